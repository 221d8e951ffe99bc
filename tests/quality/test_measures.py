"""Each measure against a plain loop over pixels, and what was measured as a table and a picture."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn.functional import interpolate

from fam_plugins.quality.measures import (
    MEASURES,
    Evaluation,
    perturbation,
    pointing,
    rank_correlation,
)


@pytest.fixture
def maps():
    return torch.randn(20, 4, 4, generator=torch.Generator().manual_seed(0)).round(decimals=1)


def quarter(cell, side):
    cells = torch.zeros(side, side, dtype=torch.bool)
    half = side // 2
    cells[half * (cell // 2) : half * (cell // 2) + half, half * (cell % 2) :][:, :half] = True
    return cells


def pointing_by_loops(enlarged, shown, cell):
    side, inside = len(shown), []
    for i in range(side):
        for j in range(side):
            inside.append((2 * i // side) * 2 + 2 * j // side == cell)
    values, positive = shown.flatten().tolist(), enlarged.flatten().tolist()
    total = sum(positive)
    energy = sum(v for v, ours in zip(positive, inside, strict=True) if ours) / total
    top = [ours for v, ours in zip(values, inside, strict=True) if v == max(values)]
    wins, pairs = 0.0, 0
    for v, ours in zip(values, inside, strict=True):
        for w, theirs in zip(values, inside, strict=True):
            if ours and not theirs:
                wins, pairs = wins + (v > w) + (v == w) / 2, pairs + 1
    return {"energy": energy, "point": sum(top) / len(top), "auc": wins / pairs}


@pytest.mark.parametrize("side", [4, 8])
def test_pointing_agrees_with_loops(maps, side):
    shown = interpolate(maps[:, None], (side, side), mode="bilinear")[:, 0]
    cells = torch.stack([quarter(k % 4, side) for k in range(len(maps))])
    found = pointing(maps, shown, cells)
    for k, one in enumerate(maps):
        positive = interpolate(one.clamp_min(0)[None, None], (side, side), mode="bilinear")[0, 0]
        for name, wanted in pointing_by_loops(positive, shown[k], k % 4).items():
            assert found[name][k].item() == pytest.approx(wanted, abs=1e-6), name


def test_a_map_without_a_preference_scores_chance():
    cells = torch.stack([quarter(k, 4) for k in range(4)])
    ones = torch.ones(4, 4, 4)
    found = pointing(ones, ones, cells)
    assert {name: values.tolist() for name, values in found.items()} == {
        "energy": [0.25] * 4,
        "point": [0.25] * 4,
        "auc": [0.5] * 4,
    }
    assert pointing(-ones, -ones, cells)["energy"].tolist() == [0] * 4


def test_rank_correlation_is_spearmans_also_on_ties(maps):
    other = maps.flip(0).clamp_min(0)
    found = rank_correlation(maps, other)
    for first, second, value in zip(maps, other, found, strict=True):
        wanted = spearmanr(first.flatten().numpy(), second.flatten().numpy()).statistic
        assert value.item() == pytest.approx(wanted)
    assert rank_correlation(maps, torch.ones(20, 4, 4)).isnan().all()


@pytest.mark.parametrize("steps", [100, 4])
def test_deletion_and_insertion_by_hand(steps):
    generator = torch.Generator().manual_seed(1)
    images, baseline = torch.rand(2, 2, 1, 20, 20, generator=generator)
    maps = torch.rand(2, 20, 20, generator=generator)
    weights = torch.rand(20, 20, generator=generator)

    def score(given):
        return (given * weights).square().sum(dim=(1, 2, 3))

    found = perturbation(score, images, baseline, maps, steps)
    for k in range(2):
        means = [
            (maps[k, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean().item(), i, j)
            for i in range(10)
            for j in range(10)
        ]
        for before, after, area in (
            (images[k], baseline[k], found[0][k]),
            (baseline[k], images[k], found[1][k]),
        ):
            now, curve = before.clone(), [score(before[None]).item()]
            for turn, (_, i, j) in enumerate(sorted(means, reverse=True), 1):
                now[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = after[
                    :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2
                ]
                if turn % (100 // steps) == 0:
                    curve.append(score(now[None]).item())
            wanted = sum((a + b) / 2 for a, b in pairwise(curve)) / steps
            assert area.item() == pytest.approx(wanted, rel=1e-4)


def test_equal_patches_go_in_random_order():
    torch.manual_seed(0)
    images = torch.zeros(300, 1, 10, 10)
    images[:, 0, 0, 0] = 1  # first in reading order: deleted at once, or last
    areas, _ = perturbation(
        lambda x: x.sum(dim=(1, 2, 3)), images, 0 * images, torch.zeros(300, 10, 10), 10
    )
    assert 0.4 < areas.mean().item() < 0.6
    assert areas.std().item() > 0.2


@pytest.fixture
def evaluation():
    rng = np.random.default_rng(0)
    columns = {name: rng.random(50) for name in MEASURES}
    better = {name: values + 1 for name, values in columns.items()}
    return Evaluation(
        {"first": columns, "second": better | {"additivity": np.full(50, np.nan)}}, 0.5
    )


def test_a_difference_is_paired(evaluation):
    mean, low, high = evaluation.difference("second", "first", "energy")
    assert (mean, low, high) == pytest.approx((1, 1, 1))
    assert all(map(math.isnan, evaluation.difference("second", "first", "additivity")))
    values = evaluation.values["first"]["point"]
    _, low, high = Evaluation(
        {"a": {"point": values}, "b": {"point": values.mean() + 0 * values}}, 1
    ).difference("a", "b", "point")
    half = 1.96 * values.std() / math.sqrt(50)
    assert (-low, high) == pytest.approx((half, half), rel=0.15)


def test_the_table_and_the_picture_show_every_method_and_measure(evaluation):
    head, rule, first, second = str(evaluation).splitlines()
    assert head == "| method | " + " | ".join(MEASURES.values()) + " |"
    assert rule.count("|") == head.count("|") == first.count("|") == len(MEASURES) + 2
    mean = evaluation.values["first"]["energy"].mean()
    assert first.startswith(f"| first | {mean:.3f} ± 0.0")
    assert second.endswith("| - |")
    figure = evaluation.plot()
    assert len(figure.axes) == len(MEASURES)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["first", "second"]
    drawn = figure.axes[1].containers[0].lines[0].get_xdata()
    assert drawn.tolist() == pytest.approx(
        [evaluation.values[label]["point"].mean() for label in ("first", "second")]
    )
