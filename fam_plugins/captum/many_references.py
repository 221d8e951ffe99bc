"""Maps for many references from one forward pass of the queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fam_plugins.captum._internals import run_forward
from fam_plugins.directions import directions
from fam_plugins.gallery import Gallery
from fam_plugins.layer_pass import LayerTensors
from fam_plugins.many_gradients import map_many
from fam_plugins.rule_pass import RulePass
from fam_plugins.rules import Rule
from fam_plugins.similarity_model import SimilarityModel
from fam_plugins.tail import find_pooled_tail

__all__ = ["ModelScores", "as_column", "check_indices", "map_references"]


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
