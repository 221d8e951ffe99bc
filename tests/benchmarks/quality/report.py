"""The full report: every row and measure as Markdown tables, and the summary that is kept."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tests.benchmarks.quality import verdict
from tests.benchmarks.quality.intervals import Estimate, over_networks

Rows = dict[str, dict[str, list[float]]]
"""Row -> measure -> one value per network."""

MAPS = {
    "energy": "energy on the match ↑",
    "point": "brightest point on it ↑",
    "auc": "pixel AUC ↑",
    "sensitivity": "reference sensitivity ↓",
    "randomisation": "model randomisation ↓",
    "additivity": "additivity error",
    "mosaic deletion": "deletion, mosaics ↓",
    "mosaic insertion": "insertion, mosaics ↑",
    "mosaic faithfulness": "insertion - deletion, mosaics ↑",
    "single deletion": "deletion, singles ↓",
    "single insertion": "insertion, singles ↑",
    "single faithfulness": "insertion - deletion, singles ↑",
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


def side_by_side(networks: list[dict[str, dict[str, float]]]) -> Rows:
    """The same rows of several networks, one value each."""
    return {
        label: {name: [rows[label][name] for rows in networks] for name in columns}
        for label, columns in networks[0].items()
    }


def summary(
    kinds: dict[str, tuple[list[float], Rows]], cape: Rows, counts: dict[str, int]
) -> dict[str, Any]:
    """What the READMEs' tables and sentences follow from, to four digits."""

    def short(rows: Rows, labels: list[str], measures: list[str]) -> Rows:
        return {
            label: {name: [round(v, 4) for v in rows[label][name]] for name in measures}
            for label in labels
        }

    return {
        **counts,
        "kinds": {
            kind: {
                "accuracy": [round(value, 4) for value in accuracy],
                "rows": short(rows, verdict.SHOWN, list(verdict.JUDGED)),
            }
            for kind, (accuracy, rows) in kinds.items()
        },
        "cape": short(cape, list(cape), ["average drop", "top-2 overlap"]),
    }


def as_text(summary: dict[str, Any]) -> str:
    """A summary as JSON, every list of numbers on one line."""
    found: list[str] = []
    for line in json.dumps(summary, indent=1).splitlines():
        inside = bool(found) and found[-1].count("[") > found[-1].count("]")
        if inside:
            found[-1] += ("" if line.strip().startswith("]") else " ") + line.strip()
        else:
            found.append(line)
    return "\n".join(line.replace("[ ", "[") for line in found) + "\n"


def similarity_section(kind: str, accuracy: list[float], rows: Rows) -> str:
    """The table of one kind of embedding."""
    facts = ", ".join(f"{value:.0%}" for value in accuracy)
    return f"## {kind}\n\nAccuracy of the nearest reference: {facts}.\n\n{_table(rows, MAPS)}"


def cape_section(facts: list[str], own: Rows, vanilla: Rows) -> str:
    """The tables of the CAPE part."""
    titles = {
        "own": "Each method judged by the head it explains, on that head's top class:",
        "vanilla": "The same, all judged by the vanilla classifier, on its top class:",
    }
    lines = ["## CAPE and CAM on a digits classifier", "", *(f"* {fact}" for fact in facts), ""]
    for title, rows in ((titles["own"], own), (titles["vanilla"], vanilla)):
        shown = {
            label: {k: [100 * v if "%" in CAPE[k] else v for v in columns[k]] for k in CAPE}
            for label, columns in rows.items()
        }
        lines += [title, "", _table(shown, CAPE), ""]
    return "\n".join(lines)


def _table(rows: Rows, columns: dict[str, str]) -> str:
    lines = [f"| method | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for label, values in rows.items():
        cells = [shown(over_networks(values[key])) for key in columns]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(value: Estimate) -> str:
    """A value and its interval; a dash where the measure is not defined for the method."""
    if value.count == 0:
        return "-"
    digits = 3 if abs(value.value) < 10 else 1
    half = "" if np.isnan(value.half) else f" ± {value.half:.{digits}f}"
    return f"{value.value:.{digits}f}{half}"
