"""Fit the sharpness of the CAPE head's probabilities: one number, on held-out labels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fam_plugins.cape.batches import feature_batches
from fam_plugins.cape.head import CapeHead, classify_regions, log_probabilities
from fam_plugins.cape.loss import check_labels
from fam_plugins.cape.model import CapeModel, require_cape_model
from fam_plugins.core.eval_mode import eval_mode

__all__ = ["Calibration", "calibrate_temperature"]


@dataclass(frozen=True)
class Calibration:
    """How well probabilities match outcomes, on the images the calibration was fitted on.

    NLL is the mean negative log-likelihood of the label in nats; ECE the expected calibration
    error of the top class in 15 equal bins of confidence (Guo et al., ICML 2017), in [0, 1].

    Attributes:
        shift: What was added to t1 and t2 and taken from t3; negative sharpens.
        images: Number of held-out images.
        nll_before, nll_after, nll_vanilla: NLL of the CAPE head before and after (never above),
            and of the model's own classifier.
        ece_before, ece_after, ece_vanilla: The same of the ECE.
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
    model: CapeModel, loader: Iterable[Any], *, bounds: tuple[float, float] = (-5.0, 5.0)
) -> Calibration:
    """Choose how sharp the CAPE head's probabilities are, by held-out likelihood.

    The distillation loss sees the temperatures only as t1 + t3 and t2 + t3, so how confident a
    fitted head is follows from the training recipe, not from data. This step shifts
    ``(t1 + d, t2 + d, t3 - d)``, which leaves that loss as it is, to the ``d`` with the least
    negative log-likelihood. Both softmaxes change, so the top class may change too.

    Host memory holds the class logits of all regions meanwhile (images · K · h · w numbers); a few
    thousand images are plenty for one number. Source: our own addition, in the spirit of
    temperature scaling (Guo et al., ICML 2017).

    Args:
        model: A model with a fitted head; t1, t2, t3 of the head are changed in place.
        loader: Yields ``(images, labels)``, or dicts with ``label``, ``labels`` or ``target``, held
            out from fitting, preprocessed as the model expects; labels are class indices ``[B]``.
        bounds: Range of ``d`` to search, around 0; a best shift at its end is warned of.

    Returns:
        NLL and ECE before and after, and of the model's own classifier.

    Raises:
        TypeError: If ``model`` has no CAPE head, or the loader yields something else than tensors.
        ValueError: If the loader is empty, images or labels do not fit, or bounds do not enclose
            0. The head is unchanged then.

    Example:
        >>> from torch import nn
        >>> from fam_plugins.cape import with_cape_head
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> model = with_cape_head(net.append(nn.Linear(8, 3)))  # then fit_cape_head
        >>> images = torch.randn(8, 1, 8, 8)
        >>> labels = (model(images).argmax(dim=1) + torch.tensor([0] * 6 + [1, 2])) % 3
        >>> report = calibrate_temperature(model, [(images, labels)])  # two of eight are wrong
        >>> report.nll_after <= report.nll_before
        True
    """
    require_cape_model(model, loader)
    low, high = bounds if isinstance(bounds, (tuple, list)) and len(bounds) == 2 else (0, 0)
    if not -50 <= low < 0 < high <= 50:
        raise ValueError(f"bounds must be (low, high) around 0, within ±50, not {bounds}")
    head = model.head
    regions, vanilla, answers = [], [], []
    with eval_mode(model), torch.no_grad():
        for features, logits, rest in feature_batches(loader, model):
            if not rest or not isinstance(rest[0], Tensor):
                raise ValueError("a batch has no tensor of labels: yield (images, labels)")
            check_labels(rest[0], images=len(logits), classes=head.num_classes)
            regions.append(classify_regions(head, features).cpu())
            vanilla.append(F.log_softmax(logits.cpu().double(), dim=1))
            answers.append(rest[0].cpu().long())
        labels = torch.cat(answers)
        before = _log_probs(head, regions)
        shift = _best_shift(
            lambda d: float(F.nll_loss(_log_probs(head, regions, d), labels)), low, high
        )
        head.t1.add_(shift)
        head.t2.add_(shift)
        head.t3.sub_(shift)
        scored = (before, _log_probs(head, regions), torch.cat(vanilla))
    values = (float(measure(p, labels)) for measure in (F.nll_loss, _ece) for p in scored)
    return Calibration(shift, len(labels), *values)


def _log_probs(head: CapeHead, regions: list[Tensor], shift: float = 0.0) -> Tensor:
    """Log-probabilities ``[M, K]``, float64 on the CPU, with t1 and t2 shifted."""
    t1, t2 = head.t1 + shift, head.t2 + shift
    parts = (log_probabilities(logits.to(t1.device), t1, t2) for logits in regions)
    return torch.cat([part.cpu().double() for part in parts])


def _best_shift(nll: Callable[[float], float], low: float, high: float) -> float:
    """The shift with the least NLL: golden-section search around the best of a coarse grid."""
    # The NLL of a mixture need not have a single valley, hence the grid first.
    grid = sorted({0.0, *(low + (high - low) * i / 20 for i in range(21))})
    tried = {shift: nll(shift) for shift in grid}
    best = grid.index(min(tried, key=tried.__getitem__))
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    golden = (5**0.5 - 1) / 2
    inner, outer = right - golden * (right - left), left + golden * (right - left)
    while right - left > 1e-4:
        for shift in {inner, outer} - set(tried):
            tried[shift] = nll(shift)
        if tried[inner] <= tried[outer]:
            right, outer = outer, inner
            inner = right - golden * (right - left)
        else:
            left, inner = inner, outer
            outer = left + golden * (right - left)
    # Everything tried competes, 0 included, so the NLL cannot rise.
    shift = min(tried, key=tried.__getitem__)
    if min(shift - low, high - shift) < 1e-3:
        warnings.warn(
            f"the best temperature shift, {shift:+.3f}, lies at the bound of the search: too few "
            "or too easy held-out images to calibrate on, or bounds is too narrow",
            stacklevel=3,
        )
    return shift


def _ece(log_probs: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """Expected calibration error of log-probabilities ``[M, K]``."""
    confidence, top = log_probs.exp().max(dim=1)
    correct = (top == labels).double()
    index = (confidence * bins).long().clamp(max=bins - 1)
    # |sum of (accuracy - confidence)| per bin is the bin's gap times its size.
    gap = confidence.new_zeros(bins).index_add(0, index, correct - confidence)
    return gap.abs().sum() / len(labels)
