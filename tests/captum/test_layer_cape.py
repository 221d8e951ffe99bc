"""LayerCape beyond the shared contract: what makes its maps probabilities."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch
from captum.attr import GuidedBackprop, GuidedGradCam, LayerGradCam, NoiseTunnel
from captum.attr import visualization as viz
from torch import nn

from fam_plugins import LayerCape
from fam_plugins.cape import CapeHead, fit_cape_head, head
from tests.contracts.explainers import cape_model
from tests.networks import State, classifier

matplotlib.use("Agg")

IMAGES = torch.rand(3, 3, 8, 10, generator=torch.Generator().manual_seed(0))


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


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_the_head_runs_once(model, monkeypatch, relative, delta):
    calls = []
    real = head.classify_regions
    monkeypatch.setattr(head, "classify_regions", lambda *a: calls.append(1) or real(*a))
    explainer = LayerCape(model, relative=relative)
    explainer.attribute(IMAGES.double(), 1, return_convergence_delta=delta and not relative)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "layer", [None, "feature_map", "model.last", "head"], ids=["none", "map", "layer", "head"]
)
def test_the_layer_of_grad_cam_code_may_stay(model, layer):
    expected = LayerCape(model).attribute(IMAGES.double(), 1)
    module = None if layer is None else model.get_submodule(layer)
    for given in {layer, module}:
        assert torch.equal(LayerCape(model, given).attribute(IMAGES.double(), 1), expected)
    by_function = LayerCape(lambda x: model(x), model.head)
    assert torch.equal(by_function.attribute(IMAGES.double(), 1), expected)
    assert torch.equal(LayerCape(model.forward).attribute(IMAGES.double(), 1), expected)


def test_a_head_in_a_network_of_the_users_own():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), CapeHead(6, 4))
    maps = LayerCape(net).attribute(IMAGES, 2)
    torch.testing.assert_close(maps.sum(dim=(1, 2, 3)), net(IMAGES)[:, 2].exp().detach())


def test_volumes():
    net = nn.Sequential(nn.Conv3d(1, 6, 3, padding=1), nn.ReLU(), CapeHead(6, 4))
    volumes = torch.rand(2, 1, 3, 4, 5)
    maps = LayerCape(net).attribute(volumes, 2)
    assert maps.shape == (2, 1, 3, 4, 5)
    torch.testing.assert_close(maps[:, 0], net[2].probability_maps(net[:2](volumes))[:, 2])
    torch.testing.assert_close(maps.sum(dim=(1, 2, 3, 4)), net(volumes)[:, 2].exp())


class Slices(nn.Module):
    """A model of the user's own around one with a head: it serves fewer classes than the head."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images)[:, :2]


def test_no_explainer_moves_the_random_state():
    net = cape_model()
    state = torch.get_rng_state()
    LayerCape(net).attribute(IMAGES, 0, return_convergence_delta=True)
    assert torch.equal(torch.get_rng_state(), state)


class TestFunctions:
    """A function may pick or reorder classes: its output must be the head's log-probabilities."""

    def test_the_models_own_output_is_explained(self, model):
        expected = LayerCape(model).attribute(IMAGES.double(), [0, 3, 1])
        for function in (lambda x: model(x), lambda x: model(x).log_softmax(1), model.forward):
            found = LayerCape(function, model.head).attribute(IMAGES.double(), [0, 3, 1])
            assert torch.equal(found, expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        net = cape_model().to(dtype)
        expected = LayerCape(net).attribute(IMAGES.to(dtype), 1)
        for function in (lambda x: net(x), lambda x: net(x).to(dtype)):
            found = LayerCape(function, net.head).attribute(IMAGES.to(dtype), 1)
            assert torch.equal(found, expected)

    @pytest.mark.parametrize(
        "change",
        [
            lambda log_p: log_p[:, 2:],
            lambda log_p: log_p.flip(1),
            lambda log_p: log_p[:, [1, 0, 2, 3, 4]],
            lambda log_p: log_p.exp(),
            lambda log_p: log_p - log_p.mean(1, keepdim=True),
        ],
        ids=["picked", "reordered", "swapped", "probabilities", "shifted"],
    )
    def test_another_output_is_refused(self, model, change):
        before = State.of(model)
        with pytest.raises(ValueError, match="not the head's log-probability.*the model itself"):
            LayerCape(lambda x: change(model(x)), model.head).attribute(IMAGES.double(), 0)
        before.assert_unchanged(model)


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

    def test_a_target_is_judged_by_the_models_own_output(self, model):
        """The head has five classes; what the model does not return cannot be asked for."""
        with pytest.raises(AssertionError, match="target 3 is out of range: the model has 2"):
            LayerCape(Slices(model)).attribute(IMAGES.double(), 3)
        found = LayerCape(Slices(model)).attribute(IMAGES.double(), 1)
        assert torch.equal(found, LayerCape(model).attribute(IMAGES.double(), 1))

    def test_a_model_without_a_head(self):
        net = classifier()
        with pytest.raises(ValueError, match=r"0 CAPE heads.*with_cape_head\(model\)"):
            LayerCape(net).attribute(IMAGES, 0)
        with pytest.raises(ValueError, match="pass the CapeHead to read as the layer"):
            LayerCape(lambda x: x).attribute(IMAGES, 0)
        assert net.calls == 0

    def test_a_layer_that_does_not_feed_the_head(self, model):
        with pytest.raises(ValueError, match="does not feed the CAPE head.*leave the layer"):
            LayerCape(model, "model.conv").attribute(IMAGES.double(), 0)

    def test_a_head_that_does_not_run(self, model):
        with pytest.raises(AssertionError, match="did not run"):
            LayerCape(model.vanilla).attribute(IMAGES.double(), 0)

    def test_splits_that_cape_does_not_have(self, model):
        for option in ({"attribute_to_layer_input": True}, {"attr_dim_summation": False}):
            with pytest.raises(ValueError, match="no parts by channel"):
                LayerCape(model).attribute(IMAGES.double(), 0, **option)

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
        slope = GuidedBackprop(net).attribute(IMAGES.clone().requires_grad_(), 1)
        maps = LayerCape.interpolate(LayerCape(net).attribute(IMAGES, 1), (8, 10))
        assert result.abs().max() > 0
        torch.testing.assert_close(result, slope * maps)

    def test_visualization(self, model):
        maps = LayerCape(model).attribute(IMAGES.double(), 1)
        heat = LayerCape.interpolate(maps, (8, 10), "bilinear")[0].permute(1, 2, 0).numpy()
        figure, axes = viz.visualize_image_attr(
            heat,
            IMAGES[0].permute(1, 2, 0).numpy(),
            method="blended_heat_map",
            use_pyplot=False,
            sign="positive",
            outlier_perc=0,
        )
        drawn = axes.images[-1].get_array()
        np.testing.assert_allclose(drawn, heat[..., 0] / heat.max(), atol=1e-6)
        matplotlib.pyplot.close(figure)

    def test_grad_cam_of_the_same_model(self):
        net = cape_model()
        assert LayerGradCam(net, net.feature_map).attribute(IMAGES, 1).shape == (3, 1, 4, 5)
