"""Which layer to explain where none is named: the graph of one pass of one image decides.

A layer qualifies if it gives a map of several regions that the whole output follows from: no path
leads around it from the output back to the image.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from fam_plugins.core.eval_mode import eval_mode
from fam_plugins.core.layer_pass import fits_image
from fam_plugins.core.messages import warn_once

__all__ = ["choose_layer", "follow"]


class Cut(NamedTuple):
    """What all follows from: the outermost module that gives the very tensor, and the innermost."""

    layer: nn.Module
    inner: nn.Module
    output: Tensor
    tokens: bool
    regions: int


def choose_layer(model: object, layer: Any, forward: Callable[[Tensor], Any], images: Any) -> Any:
    """The layer as it is, or the module found for ``None`` or ``"patches"``, the patch embedding.

    Found is the last map in front of pooling or attention pooling. A class token has read most of
    the score before the last block: there, the input of a middle block. ``forward`` runs the model.
    """
    if layer is not None and layer != "patches":
        return layer
    root: Any = getattr(model, "__self__", model)
    names = {m: n for n, m in root.named_modules()} if isinstance(root, nn.Module) else {}
    if layer in names.values():
        return layer
    usual = isinstance(images, Tensor) and images.is_floating_point() and images.dim() > 2
    usual = usual and not any(name.endswith("_orig_mod") for name in names.values())
    end, cuts = follow(root, names, forward, images[:1]) if names and usual else (images, [])
    first = next((i for i, cut in enumerate(cuts) if cut.tokens or layer is None), None)
    if first is None:
        what = "patch tokens [B, T, C]" if layer else "a map [B, C, h, w] or tokens [B, T, C]"
        raise ValueError(
            f"no layer found: nothing in this {type(root).__name__} gives {what} that all of its "
            "output follows from (a function, an MLP, a model of text or of several inputs, a "
            "small image, no_grad, a compiled module?): pass layer=, a module or its name"
        )
    if layer is not None:
        # The convolution in front of the tokens gives the same as a map, which needs no transform.
        return cuts[max(first - (cuts[first - 1].regions <= cuts[first].regions), 0)].layer
    last, waves = cuts[-1], torch.arange(end.numel(), device=end.device).cos().reshape(end.shape)
    (found,) = torch.autograd.grad(end, last.output, waves.to(end))
    if not last.tokens or found[:, found.shape[1] // 2 :].any():
        return last.layer
    # Only a class token is read. Up to where it joins, the patches bear the whole score.
    joins = [cut.regions == last.regions for cut in cuts].index(True) - 1
    kinds = Counter(type(cut.inner) for cut in cuts if cut.tokens)
    sizes = {type(cut.inner): len([*cut.inner.children()]) for cut in cuts}
    kind = max(kinds, key=lambda kind: (min(kinds[kind], 2), sizes[kind] > 0, kinds[kind]))
    blocks = [i for i, cut in enumerate(cuts) if type(cut.inner) is kind]
    middle = blocks[len(blocks) // 2] - 1
    if middle > joins:
        warn_once(
            "the layer is left out and the score is read from a class token: explained is "
            f"{names[cuts[middle].layer]!r}, the input of a middle block, at about 1.8 forward "
            'passes. Earlier patches hold more of the score; layer="patches" costs about 2.7'
        )
    return cuts[max(middle, joins, 0)].layer


def follow(
    root: nn.Module, names: dict[nn.Module, str], forward: Callable[[Tensor], Any], image: Tensor
) -> tuple[Any, list[Cut]]:
    """The output of a pass and what all of it follows from, first to run first."""
    noted: dict[Any, dict[nn.Module, Tensor]] = {}  # the modules that give one tensor
    ran, thread, cuts = Counter[nn.Module](), threading.get_ident(), list[Cut]()

    def note(module: nn.Module, _: Any, output: Any) -> None:
        parts = output if isinstance(output, (tuple, list)) else (output,)
        found = [part for part in parts if isinstance(part, Tensor)]
        if module in names and threading.get_ident() == thread:
            ran[module] += 1
            if len(found) == 1 and found[0].dim() > 2 and len(found[0]) == 1:
                edge = found[0].grad_fn, found[0].output_nr
                noted.setdefault(edge, {})[module] = found[0]

    with eval_mode(root), torch.inference_mode(False), torch.enable_grad():
        start = image.detach().clone().requires_grad_().clone()  # may be changed in place
        source = start.grad_fn
        with register_module_forward_hook(note):
            end = forward(start)
    for edge, gives in noted.items() if isinstance(end, Tensor) and _reaches(end, source) else ():
        inner, output = next(iter(gives.items()))
        around = [m for m in gives if ran[m] == 1 and inner in {*m.modules()}]
        # The same shares are finer in front of an average; a linear layer is of a pooling head.
        spare = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, *[nn.Linear] * any(cut.tokens for cut in cuts))
        if not around or isinstance(around[-1], spare) or _reaches(end, source, edge):
            continue
        tokens = image.dim() == 4 and not fits_image(output.shape[-2:], image.shape[-2:])
        tokens = tokens or output.dim() < image.dim() == 4
        regions = output[0].numel() // output.shape[-1 if tokens else 1]
        if min(regions, output.shape[2:].numel()) > 1:
            cuts.append(Cut(around[-1], inner, output, tokens, regions))
    return end, cuts


def _reaches(end: Tensor, source: Any, around: Any = None) -> bool:
    """Whether a path of the graph leads from the end to the image, around an edge of it."""
    seen, ahead = set[Any]({None}), list[Any]([(end.grad_fn, end.output_nr)])
    while ahead and source not in seen:
        edge = ahead.pop()
        if edge != around and edge[0] not in seen:
            seen.add(edge[0])
            ahead += edge[0].next_functions
    return source in seen
