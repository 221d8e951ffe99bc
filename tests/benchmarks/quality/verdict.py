"""Who beats whom outside the paired intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.benchmarks.quality.intervals import Estimate, paired

RIVAL = "GradCAM"
# Metric, and whether more of it is better.
JUDGED = {
    "energy": True,
    "point": True,
    "mosaic contrastive deletion": False,
    "single contrastive deletion": False,
}


@dataclass(frozen=True)
class Verdict:
    """One method against one rival on one metric, positive where it is better."""

    method: str
    rival: str
    metric: str
    gain: Estimate

    @property
    def word(self) -> str:
        if self.gain.above_zero():
            return "better"
        return "worse" if self.gain.below_zero() else "no difference shown"


def compare(
    rows: dict[str, dict[str, np.ndarray]], method: str, rival: str, metric: str
) -> Verdict:
    """Paired, image by image."""
    sign = 1 if JUDGED[metric] else -1
    first, second = rows[method][metric], rows[rival][metric]
    return Verdict(method, rival, metric, paired(sign * first, sign * second))


def ours(rows: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """Labels of the rules that this package ships."""
    return [label for label in rows if label.startswith("rule ")]


def statement(rows: dict[str, dict[str, np.ndarray]]) -> str:
    """Whether one of the rules beats GradCAM on all that is judged, in plain words."""
    won = {
        label: [m for m in JUDGED if compare(rows, label, RIVAL, m).word == "better"]
        for label in ours(rows)
    }
    needed = {"energy", "point", "mosaic contrastive deletion"}
    winners = [label for label, metrics in won.items() if needed <= set(metrics)]
    if winners:
        return (
            "Yes: outside the paired intervals, " + "; ".join(winners) + " beat pytorch-grad-cam's "
            "GradCAM on energy, brightest point and contrastive deletion (mosaics)."
        )
    best = [f"{label}: {', '.join(metrics)}" for label, metrics in won.items() if metrics]
    return (
        "No: no rule of this package beats pytorch-grad-cam's GradCAM on energy, brightest point "
        "and contrastive deletion (mosaics) together outside the paired intervals. Outside them "
        "on " + ("; ".join(best) if best else "none of the four") + "."
    )
