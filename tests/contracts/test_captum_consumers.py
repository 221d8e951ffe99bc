"""Every tool of Captum that takes a layer attribution, fed with LayerFam."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch
from captum.attr import GuidedGradCam, LayerGradCam, NoiseTunnel
from captum.attr import visualization as viz
from captum.metrics import infidelity, sensitivity_max
from torch import nn

from fam_plugins import LayerFam, SimilarityModel
from tests.contracts.explainers import similarity_model
from tests.networks import State, classifier, encoder

matplotlib.use("Agg")

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
RULES = ["fam", "additive", "centred", "gradcam"]


@pytest.mark.parametrize("rule", RULES)
class TestNoiseTunnel:
    def test_averages_noisy_maps(self, rule):
        model = similarity_model()
        tunnel = NoiseTunnel(LayerFam(model, model.encoder.last, rule=rule))
        quiet = tunnel.attribute(IMAGES, nt_samples=3, stdevs=0.0, target=[0, 1, 2])
        expected = LayerFam(model, "last", rule=rule).attribute(IMAGES, [0, 1, 2])
        torch.testing.assert_close(quiet, expected)
        torch.manual_seed(0)
        noisy = tunnel.attribute(
            IMAGES, nt_samples=4, nt_samples_batch_size=2, stdevs=0.1, target=1
        )
        assert noisy.shape == (3, 1, 4, 4)
        assert not torch.equal(noisy, expected)

    def test_leaves_nothing_behind(self, rule):
        model = similarity_model()
        before, images = State.of(model), IMAGES.clone()
        NoiseTunnel(LayerFam(model, "last", rule=rule)).attribute(images, nt_samples=2, target=0)
        before.assert_unchanged(model)
        assert not images.requires_grad


def test_noise_tunnel_passes_the_delta_on():
    model = similarity_model()
    tunnel = NoiseTunnel(LayerFam(model, "last", rule="additive"))
    maps, delta = tunnel.attribute(
        IMAGES, nt_samples=2, stdevs=0.1, target=0, return_convergence_delta=True
    )
    assert maps.shape == (3, 1, 4, 4)
    assert delta.shape == (6,)
    assert delta.abs().max() < 1e-5


def test_sensitivity_and_infidelity_through_a_map_of_the_input_shape():
    model = similarity_model()
    explainer = LayerFam(model, "last")

    def explain(inputs, **kwargs):
        inputs = inputs[0] if isinstance(inputs, tuple) else inputs
        maps = explainer.attribute(inputs, **kwargs)
        maps = LayerFam.interpolate(maps, inputs.shape[2:], "bilinear")
        return (maps.expand_as(inputs).contiguous(),)

    torch.manual_seed(0)
    sensitivity = sensitivity_max(explain, IMAGES, target=1, n_perturb_samples=3)
    assert sensitivity.shape == (3,)
    assert torch.isfinite(sensitivity).all()
    assert sensitivity.max() > 0

    def perturb(inputs):
        noise = 0.1 * torch.randn_like(inputs)
        return noise, inputs - noise

    unfaithful = infidelity(model, perturb, IMAGES, explain(IMAGES, target=1)[0], target=1)
    assert unfaithful.shape == (3,)
    assert torch.isfinite(unfaithful).all()


@pytest.mark.parametrize("rule", RULES)
def test_visualization_draws_the_map(rule):
    model = similarity_model()
    maps = LayerFam(model, "last", rule=rule).attribute(IMAGES[:1], 1)
    upsampled = LayerFam.interpolate(maps, (8, 8), "bilinear")[0].permute(1, 2, 0).numpy()
    image = np.random.default_rng(0).random((8, 8, 3))
    figure, axis = viz.visualize_image_attr(
        upsampled, image, method="blended_heat_map", sign="all", use_pyplot=False
    )
    assert len(axis.images) == 2
    drawn = np.asarray(axis.images[1].get_array())
    # Captum divides by the value above which the largest two hundredths of the mass lie.
    scale = drawn.flat[np.abs(drawn).argmin()] / upsampled.flat[np.abs(drawn).argmin()]
    np.testing.assert_allclose(drawn, (upsampled[..., 0] * scale).clip(-1, 1), atol=1e-5)
    matplotlib.pyplot.close(figure)


def test_guided_grad_cam_takes_ours_in_the_place_of_its_own():
    net = classifier()
    guided = GuidedGradCam(net, net.last)
    expected = guided.attribute(IMAGES.clone().requires_grad_(), 1)
    guided.grad_cam = LayerFam(net, net.last, rule="gradcam")
    torch.testing.assert_close(guided.attribute(IMAGES.clone().requires_grad_(), 1), expected)
    guided.grad_cam = LayerFam(net, net.last, rule="centred")
    maps = guided.grad_cam.attribute(IMAGES, 1, relu_attributions=True)
    pixels = guided.guided_backprop.attribute(IMAGES.clone().requires_grad_(), 1)
    torch.testing.assert_close(
        guided.attribute(IMAGES.clone().requires_grad_(), 1),
        LayerFam.interpolate(maps, IMAGES.shape[2:]) * pixels,
    )


def test_tcav_scores_concepts(tmp_path):
    from captum.concept import TCAV, Concept

    net = classifier()

    def concept(number: int, shift: float) -> Concept:
        torch.manual_seed(number)
        images = torch.randn(12, 3, 8, 8) + shift
        return Concept(number, str(number), torch.utils.data.DataLoader(images, batch_size=6))

    tcav = TCAV(
        net,
        layers=["last"],
        layer_attr_method=LayerFam(net, None, rule="additive"),
        save_path=str(tmp_path),
    )
    concepts = [concept(0, 1.0), concept(1, -1.0)]
    scores = tcav.interpret(IMAGES, [concepts], target=1, attr_dim_summation=False)
    (per_layer,) = (layers["last"] for layers in scores.values())
    assert torch.isfinite(per_layer["magnitude"]).all()
    assert per_layer["sign_count"].sum() == pytest.approx(1.0)


def test_attack_comparator_compares_maps():
    from captum.robust import AttackComparator

    model = similarity_model()
    explainer = LayerFam(model, "last")
    comparator = AttackComparator(
        forward_func=lambda x: explainer.attribute(x, 1),
        metric=lambda maps, **_: maps.flatten(1).std(dim=1),
    )
    comparator.add_attack(lambda x: x + 0.1 * torch.ones_like(x), "brighter")
    result = comparator.evaluate(IMAGES, perturbations_per_eval=1)
    for found, images in ((result["Original"], IMAGES), (result["brighter"]["mean"], IMAGES + 0.1)):
        expected = explainer.attribute(images, 1).flatten(1).std(dim=1)
        torch.testing.assert_close(found, expected)


def test_data_parallel_is_explained_on_one_device():
    model = nn.DataParallel(similarity_model())
    expected = LayerFam(model.module, "last").attribute(IMAGES, 1)
    assert torch.equal(LayerFam(model, model.module.encoder.last).attribute(IMAGES, 1), expected)


def _table() -> list[dict]:
    """The rows of Captum's own generated tests that LayerGradCam takes part in."""
    try:
        from captum.testing.attr.helpers.test_config import config
    except ImportError:
        return []
    return [row for row in config if LayerGradCam in row["algorithms"]]


@pytest.mark.skipif(not _table(), reason="Captum ships its table of test cases since 0.9")
@pytest.mark.parametrize("rule", RULES)
def test_every_case_of_captums_own_table(rule):
    for row in _table():
        model, arguments = row["model"], dict(row["attribute_args"])
        layer = model.get_submodule(row["layer"])
        ours = LayerFam(model, layer, rule=rule).attribute(**arguments)
        theirs = LayerGradCam(model, layer).attribute(**arguments)
        for our, their in zip(_tuple(ours), _tuple(theirs), strict=True):
            assert our.shape == their.shape, row["name"]
            if rule == "gradcam":
                torch.testing.assert_close(our, their.detach(), msg=row["name"])


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


def test_prototypes_embedded_in_the_forward_are_caught():
    """A siamese forward that embeds the reference too has no map of its own for the query."""
    net = encoder()

    def siamese(query):
        return torch.cosine_similarity(net(query), net(IMAGES[:1]))

    with pytest.raises(RuntimeError, match="embed references once.*SimilarityModel"):
        LayerFam(siamese, net.last).attribute(IMAGES)
    model = SimilarityModel(net, IMAGES[:1])
    torch.testing.assert_close(model(IMAGES)[:, 0], siamese(IMAGES))
