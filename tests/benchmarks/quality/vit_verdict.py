"""Which layer and which tail to take, by rule: the transformers' tables and sentences.

A summary is what ``vit_quality.json`` holds: how much was measured; of every kind of network, row
and measure one value per trained network.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fam_plugins.core.maps import TAILS
from tests.benchmarks.quality.intervals import Estimate, over_networks
from tests.benchmarks.quality.verdict import AHEAD, BEHIND, NEITHER, gain, number, signed, word
from tests.benchmarks.quality.vit_methods import PARTNERS, fam_row, partner_row
from tests.benchmarks.quality.vits import KINDS

Summary = dict[str, Any]
Rows = dict[str, dict[str, list[float]]]

SOURCE = "vit_quality.json"
JUDGED = {"energy": "energy", "faithfulness": "insertion - deletion"}
"""What a sentence is about: 95 % hold for both intervals together."""
PEERS = ("LeGrad", "Grad-ECLIP", "rollout", "random")


def page(summary: Summary) -> str:
    """The block of the benchmarks' README."""
    return "\n\n".join(
        [
            f"{summary['networks']} trained networks of each kind, {summary['mosaics']} mosaics of "
            "each network, contrast others, nothing smoothed. Accuracy of the nearest reference on "
            f"single digits, and share of a mosaic's digits among its four nearest: {accuracies(summary)}.",
            "\n".join(sentence(summary, kind) for kind in summary["kinds"]),
            *(table(summary, kind) for kind in summary["kinds"]),
            partners(summary),
        ]
    )


def accuracies(summary: Summary) -> str:
    """Both accuracies of every kind, means over networks."""
    return ", ".join(
        f"{np.mean(of['accuracy']):.0%} and {np.mean(of['found']):.0%} ({kind})"
        for kind, of in summary["kinds"].items()
    )


def recommended(rows: Rows, kind: str) -> tuple[str, str]:
    """The layer and the tail to take.

    The layer of the row with the highest mean energy; there the first of ``frozen``, ``norms`` and
    ``true`` that is not shown to be behind that row in energy or in insertion minus deletion.
    """
    pairs = [(layer, tail) for layer in KINDS[kind].layers for tail in TAILS]
    layer, best = max(pairs, key=lambda pair: np.mean(rows[fam_row("additive", *pair)]["energy"]))
    first = rows[fam_row("additive", layer, best)]
    for tail in TAILS:
        other = rows[fam_row("additive", layer, tail)]
        if all(compared(other, first, measure).sign >= 0 for measure in JUDGED):
            return layer, tail
    return layer, best


def sentence(summary: Summary, kind: str) -> str:
    """What to take for a kind of network, what that gains, and where freezing does not."""
    rows = summary["kinds"][kind]["rows"]
    layer, tail = recommended(rows, kind)
    ours, recipe = rows[fam_row("additive", layer, tail)], KINDS[kind].recipe
    best = max(KINDS[kind].layers, key=lambda at: np.mean(rows[f"GradCAM, {at}"]["energy"]))
    against = [
        f"against GradCAM at {where} ({at}) {gains(ours, rows[f'GradCAM, {at}'])}"
        for where, at in (("its usual layer", recipe), ("its best", best))
    ]
    freezing = [
        f"`{tails[0]}` against `{tails[1]}`, in energy: {by_layer(rows, kind, *tails)}"
        for tails in (("norms", "true"), ("frozen", "true"), ("frozen", "norms"))
    ]
    return (
        f"* **{kind[0].upper()}{kind[1:]}: {layer}, `{tail}`.** `additive` there, "
        f"{'; '.join(against)}. {'. '.join(freezing)}."
    )


def by_layer(rows: Rows, kind: str, first: str, second: str) -> str:
    """At which layers one tail is ahead of another in energy."""
    said: dict[str, list[str]] = {AHEAD: [], BEHIND: [], NEITHER: []}
    for layer in KINDS[kind].layers:
        pair = (rows[fam_row("additive", layer, tail)] for tail in (first, second))
        said[word(compared(*pair, "energy"))].append(layer)
    return "; ".join(f"{how} at {', '.join(layers)}" for how, layers in said.items() if layers)


def gains(first: dict[str, list[float]], second: dict[str, list[float]]) -> str:
    """Both paired differences in numbers and words."""
    parts = []
    for measure, name in JUDGED.items():
        found = compared(first, second, measure)
        parts.append(f"{signed(found.value)} ± {number(found.half)} {name} ({word(found)})")
    return ", ".join(parts)


def compared(
    first: dict[str, list[float]], second: dict[str, list[float]], measure: str
) -> Estimate:
    """The paired difference over networks."""
    return gain(first[measure], second[measure], comparisons=len(JUDGED))


def table(summary: Summary, kind: str) -> str:
    """Every row of a kind: means over networks, with the 95 % interval where it is judged."""
    rows, given = summary["kinds"][kind]["rows"], KINDS[kind]
    lines = [
        f"| {kind} | energy | point | AUC | insertion - deletion | coverage |",
        "|---" * 6 + "|",
    ]
    usual = f"GradCAM, {given.recipe}"
    labels = [fam_row("additive", layer, tail) for layer in given.layers for tail in TAILS]
    labels += [fam_row("centred", layer, "frozen") for layer in given.layers]
    labels += [f"GradCAM, {layer}" for layer in given.layers]
    for label in [*labels, *(peer for peer in PEERS if peer in rows)]:
        found = {name: over_networks(values) for name, values in rows[label].items()}
        cells = [
            shown(found["energy"]),
            number(found["point"].value),
            number(found["auc"].value),
            shown(found["faithfulness"]),
            number(found["coverage"].value) if "coverage" in found else "",
        ]
        name, *rest = label.split(", ")
        ours = name in ("additive", "centred")
        named = ", ".join([f"`{name}`", rest[0], f"`{rest[1]}`"] if ours else [name, *rest])
        lines.append(f"| {named}{' (usual)' if label == usual else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def partners(summary: Summary) -> str:
    """The partners' own methods at the patch embedding, as they are and inside the block."""
    kinds = [kind for kind in summary["kinds"] if KINDS[kind].settings.get("class_token")]
    lines = [
        f"| energy / point / AUC at the patch embedding | {' | '.join(kinds)} |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for name in PARTNERS:
        for frozen in (False, True):
            cells = []
            for kind in kinds:
                row = summary["kinds"][kind]["rows"][partner_row(name, frozen)]
                means = [over_networks(row[m]).value for m in ("energy", "point", "auc")]
                cells.append(" / ".join(map(number, means)))
            label = f"{name}{' inside `frozen_tail()`' if frozen else ''}"
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(found: Estimate) -> str:
    """A mean and half of its interval."""
    return f"{number(found.value)} ± {number(found.half)}"
