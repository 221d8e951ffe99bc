"""CAPE beyond the shared contract: the probability map beside the stretched one."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_grad_cam
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.model_targets import (
    BinaryClassifierOutputTarget,
    ClassifierOutputSoftmaxTarget,
    ClassifierOutputTarget,
)
from torch import nn

from fam_plugins import CAPE, LayerCape
from fam_plugins.cape import CapeHead, fit_cape_head, head
from tests.contracts.explainers import cape_model
from tests.networks import State, classifier

IMAGES = torch.rand(3, 3, 8, 10, generator=torch.Generator().manual_seed(0))
TARGETS = [ClassifierOutputTarget(k) for k in (0, 3, 1)]


@pytest.fixture(scope="module")
def model():
    fitted = cape_model()
    fit_cape_head(fitted, [IMAGES], epochs=3, progress=False)
    return fitted.double()


def test_the_probability_map_is_beside_the_stretched_one(model):
    with CAPE(model) as cam:
        result = cam(IMAGES.double(), TARGETS)
        assert result.min() == 0
        assert result.max(axis=(1, 2)) == pytest.approx(1, abs=1e-5)
        expected = LayerCape(model).attribute(IMAGES.double(), [0, 3, 1])
        assert torch.equal(cam.probability_maps, expected)
        assert torch.equal(cam.outputs, model(IMAGES.double()).detach())
        cam(IMAGES.double(), None)
        top = model(IMAGES.double()).argmax(dim=1).tolist()
        assert torch.equal(cam.probability_maps, LayerCape(model).attribute(IMAGES.double(), top))
        cam(IMAGES.double(), [ClassifierOutputSoftmaxTarget(1)] * 3)
        assert torch.equal(cam.probability_maps, LayerCape(model).attribute(IMAGES.double(), 1))
        cam(IMAGES.double(), TARGETS, aug_smooth=True)
        assert cam.probability_maps is None
    relative = CAPE(model, relative=True)
    relative(IMAGES.double(), TARGETS)
    assert relative.probability_maps is None
    assert relative.attributions is not None


@pytest.mark.parametrize("relative", [False, True])
def test_the_head_runs_once(model, monkeypatch, relative):
    calls = []
    real = head.classify_regions
    monkeypatch.setattr(head, "classify_regions", lambda *a: calls.append(1) or real(*a))
    CAPE(model, relative=relative)(IMAGES.double(), TARGETS)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "layer", [None, "feature_map", "model.last", "head"], ids=["none", "map", "layer", "head"]
)
def test_the_layer_of_grad_cam_code_may_stay(model, layer):
    expected = LayerCape(model).attribute(IMAGES.double(), 1)
    module = None if layer is None else model.get_submodule(layer)
    for given in {layer, module}:
        cam = CAPE(model, None if given is None else [given])
        cam(IMAGES.double(), [ClassifierOutputTarget(1)] * 3)
        assert torch.equal(cam.probability_maps, expected)


def test_it_draws_nothing():
    net = cape_model()
    state = torch.get_rng_state()
    CAPE(net)(IMAGES, TARGETS)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_head_in_a_network_of_the_users_own():
    cam = CAPE(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), CapeHead(6, 4)))
    cam(IMAGES, None)
    assert cam.probability_maps.shape == (3, 1, 6, 8)


class TestTrouble:
    def test_targets_that_name_no_class(self, model):
        before = State.of(model)
        unknown = ClassifierOutputTarget(None)
        for target in (lambda o: o[0], BinaryClassifierOutputTarget(1), unknown):
            with pytest.raises(ValueError, match=r"names none: pass ClassifierOutputTarget"):
                CAPE(model)(IMAGES.double(), [target] * 3)
        for index in (5, -1, 1.5, "cat"):
            with pytest.raises(ValueError, match="has 5 classes, 0 to 4"):
                CAPE(model)(IMAGES.double(), [ClassifierOutputTarget(index)] * 3)
        before.assert_unchanged(model)

    def test_another_number_of_targets(self, model):
        with pytest.raises(ValueError, match="2 targets for 3 images"):
            CAPE(model)(IMAGES.double(), TARGETS[:2])

    def test_a_model_without_a_head(self):
        net = classifier()
        with pytest.raises(ValueError, match=r"0 CAPE heads.*with_cape_head\(model\)"):
            CAPE(net)
        assert net.calls == 0

    def test_a_function_instead_of_a_model(self, model):
        for function in (model.forward, lambda x: model(x), None):
            with pytest.raises((TypeError, ValueError), match="nn.Module|0 CAPE heads"):
                CAPE(function)

    def test_a_layer_that_does_not_feed_the_head(self, model):
        with pytest.raises(ValueError, match="does not feed the CAPE head.*leave the layer"):
            CAPE(model, [model.model.conv])

    def test_options_that_cape_does_not_have(self, model):
        with pytest.raises(ValueError, match="eigen_smooth.*leave it out"):
            CAPE(model)(IMAGES.double(), TARGETS, eigen_smooth=True)
        with pytest.raises(ValueError, match="no reshape_transform"):
            CAPE(model, None, lambda t: t)
        with pytest.raises(TypeError, match="must be a list"):
            CAPE(model, model.feature_map)


class TestConsumers:
    def test_metrics_and_their_methods(self):
        net = cape_model()
        images = torch.rand(2, 3, 32, 32)
        cams = CAPE(net)(images, TARGETS[:2])
        with torch.no_grad():
            pairs = [net(images), net(images * torch.from_numpy(cams)[:, None])]
        own, masked = (scores[range(2), [0, 3]].numpy() for scores in pairs)
        drop = DropInConfidence()(images, cams, TARGETS[:2], net)
        np.testing.assert_allclose(drop, np.maximum(own - masked, 0), atol=1e-5)
        # Pixels are removed in the order of the map: another map gives another score.
        road = ROADCombined([20, 60])
        scores = road(images, cams, TARGETS[:2], net)
        assert np.isfinite(scores).all()
        np.testing.assert_allclose(scores, -road(images, 1 - cams, TARGETS[:2], net), atol=2e-4)
        assert np.abs(scores).min() > 1e-3

    @pytest.mark.parametrize("name", ["RefineCAM", "SESS"])
    def test_meta_methods(self, name):
        if not hasattr(pytorch_grad_cam, name):
            pytest.skip(f"this grad-cam has no {name}")
        net = cape_model()
        images = torch.rand(2, 3, 32, 32)
        extra = {"num_scales": 2} if name == "SESS" else {}
        maps = {}
        for base in (CAPE, GradCAM):
            meta = getattr(pytorch_grad_cam, name)(
                net, [net.feature_map], base_method=base, **extra
            )
            maps[base] = meta(images, TARGETS[:2])
            assert maps[base].shape == (2, 32, 32)
        assert maps[CAPE].max(axis=(1, 2)) == pytest.approx(1, abs=0.05)
        assert maps[CAPE].std(axis=(1, 2)).min() > 0.05
        assert np.abs(maps[CAPE] - maps[GradCAM]).max() > 0.05
