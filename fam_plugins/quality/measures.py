"""What makes a map good, as one value per image, and a table and a picture of such values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MEASURES", "Evaluation", "perturbation", "pointing", "rank_correlation"]

MEASURES = {
    "energy": "energy on the match ↑",
    "point": "brightest point on it ↑",
    "auc": "pixel AUC ↑",
    "mosaic deletion": "deletion, mosaics ↓",
    "mosaic insertion": "insertion, mosaics ↑",
    "single deletion": "deletion, singles ↓",
    "single insertion": "insertion, singles ↑",
    "sensitivity": "reference sensitivity ↓",
    "additivity": "additivity error ↓",
}


def pointing(maps: Tensor, shown: Tensor, cells: Tensor) -> dict[str, Tensor]:
    """Whether maps ``[B, h, w]``, enlarged ``[B, H, W]``, find where ``cells`` ``[B, H, W]`` are.

    Energy: share of the positive part (arXiv 1910.01279), cut before it is enlarged. Point: whether
    the brightest is there (arXiv 1608.00507), equal ones in proportion. AUC: how often a pixel
    inside is brighter than one outside, ties counting one half.
    """
    positive = F.interpolate(maps.clamp_min(0)[:, None], cells.shape[1:], mode="bilinear")[:, 0]
    brightest = shown == shown.amax((1, 2), keepdim=True)
    hits, misses = cells.sum((1, 2)), (~cells).sum((1, 2))
    above = (_ranks(shown) * cells.flatten(1)).sum(1) - hits * (hits + 1) / 2
    return {
        "energy": ((positive * cells).sum((1, 2)) / positive.sum((1, 2))).nan_to_num(0),
        "point": (brightest & cells).sum((1, 2)) / brightest.sum((1, 2)),
        "auc": above / (hits * misses),
    }


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's, of two maps of each image; NaN where either is constant."""
    a, b = (ranks - ranks.mean(1, keepdim=True) for ranks in (_ranks(first), _ranks(second)))
    correlation: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return correlation


def perturbation(
    score: Callable[[Tensor], Tensor], images: Tensor, baseline: Tensor, maps: Tensor, steps: int
) -> list[Tensor]:
    """Deletion and insertion (arXiv 1806.07421): areas under the score of images ``[B, C, H, W]``.

    Of 100 patches the brightest become, or stop being, those of the baseline first.
    """
    values = F.interpolate(maps[:, None], (10, 10), mode="area").flatten(1)
    # Equal ones in random order: reading order would favour maps with large areas of zeros.
    mixed = torch.rand(values.shape).argsort(1)
    order = mixed.gather(1, values.gather(1, mixed).argsort(dim=1, descending=True, stable=True))
    turn = F.interpolate(order.argsort(1).reshape(-1, 1, 10, 10).float(), images.shape[2:])
    counts, turn = torch.linspace(0, 100, steps + 1).round().tolist(), turn.to(images.device)
    curves = [
        torch.stack([score(torch.where(turn < count, after, before)) for count in counts])
        for before, after in ((images, baseline), (baseline, images))
    ]
    return [torch.trapezoid(curve, dx=1 / steps, dim=0) for curve in curves]


def _ranks(maps: Tensor) -> Tensor:
    return torch.as_tensor(rankdata(maps.flatten(1).numpy(), axis=1))


@dataclass(frozen=True)
class Evaluation:
    """What :func:`~fam_plugins.quality.evaluate` found; ``print`` shows the table.

    Attributes:
        values: Method -> measure -> one value per image, NaN where undefined. Chance is .25 for
            ``"energy"`` and ``"point"``, .5 for ``"auc"``.
        accuracy: Share of the single images that are nearest to the reference of their class.
    """

    values: dict[str, dict[str, np.ndarray]]
    accuracy: float

    def difference(self, label: str, against: str, measure: str) -> tuple[float, float, float]:
        """Mean of ``label`` minus ``against``, image by image, and its 95 % interval."""
        return _interval(self.values[label][measure] - self.values[against][measure])

    def table(self) -> str:
        """Markdown: mean ± half of the 95 % interval over images; a dash where undefined."""
        lines = [
            f"| method | {' | '.join(MEASURES.values())} |",
            "|---" * (len(MEASURES) + 1) + "|",
        ]
        for label, columns in self.values.items():
            found = [_interval(columns[measure]) for measure in MEASURES]
            cells = [f"{mean:.3f} ± {(high - low) / 2:.3f}" for mean, low, high in found]
            lines.append(f"| {' | '.join([label, *cells])} |".replace("nan ± nan", "-"))
        return "\n".join(lines)

    __str__ = table

    def plot(self) -> Figure:
        """Draw every measure with its interval, one row per method."""
        from matplotlib.figure import Figure

        rows, names = np.arange(len(self.values)), list(self.values)
        figure = Figure(figsize=(18, 1.5 + 0.3 * len(rows)), layout="constrained")
        for axis, measure in zip(figure.subplots(1, 9, sharey=True), MEASURES, strict=True):
            found = [_interval(columns[measure]) for columns in self.values.values()]
            mean, low, high = np.array(found).T
            sides = np.maximum((mean - low, high - mean), 0)  # rounding, of equal values
            axis.errorbar(mean, rows, xerr=sides, fmt="o", capsize=2)
            # The arrow as a word: not every font has it.
            title = MEASURES[measure].replace("↑", "\n(higher is better)")
            axis.set_title(title.replace("↓", "\n(lower is better)"), fontsize=8)
            axis.grid(axis="y", alpha=0.3)
            axis.set(yticks=rows, yticklabels=names, ylim=(len(rows) - 0.5, -0.5))
        return figure


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and percentiles of 2,000 bootstrap resamples, of the values that are defined."""
    known = values[np.isfinite(values)]
    if not len(known):
        return np.nan, np.nan, np.nan
    means = np.random.default_rng(0).choice(known, (2000, len(known))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(known.mean()), float(low), float(high)
