"""Every row of the table of architectures: layer, transform, and what the maps add up to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from captum._utils.gradient import compute_layer_gradients_and_eval
from captum.attr import LayerGradCam
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor

from fam_plugins import FAM, LayerFam, SimilarityModel, infer_transform
from fam_plugins.core.transforms import tokens_to_map
from tests.contracts.families import EXACT, FAMILIES, REFUSED, SIZE, encoder_of
from tests.networks import State

TARGETS = [ClassifierOutputTarget(1)] * 2


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def case(request):
    family = request.param
    net = encoder_of(family)
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        width = net(images).shape[1]
    torch.manual_seed(1)
    return family, SimilarityModel(net, torch.randn(3, width).double()), images


def test_at_least_ten_families_in_both_libraries():
    assert len({family.name.split()[0].strip(",") for family in FAMILIES}) >= 10
    assert {family.maps for family in FAMILIES} == {EXACT, REFUSED}


def test_additive_adds_up_as_the_table_says(case):
    family, model, images = case
    explainer = LayerFam(model, family.layer, rule="additive", reshape_transform=family.transform)
    if family.maps == REFUSED:
        with pytest.raises(ValueError, match="class token"):
            explainer.attribute(images, 1)
        with pytest.raises(ValueError, match="class token"):
            FAM(model, [family.layer], family.transform)(images, TARGETS)
        return
    before = State.of(model)
    maps, delta = explainer.attribute(images, 1, return_convergence_delta=True)
    found = explainer.decompose(images, 1)
    before.assert_unchanged(model)
    with torch.no_grad():
        scores = model(images)[:, 1]
    assert set(found.parts) == {"regions", *family.rest}
    parts = dict(found.parts, regions=maps.sum(dim=(1, 2, 3)))
    torch.testing.assert_close(sum(parts.values()), scores, rtol=0, atol=1e-12)
    assert delta.abs().max() < 1e-12


def test_auto_finds_the_transform_and_both_adapters_agree(case):
    family, model, images = case
    found = infer_transform(model.encoder, family.layer, images)
    assert found == family.transform
    if family.maps == REFUSED:
        return
    maps = LayerFam(model, family.layer, reshape_transform="auto").attribute(images, 1)
    by_hand = LayerFam(model, family.layer, reshape_transform=found).attribute(images, 1)
    assert torch.equal(maps, by_hand)
    with FAM(model, [family.layer], "auto") as cam:
        shown = cam(images, TARGETS)
    assert torch.equal(cam.attributions[0], maps)
    assert shown.shape == (2, SIZE, SIZE)
    assert shown.min() >= 0
    assert shown.max() <= 1
    assert np.isfinite(shown).all()


def test_gradcam_is_captums(case):
    family, model, images = case
    if family.maps == REFUSED:
        return
    maps = LayerFam(
        model, family.layer, rule="gradcam", reshape_transform=family.transform
    ).attribute(images, 1)
    layer = model.encoder.get_submodule(family.layer)
    if family.transform is None:
        expected = LayerGradCam(model, layer).attribute(images, 1).detach()
    else:
        expected = by_hand(model, layer, images, family.transform)
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def by_hand(model, layer, images, transform) -> Tensor:
    """LayerGradCam's own gradients and activations, weighed place by place."""
    (gradients,), (activations,) = compute_layer_gradients_and_eval(model, layer, images, 1)
    if isinstance(transform, tokens_to_map):
        skip, grid = transform.skip, (transform.h, transform.w)
        places = [(i, (slice(None), skip + i)) for i in range(grid[0] * grid[1])]
    else:
        grid = activations.shape[1:3]
        places = [
            (row * grid[1] + column, (slice(None), row, column))
            for row in range(grid[0])
            for column in range(grid[1])
        ]
    weights = sum(gradients[where] for _, where in places) / len(places)
    expected = torch.zeros(len(images), len(places)).double()
    for index, where in places:
        expected[:, index] = (weights * activations[where]).sum(dim=1).detach()
    return expected.reshape(len(images), 1, *grid)


@pytest.mark.parametrize("lie", [{"rest": ()}, {"rest": ("bias", "registers")}])
def test_a_row_that_lies_fails(lie):
    row = next(f for f in FAMILIES if f.rest == ("bias",) and f.transform is None)
    images = torch.randn(2, 3, SIZE, SIZE).double()
    net = encoder_of(row)
    model = SimilarityModel(net, torch.randn(3, net(images).shape[1]).double())
    with pytest.raises(AssertionError):
        test_additive_adds_up_as_the_table_says((replace(row, **lie), model, images))


@pytest.mark.true_gradient
def test_with_the_true_gradient_it_does_not_add_up(case):
    """The proofs above can tell a frozen tail from one that is not."""
    family, model, images = case
    if family.maps == REFUSED:
        return
    deltas = [
        LayerFam(
            model, family.layer, rule="additive", reshape_transform=family.transform, tail=tail
        ).attribute(images, 1, return_convergence_delta=True)[1]
        for tail in ("true", "frozen")
    ]
    curved = "bias" in family.rest and "layer behind" not in family.why
    assert deltas[1].abs().max() < 1e-12
    if curved or "attention" in family.why:
        assert deltas[0].abs().max() > 1e-7
