"""The mathematics of the rules, measured on whole networks through both adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from fam_plugins import FAM, LayerFam, SimilarityModel, prototypes
from fam_plugins.core.scores import frozen_scores, score
from tests.contracts.explainers import fam, layer_fam
from tests.networks import classifier, encoder, pooled

REFERENCE = Path(__file__).parents[1] / "data" / "fam_reference.npz"
IMAGES = torch.randn(3, 3, 8, 10, generator=torch.Generator().manual_seed(0)).double()
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()
both = pytest.mark.parametrize("make", [layer_fam, fam], ids=["LayerFam", "FAM"])
each_similarity = pytest.mark.parametrize("similarity", ["cosine", "dot", "sqeuclidean"])


@both
@pytest.mark.parametrize("tag", ["relu", "signed"])
@pytest.mark.parametrize("shots", [1, 4])
def test_maps_equal_the_authors_released_code(make, tag, shots):
    with np.load(REFERENCE) as data:
        images = torch.from_numpy(data[f"{tag}_activations"])
        supports = torch.from_numpy(data[f"{tag}_supports"])
        expected = torch.from_numpy(data[f"{tag}_map_{shots}shot"])
    rows = torch.cat([prototypes(s[:shots], [0] * shots) for s in supports])
    model = SimilarityModel(pooled(), rows)
    maps = make("fam").explain(model, "0", images, [0, 1, 2])
    torch.testing.assert_close(maps[:, 0], expected, rtol=0, atol=1e-12)


@both
@each_similarity
@pytest.mark.parametrize("contrast", [None, "others"])
def test_additive_sums_to_the_score(make, similarity, contrast):
    model = SimilarityModel(encoder().double(), ROWS, similarity=similarity, contrast=contrast)
    maps = make("additive").explain(model, "last", IMAGES, [2, 2, 2])
    with torch.no_grad():
        scores = model(IMAGES)[:, 2]
        if similarity == "sqeuclidean":  # the frozen score has no -|z|^2; under contrast it cancels
            constant = -ROWS.square().sum(1)
            if contrast == "others":
                constant = constant[2] - constant[[0, 1, 3]].mean()
            else:
                constant = constant[2] - model.embed(IMAGES).square().sum(1)
            scores = scores - constant
    torch.testing.assert_close(maps.sum(dim=(1, 2, 3)), scores, rtol=1e-12, atol=1e-12)


@both
def test_additive_is_cam_on_a_classifier(make):
    net = classifier().double()
    maps = make("additive").explain(net, "last", IMAGES, [1, 1, 1])
    features = net.last(net.features(net.relu(net.norm(net.conv(IMAGES)))))
    cam = torch.einsum("bchw,c->bhw", features, net.head.weight[1]) / 20
    torch.testing.assert_close(maps[:, 0], cam.detach(), rtol=1e-12, atol=1e-12)
    logit = net(IMAGES)[:, 1] - net.head.bias[1]
    torch.testing.assert_close(maps.sum(dim=(1, 2, 3)), logit.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.true_gradient
@both
def test_gradcam_of_a_cosine_sums_to_zero_and_fam_does_not(make):
    model = SimilarityModel(encoder().double(), ROWS.abs())
    assert (
        make("gradcam").explain(model, "last", IMAGES, [0] * 3).sum(dim=(1, 2, 3)).abs().max()
        < 1e-12
    )
    assert make("fam").explain(model, "last", IMAGES, [0] * 3).sum(dim=(1, 2, 3)).abs().min() > 0.1


@pytest.mark.true_gradient
@both
def test_gradcam_of_an_image_with_itself_is_zero_and_additive_is_not(make):
    model = SimilarityModel(encoder().double(), IMAGES)
    assert make("gradcam").explain(model, "last", IMAGES, [0, 1, 2]).abs().max() < 1e-12
    maps = make("additive").explain(model, "last", IMAGES, [0, 1, 2])
    torch.testing.assert_close(maps.sum(dim=(1, 2, 3)), torch.ones(3).double())


@pytest.mark.true_gradient
@both
def test_gradcam_of_a_pooled_cosine_has_a_closed_form(make):
    model = SimilarityModel(encoder().double(), ROWS)
    maps = make("gradcam").explain(model, "last", IMAGES, [1] * 3)
    net = model.encoder
    with torch.no_grad():
        features = net.last(net.features(net.relu(net.norm(net.conv(IMAGES)))))
        q = features.mean(dim=(2, 3))
        unit, t = q / q.norm(dim=1, keepdim=True), ROWS[1] / ROWS[1].norm()
        weights = (t - (unit @ t)[:, None] * unit) / (20 * q.norm(dim=1, keepdim=True))
        expected = torch.einsum("bchw,bc->bhw", features, weights)
    torch.testing.assert_close(maps[:, 0], expected, rtol=1e-10, atol=1e-12)


@both
@pytest.mark.parametrize("rule", ["fam", "additive", "centred"])
def test_scaling_a_reference_changes_nothing_under_cosine(make, rule):
    one, two = (SimilarityModel(encoder().double(), ROWS * c) for c in (1, 1000))
    explain = make(rule).explain
    torch.testing.assert_close(
        explain(one, "last", IMAGES, [0] * 3), explain(two, "last", IMAGES, [0] * 3)
    )


def test_swapping_query_and_reference_keeps_the_cosine_weights():
    a, b = IMAGES[:1], IMAGES[1:2]
    weights = []
    for query, reference in ((a, b), (b, a)):
        model = SimilarityModel(encoder().double(), reference)
        explainer = LayerFam(model, "last")
        parts = explainer.attribute(query, target=0, attr_dim_summation=False)
        features = FAM(model, ["last"])
        features(query, [ClassifierOutputTarget(0)])
        net = model.encoder
        with torch.no_grad():
            maps = net.last(net.features(net.relu(net.norm(net.conv(query)))))
        weights.append((parts.sum(dim=(2, 3)) / maps.sum(dim=(2, 3))).nan_to_num())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("head", [nn.Identity(), nn.Linear(6, 6), nn.BatchNorm1d(6)])
@each_similarity
def test_convergence_delta_is_zero_through_linear_tails(head, similarity):
    torch.manual_seed(0)
    net = encoder().double()
    net.head = nn.Sequential(head, nn.Linear(6, 5)).double().eval()
    model = SimilarityModel(net, torch.randn(3, 5).double(), similarity=similarity)
    explainer = LayerFam(model, "last", rule="additive")
    maps, delta = explainer.attribute(IMAGES, target=1, return_convergence_delta=True)
    assert delta.shape == (3,)
    assert delta.abs().max() < 1e-12
    assert explainer.has_convergence_delta()
    torch.testing.assert_close(explainer.compute_convergence_delta(maps, IMAGES, 1), delta)
    off = explainer.compute_convergence_delta(maps + 1, IMAGES, 1)
    torch.testing.assert_close(off, delta + maps[0].numel())


@pytest.mark.true_gradient
def test_convergence_delta_is_the_first_order_error_of_a_curved_tail():
    torch.manual_seed(0)
    net = encoder().double()
    net.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh()).double()
    reference = torch.randn(1, 5).double()
    model = SimilarityModel(net, reference, similarity="dot")
    maps, delta = LayerFam(model, "last", rule="additive", tail="true").attribute(
        IMAGES, target=0, return_convergence_delta=True
    )
    at_zero = torch.tanh(net.head[0].bias) @ reference[0]
    expected = maps.sum(dim=(1, 2, 3)) + at_zero - model(IMAGES)[:, 0]
    torch.testing.assert_close(delta, expected.detach())
    assert delta.abs().min() > 1e-3


@each_similarity
def test_a_model_around_the_similarity_model_is_frozen_too(similarity):
    model = SimilarityModel(encoder().double(), ROWS, similarity=similarity)
    expected = LayerFam(model, model.encoder.last, rule="additive").attribute(IMAGES, target=2)
    for wrapped in (lambda x: model(x), model.forward, nn.Sequential(model)):
        maps = LayerFam(wrapped, model.encoder.last, rule="additive").attribute(IMAGES, target=2)
        assert torch.equal(maps, expected)


@pytest.mark.true_gradient
def test_frozen_scores_serve_the_partners_too():
    """Gradient times activation under frozen scores is the additive map."""
    model = SimilarityModel(encoder().double(), ROWS)
    with frozen_scores():
        parts = LayerGradCam(model, model.encoder.last).attribute(
            IMAGES, target=0, attr_dim_summation=False
        )
    expected = LayerFam(model, "last", rule="additive").attribute(IMAGES, target=0)
    # The gradient of a pooled layer is the same everywhere, so its mean is itself.
    torch.testing.assert_close(parts.sum(1, keepdim=True).detach(), expected)
    z = ROWS[:1].clone().requires_grad_()
    (grad,) = torch.autograd.grad(score("cosine", z, ROWS[1:2]).sum(), z)
    assert (grad * z).sum().abs() < 1e-12


@each_similarity
def test_gradcam_rule_equals_both_partners(similarity):
    model = SimilarityModel(encoder().double(), ROWS, similarity=similarity)
    expected = LayerGradCam(model, model.encoder.last).attribute(IMAGES, target=3).detach()
    torch.testing.assert_close(
        LayerFam(model, "last", rule="gradcam").attribute(IMAGES, target=3), expected
    )
    targets = [ClassifierOutputTarget(3)] * 3
    ours = FAM(model, ["last"], rule="gradcam")(IMAGES, targets)
    theirs = GradCAM(model, [model.encoder.last])(IMAGES, targets)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
