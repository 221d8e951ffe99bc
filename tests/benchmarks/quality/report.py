"""The Markdown tables."""

from __future__ import annotations

import numpy as np

from tests.benchmarks.quality.intervals import Estimate, estimate
from tests.benchmarks.quality.verdict import JUDGED, RIVAL, compare, ours, statement

Rows = dict[str, dict[str, np.ndarray]]

MAPS = {
    "energy": "energy in the right cell ↑ (chance .25)",
    "point": "brightest point in it ↑ (chance .25)",
    "sensitivity": "reference sensitivity ↓",
    "randomisation": "model randomisation ↓",
    "additivity": "additivity error",
    "ms": "ms per image (median)",
}
FAITHFUL = {
    "deletion": "deletion ↓",
    "insertion": "insertion ↑",
    "contrastive deletion": "contrastive deletion ↓",
    "contrastive insertion": "contrastive insertion ↑",
    "faithfulness": "contrastive insertion - deletion ↑",
}
CAPE = {
    "average drop": "average drop % ↓",
    "increase": "increase in confidence % ↑",
    "drop in deletion": "average drop in deletion % ↑",
    "ADCC": "ADCC ↑",
    "coherency": "coherency ↑",
    "complexity": "complexity ↓",
    "top-2 overlap": "overlap of the top-2 maps ↓",
}


def similarity_section(name: str, facts: list[str], networks: list[Rows], rows: Rows) -> str:
    """Tables and verdict of one kind of network, pooled over its seeds."""
    lines = [f"## {name}", "", *(f"* {fact}" for fact in facts), ""]
    lines += [f"**Does a rule of ours beat GradCAM?** {statement(rows)}", ""]
    lines += [_table("method", rows, MAPS), ""]
    for where, what in (("mosaic", "mosaics"), ("single", "single images")):
        lines += [f"Deletion and insertion on {what}, areas under the curve:", ""]
        columns = {f"{where} {key}": title for key, title in FAITHFUL.items()}
        lines += [_table("method", rows, columns), ""]
    return "\n".join(
        [
            *lines,
            *_versus(rows, RIVAL),
            "",
            *_versus(rows, f"{RIVAL}, contrast others"),
            "",
            _path(networks, rows),
        ]
    )


def cape_section(facts: list[str], own: Rows, vanilla: Rows) -> str:
    """The tables of the CAPE part."""
    percent = {"average drop", "increase", "drop in deletion"}
    titles = {
        "own": "Each method judged by the head it explains, on that head's top class:",
        "vanilla": "The same, all judged by the vanilla classifier, on its top class:",
    }
    lines = ["## CAPE and CAM on a digits classifier", "", *(f"* {fact}" for fact in facts), ""]
    for title, rows in ((titles["own"], own), (titles["vanilla"], vanilla)):
        shown = {
            label: {k: 100 * v if k in percent else v for k, v in columns.items()}
            for label, columns in rows.items()
        }
        lines += [title, "", _table("method", shown, CAPE), ""]
    return "\n".join(lines)


def _table(first: str, rows: Rows, columns: dict[str, str]) -> str:
    lines = [
        f"| {first} | " + " | ".join(columns.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for label, values in rows.items():
        cells = [shown(estimate(values[key], median=key == "ms")) for key in columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(value: Estimate) -> str:
    """A value and its interval; a dash where the metric is not defined for the method."""
    if value.count == 0:
        return "-"
    digits = 3 if max(abs(value.value), abs(value.high)) < 10 else 1
    if 0 < abs(value.value) < 5e-4:
        return f"{value.value:.0e} [{value.low:.0e}, {value.high:.0e}]"
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def _versus(rows: Rows, rival: str) -> list[str]:
    lines = [
        f"Gain over pytorch-grad-cam's {rival}, image by image (positive is "
        "better, 95 % interval of the paired difference):",
        "",
        "| rule | " + " | ".join(JUDGED) + " |",
        "|---" * (len(JUDGED) + 1) + "|",
    ]
    for label in ours(rows):
        found = [compare(rows, label, rival, metric) for metric in JUDGED]
        lines.append(
            f"| {label} | " + " | ".join(f"{shown(v.gain)} {v.word}" for v in found) + " |"
        )
    return lines


def _path(networks: list[Rows], rows: Rows) -> str:
    lines = [
        "Gain of the path rule over `centred`. It reads a gallery already without contrast, so it "
        "also has to beat `centred` with one:",
        "",
        "| path rule | against | metric | all networks | network by network |",
        "|---|---|---|---|---|",
    ]
    contrasts = {"none": "", "others": ", contrast others"}
    for mine, theirs in (("none", "none"), ("others", "others"), ("none", "others")):
        for metric in JUDGED:
            pair = (f"path rule{contrasts[mine]}", f"rule centred{contrasts[theirs]}", metric)
            verdict = compare(rows, *pair)
            each = [compare(network, *pair).word for network in networks]
            lines.append(
                f"| contrast {mine} | `centred`, contrast {theirs} | {metric} | "
                f"{shown(verdict.gain)} {verdict.word} | {', '.join(each)} |"
            )
    return "\n".join(lines)
