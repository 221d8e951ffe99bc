"""Which layer and which tail to take, by rule: the transformers' tables and sentences.

A summary is what ``vit_quality.json`` holds: how much was measured; of every kind of network, row
and measure one value per trained network.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fam_plugins.core.maps import TAILS
from tests.benchmarks.quality.intervals import Estimate, over_networks
from tests.benchmarks.quality.verdict import AHEAD, BEHIND, NEITHER, gain, number, signed, word
from tests.benchmarks.quality.vit_methods import fam_row, partner_row, partner_rows
from tests.benchmarks.quality.vits import KINDS

Summary = dict[str, Any]
Rows = dict[str, dict[str, list[float]]]

SOURCE = "vit_quality.json"
JUDGED = {"energy": "energy", "faithfulness": "insertion - deletion"}
"""What a sentence is about: 95 % hold for both intervals together."""
PEERS = ("LeGrad", "Grad-ECLIP", "rollout", "random")


def page(summary: Summary) -> str:
    """The block of the benchmarks' README."""
    kinds = summary["kinds"]
    return "\n\n".join(
        [
            f"{summary['networks']} trained networks of each kind, {summary['mosaics']} mosaics of "
            "each network, contrast others, nothing smoothed. Accuracy of the nearest reference on "
            "single digits, and share of a mosaic's digits among its four nearest: "
            f"{accuracies(summary)}.",
            "\n".join(sentence(summary, kind) for kind in kinds),
            "Gain of `additive` on GradCAM at its usual layer: energy, insertion minus deletion; "
            "bold where the interval of the paired difference lies on one side of zero.",
            gained(summary),
            "The values themselves, `additive` unless it says otherwise: energy / point / AUC / "
            "insertion minus deletion and, of ours, the median share of the score that the patches "
            "carry.",
            *(table(summary, kind) for kind in kinds),
            "The partners' own methods at the patch embedding, as they are and inside the block:",
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
    """The layer and the tail to take: those of the highest mean energy of ``additive``.

    Of equal ones the first of ``frozen``, ``norms`` and ``true``.
    """
    pairs = [(layer, tail) for layer in KINDS[kind].layers for tail in TAILS]
    return max(pairs, key=lambda pair: np.mean(rows[fam_row("additive", *pair)]["energy"]))


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
    centred = by_layer(rows, kind, "norms", "frozen", rule="centred")
    freezing.append(f"Of `centred` `norms` against `frozen`, in energy: {centred}")
    return (
        f"* **{kind[0].upper()}{kind[1:]}: {layer}, `{tail}`.** `additive` there, "
        f"{'; '.join(against)}. {'. '.join(freezing)}."
    )


def by_layer(rows: Rows, kind: str, first: str, second: str, rule: str = "additive") -> str:
    """At which layers one tail is ahead of another in energy."""
    said: dict[str, list[str]] = {AHEAD: [], BEHIND: [], NEITHER: []}
    for layer in KINDS[kind].layers:
        pair = (rows[fam_row(rule, layer, tail)] for tail in (first, second))
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
    """Layers against tails and GradCAM, then the peers that have no choice of layer."""
    rows, given = summary["kinds"][kind]["rows"], KINDS[kind]
    centred = ("frozen", "norms")
    head = [kind, *(f"`{tail}`" for tail in TAILS), *(f"`centred`, `{t}`" for t in centred)]
    head += ["GradCAM"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for layer in given.layers:
        labels = [fam_row("additive", layer, tail) for tail in TAILS]
        labels += [fam_row("centred", layer, tail) for tail in centred]
        labels += [f"GradCAM, {layer}"]
        usual = " (usual)" if layer == given.recipe else ""
        cells = " | ".join(cell(rows[label]) for label in labels)
        lines.append(f"| {layer}{usual} | {cells} |")
    peers = "; ".join(f"{peer} {cell(rows[peer])}" for peer in PEERS if peer in rows)
    return "\n".join(lines) + f"\n\nWithout a choice of layer: {peers}."


def cell(row: dict[str, list[float]]) -> str:
    """Energy, point, AUC, insertion minus deletion and, of our own rows, coverage."""
    found = {name: over_networks(values) for name, values in row.items()}
    parts = [shown(found["energy"]), *(number(found[name].value) for name in ("point", "auc"))]
    parts += [shown(found["faithfulness"])]
    parts += [f"{found['coverage'].value:.1f}"] if "coverage" in found else []
    return " / ".join(parts)


def gained(summary: Summary) -> str:
    """What ``additive`` gains on GradCAM at its usual layer, by kind, layer and tail."""
    lines = [f"| gain on GradCAM | {' | '.join(f'`{tail}`' for tail in TAILS)} |"]
    lines += ["|---" * (len(TAILS) + 1) + "|"]
    for kind, measured in summary["kinds"].items():
        usual = measured["rows"][f"GradCAM, {KINDS[kind].recipe}"]
        for layer in KINDS[kind].layers:
            cells = []
            for tail in TAILS:
                ours = measured["rows"][fam_row("additive", layer, tail)]
                found = [compared(ours, usual, measure) for measure in JUDGED]
                cells.append(
                    ", ".join(
                        f"{bold}{signed(one.value)} ± {number(one.half)}{bold}"
                        for one in found
                        for bold in ["**" if one.sign else ""]
                    )
                )
            lines.append(f"| {kind}: {layer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def partners(summary: Summary) -> str:
    """The partners' own methods at the patch embedding, as they are and inside the block."""
    kinds = [kind for kind in summary["kinds"] if KINDS[kind].settings.get("class_token")]
    lines = [
        f"| energy / point / AUC at the patch embedding | {' | '.join(kinds)} |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for name, inside in partner_rows():
        cells = []
        for kind in kinds:
            row = summary["kinds"][kind]["rows"][partner_row(name, inside)]
            means = [over_networks(row[m]).value for m in ("energy", "point", "auc")]
            cells.append(" / ".join(map(number, means)))
        label = name if inside is None else f"{name} inside `frozen_tail({inside})`"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(summary: Summary) -> Figure:
    """Energy along the layers, a line a tail, with the intervals over networks."""
    kinds = summary["kinds"]
    figure = Figure(figsize=(3.4 * len(kinds), 3.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(kinds), sharey=True))
    colours = dict(zip(TAILS, ("tab:blue", "tab:green", "tab:orange"), strict=True))
    for axis, (kind, measured) in zip(axes, kinds.items(), strict=True):
        rows, layers = measured["rows"], list(KINDS[kind].layers)
        lines = {
            f"additive, {tail}": (colour, [fam_row("additive", at, tail) for at in layers])
            for tail, colour in colours.items()
        }
        lines["GradCAM"] = ("0.4", [f"GradCAM, {at}" for at in layers])
        for shift, (name, (colour, labels)) in enumerate(lines.items()):
            found = [over_networks(rows[label]["energy"]) for label in labels]
            axis.errorbar(
                np.arange(len(layers)) + 0.06 * (shift - 1.5),
                [one.value for one in found],
                [one.half for one in found],
                color=colour,
                marker="o",
                markersize=4,
                capsize=2,
                linestyle="--" if name == "GradCAM" else "-",
                label=name,
            )
        axis.axhline(0.25, color="0.7", linestyle=":")
        axis.set_title(kind, fontsize=10)
        axis.set_xticks(range(len(layers)), layers, rotation=40, ha="right", fontsize=8)
    axes[0].set_ylabel("energy on the match (dotted: chance)")
    axes[0].legend(fontsize=8, loc="upper left")
    axes[0].set_ylim(0, 1)
    return figure


def shown(found: Estimate) -> str:
    """A mean and half of its interval."""
    return f"{number(found.value)} ± {number(found.half)}"
