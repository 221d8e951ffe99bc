"""Maps for many references from one forward pass of the queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fam_plugins.captum.targets import run_forward
from fam_plugins.core.gallery import Gallery
from fam_plugins.core.layer_pass import LayerTensors, backward_many
from fam_plugins.core.maps import RulePass
from fam_plugins.core.rules import Rule, map_many
from fam_plugins.core.similarity import full_precision
from fam_plugins.core.similarity_model import SimilarityModel

__all__ = [
    "ModelScores",
    "PooledTail",
    "as_column",
    "check_indices",
    "directions",
    "find_pooled_tail",
    "map_references",
]


class ModelScores:
    """A model's scores, or what they can be computed from more cheaply.

    A :class:`SimilarityModel` ends for this purpose in its embedding, from which the gradients of
    only the wanted references follow without a backward step through the network's tail. Any other
    model ends in its scores ``[B, N]``.

    Args:
        forward_func: The model.
        inputs: Its inputs, as for every Captum method.
        additional_forward_args: Its further arguments.
    """

    def __init__(
        self, forward_func: Callable[..., Any], inputs: Any, additional_forward_args: Any
    ) -> None:
        self._model = _similarity_model(forward_func)
        run: Callable[..., Any] = forward_func if self._model is None else self._model.embed
        self._call = (run, inputs, additional_forward_args)
        self._end: Tensor | None = None

    def run(self) -> Tensor:
        """Run the model to its end ``[B, M]``.

        Raises:
            TypeError: If it returns something other than a tensor.
            ValueError: If that is not ``[B, M]``.
        """
        end = run_forward(*self._call)
        if not isinstance(end, Tensor):
            raise TypeError(
                f"the model returns a {type(end).__name__}, not a tensor: pass a function that "
                "picks the scores out of it, such as lambda x: model(x)['logits']"
            )
        if end.dim() != 2:
            raise ValueError(
                f"the model returns shape {tuple(end.shape)}, not scores [B, N]: explain one "
                "target at a time with attribute(target=...)"
            )
        self._end = end
        return end

    @property
    def end(self) -> Tensor:
        """What :meth:`run` has returned."""
        assert self._end is not None
        return self._end

    @property
    def count(self) -> int:
        """The number of references."""
        if self._model is not None:
            return len(self._model.references)
        return self.end.shape[1]

    def directions(self, indices: Tensor) -> Tensor:
        """Gradient of the scores at references ``[B, c]`` with respect to the end, ``[B, c, M]``.

        To be called where scores are frozen as they were in the pass.
        """
        if self._model is not None:
            return directions(self._model, self.end.detach(), indices)
        return F.one_hot(indices, self.end.shape[1]).to(self.end.dtype)


def map_references(
    one: RulePass,
    rule: Rule,
    scores: ModelScores,
    *,
    indices: Any,
    as_map: Callable[[Tensor], Tensor],
    check: Callable[[Tensor, Tensor], None],
    per_chunk: int,
) -> LayerTensors:
    """Run the model once and map every wanted reference.

    Args:
        one: The pass to use.
        rule: Its rule.
        scores: The model and its inputs.
        indices: ``[B, k]``, checked by :func:`check_indices`; ``None`` for all.
        as_map: Rearranges what the layer gives into ``[B, C, ...]``.
        check: Judges gradients as the layer has them beside the same ones rearranged.
        per_chunk: How many references an image to hold gradients of at a time.

    Returns:
        One tensor ``[B, k, 1, ...]`` for each tensor that the layer gives.

    Raises:
        IndexError: If an index is out of the range of the model's outputs.
    """
    end = one.run(scores.run)
    batch = len(end)
    # Inference mode would make tensors here that autograd refuses to index with.
    with torch.inference_mode(False):
        if indices is None:
            chosen = torch.arange(scores.count, device=end.device).repeat(batch, 1)
        else:
            chosen = _as_integers(indices).to(end.device, copy=True)
            _check_range(chosen, scores.count)
    activations = [as_map(tensor) for tensor in one.activations[0]]

    def backward(cotangents: Tensor) -> list[Tensor]:
        """Directions ``[c, B, M]`` -> gradients ``[c, B, C, R]`` of each tensor of the layer."""
        found = one.many_gradients(end, cotangents)[0]
        rearranged = []
        for parts in found:
            maps = torch.stack([as_map(part) for part in parts])
            check(parts, maps)
            rearranged.append(maps.flatten(3) if maps.dim() > 3 else maps[..., None])
        return rearranged

    tail = None
    if len(activations) == 1:
        tail = find_pooled_tail(
            lambda cotangents: backward(cotangents)[0],
            end,
            count=chosen.shape[1],
            per_chunk=per_chunk,
        )
    maps: list[list[Tensor]] = [[] for _ in activations]
    for part in torch.split(chosen, per_chunk, dim=1):
        with one.frozen():
            wanted = scores.directions(part)
        if tail is not None:
            gradients: Iterator[Tensor] = iter([tail.gradients(wanted)])
        else:
            gradients = (g.transpose(0, 1) for g in backward(wanted.transpose(0, 1)))
        for done, activation, gradient in zip(maps, activations, gradients, strict=True):
            done.append(map_many(rule, activation, gradient))
    one.warn_about_contrast(stacklevel=4)
    return tuple(torch.cat(done, dim=1) for done in maps)


def check_indices(
    forward_func: Callable[..., Any], indices: Any, batch: int, per_chunk: int
) -> None:
    """Refuse indices that cannot be meant, before any work.

    Args:
        forward_func: The model; the references of a :class:`SimilarityModel` are counted.
        indices: What the user gave.
        batch: The number of images.
        per_chunk: References per chunk, which must be positive.

    Raises:
        IndexError: If there is no reference of an index.
        TypeError: If they are no integers.
        ValueError: If they are not ``[batch, k]`` with ``k`` at least 1, or a chunk is empty.
    """
    if per_chunk < 1:
        raise ValueError(f"references_per_chunk must be at least 1, not {per_chunk}")
    if indices is None:
        return
    chosen = _as_integers(indices)
    if chosen.dim() != 2:
        raise ValueError(
            f"indices have shape {tuple(chosen.shape)}: pass [B, k], a row of references for each "
            f"image; for the same references everywhere, [row] * {batch}"
        )
    if len(chosen) != batch:
        raise ValueError(
            f"indices have {len(chosen)} rows and there are {batch} images: pass one row an image "
            "(were they searched with another batch?)"
        )
    if chosen.shape[1] == 0:
        raise ValueError("indices have no columns: ask for at least one reference an image")
    model = _similarity_model(forward_func)
    _check_range(chosen, None if model is None else len(model.references))


def as_column(forward_func: Callable[..., Any], target: Any, batch: int) -> Tensor | None:
    """Indices ``[batch, 1]`` for a target, if explaining it that way saves reading a gallery.

    Args:
        forward_func: The model.
        target: Captum's target.
        batch: The number of images.

    Returns:
        ``None`` where the model holds no memory-mapped gallery, or the target is not one index an
        image; the usual road then judges it.
    """
    model = _similarity_model(forward_func)
    if model is None or not isinstance(model.references, Gallery):
        return None
    try:
        given = _as_integers(target).flatten()
    except TypeError:
        return None
    if given.numel() not in (1, batch) or int(given.min()) < 0:
        return None
    return given.expand(batch)[:, None]


def _as_integers(indices: Any) -> Tensor:
    try:
        given = indices if isinstance(indices, Tensor) else torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            "indices must be a tensor, an array or a nested list of integers [B, k] with rows of "
            f"equal length: {error}"
        ) from error
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(
            f"indices have dtype {given.dtype}: pass integers [B, k]; searches return "
            "(distances, indices), and these may be the distances or a mask"
        )
    return given.detach().to(torch.int64)


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
            f"{count - 1} (was the gallery searched another one?)"
        )


def _similarity_model(forward_func: Callable[..., Any]) -> SimilarityModel | None:
    """The model itself, unless somebody has given it another forward pass."""
    if not isinstance(forward_func, SimilarityModel):
        return None
    if type(forward_func).forward is not SimilarityModel.forward:
        return None
    return forward_func


Backward = Callable[[Tensor], Tensor]
"""Directions ``[c, B, M]`` at the end of the tail -> gradients ``[c, B, C, R]`` at its start."""


class PooledTail:
    """A tail that pools all regions alike and then applies one matrix, the same for every image.

    Args:
        matrix: ``[M, C]``, or ``None`` for the identity: the embedding is the mean itself.
        regions: The number of regions it averages.

    Example:
        >>> PooledTail(None, 4).gradients(torch.ones(1, 1, 2)).flatten()
        tensor([0.2500, 0.2500])
    """

    def __init__(self, matrix: Tensor | None, regions: int) -> None:
        self._matrix = matrix
        self._regions = regions

    def gradients(self, directions: Tensor) -> Tensor:
        """Directions ``[B, c, M]`` -> gradients ``[B, c, C, 1]``, the same at every region."""
        if self._matrix is not None:
            with full_precision(directions.device):
                directions = directions @ self._matrix
        return (directions / self._regions)[..., None]


def find_pooled_tail(
    backward: Backward, end: Tensor, *, count: int, per_chunk: int
) -> PooledTail | None:
    """Find out whether a tail is pooling, or pooling and a matrix, by what it does to directions.

    Args:
        backward: Sends directions back through the tail.
        end: What the tail ends in, ``[B, M]``.
        count: How many directions an image are wanted; the matrix is only looked for where
            finding it takes fewer backward steps than that.
        per_chunk: How many directions may be sent back at once.

    Returns:
        The tail, or ``None`` if it is something else, in half precision (where the comparison
        could not tell) or not worth it.

    Example:
        >>> maps = torch.randn(2, 3, 4, requires_grad=True)
        >>> end = maps.mean(dim=2)
        >>> def backward(directions):
        ...     return torch.stack([torch.autograd.grad(end, maps, d, retain_graph=True)[0]
        ...                         for d in directions])
        >>> find_pooled_tail(backward, end, count=2, per_chunk=2).gradients(torch.ones(2, 1, 3))[0]
        tensor([[[0.2500],
                 [0.2500],
                 [0.2500]]])
    """
    if end.dtype not in (torch.float32, torch.float64) or count < 2:
        return None
    batch, width = end.shape
    # A generator of its own: asking for an explanation must not move the user's random numbers.
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(batch, width, generator=generator, dtype=torch.float64).to(end)
    answer = backward(probe[None])[0]
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
        backward(chunk)[..., 0].flatten(0, 1)
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


_IMAGES = 8
"""Images per group: bounds what different references for every image cost together."""


def directions(model: SimilarityModel, embeddings: Tensor, indices: Tensor) -> Tensor:
    """Gradient of the score of each chosen reference with respect to the embedding.

    Inside :func:`fam_plugins.frozen_scores` that of the frozen score.

    Args:
        model: The references, their similarity and their contrast.
        embeddings: ``[B, D]``.
        indices: Which references, ``[B, c]``.

    Returns:
        ``[B, c, D]``, detached.

    Raises:
        ValueError: As for scoring the embeddings.

    Example:
        >>> model = SimilarityModel(torch.nn.Flatten(), torch.eye(2), similarity="dot")
        >>> directions(model, torch.ones(1, 2), torch.tensor([[1, 0]]))
        tensor([[[0., 1.],
                 [1., 0.]]])
    """
    groups = zip(torch.split(embeddings, _IMAGES), torch.split(indices, _IMAGES), strict=True)
    return torch.cat([_of_group(model, part, chosen) for part, chosen in groups])


def _of_group(model: SimilarityModel, embeddings: Tensor, indices: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        rows, places = torch.unique(indices, return_inverse=True)
        leaf = embeddings.detach().clone().requires_grad_()
        scores = model.score(leaf, rows)
        (found,) = backward_many(scores, [leaf], F.one_hot(places.T, scores.shape[1]))
    if found is None:
        return leaf.detach().new_zeros(*indices.shape, leaf.shape[1])
    return found.detach().transpose(0, 1)
