"""Find the layer and the classifier that a CAPE head fits, or the reason why none does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from fam_plugins.core.eval_mode import eval_mode, place_of
from fam_plugins.core.layer_pass import find_layer

__all__ = ["Site", "locate"]


@dataclass(frozen=True)
class Site:
    """Where the head goes.

    Attributes:
        layer: Dotted name of the module whose output is the last feature map.
        classifier: Dotted name of the ``nn.Linear``.
        channels_last: The layer returns ``[B, h, w, C]`` rather than ``[B, C, h, w]``.
        relu: The model applies a ReLU between the layer and pooling (DenseNet).
    """

    layer: str
    classifier: str
    channels_last: bool
    relu: bool


@dataclass
class Call:
    """What one call of one module shows; of a map only the means over its regions are kept."""

    name: str
    module: nn.Module
    shape: torch.Size  # of the output
    pooled_input: bool  # whether the input has no regions
    # [B, C] by (channels last, ReLU first); empty where the output has no regions.
    means: dict[tuple[bool, bool], Tensor] = field(default_factory=dict)
    token: Tensor | None = None  # the first token [B, C] of an output [B, N, C]
    linear: tuple[Tensor, ...] = ()  # input [B, C] and output [B, K] of an nn.Linear


def locate(
    model: nn.Module,
    layer: nn.Module | str | None = None,
    classifier: nn.Module | str | None = None,
    example_input: Tensor | None = None,
) -> Site:
    """Find the feature map that ``model`` averages and hands to its linear classifier.

    No list of architectures: the model runs once, and a layer qualifies when the mean of its output
    over regions *is* the classifier's input. What the numbers do not show is refused.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must be a plain torch.nn.Module, not {type(model).__name__}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device: load its weights first")
    layer, classifier = _name_in(model, layer), _name_in(model, classifier)
    if classifier and not isinstance(model.get_submodule(classifier), nn.Linear):
        kind = type(model.get_submodule(classifier)).__name__
        raise TypeError(f"classifier {classifier!r} must be an nn.Linear to copy, not a {kind}")
    output, calls = _probe(model, example_input)
    classifier, pooled = _classifier_call(model, output, calls, classifier)
    maps = [call for call in calls if call.means and layer in (None, call.name)]
    times = Counter(call.name for call in maps)
    once = [call for call in maps if times[call.name] == 1]
    # The last module to finish is the outermost one around the same tensor: "layer4", not
    # "layer4.2.relu". A map that needs no ReLU of ours comes first.
    for relu, call, channels_last in product((False, True), reversed(once), (False, True)):
        regions = math.prod(call.shape[1:-1] if channels_last else call.shape[2:])
        if _same(call.means[channels_last, relu], pooled, regions):
            return Site(call.name, classifier, channels_last, relu)
    raise ValueError(
        f"{type(model).__name__} does not fit CAPE: {_why_not(calls, layer, classifier, pooled)}. "
        "CAPE needs global average pooling followed directly by one nn.Linear."
    )


def _name_in(model: nn.Module, layer: nn.Module | str | None) -> str | None:
    """The name of a layer, which must be part of the model."""
    if layer is None:
        return None
    module, name = find_layer(model, layer)
    if dict(model.named_modules()).get(name) is not module:
        kind = type(model).__name__
        raise ValueError(f"layer {name} is not part of this {kind}: pass one of its own, or a name")
    return name


def _classifier_call(
    model: nn.Module, output: Any, calls: list[Call], name: str | None
) -> tuple[str, Tensor]:
    """The name of the ``nn.Linear`` whose output the model returns, and its input ``[B, C]``."""
    kind = type(model).__name__
    if not isinstance(output, Tensor):
        returned = type(output).__name__
        raise ValueError(f"{kind} returns a {returned}: wrap it to return the logits [B, K]")
    linears = [call for call in calls if call.linear and name in (None, call.name)]
    last = next((c for c in reversed(linears) if c.linear[1].shape == output.shape), None)
    # Equality, not closeness: nothing may stand between the classifier and the output.
    if last is None or not torch.equal(*(t.nan_to_num() for t in (last.linear[1], output))):
        what = f"{name!r} does not compute" if name else "no nn.Linear computes"
        raise ValueError(
            f"{kind} does not fit CAPE: {what} its output. CAPE needs pooling followed by one "
            "nn.Linear that returns the logits (remove a softmax at the end)"
        )
    pooled = last.linear[0]
    if not torch.isfinite(pooled).all() or not pooled.any():
        raise ValueError(
            f"{kind}: the probe reached {last.name!r} as zeros or non-finite numbers, so nothing "
            "can be verified; pass real images as example_input="
        )
    return last.name, pooled


