"""Distances of other libraries and functions of users, against the objects themselves."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fam_plugins import LayerFam, SimilarityModel, explain_pair, prototypes
from fam_plugins.core.scores import frozen_scores, score
from fam_plugins.core.similarity import as_similarity, find_similarity, on_unit_length
from tests.networks import encoder

IMAGES = torch.randn(3, 3, 8, 10, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def metric_learning():
    return pytest.importorskip("pytorch_metric_learning.distances")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("CosineSimilarity", {}),
        ("DotProductSimilarity", {}),
        ("DotProductSimilarity", {"normalize_embeddings": False}),
        ("LpDistance", {}),
        ("LpDistance", {"power": 2}),
        ("LpDistance", {"normalize_embeddings": False}),
        ("LpDistance", {"normalize_embeddings": False, "power": 2}),
    ],
)
def test_pytorch_metric_learning_is_reproduced(name, options):
    distance = getattr(metric_learning(), name)(**options)
    model = SimilarityModel(encoder(), ROWS, similarity=distance)
    theirs = distance(encoder()(IMAGES), ROWS) * (1 if distance.is_inverted else -1)
    torch.testing.assert_close(model(IMAGES), theirs, rtol=1e-6, atol=1e-6)
    LayerFam(model, "last").attribute_references(IMAGES)
    assert torch.equal(copy.deepcopy(model)(IMAGES), model(IMAGES))


def test_what_cannot_be_split_is_refused_with_the_reason():
    distances = metric_learning()
    for distance, message in (
        (distances.LpDistance(p=1), "p=1, and only the Euclidean norm.*lambda z, t: -distance"),
        (distances.LpDistance(power=3), "power=3, and only power 1 or 2"),
        (distances.CosineSimilarity(power=2), r"power=2.*lambda z, t: distance\(z, t\)"),
        (distances.SNRDistance(), "no dot product, cosine or Euclidean distance"),
    ):
        with pytest.raises(ValueError, match=message):
            SimilarityModel(encoder(), ROWS, similarity=distance)
    with pytest.raises(TypeError, match="not int"):
        SimilarityModel(encoder(), ROWS, similarity=3)


class Distance:
    """What a normalising distance of pytorch-metric-learning looks like."""

    is_inverted, normalize_embeddings, p, power = False, True, 2, 1

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, z, t):
        return self.factor * torch.cdist(F.normalize(z), F.normalize(t))


def test_a_distance_at_unit_length_averages_supports_at_unit_length():
    rows = prototypes(ROWS[:4], [0, 1, 0, 1], Distance())
    for number, row in enumerate(rows):
        shots = [ROWS[i] / ROWS[i].norm() for i in (number, number + 2)]
        torch.testing.assert_close(row, (shots[0] + shots[1]) / 2)


def test_a_distance_that_differs_by_a_hundredth_is_refused():
    assert as_similarity(Distance()).name == "euclidean at unit length"
    with pytest.raises(ValueError, match="Distance computes no dot product, cosine or Euclidean"):
        as_similarity(Distance(1.01))


def test_frozen_distance_is_the_euclidean_direction_over_twice_the_distance():
    z = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    rows = ROWS.double()
    with frozen_scores():
        plain = score("euclidean", z, rows)
        unit = score(on_unit_length(find_similarity("euclidean")), z, rows)
    for i in range(2):
        for j in range(5):
            found = torch.autograd.grad(plain[i, j], z, retain_graph=True)[0][i]
            distance = (z[i] - rows[j]).norm().detach()
            torch.testing.assert_close(plain[i, j].detach(), -distance)
            torch.testing.assert_close(found, rows[j] / distance)
            found = torch.autograd.grad(unit[i, j], z, retain_graph=True)[0][i]
            t = rows[j] / rows[j].norm()
            apart = (z[i] / z[i].norm() - t).norm().detach()
            torch.testing.assert_close(found, t / apart / z[i].norm().detach())


def test_distance_zero_gives_no_nan():
    net = encoder()
    model = SimilarityModel(net, net(IMAGES), similarity="euclidean")
    for rule in ("additive", "gradcam"):
        assert torch.isfinite(LayerFam(model, "last", rule=rule).attribute(IMAGES, 0)).all()


def soft(z, t):
    """Couples its references, as a softmax does."""
    return F.log_softmax(z @ t.T, dim=1)


@pytest.mark.parametrize("rule", ["additive", "centred", "gradcam"])
def test_a_function_of_the_user_works_through_its_true_gradient(rule):
    net = encoder()
    model = SimilarityModel(net, ROWS, similarity=soft)
    torch.testing.assert_close(model(IMAGES), soft(net(IMAGES), ROWS))
    assert model.similarity == "soft"
    maps = LayerFam(model, "last", rule=rule).attribute_references(IMAGES, [[3, 1]] * 3)
    plain = torch.nn.Sequential(net, Softly())
    for j, target in enumerate((3, 1)):
        expected = LayerFam(plain, net.last, rule=rule).attribute(IMAGES, target)
        torch.testing.assert_close(maps[:, j], expected, rtol=1e-5, atol=1e-6)


class Softly(torch.nn.Module):
    def forward(self, z):
        return soft(z, ROWS)


def test_a_function_in_a_pair_sees_one_pair_at_a_time():
    pair = explain_pair(encoder(), "last", IMAGES, IMAGES.flip(0), similarity=soft)
    assert torch.equal(pair.score, torch.zeros(3))  # the logarithm of a softmax over one


def test_a_function_that_returns_something_else_is_refused():
    model = SimilarityModel(encoder(), ROWS, similarity=lambda z, t: (z @ t.T).sum(1))
    with pytest.raises(ValueError, match=r"returns \(3,\).*return scores \[B, N\]"):
        model(IMAGES)
    assert as_similarity(soft).linear is None


def test_a_function_is_refused_on_a_gallery_read_in_parts(tmp_path):
    np.save(tmp_path / "g.npy", ROWS.numpy())
    with pytest.raises(ValueError, match="scored in parts"):
        SimilarityModel(encoder(), np.load(tmp_path / "g.npy", mmap_mode="r"), similarity=soft)
