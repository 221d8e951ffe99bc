"""Maps for many references from one forward pass of the queries.

Behind a layer there is usually a global average pooling, perhaps followed by a projection head.
Then the gradient is the same at every region, and only the steps behind the pooling need be
differentiated for each reference. Whether that is so is not guessed from module names but measured:
a random direction is sent back through the tail once, and looked at on its way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import compress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fam_plugins.core.decompose import warn_of_coverage
from fam_plugins.core.layer_pass import LayerTensors, products
from fam_plugins.core.maps import MapPass
from fam_plugins.core.own_norm import hold_own_norm
from fam_plugins.core.similarity_model import ModelScores

__all__ = ["as_indices", "behind_pooling", "map_references"]

_IMAGES = 8
"""Images per group: bounds what different references for every image cost together."""


def map_references(
    one: MapPass,
    scores: ModelScores,
    forward: Callable[[], Any],
    images: Any,
    *,
    indices: Tensor | None,
    per_chunk: int,
) -> list[LayerTensors]:
    """Run a model once on images and explain its scores at indices ``[B, k]``; all by default.

    ``forward`` calls ``scores.forward``. Returns for each layer its maps ``[B, k, 1, ...]``; at
    most ``per_chunk`` references per image are worked on at a time. Inside ``one.frozen()`` values
    are checked at its end.
    """
    one.again = False
    end = one.run(forward, images)
    if not isinstance(end, Tensor):
        raise TypeError(
            f"the model returns a {type(end).__name__}, not a tensor: pass a function that picks "
            "the scores out of it, such as lambda x: model(x)['logits']"
        )
    if end.dim() != 2:
        raise ValueError(
            f"the model returns shape {tuple(end.shape)}, not scores [B, N]: explain one target at "
            "a time"
        )
    count = end.shape[1] if scores.model is None else len(scores.model.references)
    # Indices stay on the host, where unique() keeps no GPU waiting. Inference mode would make
    # tensors here that autograd refuses to index with.
    with torch.inference_mode(False):
        if indices is None:
            chosen = torch.arange(count, device="cpu").repeat(len(end), 1)
        else:
            if scores.model is None:  # the references of the others were counted before the pass
                _check_range(indices, count)
            chosen = indices.to("cpu", copy=True)
    if scores.model is not None and one.rule.frozen:
        hold_own_norm(end)
    pooled = behind_pooling(one, end) if chosen.shape[1] > 1 else None
    chunks, sums, explained = [], [], []
    for part in torch.split(chosen, per_chunk, dim=1):
        with one.frozen():
            wanted, values = _directions(scores, end, part)
        explained.append(values)
        if pooled is not None:
            gradients = [[pooled(wanted)]]
        else:
            gradients = one.gradients(end, wanted.transpose(0, 1), retain_graph=True)
        chunks.append(one.finish(gradients))
        sums.append(one.sums)
    one.warn()
    found = [
        tuple(torch.cat(parts, dim=1) for parts in zip(*of_layer, strict=True))
        for of_layer in zip(*chunks, strict=True)
    ]
    if one.rule.adds_up or len(found) == 1:
        total = torch.cat(explained, dim=1)
        shares = [(torch.cat(of_layer, dim=1), total) for of_layer in zip(*sums, strict=True)]
        warn_of_coverage(one.rule, one.constants, *shares)
    return found


def as_indices(indices: Any, scores: ModelScores, batch: int, per_chunk: int) -> Tensor | None:
    """What a user gave as indices -> int64 ``[B, k]``, refused before any work if it is not."""
    if not isinstance(per_chunk, int) or per_chunk < 1:
        raise ValueError(f"references_per_chunk must be an int of at least 1, not {per_chunk!r}")
    if indices is None:
        return None
    try:
        chosen = indices if isinstance(indices, Tensor) else torch.tensor(indices, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            "indices must be a tensor, an array or a nested list of integers [B, k] with rows of "
            f"equal length: {error}"
        ) from error
    wrong = chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool
    if wrong or np.ma.isMaskedArray(indices):
        kind = f"dtype {chosen.dtype}" if wrong else "a mask"
        raise TypeError(
            f"indices have {kind}: pass integers [B, k]; searches return (distances, indices), and "
            "these may be the distances or a mask"
        )
    if chosen.dim() != 2 or chosen.shape[1] == 0:
        raise ValueError(
            f"indices have shape {tuple(chosen.shape)}: pass [B, k], a row of references for each "
            f"image; for the same references everywhere, [row] * {batch}"
        )
    if len(chosen) != batch:
        raise ValueError(
            f"indices have {len(chosen)} rows and there are {batch} images: pass one row per image "
            "(were they searched with another batch?)"
        )
    chosen = chosen.detach().to("cpu", torch.int64)
    _check_range(chosen, None if scores.model is None else len(scores.model.references))
    return chosen


def _check_range(chosen: Tensor, count: int | None) -> None:
    low, high = int(chosen.min()), int(chosen.max())
    if low < 0:
        raise IndexError(
            f"index {low} is negative: faiss fills up with -1 where it found fewer than k "
            "neighbours; ask for fewer, or explain those images apart"
        )
    if count is not None and high >= count:
        raise IndexError(
            f"index {high} is out of range: there are {count} references, so indices go from 0 to "
            f"{count - 1} (was another gallery searched?)"
        )


def _directions(scores: ModelScores, end: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the scores at ``[B, c]`` by the end ``[B, M]``, ``[B, c, M]``; the scores."""
    if scores.model is None:
        indices = indices.to(end.device, non_blocking=True)
        return F.one_hot(indices, end.shape[1]).to(end.dtype), end.detach().gather(1, indices)
    parts, picked = [], []
    for group, chosen in zip(
        torch.split(end.detach(), _IMAGES), torch.split(indices, _IMAGES), strict=True
    ):
        with torch.inference_mode(False), torch.enable_grad():
            rows, places = torch.unique(chosen, return_inverse=True)
            places = places.to(end.device, non_blocking=True)
            leaf = group.clone().requires_grad_()
            values = scores.model.score(leaf, rows)
            (found,) = products(values, [leaf], F.one_hot(places.T, values.shape[1]))
        if found is None:
            found = leaf.detach().new_zeros(chosen.shape[1], *leaf.shape)
        parts.append(found.detach().transpose(0, 1))
        picked.append(values.detach().gather(1, places))
    return torch.cat(parts), torch.cat(picked)


