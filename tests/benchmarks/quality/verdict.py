"""Who is ahead of whom, by rule: the tables and sentences of the READMEs, from the numbers alone.

A summary is what ``map_quality.json`` holds: how much was measured; of every kind of embedding, row
and measure one value per trained network; the same of CAPE's part.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.benchmarks.quality.intervals import Estimate, over_networks
from tests.benchmarks.quality.methods import row

Summary = dict[str, Any]

JUDGED = {
    "energy": ("energy", 1),
    "point": ("point", 1),
    "auc": ("AUC", 1),
    "mosaic faithfulness": ("faithfulness on mosaics", 1),
    "single faithfulness": ("faithfulness on single images", 1),
    "sensitivity": ("dependence on the reference", -1),
}
"""Measures by title, and whether more is better."""

BEST = row("centred", "others", True)
PAIRS = {
    "`centred` against GradCAM, both with contrast and smoothed": (
        BEST,
        row("GradCAM", "others", True),
    ),
    "`centred` against GradCAM, both with contrast, neither smoothed": (
        row("centred", "others", False),
        row("GradCAM", "others", False),
    ),
    "`centred` with contrast and smoothed, against the published `fam`": (BEST, "fam"),
    "`centred` with contrast, against without": (row("centred", "others", False), "centred"),
    "`centred` with contrast and smoothed, against not smoothed": (
        BEST,
        row("centred", "others", False),
    ),
}
"""What is compared: one row against another."""

SHOWN = [
    *(row(name, None, False) for name in ("fam", "additive", "centred", "gradcam", "GradCAM")),
    *(row(name, "others", False) for name in ("additive", "centred", "gradcam", "GradCAM")),
    *(row(name, "others", True) for name in ("additive", "centred", "gradcam", "GradCAM")),
    *(row(name, "others", True) for name in ("GradCAMPlusPlus", "LayerCAM", "ScoreCAM")),
    row("centred", "gallery", True),
    row("GradCAM", "gallery", True),
    "random",
]
"""Rows of the table in the benchmarks' README."""

FIRST = [
    "fam",
    "centred",
    "GradCAM",
    row("centred", "others", False),
    row("GradCAM", "others", False),
    BEST,
    row("GradCAM", "others", True),
]
"""Rows of the first page's table."""

AHEAD, BEHIND, NEITHER = "ahead", "behind", "no difference could be shown"


def gain(
    first: list[float], second: list[float], better: int = 1, comparisons: int = len(JUDGED)
) -> Estimate:
    """How much better the first is, paired network by network."""
    return over_networks(better * (np.array(first) - np.array(second)), comparisons)


def word(found: Estimate) -> str:
    """Ahead or behind where the interval over networks lies on one side of zero."""
    return {1: AHEAD, -1: BEHIND, 0: NEITHER}[found.sign]


def sentence(summary: Summary, title: str) -> str:
    """One pair on every kind of embedding, in words."""
    first, second = PAIRS[title]
    parts = []
    for kind, measured in summary["kinds"].items():
        said: dict[str, list[str]] = {AHEAD: [], BEHIND: [], NEITHER: []}
        for measure, (name, better) in JUDGED.items():
            rows = measured["rows"]
            said[word(gain(rows[first][measure], rows[second][measure], better))].append(name)
        phrases = [
            f"{how} in {', '.join(names) if len(names) < len(JUDGED) else _all(how)}"
            for how, names in said.items()
            if names
        ]
        parts.append(f"{kind}: {'; '.join(phrases)}.")
    return f"* {title}. {' '.join(part[0].upper() + part[1:] for part in parts)}"


def cape_sentence(summary: Summary) -> str:
    """Whether CAPE's map is a good mask, and whether it tells classes apart."""
    rows = summary["cape"]
    mask = word(gain(rows["CAPE"]["average drop"], rows["random"]["average drop"], -1, 2))
    apart = word(gain(rows["CAPE"]["top-2 overlap"], rows["Grad-CAM"]["top-2 overlap"], -1, 2))

    def mean(method: str, measure: str) -> str:
        return number(over_networks(rows[method][measure]).value)

    return (
        f"As a mask CAPE's map is, to a random one: {mask} (average drop "
        f"{mean('CAPE', 'average drop')} and {mean('random', 'average drop')}, less is better). "
        f"In telling the two top classes apart, to Grad-CAM: {apart} (overlap of the two maps "
        f"{mean('CAPE', 'top-2 overlap')} and {mean('Grad-CAM', 'top-2 overlap')})."
    )


def table(summary: Summary, rows: list[str]) -> str:
    """Means over networks: energy, point and AUC on every kind of embedding."""
    kinds = summary["kinds"]
    lines = [f"| energy / point / AUC | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for label in rows:
        cells = []
        for measured in kinds.values():
            columns = measured["rows"][label]
            means = [over_networks(columns[m]).value for m in ("energy", "point", "auc")]
            cells.append(" / ".join(map(number, means)))
        lines.append(f"| {_named(label)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gains(summary: Summary) -> str:
    """The paired differences that the words follow from, with their intervals."""
    names = [name for name, _ in JUDGED.values()]
    lines = [f"| gain of | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for title, (first, second) in PAIRS.items():
        for kind, measured in summary["kinds"].items():
            rows, cells = measured["rows"], []
            for measure, (_, better) in JUDGED.items():
                found = gain(rows[first][measure], rows[second][measure], better)
                bold = "**" if found.sign else ""
                cells.append(f"{bold}{signed(found.value)} ± {number(found.half)}{bold}")
            lines.append(f"| {title}: {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def accuracies(summary: Summary) -> str:
    """Mean accuracy of the nearest reference, by kind."""
    kinds = summary["kinds"].items()
    return ", ".join(f"{np.mean(found['accuracy']):.0%} ({kind})" for kind, found in kinds)


def first_page(summary: Summary) -> str:
    """The block of the first page."""
    intro = f"Means over {summary['networks']} trained networks of each kind:"
    return f"{intro}\n\n{table(summary, FIRST)}\n\n{sentence(summary, next(iter(PAIRS)))}"


def benchmarks_page(summary: Summary) -> str:
    """The block of the benchmarks' README."""
    counts = (
        f"{summary['networks']} trained networks of each kind, {summary['mosaics']} mosaics and "
        f"{summary['singles']} single images of each network. Nearest-reference accuracy: "
        f"{accuracies(summary)}."
    )
    words = "\n".join(sentence(summary, title) for title in PAIRS)
    parts = counts, table(summary, SHOWN), words, gains(summary)
    return "\n\n".join([*parts, f"**CAPE.** {cape_sentence(summary)}"])


def insert(page: str, block: str, source: str = "map_quality.json") -> str:
    """A page with another block between the two markers of a source."""
    found = re.subn(
        rf"(<!-- by rule from {re.escape(source)} -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{block}\n{match[2]}",
        page,
        flags=re.DOTALL,
    )
    if found[1] != 1:
        raise ValueError("the page needs one pair of markers, <!-- by rule ... --> to <!-- end -->")
    return found[0]


def _all(how: str) -> str:
    return "any of the six" if how == NEITHER else "all six"


def _named(label: str) -> str:
    name, *rest = label.split(", ")
    ours = name in ("fam", "additive", "centred", "gradcam")
    return ", ".join([f"`{name}`" if ours else name, *rest])


def number(value: float) -> str:
    """Three digits, as the tables show them."""
    text = f"{round(value, 3) + 0:.3f}" if abs(value) < 10 else f"{value:.1f}"  # no minus zero
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def signed(value: float) -> str:
    """The same with its sign."""
    return ("" if number(value).startswith("-") else "+") + number(value)
