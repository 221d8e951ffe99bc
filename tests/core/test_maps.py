"""The one road from a score to a map: precision, layouts, rules of users, and what is refused."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from torch import nn

from fam_plugins import FAM, LayerFam, Rule, SimilarityModel, explain_pair
from fam_plugins.core.maps import MapPass, check_finite
from fam_plugins.core.rules import RULES
from tests.networks import State, encoder

IMAGES = torch.randn(3, 3, 8, 10, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))

LAYER_CAM = Rule("layercam", lambda activations, gradients: gradients.relu(), frozen=False)
TWICE_CENTRED = Rule("twice", lambda activations, gradients: 2 * gradients, centred=True)


def layer_cam(images: torch.Tensor, targets: list[int]) -> torch.Tensor:
    """The rule above by hand: relu of the true gradient times the activation."""
    net, kept = encoder(), []
    handle = net.last.register_forward_hook(lambda _m, _i, out: kept.append(out.clone()) or kept[0])
    scores = nn.functional.normalize(net(images), dim=1) @ nn.functional.normalize(ROWS, dim=1).T
    handle.remove()
    total = scores[range(len(images)), targets].sum()
    (gradient,) = torch.autograd.grad(total, kept[0])
    return (gradient.relu() * kept[0]).sum(1, keepdim=True).detach()


class TestARuleOfTheUser:
    def test_in_layer_fam(self):
        model = SimilarityModel(encoder(), ROWS)
        maps = LayerFam(model, "last", rule=LAYER_CAM).attribute(IMAGES, [0, 3, 1])
        torch.testing.assert_close(maps, layer_cam(IMAGES, [0, 3, 1]))
        twice = LayerFam(model, "last", rule=TWICE_CENTRED).attribute(IMAGES, 1)
        once = LayerFam(model, "last", rule="centred").attribute(IMAGES, 1)
        torch.testing.assert_close(twice, 2 * once)

    def test_in_fam(self):
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        cam = FAM(SimilarityModel(encoder(), ROWS), ["last"], rule=LAYER_CAM)
        cam(IMAGES, [ClassifierOutputTarget(j) for j in (0, 3, 1)])
        torch.testing.assert_close(cam.attributions[0], layer_cam(IMAGES, [0, 3, 1]))

    def test_in_explain_pair(self):
        pair = explain_pair(encoder(), "last", IMAGES, IMAGES.flip(0), rule=TWICE_CENTRED)
        plain = explain_pair(encoder(), "last", IMAGES, IMAGES.flip(0), rule="centred")
        torch.testing.assert_close(pair.map_a, 2 * plain.map_a)
        torch.testing.assert_close(pair.map_b, 2 * plain.map_b)

    def test_in_attribute_references(self):
        model = SimilarityModel(encoder(), ROWS)
        maps = LayerFam(model, "last", rule=LAYER_CAM).attribute_references(IMAGES)
        for target in range(4):
            torch.testing.assert_close(maps[:, target], layer_cam(IMAGES, [target] * 3))

    def test_may_add_up_and_then_has_a_delta(self):
        mine = Rule("mine", lambda activations, gradients: gradients, adds_up=True)
        explainer = LayerFam(SimilarityModel(encoder(), ROWS), "last", rule=mine)
        assert explainer.has_convergence_delta()
        _, delta = explainer.attribute(IMAGES, 1, return_convergence_delta=True)
        assert delta.abs().max() < 1e-6


def test_the_rule_may_be_changed_by_name_later():
    explainer = LayerFam(SimilarityModel(encoder(), ROWS), "last", rule="fam")
    explainer.rule = "centred"
    assert explainer.attribute(IMAGES, 0).sum((1, 2, 3)).abs().max() < 1e-6


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(rule, dtype):
    net = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(4 * 15, 2)).to(dtype)
    images = torch.randn(2, 4, 3, 5).to(dtype)
    one = MapPass(net, ["0"], rule)
    output = one.run(lambda: net(images), images)
    gradients = one.gradients(output[:, 1], torch.ones(1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ((found,),) = one.finish(gradients)
    assert found.dtype == dtype
    gradient = net[2].weight[1].detach().float().reshape(1, 1, 4, 15).expand(2, -1, -1, -1)
    expected = RULES[rule].apply(images.float().flatten(2), gradient)
    if RULES[rule].centred:
        expected = expected - expected.mean(dim=-1, keepdim=True)
    assert torch.equal(found, expected.reshape(2, 1, 1, 3, 5).to(dtype))


@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 3, 5), (4, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_layers_of_any_dimensions(rule, shape):
    net = nn.Sequential(nn.Identity(), nn.Flatten(), nn.LazyLinear(2)).double()
    images = torch.randn(2, *shape, dtype=torch.float64)
    net(images)
    one = MapPass(net, ["0"], rule)
    output = one.run(lambda: net(images), images)
    ((found,),) = one.maps(lambda: output[:, 0], retain_graph=True)
    ((parts,),) = one.maps(lambda: output[:, 0], sum_channels=False)
    assert found.shape == (2, 1, *shape[1:])
    assert parts.shape == (2, *shape)
    torch.testing.assert_close(parts.sum(1, keepdim=True), found)
    assert one.scores.tolist() == output[:, 0].tolist()


def test_pooled_is_the_mean_of_the_map_in_at_least_float32():
    half = (1000 + torch.arange(2 * 3 * 49.0)).reshape(2, 3, 7, 7).to(torch.float16)
    net = nn.Sequential(nn.Identity(), nn.Flatten())
    one = MapPass(net, ["0"], "additive", lambda t: t.flip(1), regions=1)
    one.run(lambda: net(half), half)
    expected = half.float().mean(dim=(2, 3)).to(torch.float16).flip(1)
    assert torch.equal(one.pooled().detach(), expected)


class Crops(nn.Module):
    """Two crops of every image go through the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = encoder()

    def forward(self, images):
        return self.net(images.repeat_interleave(2, 0)).reshape(len(images), 2, -1).mean(1)


