"""Scores and frozen scores against plain loops, and the identities they must keep."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from fam_plugins.core.scores import Frozen, frozen_scores, score
from fam_plugins.core.similarity import SIMILARITIES, find_similarity

NAMES = sorted(SIMILARITIES)


def vectors(rows: int, width: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def by_loop(name: str, z: list[float], t: list[float]) -> float:
    dot = sum(a * b for a, b in zip(z, t, strict=True))
    if name == "dot":
        return dot
    if name.endswith("euclidean"):
        squared = sum((a - b) ** 2 for a, b in zip(z, t, strict=True))
        return -squared if name == "sqeuclidean" else -math.sqrt(squared)
    return dot / math.sqrt(sum(a * a for a in z)) / math.sqrt(sum(b * b for b in t))


def frozen_gradient_by_hand(name: str, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return {
        "cosine": t / t.norm() / z.norm(),
        "dot": t,
        "sqeuclidean": 2 * t,
        "euclidean": t / (z - t).norm(),
    }[name]


@pytest.mark.parametrize("name", NAMES)
class TestScore:
    def test_equals_plain_loops(self, name):
        z, t = vectors(3), vectors(4, seed=1)
        expected = [[by_loop(name, a.tolist(), b.tolist()) for b in t] for a in z]
        torch.testing.assert_close(
            score(name, z, t), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )

    def test_larger_is_more_alike(self, name):
        t = torch.eye(3, dtype=torch.float64)
        assert score(name, t[:1] + 0.1 * t[1:2], t).argmax() == 0

    def test_gradient_is_the_true_one(self, name):
        z, t = vectors(2).requires_grad_(), vectors(3, seed=1)
        assert torch.autograd.gradcheck(lambda x: score(name, x, t), (z,))

    def test_frozen_keeps_the_value_and_changes_the_gradient(self, name):
        z, t = vectors(2).requires_grad_(), vectors(3, seed=1)
        with frozen_scores():
            frozen = score(name, z, t)
        torch.testing.assert_close(frozen, score(name, z, t), rtol=1e-12, atol=1e-12)
        (grad,) = torch.autograd.grad(frozen[:, 2].sum(), z)
        for row in range(2):
            expected = frozen_gradient_by_hand(name, z[row].detach(), t[2])
            torch.testing.assert_close(grad[row], expected, rtol=1e-12, atol=1e-12)

    def test_replay_is_the_same_linear_function(self, name):
        z, t = vectors(2).requires_grad_(), vectors(3, seed=1)
        with frozen_scores() as frozen:
            at_z = score(name, z, t)
        (grad,) = torch.autograd.grad(at_z[:, 1].sum(), z)
        with frozen_scores(frozen, replay=True):
            at_zero = score(name, torch.zeros_like(z), t)
        torch.testing.assert_close(
            (grad * z).sum(1) + at_zero[:, 1], at_z[:, 1], rtol=1e-12, atol=1e-12
        )

    def test_contrast_subtracts_the_mean(self, name):
        z, t, c = vectors(2), vectors(3, seed=1), vectors(5, seed=2)
        plain = score(name, z, t)
        expected = plain - score(name, z, c).mean(dim=1, keepdim=True)
        torch.testing.assert_close(score(name, z, t, c), expected)
        others = torch.stack(
            [plain[:, j] - plain[:, [i for i in range(3) if i != j]].mean(1) for j in range(3)], 1
        )
        torch.testing.assert_close(score(name, z, t, "others"), others)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_compared_in_float32(self, name, dtype):
        z, t = vectors(2).to(dtype), vectors(3, seed=1).to(dtype)
        result = score(name, z, t)
        assert result.dtype == dtype
        torch.testing.assert_close(result, score(name, z.float(), t.float()).to(dtype))

    def test_autocast_does_not_coarsen_it(self, name):
        z, t = vectors(2).float(), vectors(3, seed=1).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = score(name, z, t)
        assert torch.equal(result, score(name, z, t))

    def test_not_a_number_is_refused(self, name):
        z = vectors(2)
        z[1, 0] = math.nan
        with pytest.raises(ValueError, match=r"row 1 holds NaN .* check the images"):
            score(name, z, vectors(3))

    def test_another_width_is_refused(self, name):
        with pytest.raises(ValueError, match="7 values and the references have 6.*same encoder"):
            score(name, vectors(2), vectors(3, 6))


def test_zero_embeddings_and_references_score_zero_under_cosine():
    zero = torch.zeros(1, 7, dtype=torch.float64)
    for frozen in (True, False):
        z = torch.cat([vectors(2), zero]).requires_grad_()
        with frozen_scores() if frozen else nullcontext():
            scores = score("cosine", z, torch.cat([vectors(2), zero]))
        (grad,) = torch.autograd.grad(scores[:, 0].sum(), z)
        assert scores[2].eq(0).all()
        assert scores[:, 2].eq(0).all()
        assert grad[2].eq(0).all()
        assert grad[:2].abs().sum() > 0
    assert score("sqeuclidean", zero, vectors(2)).lt(0).all()


@pytest.mark.parametrize("length", [1e-30, 1e-22, 1e19, 1e30])
def test_cosine_is_right_at_any_length_of_float32(length):
    z, t = vectors(2).float(), vectors(3, seed=1).float()
    expected = score("cosine", z, t)
    torch.testing.assert_close(score("cosine", length * z, t), expected)
    torch.testing.assert_close(score("cosine", z, length * t), expected)
    far = (length * z).requires_grad_()
    with frozen_scores():
        frozen = score("cosine", far, t)
    torch.testing.assert_close(frozen.detach(), expected)
    (grad,) = torch.autograd.grad(frozen[:, 1].sum(), far)
    torch.testing.assert_close((grad * far).sum(1), expected[:, 1])


def test_float16_scores_are_finite_or_refused():
    z = torch.full((1, 2048), 100.0, dtype=torch.float16)
    assert score("cosine", z, z).item() == 1
    for name in ("dot", "sqeuclidean"):
        with pytest.raises(ValueError, match="do not fit into float16: score in bfloat16"):
            score(name, z, -z)


def test_euclidean_gradient_at_distance_zero_is_finite():
    z = vectors(1).requires_grad_()
    (grad,) = torch.autograd.grad(score("sqeuclidean", z, z.detach()).sum(), z)
    assert grad.eq(0).all()


@pytest.mark.parametrize(("name", "power"), [("sqeuclidean", 2), ("euclidean", 1)])
def test_small_distances_of_long_vectors_survive(name, power):
    t = torch.full((30, 512), 10.0)  # from 26 rows on cdist would multiply matrices
    expected = torch.full((30, 30), -((2**-10 * 512**0.5) ** power))
    torch.testing.assert_close(score(name, t + 2**-10, t), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_references_and_contrast_may_have_another_dtype(name):
    z, t, c = vectors(2), vectors(3, seed=1), vectors(4, seed=2)
    found = score(name, z.float(), t, c.half())
    assert found.dtype == torch.float64
    expected = score(name, z.float().double(), t, c.half().double())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert score(name, z.half(), t.float(), c).dtype == torch.float32


def test_large_values_are_not_taken_for_infinite_ones():
    for z in (torch.full((1, 7), 1e38), torch.full((1, 4096), 300.0, dtype=torch.float16)):
        torch.testing.assert_close(score("cosine", z, z), torch.ones(1, 1, dtype=z.dtype))


def test_scaling_a_reference_changes_nothing_under_cosine():
    z, t = vectors(2), vectors(3, seed=1)
    torch.testing.assert_close(score("cosine", z, t), score("cosine", z, 1e9 * t))


def test_unknown_similarity_suggests_the_closest():
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        find_similarity("cosin")
    for name in ("l2", "L2"):
        with pytest.raises(ValueError, match="did you mean 'euclidean' .* or 'sqeuclidean'"):
            find_similarity(name)


def test_freezing_ends_with_the_block_even_on_an_error():
    z = vectors(1).requires_grad_()
    with pytest.raises(KeyError), frozen_scores():
        raise KeyError
    (grad,) = torch.autograd.grad(score("cosine", z, vectors(1, seed=1)).sum(), z)
    assert abs((grad * z).sum()) < 1e-12, "the true gradient of a cosine is orthogonal to z"


def test_contrast_is_noticed():
    frozen = Frozen()
    with frozen_scores(frozen):
        score("dot", vectors(1), vectors(2))
        assert not frozen.contrasted
        score("dot", vectors(1), vectors(2), "others")
        score("dot", vectors(1), vectors(2))
    assert frozen.contrasted