def behind_pooling(one: MapPass, end: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Directions ``[B, c, M]`` -> gradients ``[B, c, C, 1]``, if all regions are pooled alike.

    The tensor they are pooled into is found by looking at what passes by on the way back. That
    compares values: on a GPU it is waited for, once. ``None`` in half precision too, where the
    comparison could not tell.
    """
    if [*map(len, one.activations)] != [1] or end.dtype not in (torch.float32, torch.float64):
        return None
    # A generator of its own: asking for an explanation must not move the user's random numbers.
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(end.shape, generator=generator, dtype=torch.float64, device="cpu")
    batch, channels = one.activations[0][0].shape[:2]
    passed: list[tuple[Any, Tensor]] = []

    def note(node: Any, gradients: Any) -> None:
        first = gradients[0]
        if first is not None and len(first) == batch and first.numel() == batch * channels:
            passed.append((node, first.flatten(1)))

    nodes: list[Any] = [end.grad_fn] if end.requires_grad else []
    seen = {None, *nodes}
    for node in nodes:
        before = {step for step, _ in node.next_functions} - seen
        seen |= before
        nodes += before
    handles = [node.register_prehook(partial(note, node)) for node in nodes]
    try:
        cotangent = probe.to(end, non_blocking=True)[None]
        answer = one.gradients(end, cotangent, retain_graph=True)[0][0][:, 0]
    finally:
        for handle in handles:
            handle.remove()
    # Equal to the rounding of a quotient: an error beyond it would show in the maps.
    eps = 16 * torch.finfo(answer.dtype).eps * answer.abs().amax(dim=(1, 2), keepdim=True)
    found, equal = [], []
    for node, gradient in passed:
        place = gradient.abs().argmax(dim=1, keepdim=True)
        share = answer[..., 0].gather(1, place) / gradient.gather(1, place)
        share = share.nan_to_num(0)  # of a gradient of zeros
        found.append(partial(_gradients, end, GradientEdge(node, 0), share[:, None]))
        equal.append((((gradient * share)[..., None] - answer).abs() <= eps).all())
    proved = torch.stack(equal).tolist() if equal else []
    return next(compress(found, proved), None)


def _gradients(end: Tensor, pooled: GradientEdge, share: Tensor, directions: Tensor) -> Tensor:
    (found,) = products(end, [pooled], directions.transpose(0, 1), retain_graph=True)
    assert found is not None  # a gradient came by when the tail was found
    return (found.transpose(0, 1).flatten(2) * share)[..., None]
