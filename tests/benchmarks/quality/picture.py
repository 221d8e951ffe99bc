"""The picture: one panel a metric, one row a method, every point with its interval."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from tests.benchmarks.quality.intervals import estimate
from tests.benchmarks.quality.report import CAPE, Rows

PANELS = {
    "energy": ("energy in the\nright cell", "higher", 0.25),
    "point": ("brightest point\nin it", "higher", 0.25),
    "mosaic contrastive deletion": ("contrastive\ndeletion, mosaics", "lower", None),
    "single contrastive deletion": ("contrastive\ndeletion, singles", "lower", None),
    "single faithfulness": ("insertion minus\ndeletion, singles", "higher", None),
    "sensitivity": ("reference\nsensitivity", "lower", None),
    "randomisation": ("model\nrandomisation", "lower", None),
}
COLOURS = ("tab:blue", "tab:orange", "tab:green")


def draw(similarity: dict[str, Rows], cape: Rows | None, path: Path) -> None:
    """Draw the pooled similarity rows of each kind of network, and the CAPE rows below."""
    labels = list(next(iter(similarity.values())))
    heights = [0.28 * len(labels) + 1] + ([2.6] if cape else [])
    figure = plt.figure(figsize=(19, sum(heights) + 2), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights))
    axes = parts[0].subplots(1, len(PANELS), sharey=True)
    parts[0].suptitle("Similarity maps: mean and 95 % bootstrap interval; dotted: chance")
    spread = 0.15 * (len(similarity) - 1)
    for axis, (key, (title, better, chance)) in zip(axes, PANELS.items(), strict=True):
        for (name, rows), colour, shift in zip(
            similarity.items(), COLOURS, np.linspace(-spread, spread, len(similarity)), strict=False
        ):
            _points(axis, [rows[label][key] for label in labels], shift, colour, name)
        if chance is not None:
            axis.axvline(chance, linestyle=":", color="grey")
        axis.set_title(f"{title}\n({better} is better)", fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    parts[0].legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    if cape:
        _draw_cape(parts[1], cape)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_cape(part: object, cape: Rows) -> None:
    axes = part.subplots(1, len(CAPE), sharey=True)  # type: ignore[attr-defined]
    part.suptitle(  # type: ignore[attr-defined]
        "Class maps on a digits classifier, each judged by the head it explains"
    )
    for axis, (key, title) in zip(axes, CAPE.items(), strict=True):
        percent = 100 if "%" in title else 1
        _points(axis, [percent * columns[key] for columns in cape.values()], 0, COLOURS[0], "")
        # The arrows of the table as words: not every font has them.
        better = "higher" if title.endswith("↑") else "lower"
        axis.set_title(f"{title[:-2]}\n({better} is better)", fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_yticks(range(len(cape)), list(cape))
    axes[0].set_ylim(len(cape) - 0.5, -0.5)


def _points(
    axis: plt.Axes, columns: list[np.ndarray], shift: float, colour: str, name: str
) -> None:
    found = [estimate(values) for values in columns]
    centre = np.array([e.value for e in found])
    # Intervals of percentiles need not be symmetric; a single value has none.
    below = np.nan_to_num(np.maximum(centre - [e.low for e in found], 0))
    above = np.nan_to_num(np.maximum([e.high for e in found] - centre, 0))
    axis.errorbar(
        centre,
        np.arange(len(found)) + shift,
        xerr=np.stack([below, above]),
        fmt="o",
        markersize=4,
        capsize=2,
        color=colour,
        label=name,
    )
