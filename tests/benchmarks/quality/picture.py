"""The picture: one panel a metric, one row a method, every point with its interval."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from tests.benchmarks.quality.intervals import over_networks
from tests.benchmarks.quality.report import CAPE, Rows

PANELS = {
    "energy": ("energy on\nthe match", "higher", 0.25),
    "point": ("brightest point\non it", "higher", 0.25),
    "auc": ("pixel AUC", "higher", 0.5),
    "mosaic faithfulness": ("insertion minus\ndeletion, mosaics", "higher", None),
    "single faithfulness": ("insertion minus\ndeletion, singles", "higher", None),
    "sensitivity": ("reference\nsensitivity", "lower", None),
    "randomisation": ("model\nrandomisation", "lower", None),
}
COLOURS = ("tab:blue", "tab:orange", "tab:green")


def draw(kinds: dict[str, Rows], cape: Rows | None, path: Path) -> None:
    """Draw the rows of each kind of embedding, and the CAPE rows below."""
    labels = list(next(iter(kinds.values())))
    heights = [0.34 * len(labels) + 1] + ([2.6] if cape else [])
    figure = plt.figure(figsize=(19, sum(heights) + 2), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights))
    axes = parts[0].subplots(1, len(PANELS), sharey=True)
    networks = max(len(v) for rows in kinds.values() for v in rows[labels[0]].values())
    parts[0].suptitle(
        f"Similarity maps: mean of {networks} networks and 95 % t interval; dotted: chance"
    )
    spread = 0.13 * (len(kinds) - 1)
    for axis, (key, (title, better, chance)) in zip(axes, PANELS.items(), strict=True):
        for (name, rows), colour, shift in zip(
            kinds.items(), COLOURS, np.linspace(-spread, spread, len(kinds)), strict=False
        ):
            columns = [rows[label][key] for label in labels]
            # Squared distances have a scale of their own in every network: shown by their sign and
            # size against the largest of the panel.
            scale = 1.0
            if "faithfulness" in key:
                means = np.abs([over_networks(values).value for values in columns])
                scale = max(np.nanmax(means), 1e-9)
            _points(axis, [np.array(values) / scale for values in columns], shift, colour, name)
        if chance is not None:
            axis.axvline(chance, linestyle=":", color="grey")
        relative = ",\nlargest = 1" if "faithfulness" in key else ""
        axis.set_title(f"{title}{relative}\n({better} is better)", fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    parts[0].legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    if cape:
        _draw_cape(parts[1], cape)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _draw_cape(part: object, cape: Rows) -> None:
    axes = part.subplots(1, len(CAPE), sharey=True)  # type: ignore[attr-defined]
    part.suptitle(  # type: ignore[attr-defined]
        "Class maps on a digits classifier, each judged by the head it explains"
    )
    for axis, (key, title) in zip(axes, CAPE.items(), strict=True):
        percent = 100 if "%" in title else 1
        columns = [percent * np.array(columns[key]) for columns in cape.values()]
        _points(axis, columns, 0, COLOURS[0], "")
        # The arrows of the table as words: not every font has them.
        better = "higher" if title.endswith("↑") else "lower"
        axis.set_title(f"{title[:-2]}\n({better} is better)", fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_yticks(range(len(cape)), list(cape))
    axes[0].set_ylim(len(cape) - 0.5, -0.5)


def _points(
    axis: plt.Axes, columns: list[np.ndarray], shift: float, colour: str, name: str
) -> None:
    found = [over_networks(values) for values in columns]
    axis.errorbar(
        [e.value for e in found],
        np.arange(len(found)) + shift,
        xerr=np.nan_to_num([e.half for e in found]),  # a single network has no interval
        fmt="o",
        markersize=4,
        capsize=2,
        color=colour,
        label=name,
    )
