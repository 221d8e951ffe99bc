"""What every attribution of ours takes from Captum: its inputs, its targets, its forward call.

The two private functions imported here are the only ones the package uses. Captum's own methods
call them to feed a model and to select targets, and its tests check for their errors. They are
the same in Captum 0.7 to 0.9.
"""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from captum._utils.common import _run_forward as run_forward
from captum._utils.common import _select_targets
from torch import Tensor

from fam_plugins.core.maps import batch_size

__all__ = ["TensorOrTensors", "batch_size", "run_forward", "select_scores"]

TensorOrTensors = Tensor | tuple[Tensor, ...]


def select_scores(output: Any, target: Any) -> Tensor:
    """One score per image ``[B]`` of an output ``[B, ...]``, with Captum's targets and errors.

    A model that returns one number for the whole batch keeps it. Targets of a labelled
    :class:`~fam_plugins.SimilarityModel` may be labels.
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returns a {type(output).__name__}, not a tensor: pass a function that "
            "picks the scores out of it, such as lambda x: model(x)['logits']"
        )
    target = _plain(_row_of(output, target))
    _check_range(output, target)
    try:
        scores: Tensor = _select_targets(output, target)
    except (AssertionError, IndexError, TypeError, RuntimeError) as error:
        shown = f"of shape {tuple(target.shape)}" if isinstance(target, Tensor) else repr(target)
        raise AssertionError(
            f"target {shown} does not fit an output of shape {tuple(output.shape)}, one int for "
            f"all images or a list of one per image would: {error}"
        ) from error
    if scores.dim() > 0 and scores[0].numel() != 1:
        raise AssertionError(
            f"the output has shape {tuple(output.shape)}, which is more than one score per image: "
            "pass target=, the index of the class or reference to explain"
        )
    return scores.reshape(len(scores)) if scores.dim() > 0 else scores


def _row_of(output: Any, target: Any) -> Any:
    """Labels that are strings, as row numbers where the output knows them; others as they are."""
    named = target if isinstance(target, (list, tuple)) else [target]
    if not named or not all(isinstance(n, str) for n in named) or not hasattr(output, "row_of"):
        return target
    try:
        return output.row_of(target if isinstance(target, str) else list(target))
    except ValueError as error:
        raise AssertionError(f"target {target!r} is a {type(target).__name__}: {error}") from error


def _plain(target: Any) -> Any:
    """Numpy's integers stand for Python's; everything else is as it is."""
    if target is None or isinstance(target, (int, tuple, list, Tensor)):
        return target
    try:
        return index(target)
    except TypeError:
        raise AssertionError(
            f"target {target!r} is a {type(target).__name__}: pass an int, a tensor of ints [B], "
            "a list of ints, or tuples of ints; labels are for SimilarityModel(..., labels=[...])"
        ) from None


def _check_range(output: Tensor, target: Any) -> None:
    """Refuse an index that torch would report badly: on CUDA, by killing the process."""
    single = isinstance(target, int) or (isinstance(target, Tensor) and target.numel() == 1)
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise AssertionError(f"target has dtype {target.dtype}: pass integers (target.long())")
        chosen = target.flatten().tolist()
    else:
        chosen = [target] if single else target
    if (
        output.dim() < 2
        or not isinstance(chosen, list)
        or not all(isinstance(t, int) for t in chosen)
    ):
        return
    count = output.shape[1]
    wrong = [t for t in chosen if not (-count if single else 0) <= t < count]
    if wrong:
        raise AssertionError(
            f"target {wrong[0]} is out of range: the model has {count} outputs, "
            f"so targets go from 0 to {count - 1}"
        )
