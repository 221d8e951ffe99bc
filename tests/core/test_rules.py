"""Rules against plain loops, hand-computed maps, and the authors' released numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fam_plugins.core.references import prototypes
from fam_plugins.core.rules import RULES, contributions, fam_weights, find_rule

SHAPES = [(2, 4), (2, 4, 6), (2, 4, 3, 5), (2, 4, 2, 3, 5)]
REFERENCE = Path(__file__).parents[1] / "data" / "fam_reference.npz"


def pair(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return a, g


def by_loops(rule: str, activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """One image, one channel, one region at a time."""
    full = torch.zeros_like(activation)
    for image in range(len(activation)):
        a = (
            activation[image].flatten(1).tolist()
            if activation.dim() > 2
            else [[value] for value in activation[image].tolist()]
        )
        g = (
            gradient[image].flatten(1).tolist()
            if gradient.dim() > 2
            else [[value] for value in gradient[image].tolist()]
        )
        channels, regions = len(a), len(a[0])
        shares = [sum(a[k][r] * g[k][r] for r in range(regions)) for k in range(channels)]
        low, high = min(shares), max(shares)
        rows = []
        for k in range(channels):
            if rule == "fam":
                w = (shares[k] - low) / (high - low) if high > low else 1.0
                rows.append([w * value for value in a[k]])
            elif rule == "gradcam":
                w = sum(g[k]) / regions
                rows.append([w * value for value in a[k]])
            else:
                row = [x * y for x, y in zip(a[k], g[k], strict=True)]
                mean = sum(row) / regions if rule == "centred" else 0.0
                rows.append([value - mean for value in row])
        full[image] = torch.tensor(rows, dtype=full.dtype).reshape(activation.shape[1:])
    return full


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s)}-D")
@pytest.mark.parametrize("rule", sorted(RULES))
class TestRule:
    def test_equals_plain_loops(self, rule, shape):
        a, g = pair(shape)
        expected = by_loops(rule, a, g)
        full = RULES[rule].map(a, g, sum_channels=False)
        torch.testing.assert_close(full, expected, rtol=1e-12, atol=1e-12)
        summed = RULES[rule].map(a, g)
        torch.testing.assert_close(summed, expected.sum(1, keepdim=True), rtol=1e-12, atol=1e-12)
        assert summed.shape == (2, 1, *shape[2:])

    def test_permuting_channels_changes_nothing(self, rule, shape):
        a, g = pair(shape)
        order = torch.randperm(shape[1])
        torch.testing.assert_close(RULES[rule].map(a[:, order], g[:, order]), RULES[rule].map(a, g))

    def test_memory_layout_changes_nothing(self, rule, shape):
        a, g = pair(shape)
        moved = a.transpose(0, -1).contiguous().transpose(0, -1)
        torch.testing.assert_close(RULES[rule].map(moved, g), RULES[rule].map(a, g))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_summed_in_float32(self, rule, shape, dtype):
        a, g = (x.to(dtype) for x in pair(shape))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = RULES[rule].map(a, g)
        assert result.dtype == dtype
        expected = RULES[rule].map(a.float(), g.float()).to(dtype)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("tag", ["relu", "signed"])
@pytest.mark.parametrize("shots", [1, 4])
def test_equals_the_authors_released_code(tag, shots):
    with np.load(REFERENCE) as data:
        get = {
            name: torch.from_numpy(data[f"{tag}_{name}"])
            for name in ("activations", "supports", f"weights_{shots}shot", f"map_{shots}shot")
        }
    a = get["activations"]
    q = a.mean(dim=(2, 3))
    t = torch.stack([prototypes(s[:shots], [0] * shots)[0] for s in get["supports"]])
    direction = t / t.norm(dim=1, keepdim=True) / q.norm(dim=1, keepdim=True)
    g = (direction / 35)[:, :, None, None].expand_as(a)
    torch.testing.assert_close(
        fam_weights(contributions(a, g)), get[f"weights_{shots}shot"], rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        RULES["fam"].map(a, g)[:, 0], get[f"map_{shots}shot"], rtol=0, atol=1e-12
    )


def test_a_map_computed_by_hand():
    activation = torch.tensor([[[1.0, 3.0], [2.0, 0.0], [4.0, 4.0]]])
    gradient = torch.tensor([[[1.0, 1.0], [0.5, 0.5], [0.25, 0.25]]])
    # contributions 4, 1, 2 -> weights 1, 0, 1/3
    expected = torch.tensor([[[1 + 4 / 3, 3 + 4 / 3]]])
    torch.testing.assert_close(RULES["fam"].map(activation, gradient), expected)
    torch.testing.assert_close(
        RULES["additive"].map(activation, gradient), torch.tensor([[[3.0, 4.0]]])
    )
    torch.testing.assert_close(
        RULES["centred"].map(activation, gradient), torch.tensor([[[-0.5, 0.5]]])
    )


def test_constant_contributions_weigh_every_channel_alike():
    assert fam_weights(torch.full((2, 3), 0.4)).eq(1).all()


def test_fam_is_the_weighted_sum_minus_the_channel_sum():
    a, g = pair((2, 4, 3, 5))
    c = contributions(a, g)
    low, high = c.amin(1), c.amax(1)
    weighted = torch.einsum("bchw,bc->bhw", a, c) - low[:, None, None] * a.sum(1)
    torch.testing.assert_close(RULES["fam"].map(a, g)[:, 0], weighted / (high - low)[:, None, None])


def test_centred_sums_to_zero_and_additive_to_the_contributions():
    a, g = pair((2, 4, 3, 5))
    assert RULES["centred"].map(a, g).sum(dim=(1, 2, 3)).abs().max() < 1e-12
    torch.testing.assert_close(
        RULES["additive"].map(a, g).sum(dim=(1, 2, 3)), contributions(a, g).sum(1)
    )


def test_unknown_rule_suggests_the_closest():
    with pytest.raises(ValueError, match="did you mean 'centred'"):
        find_rule("centered")
