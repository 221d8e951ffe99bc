"""LayerCape and CAPE beyond the shared contract: what makes their maps probabilities."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch
from captum.attr import GuidedGradCam, LayerGradCam, NoiseTunnel
from captum.attr import visualization as viz
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
from fam_plugins.cape import CapeHead, fit_cape_head
from tests.contracts.explainers import cape_model
from tests.networks import State, classifier

matplotlib.use("Agg")

IMAGES = torch.rand(3, 3, 8, 10, generator=torch.Generator().manual_seed(0))
TARGETS = [ClassifierOutputTarget(k) for k in (0, 3, 1)]


@pytest.fixture(scope="module")
def model():
    fitted = cape_model()
    fit_cape_head(fitted, [IMAGES], epochs=3, progress=False)
    return fitted.double()


def test_maps_are_the_heads_and_sum_to_the_probability(model):
    x = IMAGES.double()
    maps, delta = LayerCape(model).attribute(x, [0, 3, 1], return_convergence_delta=True)
    p = model(x).exp()[range(3), [0, 3, 1]]
    torch.testing.assert_close(maps.sum(dim=(1, 2, 3)), p.detach(), rtol=0, atol=1e-12)
    assert delta.abs().max() < 1e-12
    whole = model.head.probability_maps(model.features(x))
    torch.testing.assert_close(maps[:, 0], whole[range(3), [0, 3, 1]].detach())
    total = sum(LayerCape(model).attribute(x, k).sum(dim=(1, 2, 3)) for k in range(5))
    torch.testing.assert_close(total, torch.ones(3).double())


def test_delta_of_other_maps_is_their_distance(model):
    explainer = LayerCape(model)
    assert explainer.has_convergence_delta()
    maps = explainer.attribute(IMAGES.double(), 2)
    off = explainer.compute_convergence_delta(maps + 0.5, IMAGES.double(), 2)
    torch.testing.assert_close(off, torch.full((3,), 0.5 * maps[0].numel()).double())


def test_relative_is_mu_cape_and_does_not_add_up(model):
    explainer = LayerCape(model, relative=True)
    whole = model.head.relative_maps(model.features(IMAGES.double()))
    torch.testing.assert_close(explainer.attribute(IMAGES.double(), 2)[:, 0], whole[:, 2].detach())
    assert not explainer.has_convergence_delta()
    with pytest.raises(ValueError, match="does not add up.*relative=False"):
        explainer.attribute(IMAGES.double(), 2, return_convergence_delta=True)


@pytest.mark.parametrize(
    "layer", [None, "feature_map", "model.last", "head"], ids=["none", "map", "layer", "head"]
)
def test_the_layer_of_grad_cam_code_may_stay(model, layer):
    expected = LayerCape(model).attribute(IMAGES.double(), 1)
    module = None if layer is None else model.get_submodule(layer)
    for given in {layer, module}:
        assert torch.equal(LayerCape(model, given).attribute(IMAGES.double(), 1), expected)
        cam = CAPE(model, None if given is None else [given])
        cam(IMAGES.double(), [ClassifierOutputTarget(1)] * 3)
        assert torch.equal(cam.probability_maps, expected)
    by_function = LayerCape(lambda x: model(x), model.head)
    assert torch.equal(by_function.attribute(IMAGES.double(), 1), expected)
    assert torch.equal(LayerCape(model.forward).attribute(IMAGES.double(), 1), expected)


def test_a_head_in_a_network_of_the_users_own():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), CapeHead(6, 4))
    maps = LayerCape(net).attribute(IMAGES, 2)
    torch.testing.assert_close(maps.sum(dim=(1, 2, 3)), net(IMAGES)[:, 2].exp().detach())
    cam = CAPE(net)
    cam(IMAGES, None)
    assert cam.probability_maps.shape == (3, 1, 6, 8)


def test_volumes():
    net = nn.Sequential(nn.Conv3d(1, 6, 3, padding=1), nn.ReLU(), CapeHead(6, 4))
    volumes = torch.rand(2, 1, 3, 4, 5)
    assert LayerCape(net).attribute(volumes, 2).shape == (2, 1, 3, 4, 5)


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


class TestTrouble:
    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (None, "pass target="),
            (5, "out of range: the model has 5 outputs"),
            (1.5, "pass an int"),
            ([0, 1], "does not match"),
        ],
    )
    def test_bad_targets_raise_as_captums_do(self, model, target, message):
        before = State.of(model)
        with pytest.raises(AssertionError, match=message):
            LayerCape(model).attribute(IMAGES.double(), target)
        before.assert_unchanged(model)

    def test_targets_that_name_no_class(self, model):
        before = State.of(model)
        for target in (lambda o: o[0], BinaryClassifierOutputTarget(1)):
            with pytest.raises(ValueError, match=r"names none: pass ClassifierOutputTarget"):
                CAPE(model)(IMAGES.double(), [target] * 3)
        for index in (5, -1):
            with pytest.raises(ValueError, match="has 5 classes, 0 to 4"):
                CAPE(model)(IMAGES.double(), [ClassifierOutputTarget(index)] * 3)
        before.assert_unchanged(model)

    def test_another_number_of_targets(self, model):
        with pytest.raises(ValueError, match="2 targets for 3 images"):
            CAPE(model)(IMAGES.double(), TARGETS[:2])

    def test_a_model_without_a_head(self):
        net = classifier()
        for use in (lambda: LayerCape(net).attribute(IMAGES, 0), lambda: CAPE(net)):
            with pytest.raises(ValueError, match=r"0 CAPE heads.*with_cape_head\(model\)"):
                use()
        with pytest.raises(ValueError, match="pass the CapeHead to read as the layer"):
            LayerCape(lambda x: x).attribute(IMAGES, 0)
        assert net.calls == 0

    def test_a_layer_that_does_not_feed_the_head(self, model):
        for use in (
            lambda: LayerCape(model, "model.conv").attribute(IMAGES.double(), 0),
            lambda: CAPE(model, [model.model.conv]),
        ):
            with pytest.raises(ValueError, match="does not feed the CAPE head.*leave the layer"):
                use()

    def test_a_head_that_does_not_run(self, model):
        with pytest.raises(AssertionError, match="did not run"):
            LayerCape(model.vanilla).attribute(IMAGES.double(), 0)

    def test_splits_that_cape_does_not_have(self, model):
        for option in ({"attribute_to_layer_input": True}, {"attr_dim_summation": False}):
            with pytest.raises(ValueError, match="no parts by channel"):
                LayerCape(model).attribute(IMAGES.double(), 0, **option)
        with pytest.raises(ValueError, match="eigen_smooth.*leave it out"):
            CAPE(model)(IMAGES.double(), TARGETS, eigen_smooth=True)
        with pytest.raises(ValueError, match="no reshape_transform"):
            CAPE(model, None, lambda t: t)
        with pytest.raises(TypeError, match="must be a list"):
            CAPE(model, model.feature_map)

    def test_an_empty_batch(self, model):
        with pytest.raises(ValueError, match="batch is empty"):
            LayerCape(model).attribute(IMAGES[:0].double(), 0)

    def test_no_asynchronous_form(self, model):
        with pytest.raises(NotImplementedError):
            LayerCape(model).attribute_future()


class TestConsumers:
    def test_noise_tunnel(self, model):
        tunnel = NoiseTunnel(LayerCape(model))
        quiet = tunnel.attribute(IMAGES.double(), nt_samples=2, stdevs=0.0, target=[0, 3, 1])
        torch.testing.assert_close(quiet, LayerCape(model).attribute(IMAGES.double(), [0, 3, 1]))
        maps, delta = tunnel.attribute(
            IMAGES.double(), nt_samples=2, target=0, return_convergence_delta=True
        )
        assert maps.shape == (3, 1, 4, 5)
        assert delta.abs().max() < 1e-12

    def test_guided_grad_cam(self):
        net = cape_model()
        guided = GuidedGradCam(net, net.feature_map)
        guided.grad_cam = LayerCape(net)
        result = guided.attribute(IMAGES.clone().requires_grad_(), 1)
        assert result.shape == IMAGES.shape

    def test_visualization(self, model):
        maps = LayerCape(model).attribute(IMAGES.double(), 1)
        heat = LayerCape.interpolate(maps, (8, 10), "bilinear")[0].permute(1, 2, 0).numpy()
        figure, _ = viz.visualize_image_attr(
            heat, IMAGES[0].permute(1, 2, 0).numpy(), method="blended_heat_map", use_pyplot=False
        )
        matplotlib.pyplot.close(figure)

    def test_metrics_and_their_methods(self):
        net = cape_model()
        images = torch.rand(2, 3, 32, 32)
        cams = CAPE(net)(images, TARGETS[:2])
        assert DropInConfidence()(images, cams, TARGETS[:2], net).shape == (2,)
        assert np.isfinite(ROADCombined([20, 60])(images, cams, TARGETS[:2], net)).all()
        with GradCAM(net, [net.feature_map]) as cam:
            assert cam(images, TARGETS[:2]).shape == (2, 32, 32)
        assert LayerGradCam(net, net.feature_map).attribute(images, 1).shape == (2, 1, 16, 16)

    @pytest.mark.parametrize("name", ["RefineCAM", "SESS"])
    def test_meta_methods(self, name):
        import pytorch_grad_cam

        if not hasattr(pytorch_grad_cam, name):
            pytest.skip(f"this grad-cam has no {name}")
        net = cape_model()
        images = torch.rand(2, 3, 32, 32)
        extra = {"num_scales": 2} if name == "SESS" else {}
        method = getattr(pytorch_grad_cam, name)(net, [net.feature_map], base_method=CAPE, **extra)
        assert method(images, TARGETS[:2]).shape == (2, 32, 32)
