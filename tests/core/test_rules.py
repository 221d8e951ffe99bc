"""Rules against plain loops, hand-computed maps, and the authors' released numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fam_plugins import Rule
from fam_plugins.core.maps import maps_of
from fam_plugins.core.references import prototypes
from fam_plugins.core.rules import RULES, fam_weights, find_rule

REFERENCE = Path(__file__).parents[1] / "data" / "fam_reference.npz"


def tensors(regions: int = 6, scores: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations ``[2, 4, R]`` and gradients ``[2, k, 4, R]``."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 4, regions, generator=generator, dtype=torch.float64)
    return a, torch.randn(2, scores, 4, regions, generator=generator, dtype=torch.float64)


def by_loops(rule: str, activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """One image, one score, one channel, one region at a time: ``[B, k, C, R]``."""
    full = torch.zeros(gradients.shape[:3] + activations.shape[2:], dtype=activations.dtype)
    for image in range(len(activations)):
        a = activations[image].tolist()
        channels, regions = len(a), len(a[0])
        for number, of_score in enumerate(gradients[image]):
            g = of_score.expand(-1, regions).tolist()
            shares = [sum(a[k][r] * g[k][r] for r in range(regions)) for k in range(channels)]
            low, high = min(shares), max(shares)
            for k in range(channels):
                if rule == "fam":
                    w = (shares[k] - low) / (high - low) if high > low else float(low != 0)
                    row = [w * value for value in a[k]]
                elif rule == "gradcam":
                    w = sum(g[k]) / regions
                    row = [w * value for value in a[k]]
                else:
                    row = [x * y for x, y in zip(a[k], g[k], strict=True)]
                    mean = sum(row) / regions if rule == "centred" else 0.0
                    row = [value - mean for value in row]
                full[image, number, k] = torch.tensor(row, dtype=full.dtype)
    return full


def finished(rule, activations, gradients, **options):
    return maps_of(RULES[rule], activations, gradients, smooth=False, **options)[0]


@pytest.mark.parametrize("scores", [1, 3])
@pytest.mark.parametrize("regions", [1, 6])
@pytest.mark.parametrize("rule", sorted(RULES))
class TestRule:
    @pytest.mark.parametrize("pooled", [False, True])
    def test_equals_plain_loops(self, rule, regions, scores, pooled):
        a, g = tensors(regions, scores)
        g = g[..., :1] if pooled else g
        expected = by_loops(rule, a, g)
        full = finished(rule, a, g, sum_channels=False)
        torch.testing.assert_close(full, expected, rtol=1e-12, atol=1e-12)
        summed = finished(rule, a, g)
        assert summed.shape == (2, scores, 1, regions)
        torch.testing.assert_close(summed, expected.sum(2, keepdim=True), rtol=1e-12, atol=1e-12)

    def test_permuting_channels_changes_nothing(self, rule, regions, scores):
        a, g = tensors(regions, scores)
        order = torch.randperm(4)
        permuted = finished(rule, a[:, order], g[:, :, order])
        torch.testing.assert_close(permuted, finished(rule, a, g))

    def test_memory_layout_changes_nothing(self, rule, regions, scores):
        a, g = tensors(regions, scores)
        moved = a.transpose(0, -1).contiguous().transpose(0, -1)
        torch.testing.assert_close(finished(rule, moved, g), finished(rule, a, g))


@pytest.mark.parametrize("tag", ["relu", "signed"])
@pytest.mark.parametrize("shots", [1, 4])
def test_equals_the_authors_released_code(tag, shots):
    with np.load(REFERENCE) as data:
        get = {
            name: torch.from_numpy(data[f"{tag}_{name}"])
            for name in ("activations", "supports", f"weights_{shots}shot", f"map_{shots}shot")
        }
    a = get["activations"].flatten(2)
    q = a.mean(dim=2)
    t = torch.stack([prototypes(s[:shots], [0] * shots)[0] for s in get["supports"]])
    direction = t / t.norm(dim=1, keepdim=True) / q.norm(dim=1, keepdim=True)
    pooled = (direction / 35)[:, None, :, None]
    expected = get[f"map_{shots}shot"].flatten(1)
    for g in (pooled, pooled.expand(-1, -1, -1, 35)):
        weights = fam_weights(a, g)[:, 0, :, 0]
        torch.testing.assert_close(weights, get[f"weights_{shots}shot"], rtol=0, atol=1e-12)
        found = RULES["fam"].apply(a, g)[:, 0, 0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_map_computed_by_hand():
    a = torch.tensor([[[1.0, 3.0], [2.0, 0.0], [4.0, 4.0]]])
    g = torch.tensor([1.0, 0.5, 0.25]).reshape(1, 1, 3, 1)
    # contributions 4, 1, 2 -> weights 1, 0, 1/3
    for rule, expected in (
        ("fam", [1 + 4 / 3, 3 + 4 / 3]),
        ("additive", [3.0, 4.0]),
        ("centred", [-0.5, 0.5]),
        ("gradcam", [3.0, 4.0]),
    ):
        torch.testing.assert_close(finished(rule, a, g), torch.tensor([[[expected]]]))


def test_constant_contributions_weigh_every_channel_alike():
    assert fam_weights(torch.ones(2, 3, 1), torch.full((2, 1, 3, 1), 0.4)).eq(1).all()
    assert fam_weights(torch.ones(2, 3, 1), torch.full((2, 1, 3, 1), -0.4)).eq(1).all()


def test_where_no_channel_contributes_none_weighs():
    assert fam_weights(torch.ones(2, 3, 1), torch.zeros(2, 1, 3, 1)).eq(0).all()


def test_fam_is_the_weighted_sum_minus_the_channel_sum():
    a, g = tensors()
    c = (a[:, None] * g).sum(3)
    low, high = c.amin(2, keepdim=True), c.amax(2, keepdim=True)
    weighted = torch.einsum("bcr,bkc->bkr", a, c) - low * a.sum(1)[:, None]
    torch.testing.assert_close(RULES["fam"].apply(a, g)[:, :, 0], weighted / (high - low))


def test_centred_sums_to_zero_and_additive_to_the_contributions():
    a, g = tensors()
    assert finished("centred", a, g).sum(dim=(2, 3)).abs().max() < 1e-12
    shares = RULES["additive"].apply(a, g).sum(dim=(2, 3))
    torch.testing.assert_close(shares, (a[:, None] * g).sum(dim=(2, 3)))


@pytest.mark.parametrize(
    "weights",
    [
        lambda a, g: g.sum(dim=3),
        lambda a, g: g[:, :1].expand(-1, 2, -1, -1),
        lambda a, g: g[..., :2],
    ],
)
def test_a_rule_that_returns_another_shape_is_refused(weights):
    a, g = tensors()
    with pytest.raises(ValueError, match=r"'mine' returns weights of shape.*return \[2, 3, 4, 6\]"):
        Rule("mine", weights).apply(a, g)


def test_a_rule_is_found_by_name_or_is_one():
    mine = Rule("mine", lambda a, g: g)
    assert find_rule(mine) is mine
    with pytest.raises(ValueError, match="did you mean 'centred'"):
        find_rule("centered")
    with pytest.raises(TypeError, match="a name such as 'centred' or a Rule, not 3"):
        find_rule(3)


def test_units_say_what_the_numbers_are():
    assert RULES["additive"].unit == "share of the score"
    assert RULES["centred"].unit == "share of the score above the image's mean"
    assert len({rule.unit for rule in RULES.values()}) == len(RULES)
    assert Rule("mine", lambda a, g: g).unit == "attribution"


def test_leaving_the_rule_out_warns_once_per_process_at_the_users_line():
    code = (
        "import warnings\n"
        "from torch import nn\n"
        "from fam_plugins import FAM, LayerFam\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    LayerFam(nn.ReLU(), '0', rule='fam')\n"
        "    print(len(caught))\n"
        "    first = LayerFam(nn.Sequential(nn.ReLU()), '0')\n"
        "    FAM(nn.Sequential(nn.ReLU()), ['0'])\n"
        "print(len(caught), caught[0].filename, caught[0].lineno, first.rule.name)\n"
        "print(caught[0].message)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, where, message = out.stdout.splitlines()
    assert before == "0"
    assert where == "1 <string> 8 fam"
    assert "hardly depends on the target (on a classifier: not at all)" in message
    assert 'rule="centred"' in message