def _same(mean: Tensor, pooled: Tensor, regions: int = 1) -> bool:
    """Whether two tensors are equal but for the order in which the regions were summed.

    Strict on purpose: an untrained batch norm in eval mode is the identity to 5e-6, so a looser
    test would take the layer before it for the layer after it.
    """
    if mean.shape != pooled.shape:
        return False
    gap = (mean - pooled).abs().max()
    roundings = min(4 + regions**0.5, 32)
    return bool(gap <= roundings * torch.finfo(pooled.dtype).eps * pooled.abs().max())


def _why_not(calls: list[Call], layer: str | None, classifier: str, pooled: Tensor) -> str:
    """What stands between the last feature map and the classifier."""
    last_map = max((i for i, call in enumerate(calls) if call.means), default=-1)
    after = [c for c in calls[last_map + 1 :] if c.pooled_input and c.name not in ("", classifier)]
    hidden = [c for c in after if isinstance(c.module, (nn.Linear, nn.Conv2d, nn.Conv3d))]
    norms = [c for c in after if "norm" in type(c.module).__name__.lower()]
    tokens = [c for c in calls if c.token is not None and _same(c.token, pooled)]
    named = ", ".join(repr(call.name) for call in tokens[-1:] or hidden or norms)
    if tokens:
        return f"its classifier {classifier!r} reads a class token (of {named})"
    if last_map < 0:
        return "no layer returned a map with several regions; pass larger images as example_input="
    if hidden or norms:
        what = "hidden layers stand" if hidden else "a norm stands"
        return f"{what} between pooling and the classifier ({named})"
    if layer is not None:
        return f"the mean of layer {layer!r} over regions is not the input of {classifier!r}"
    return f"the input of {classifier!r} is not the mean over regions of any layer's map"


def _probe(model: nn.Module, example_input: Tensor | None) -> tuple[Any, list[Call]]:
    """Run the model once in eval mode; return its output and all calls, first to finish first."""
    images = _made_up_input(model) if example_input is None else example_input
    calls: list[Call] = []
    handles = [m.register_forward_hook(_note(name, calls)) for name, m in model.named_modules()]
    try:
        with eval_mode(model), torch.no_grad():
            return model(images), calls
    except Exception as error:
        what = "a made-up input" if example_input is None else "example_input"
        shape, why = tuple(getattr(images, "shape", ())), str(error).partition("\n")[0]
        raise ValueError(
            f"{type(model).__name__} did not accept {what} of shape {shape}: pass images that it "
            f"accepts as example_input= ({why})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _note(name: str, calls: list[Call]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    """A hook that notes one call of a module."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        given = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
        pooled = given is not None and math.prod(given.shape[2:]) == 1
        call = Call(name, module, output.shape, pooled)
        calls.append(call)
        # Noted now: an in-place operation may change these very tensors a moment later.
        if output.dim() in (4, 5) and math.prod(output.shape[2:]) > 1:
            for last, relu in product((False, True), repeat=2):
                axes = tuple(range(1, output.dim() - 1) if last else range(2, output.dim()))
                call.means[last, relu] = (output.relu() if relu else output).mean(dim=axes)
        if output.dim() == 3:
            call.token = output[:, 0].clone()
        if isinstance(module, nn.Linear) and given is not None and given.dim() == 2:
            call.linear = given.clone(), output.clone()

    return hook


def _made_up_input(model: nn.Module) -> Tensor:
    """Two noise images of the size that the model asks for, from a generator of their own."""
    convolution = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    if convolution is None:
        raise ValueError("no convolution found to size the input: pass example_input=images")
    if isinstance(convolution, nn.Conv3d):
        size: tuple[int, ...] = (16, 112, 112)
    elif isinstance(config := getattr(model, "default_cfg", None), dict) and "input_size" in config:
        size = tuple(config["input_size"][1:])  # timm
    else:
        size = (getattr(model, "image_size", 224),) * 2  # torchvision's ViT
    device, dtype = place_of(model)
    shape, generator = (2, convolution.in_channels, *size), torch.Generator("cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
