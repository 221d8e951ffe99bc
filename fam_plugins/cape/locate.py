"""Decide which layer and which classifier a CAPE head replaces, or say why none can."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fam_plugins.core.eval_mode import eval_mode

__all__ = ["Event", "Site", "Trace", "locate", "trace"]


@dataclass(frozen=True)
class Site:
    """Where the head goes.

    Attributes:
        layer: dotted name of the module whose output is the last feature map.
        classifier: dotted name of the ``nn.Linear``.
        channels_last: the layer returns ``[B, h, w, C]`` rather than ``[B, C, h, w]``.
        relu: the model applies a ReLU between the layer and pooling (DenseNet).
    """

    layer: str
    classifier: str
    channels_last: bool
    relu: bool


def locate(
    model: nn.Module,
    layer: nn.Module | str | None = None,
    classifier: nn.Module | str | None = None,
    example_input: Tensor | None = None,
) -> Site:
    """Find the feature map that ``model`` averages and hands to its linear classifier.

    No list of architectures: the model runs once, and a layer qualifies when the mean of its
    output over regions *is* the classifier's input. What cannot be shown is refused.

    Args:
        model: an image classifier.
        layer: the module (or its dotted name) with the last feature map; found when None.
        classifier: the ``nn.Linear`` (or its dotted name); found when None.
        example_input: a batch of images for that one run; made up when None.

    Returns:
        The site.

    Raises:
        TypeError: ``model`` is not a module, ``classifier`` not an ``nn.Linear``.
        ValueError: the architecture does not fit, a name is unknown, or the probe proved nothing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layer_name = _name_of(model, layer, "layer")
    classifier_name = _name_of(model, classifier, "classifier")
    if classifier_name is not None:
        module = model.get_submodule(classifier_name)
        if not isinstance(module, nn.Linear):
            raise TypeError(
                f"classifier {classifier_name!r} is a {type(module).__name__}: CAPE copies an "
                "nn.Linear"
            )
    shown = trace(model, example_input)
    classifier_name, pooled = _classifier_call(model, shown, classifier_name)
    candidates = [event for event in shown.events if event.means]
    if layer_name is not None:
        candidates = [event for event in candidates if event.name == layer_name]
    once = [e for e in candidates if sum(o.name == e.name for o in candidates) == 1]
    # The last module to finish is the outermost one around the same tensor: "layer4", not
    # "layer4.2.relu". A map that needs no ReLU of ours comes first.
    for relu in (False, True):
        for event in reversed(once):
            for channels_last in (False, True):
                if _same(event.means[channels_last, relu], pooled, _regions(event, channels_last)):
                    return Site(event.name, classifier_name, channels_last, relu)
    raise ValueError(_why_not(model, shown, layer_name, classifier_name, pooled))


def _name_of(model: nn.Module, module: nn.Module | str | None, role: str) -> str | None:
    if module is None:
        return None
    names: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if name}
    if isinstance(module, str):
        if module in names:
            return module
        near = get_close_matches(module, names, n=3, cutoff=0.4) or list(names)[-3:]
        raise ValueError(
            f"{role} {module!r} is no module of {type(model).__name__}; closest: {', '.join(near)}"
        )
    for name, candidate in names.items():
        if candidate is module:
            return name
    raise ValueError(
        f"{role} ({type(module).__name__}) is not part of this {type(model).__name__}: take it "
        "from the same model object, or give its dotted name"
    )


def _classifier_call(model: nn.Module, shown: Trace, name: str | None) -> tuple[str, Tensor]:
    """The ``nn.Linear`` whose output the model returns, and what it was given."""
    kind = type(model).__name__
    if not isinstance(shown.output, Tensor):
        raise ValueError(
            f"{kind} returns a {type(shown.output).__name__} in eval mode: wrap it in a module "
            "that returns the logits [B, K]"
        )
    calls = [call for call in shown.linear_io if name is None or call[0] == name]
    for linear_name, _, given, returned in reversed(calls):
        if given.ndim == 2 and returned.shape == shown.output.shape:
            # Equality, not closeness: nothing may stand between the classifier and the output.
            if not torch.equal(returned, shown.output):
                break
            if not torch.isfinite(given).all() or not given.any():
                raise ValueError(
                    f"{kind}: the probe reached {linear_name!r} as zeros or non-finite numbers, so "
                    "nothing can be verified; pass real images as example_input="
                )
            return linear_name, given
    what = f"classifier {name!r} does not compute" if name else "no nn.Linear computes"
    raise ValueError(
        f"{kind} does not fit CAPE: {what} the model's output directly. CAPE needs pooling "
        "followed by one nn.Linear that returns the logits (remove a softmax at the end)"
    )


def _same(mean: Tensor, pooled: Tensor, regions: int = 1) -> bool:
    """Equal but for the order in which the regions were summed.

    Strict on purpose: an untrained batch norm in eval mode is the identity to 5e-6, so a looser
    test would take the layer before it for the layer after it.
    """
    if mean.shape != pooled.shape:
        return False
    gap = (mean - pooled).abs().max()
    roundings = min(4 + regions**0.5, 32)
    return bool(gap <= roundings * torch.finfo(pooled.dtype).eps * pooled.abs().max())


def _regions(event: Event, channels_last: bool) -> int:
    return math.prod(event.shape[1:-1] if channels_last else event.shape[2:])


def _why_not(
    model: nn.Module, shown: Trace, layer: str | None, classifier: str, pooled: Tensor
) -> str:
    """Name what stands between the last feature map and the classifier."""
    start = f"{type(model).__name__} does not fit CAPE: "
    end = " CAPE needs global average pooling followed directly by one nn.Linear."
    last_map = max((i for i, e in enumerate(shown.events) if e.means), default=-1)
    after = [e for e in shown.events[last_map + 1 :] if e.name not in ("", classifier)]
    tokens = [e for e in shown.events if e.token is not None and _same(e.token, pooled)]
    norms = [e for e in after if e.pooled_input and "norm" in type(e.module).__name__.lower()]
    hidden = [e for e in after if e.pooled_input and _is_layer(e)]
    if last_map < 0 and not tokens:
        reason = (
            "no layer returned a map with more than one region; pass larger images as "
            "example_input=."
        )
    elif tokens:
        reason = f"its classifier {classifier!r} reads a class token (of {tokens[-1].name!r})."
    elif hidden:
        names = ", ".join(repr(e.name) for e in hidden)
        reason = f"hidden layers stand between pooling and the classifier ({names})."
    elif norms:
        names = ", ".join(repr(e.name) for e in norms)
        reason = f"a norm stands between pooling and the classifier ({names})."
    elif layer is not None:
        reason = (
            f"the mean of layer {layer!r} over regions is not the input of {classifier!r}; leave "
            "layer out to have it found."
        )
    else:
        reason = (
            f"the input of {classifier!r} is not the mean over regions of any layer's map (other "
            "pooling, tokens, or an operation outside any module)."
        )
    return start + reason + end


def _is_layer(event: Event) -> bool:
    return isinstance(event.module, (nn.Linear, nn.Conv2d, nn.Conv3d))


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
        event.pooled_input = isinstance(first, Tensor) and _positions(first.shape) == 1
        event.regions = _positions(output.shape)
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


def _positions(shape: Sequence[int]) -> int:
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
