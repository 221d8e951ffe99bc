"""Find where a model pools its last feature map into its linear classifier, and prove it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fam_plugins.eval_mode import eval_mode

__all__ = ["Event", "Trace", "trace"]


@dataclass
class Event:
    """One call of one module during the probe pass.

    Attributes:
        name: dotted name of the module.
        module: the module.
        shape: shape of its output.
        means: mean of the output over its regions, ``[B, C]``, keyed by (channels last, ReLU
            first); empty when the output has no axes of regions.
        token: the first token ``[B, C]`` of an output ``[B, N, C]``, else None.
        regions: number of regions; 1 after global pooling.
        pooled_input: whether the input no longer has regions.
    """

    name: str
    module: nn.Module
    shape: torch.Size
    means: dict[tuple[bool, bool], Tensor] = field(default_factory=dict)
    token: Tensor | None = None
    regions: int = 1
    pooled_input: bool = False


@dataclass
class Trace:
    """Everything a probe pass has shown.

    Attributes:
        events: module calls in the order in which they finished.
        output: what the model returned.
        linear_io: input and output of every ``nn.Linear`` call, by name.
    """

    events: list[Event]
    output: Any
    linear_io: list[tuple[str, nn.Linear, Tensor, Tensor]]


def trace(model: nn.Module, example_input: Tensor | None) -> Trace:
    """Run ``model`` once in eval mode without gradients and note what every module returned.

    Only means over regions are kept, so a probe of a large model stays small. The model's
    training modes are given back and no hook stays.

    Args:
        model: the model.
        example_input: a batch that the model accepts; made up of noise when None.

    Returns:
        The trace.

    Raises:
        ValueError: the model did not accept the input.
    """
    made_up = example_input is None
    images = _made_up_input(model) if example_input is None else example_input
    events: list[Event] = []
    linear_io: list[tuple[str, nn.Linear, Tensor, Tensor]] = []
    handles: list[RemovableHandle] = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_hook(_note(name, events, linear_io)))
        with eval_mode(model), torch.no_grad():
            output = model(images)
    except Exception as error:
        what = "a made-up input" if made_up else "example_input"
        raise ValueError(
            f"{type(model).__name__} did not accept {what} of shape {tuple(images.shape)}: pass a "
            f"batch that it accepts, with_cape_head(model, example_input=images) ({error})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return Trace(events, output, linear_io)


def _note(
    name: str, events: list[Event], linear_io: list[tuple[str, nn.Linear, Tensor, Tensor]]
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        event = Event(name, module, output.shape)
        first = inputs[0] if inputs else None
        event.pooled_input = isinstance(first, Tensor) and _regions(first.shape) == 1
        event.regions = _regions(output.shape)
        if output.ndim in (4, 5) and event.regions > 1:
            # Noted now: an in-place operation may change this very tensor a moment later.
            for channels_last in (False, True):
                axes = tuple(range(1, output.ndim - 1) if channels_last else range(2, output.ndim))
                for relu in (False, True):
                    values = output.relu() if relu else output
                    event.means[channels_last, relu] = values.mean(dim=axes)
        if output.ndim == 3:
            event.token = output[:, 0].clone()
        events.append(event)
        if isinstance(module, nn.Linear) and isinstance(first, Tensor):
            linear_io.append((name, module, first.clone(), output.clone()))

    return hook


def _regions(shape: Sequence[int]) -> int:
    """Positions that a tensor holds beside batch and channels (channels first assumed)."""
    count = 1
    for n in shape[2:]:
        count *= n
    return count


def _made_up_input(model: nn.Module) -> Tensor:
    """Two noise images of the size that the model asks for, from a generator of their own."""
    convolution = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if convolution is None or parameter is None:
        raise ValueError(
            f"cannot tell what {type(model).__name__} takes as input (no convolution found): pass "
            "a batch that it accepts, with_cape_head(model, example_input=images)"
        )
    if isinstance(convolution, nn.Conv3d):
        size: tuple[int, ...] = (convolution.in_channels, 16, 112, 112)
    else:
        side = getattr(model, "image_size", 224)  # torchvision's ViT
        size = (convolution.in_channels, side, side)
        config = getattr(model, "default_cfg", None)  # timm
        if isinstance(config, dict) and "input_size" in config:
            size = (convolution.in_channels, *config["input_size"][1:])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, *size, generator=generator)
    return noise.to(parameter.device, parameter.dtype)
