"""Measure every row on one network: means over its images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor, nn
from tqdm.auto import tqdm

from fam_plugins import LayerFam
from fam_plugins.quality import evaluate
from fam_plugins.quality.evaluate import explain
from fam_plugins.quality.measures import rank_correlation
from tests.benchmarks.quality.methods import SETTINGS, explainers, row
from tests.benchmarks.quality.problems import Problem
from tests.benchmarks.quality.randomise import randomised, stages

Means = dict[str, dict[str, float]]
"""Row -> measure -> mean over the images of one network; NaN where it is undefined."""


@dataclass(frozen=True)
class Counts:
    """How much is measured."""

    mosaics: int = 40
    singles: int = 40
    steps: int = 10
    randomised: int = 5


def measure(problem: Problem, counts: Counts, seed: int) -> tuple[Means, float]:
    """Means by row, and the accuracy of the nearest reference."""
    rows: Means = {}
    for contrast, smooth in tqdm(SETTINGS, desc="contrasts and smoothing", leave=False):
        found = evaluate(
            explainers(contrast, smooth),
            **vars(problem),
            contrast=contrast,
            smooth=smooth,
            mosaics=counts.mosaics,
            singles=counts.singles,
            steps=counts.steps,
            seed=seed,
        )
        for name, columns in found.values.items():
            means = {measure: _mean(values) for measure, values in columns.items()}
            for kind in ("mosaic", "single"):
                gap = columns[f"{kind} insertion"] - columns[f"{kind} deletion"]
                means[f"{kind} faithfulness"] = _mean(gap)
            rows[row(name, contrast, smooth)] = means
    for columns in rows.values():
        columns["randomisation"] = float("nan")
    for name, value in _randomisation(problem, counts.randomised, seed).items():
        rows[row(name, "others", True)]["randomisation"] = value
    return rows, found.accuracy


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _randomisation(problem: Problem, count: int, seed: int) -> dict[str, float]:
    """Mean over the cascade of the rank correlation with the maps of the trained network."""
    trained = _maps(problem, count, seed)
    found: dict[str, list[float]] = {name: [] for name in trained}
    reset: list[str] = []
    for part in stages(problem.encoder):
        reset = reset + part
        asked = replace(problem, encoder=randomised(problem.encoder, reset, seed))
        for name, maps in _maps(asked, count, seed).items():
            found[name].append(_mean(rank_correlation(trained[name], maps).numpy()))
    return {name: _mean(np.array(values)) for name, values in found.items()}


def _maps(problem: Problem, count: int, seed: int) -> dict[str, Tensor]:
    """Smoothed maps of the same mosaics, contrast others, by name."""
    methods = explainers("others", True)
    seen: dict[str, list[Tensor]] = {name: [] for name in methods}

    def keep(
        name: str, model: nn.Module, layer: nn.Module, images: Tensor, targets: Tensor
    ) -> Tensor:
        given = methods[name]
        if isinstance(given, str):
            given = partial(LayerFam, rule=given)
        maps, _ = explain(given, model, layer, images, targets, True)
        seen[name].append(maps)
        return maps

    evaluate(
        {name: partial(keep, name) for name in methods if name != "ScoreCAM"},
        **vars(problem),
        mosaics=count,
        singles=1,
        steps=1,
        seed=seed,
    )
    # The first call explains the mosaics' own class, as long as they are one batch.
    return {name: maps[0] for name, maps in seen.items() if maps}