@pytest.mark.parametrize(
    "explain",
    [
        lambda m: LayerFam(m, "encoder.net.last", rule="additive").attribute(IMAGES, 0),
        lambda m: LayerFam(m, "net.last", rule="additive").attribute_references(IMAGES),
        lambda m: FAM(m, ["net.last"], rule="additive")(IMAGES),
        lambda m: FAM(m, ["net.last"], rule="additive").attribute_references(IMAGES),
        lambda m: explain_pair(m.encoder, "net.last", IMAGES, IMAGES),
    ],
)
def test_a_layer_of_another_batch_is_refused(explain):
    model = SimilarityModel(Crops().eval(), ROWS)
    before = State.of(model)
    with pytest.raises(ValueError, match=r"gives \(6, 6, 4, 5\) for 3 images, not \[3, C, h, w\]"):
        explain(model)
    before.assert_unchanged(model)


class Parts(nn.Module):
    """A layer that gives two tensors, and a tail that reads both."""

    class Split(nn.Module):
        def forward(self, maps):
            return maps, 3 * maps

    def __init__(self) -> None:
        super().__init__()
        self.split = self.Split()

    def forward(self, images):
        first, second = self.split(images)
        return (first + second).mean(dim=(2, 3))


@pytest.mark.parametrize("transform", [None, lambda parts: parts[1]])
def test_a_transform_gets_what_the_layer_gives(transform):
    model = SimilarityModel(Parts(), torch.eye(3), similarity="dot")
    maps = LayerFam(model, "split", rule="additive", reshape_transform=transform).attribute(
        IMAGES, 1
    )
    second = maps[1] if transform is None else maps
    torch.testing.assert_close(second, 3 * IMAGES[:, 1:2] / 80)
    for explain in (
        lambda: FAM(model, ["split"], transform, rule="additive")(IMAGES),
        lambda: explain_pair(Parts(), "split", IMAGES, IMAGES, reshape_transform=transform),
    ):
        if transform is None:
            with pytest.raises(ValueError, match="2 tensors: pass a reshape_transform that picks"):
                explain()
        else:
            explain()


