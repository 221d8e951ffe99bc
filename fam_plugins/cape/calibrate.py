"""Make the CAPE head's probabilities mean what they say: one number, fitted on held-out labels."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fam_plugins.cape.batches import checked_batches, computed_features
from fam_plugins.cape.head import CapeHead
from fam_plugins.cape.model import CapeModel
from fam_plugins.core.eval_mode import eval_mode

__all__ = ["Calibration", "calibrate_temperature"]

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Calibration:
    """How well probabilities match outcomes, on the images the calibration was fitted on.

    NLL is the mean negative log-likelihood of the label in nats; ECE the expected calibration
    error of the top class in 15 equal bins of confidence (Guo et al., ICML 2017), in [0, 1].

    Attributes:
        shift: what was added to t1 and t2 and taken from t3; negative sharpens.
        images: number of held-out images.
        nll_before: NLL of the CAPE head before.
        nll_after: NLL of the CAPE head after; never above ``nll_before``.
        nll_vanilla: NLL of the model's own classifier.
        ece_before: ECE of the CAPE head before.
        ece_after: ECE of the CAPE head after.
        ece_vanilla: ECE of the model's own classifier.
    """

    shift: float
    images: int
    nll_before: float
    nll_after: float
    nll_vanilla: float
    ece_before: float
    ece_after: float
    ece_vanilla: float

    def __str__(self) -> str:
        """A small table."""
        return (
            f"temperature shift {self.shift:+.4f}, fitted on {self.images} held-out images\n"
            f"{'':16}{'NLL':>8}{'ECE':>8}\n"
            f"{'CAPE before':16}{self.nll_before:8.4f}{self.ece_before:8.4f}\n"
            f"{'CAPE after':16}{self.nll_after:8.4f}{self.ece_after:8.4f}\n"
            f"{'vanilla head':16}{self.nll_vanilla:8.4f}{self.ece_vanilla:8.4f}"
        )


def calibrate_temperature(
    model: CapeModel,
    loader: Iterable[Any],
    *,
    bounds: tuple[float, float] = (-5.0, 5.0),
) -> Calibration:
    """Choose how sharp the CAPE head's probabilities are, by held-out likelihood.

    The distillation loss sees the temperatures only as t1 + t3 and t2 + t3, so how confident a
    fitted head is follows from the training recipe, not from data. This step shifts
    ``(t1 + d, t2 + d, t3 - d)``, which leaves that loss as it is, to the ``d`` with the least
    negative log-likelihood. Both softmaxes change, so the top class may change too.

    The features of the held-out images are kept in host memory meanwhile; a few thousand images
    are plenty for one number.

    Source: our own addition, in the spirit of temperature scaling (Guo et al., ICML 2017).

    Args:
        model: a model with a fitted head; t1, t2, t3 of the head are changed in place.
        loader: yields ``(images, labels)``, held out from fitting, preprocessed as the model
            expects; labels are class indices ``[B]``.
        bounds: range of ``d`` to search, around 0.

    Returns:
        NLL and ECE before and after, and of the model's own classifier.

    Raises:
        TypeError: ``model`` has no CAPE head, or the loader yields something other than tensors.
        ValueError: an empty loader, wrong shapes, NaN images, labels missing or out of range,
            bounds that do not enclose 0. The head is unchanged then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fam_plugins.cape import calibrate_temperature, with_cape_head
        >>> net = nn.Sequential(
        ...     nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        ...     nn.Flatten(), nn.Linear(8, 3),
        ... )
        >>> model = with_cape_head(net)  # then fit_cape_head(model, train_loader)
        >>> held_out = [(torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
        >>> report = calibrate_temperature(model, held_out)
        >>> report.nll_after <= report.nll_before
        True
    """
    if not isinstance(model, CapeModel):
        raise TypeError(
            f"model is a {type(model).__name__}: pass what with_cape_head(model) returned"
        )
    low, high = bounds
    if not -50 <= low < 0 < high <= 50:
        raise ValueError(f"bounds are {bounds}: use (low, high) around 0, within ±50")
    head = model.head
    batches: list[Tensor] = []
    answered: list[Tensor] = []
    vanilla: list[Tensor] = []
    with eval_mode(model), torch.no_grad():
        for images, labels in checked_batches(loader, model, labelled=True):
            assert labels is not None  # labelled=True
            features, logits = computed_features(model, images)
            batches.append(features.cpu())
            answered.append(labels.cpu())
            vanilla.append(F.log_softmax(logits.cpu().double(), dim=1))
        answers = torch.cat(answered)
        before = _log_probs(head, batches, 0.0)
        shift = _best_shift(head, batches, answers, low, high)
        _apply(head, shift)
        after = _log_probs(head, batches, 0.0)
        own = torch.cat(vanilla)
    return Calibration(
        shift=shift,
        images=len(answers),
        nll_before=_nll(before, answers),
        nll_after=_nll(after, answers),
        nll_vanilla=_nll(own, answers),
        ece_before=_ece(before, answers),
        ece_after=_ece(after, answers),
        ece_vanilla=_ece(own, answers),
    )


def _apply(head: CapeHead, shift: float) -> None:
    head.t1.add_(shift)
    head.t2.add_(shift)
    head.t3.sub_(shift)


def _log_probs(head: CapeHead, batches: list[Tensor], shift: float) -> Tensor:
    """Log-probabilities ``[M, K]``, float64 on the CPU, as with t1 and t2 shifted."""
    state = {"t1": head.t1 + shift, "t2": head.t2 + shift}
    device = head.weight.device
    parts = [torch.func.functional_call(head, state, (f.to(device),)) for f in batches]
    return torch.cat([part.cpu().double() for part in parts])


def _best_shift(
    head: CapeHead,
    batches: list[Tensor],
    answers: Tensor,
    low: float,
    high: float,
) -> float:
    """The shift with the least NLL: a coarse grid, then golden-section search around its best.

    The NLL of a mixture need not have a single valley, hence the grid first.
    """

    def nll(shift: float) -> float:
        return _nll(_log_probs(head, batches, shift), answers)

    steps = 20
    grid = sorted({0.0, *(low + (high - low) * i / steps for i in range(steps + 1))})
    values = [nll(shift) for shift in grid]
    best = min(range(len(grid)), key=values.__getitem__)
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    tried = dict(zip(grid, values, strict=True))
    inner, outer = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
    tried[inner], tried[outer] = nll(inner), nll(outer)
    while right - left > 1e-4:
        if tried[inner] <= tried[outer]:
            right, outer = outer, inner
            inner = right - _GOLDEN * (right - left)
            tried[inner] = nll(inner)
        else:
            left, inner = inner, outer
            outer = left + _GOLDEN * (right - left)
            tried[outer] = nll(outer)
    # Everything tried competes, 0 included, so the NLL cannot rise.
    shift = min(tried, key=tried.__getitem__)
    if min(shift - low, high - shift) < 1e-3:
        warnings.warn(
            f"the best temperature shift, {shift:+.3f}, lies at the bound of the search: the "
            "held-out images are too few or too easy to calibrate on, or bounds is too narrow",
            stacklevel=3,
        )
    return shift


def _nll(log_probs: Tensor, labels: Tensor) -> float:
    return float(F.nll_loss(log_probs, labels))


def _ece(log_probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    confidence, top = log_probs.exp().max(dim=1)
    correct = (top == labels).double()
    index = (confidence * bins).long().clamp(max=bins - 1)
    zeros = confidence.new_zeros(bins)
    # |sum of (accuracy - confidence)| per bin is the bin's gap times its size.
    gap = zeros.index_add(0, index, correct - confidence)
    return float(gap.abs().sum() / len(labels))
