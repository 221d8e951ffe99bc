"""Maps for many references from one forward pass of the queries.

Behind a layer there is usually a global average pooling, perhaps followed by a linear projection.
Then the gradient of any direction in the embedding is a matrix product away and the same at every
region. Whether that is so is not guessed from module names but measured: a random direction is
sent back through the tail once and compared with what the matrix predicts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fam_plugins.core.decompose import region_sum, warn_of_coverage
from fam_plugins.core.layer_pass import LayerTensors, products
from fam_plugins.core.maps import MapPass
from fam_plugins.core.own_norm import hold_own_norm
from fam_plugins.core.scores import full_precision
from fam_plugins.core.similarity_model import ModelScores

__all__ = ["as_indices", "map_references"]

_IMAGES = 8
"""Images per group: bounds what different references for every image cost together."""


def map_references(
    one: MapPass,
    scores: ModelScores,
    forward: Callable[[], Any],
    images: Any,
    *,
    indices: Any,
    per_chunk: int,
) -> list[LayerTensors]:
    """Run a model once on images and explain its scores at indices ``[B, k]``; all by default.

    ``forward`` calls ``scores.forward``. A function as ``indices`` gets all scores ``[B, N]``.
    Returns for each layer its maps ``[B, k, 1, ...]``, and leaves ``one.scores`` and
    ``one.indices`` ``[B, k]``; at most ``per_chunk`` references per image are worked on at a time.
    """
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
    # Inference mode would make tensors here that autograd refuses to index with.
    with torch.inference_mode(False):
        if callable(indices):
            with torch.no_grad():
                of_all = end if scores.model is None else scores.model.score(end)
                indices = as_indices(indices(of_all.detach()), scores, len(end), per_chunk)
        if indices is None:
            chosen = torch.arange(count, device=end.device).repeat(len(end), 1)
        else:
            if scores.model is None:  # the references of the others were counted before the pass
                _check_range(indices, count)
            chosen = indices.to(end.device, copy=True)
    # Behind a norm of the encoder's own, held constant, images share a matrix up to their lengths.
    held = hold_own_norm(end) if scores.model is not None and one.rule.frozen else None
    lengths = torch.ones_like(end[:, :1]) if held is None else held.to(end)
    tail = None
    if [len(maps) for maps in one.activations] == [1]:
        tail = _find_pooled_tail(
            lambda each: one.gradients(end, each * lengths, retain_graph=True)[0][0],
            end,
            count=chosen.shape[1],
            per_chunk=per_chunk,
        )
    chunks, explained = [], []
    for part in torch.split(chosen, per_chunk, dim=1):
        with one.frozen():
            wanted, values = _directions(scores, end, part)
        explained.append(values)
        if tail is not None:
            gradients = [[tail.gradients(wanted / lengths[:, None])]]
        else:
            gradients = one.gradients(end, wanted.transpose(0, 1), retain_graph=True)
        chunks.append(one.finish(gradients))
    one.warn()
    one.scores, one.indices = torch.cat(explained, dim=1), chosen
    found = [
        tuple(torch.cat(parts, dim=1) for parts in zip(*of_layer, strict=True))
        for of_layer in zip(*chunks, strict=True)
    ]
    if one.rule.adds_up:
        shares = [(region_sum(maps, leading=2), one.scores) for maps in found]
        warn_of_coverage(one.rule, one.constants, *shares)
    return found


def as_indices(indices: Any, scores: ModelScores, batch: int, per_chunk: int) -> Any:
    """What a user gave as indices -> int64 ``[B, k]``, refused before any work if it is not."""
    if not isinstance(per_chunk, int) or per_chunk < 1:
        raise ValueError(f"references_per_chunk must be an int of at least 1, not {per_chunk!r}")
    if indices is None or callable(indices):
        return indices
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
    chosen = chosen.detach().to(torch.int64)
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
        return F.one_hot(indices, end.shape[1]).to(end.dtype), end.detach().gather(1, indices)
    parts, picked = [], []
    for group, chosen in zip(
        torch.split(end.detach(), _IMAGES), torch.split(indices, _IMAGES), strict=True
    ):
        with torch.inference_mode(False), torch.enable_grad():
            rows, places = torch.unique(chosen, return_inverse=True)
            leaf = group.clone().requires_grad_()
            values = scores.model.score(leaf, rows)
            (found,) = products(values, [leaf], F.one_hot(places.T, values.shape[1]))
        if found is None:
            found = leaf.detach().new_zeros(chosen.shape[1], *leaf.shape)
        parts.append(found.detach().transpose(0, 1))
        picked.append(values.detach().gather(1, places))
    return torch.cat(parts), torch.cat(picked)


@dataclass(frozen=True)
class PooledTail:
    """A tail that averages all regions and then applies a matrix ``[M, C]``; ``None``: identity."""

    matrix: Tensor | None
    regions: int

    def gradients(self, directions: Tensor) -> Tensor:
        """Directions ``[B, c, M]`` -> gradients ``[B, c, C, 1]``, the same at every region."""
        if self.matrix is not None:
            with full_precision(directions.device):
                directions = directions @ self.matrix
        return (directions / self.regions)[..., None]


def _find_pooled_tail(
    backward: Callable[[Tensor], Tensor], end: Tensor, *, count: int, per_chunk: int
) -> PooledTail | None:
    """Find out from what a tail does to directions ``[c, B, M]`` whether it is pooled.

    ``backward`` returns ``[B, c, C, R]``. The matrix is only looked for where finding it takes
    fewer steps than the ``count`` directions that are wanted. ``None`` in half precision too, where
    the comparison could not tell.
    """
    if end.dtype not in (torch.float32, torch.float64) or count < 2:
        return None
    batch, width = end.shape
    # A generator of its own: asking for an explanation must not move the user's random numbers.
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(batch, width, generator=generator, dtype=torch.float64, device="cpu")
    probe = probe.to(end)
    answer = backward(probe[None])[:, 0]
    channels, regions = answer.shape[1:]
    if not _close(answer[..., :1].expand_as(answer), answer):
        return None
    pooled = PooledTail(None, regions)
    if channels == width and _predicts(pooled, probe, answer):
        return pooled
    steps = -(-width // batch)
    if steps >= count:
        return None
    # Every image carries another row of the matrix; whether they share one is checked below.
    rows = torch.zeros(steps * batch, width, dtype=end.dtype, device=end.device)
    rows[:width] = torch.eye(width, dtype=end.dtype, device=end.device)
    found = [
        backward(chunk)[..., 0].transpose(0, 1).flatten(0, 1)
        for chunk in torch.split(rows.reshape(steps, batch, width), per_chunk)
    ]
    pooled = PooledTail(torch.cat(found)[:width] * regions, regions)
    return pooled if _predicts(pooled, probe, answer) else None


def _predicts(tail: PooledTail, probe: Tensor, answer: Tensor) -> bool:
    return _close(tail.gradients(probe[:, None])[:, 0].expand_as(answer), answer)


def _close(predicted: Tensor, answer: Tensor) -> bool:
    """Equal to the rounding of a matrix product: an error beyond it would show in the maps."""
    scale = answer.abs().amax(dim=(1, 2), keepdim=True)
    gap = (predicted - answer).abs()
    return bool((gap <= 16 * torch.finfo(answer.dtype).eps * scale).all())