def test_many_references_for_pytorch_grad_cam():
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = SimilarityModel(encoder(), ROWS)
    indices = [[3, 0], [1, 1], [2, 3]]
    for layers in (["last"], ["last", "features"]):
        cam = FAM(model, layers, rule="centred")
        model.train()
        many = cam.attribute_references(IMAGES, indices)
        assert model.training
        assert many.shape == (3, 2, 8, 10)
        assert many.dtype == np.float32
        signed = cam.attributions
        assert [tuple(part.shape) for part in signed] == [(3, 2, 1, 4, 5)] * len(layers)
        for column in range(2):
            targets = [ClassifierOutputTarget(row[column]) for row in indices]
            np.testing.assert_allclose(many[:, column], cam(IMAGES, targets), atol=2e-6)
            for part, single in zip(signed, cam.attributions, strict=True):
                torch.testing.assert_close(part[:, column], single)
    with pytest.raises(IndexError, match="index 4 is out of range: there are 4 references"):
        cam.attribute_references(IMAGES, [[4]] * 3)
    assert cam.attribute_references(IMAGES).shape == (3, 4, 8, 10)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="the map holds NaN"):
        check_finite(torch.tensor([1.0, float(value)]))


@pytest.mark.parametrize("channels", [True, False], ids=["summed", "channels"])
def test_maps_are_contiguous_whatever_the_layer_gives(channels):
    model = SimilarityModel(encoder().to(memory_format=torch.channels_last), ROWS)
    images = IMAGES.to(memory_format=torch.channels_last)
    for rule in RULES:
        explainer = LayerFam(model, "last", rule=rule)
        assert explainer.attribute(images, 1, attr_dim_summation=channels).is_contiguous()


def test_the_constant_term_is_measured_under_the_same_dropout():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 3))
    net = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).train()
    explainer = LayerFam(net, "0", rule="additive")
    images = torch.randn(2, 6, 4, 5)
    deltas = [explainer.attribute(images, 1, return_convergence_delta=True)[1] for _ in range(3)]
    assert torch.stack(deltas).abs().max() < 1e-5
    # Measuring it moves nobody's random numbers: both draw one mask.
    torch.manual_seed(1)
    explainer.attribute(images, 1)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    explainer.attribute(images, 1, return_convergence_delta=True)
    assert torch.equal(torch.get_rng_state(), state)


class TestZeroEmbedding:
    """A black image through an encoder without biases: nothing to explain, and nothing to crash."""

    images = torch.cat([IMAGES, 0 * IMAGES[:1]])

    def model(self) -> SimilarityModel:
        net = encoder()
        net.conv.bias = net.features.bias = None
        net.norm = nn.Identity()
        return SimilarityModel(net, ROWS)

    def test_is_scored_zero(self):
        scores = self.model()(self.images)
        assert scores[3].eq(0).all()
        torch.testing.assert_close(scores[:3], self.model()(IMAGES))

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("layer", ["last", "features"])
    def test_has_a_map_of_zeros_and_a_warning_that_names_the_row(self, rule, layer):
        model = self.model()
        for explain in (
            lambda: LayerFam(model, layer, rule=rule).attribute(self.images, 1),
            lambda: LayerFam(model, layer, rule=rule).attribute_references(
                self.images, references_per_chunk=1
            )[:, 1],
            lambda: self.fam(model, layer, rule),
            lambda: (
                explain_pair(
                    model.encoder, layer, self.images, self.images.roll(1, 0), rule=rule
                ).map_a
            ),
        ):
            with pytest.warns(UserWarning, match="embedding row 3 is all zero") as caught:
                maps = explain()
            assert caught[0].filename == __file__
            assert maps[3].eq(0).all()
            assert maps[1].abs().sum() > 0

    def fam(self, model, layer, rule):
        cam = FAM(model, [layer], rule=rule)
        cam(self.images)
        return cam.attributions[0]

    def test_does_not_warn_where_there_is_none(self, recwarn):
        model = self.model()
        # Behind a ReLU, an embedding with some zeros in it is nothing special.
        model.encoder.features.weight.data[2] = 0
        assert model.embed(IMAGES)[:, 2].eq(0).all()
        explainer = LayerFam(model, "last", rule="additive")
        explainer.attribute(IMAGES, 1, return_convergence_delta=True)
        assert not recwarn


def test_a_namedtuple_stays_one():
    Pair = collections.namedtuple("Pair", "map aux")

    class Named(nn.Module):
        def forward(self, maps):
            return Pair(maps, maps.sum())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.named = Named()

        def forward(self, images):
            return self.named(images).map.mean(dim=(2, 3))

    maps = LayerFam(
        SimilarityModel(Net(), torch.eye(3)),
        "named",
        rule="additive",
        reshape_transform=lambda pair: pair[0],
    ).attribute(IMAGES, 0)
    assert maps.shape == (3, 1, 8, 10)
