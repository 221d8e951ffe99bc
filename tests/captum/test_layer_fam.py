"""LayerFam beyond the shared contract: targets, shapes, transforms, delta."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import nn

from fam_plugins import LayerFam
from fam_plugins.captum.targets import select_scores
from tests.contracts.explainers import MODELS, similarity_model
from tests.networks import State, classifier

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_takes_the_arguments_of_layer_grad_cam_in_their_order():
    own = {
        "__init__": ["rule", "reshape_transform", "smooth"],
        "attribute": ["return_convergence_delta"],
    }
    for method in own:
        ours = list(inspect.signature(getattr(LayerFam, method)).parameters.values())
        theirs = list(inspect.signature(getattr(LayerGradCam, method)).parameters.values())
        assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
        shared = [p for p in ours if p.name not in own[method]]
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in shared)
        # Captum 0.7 has no grad_kwargs.
        assert {p.name for p in shared} - {p.name for p in theirs} <= {"grad_kwargs"}
        assert [p.name for p in ours if p.kind is p.KEYWORD_ONLY] == own[method]
    assert issubclass(LayerFam, LayerAttribution)
    assert LayerFam.get_name() == "Layer Fam"
    assert hasattr(LayerFam.attribute, "__wrapped__")


def test_forward_func_and_layer_may_be_set_later():
    net = classifier()
    explainer = LayerFam(nn.Identity(), None)
    explainer.forward_func, explainer.layer = net, net.last
    expected = LayerFam(net, net.last).attribute(IMAGES, target=1)
    assert torch.equal(explainer.attribute(IMAGES, target=1), expected)


@pytest.mark.parametrize(
    "target",
    [
        2,
        np.int64(2),
        torch.tensor(2),
        torch.tensor([2]),
        [2, 2, 2],
        torch.tensor([2, 2, 2]),
        (2,),
        -3,
    ],
    ids=repr,
)
def test_every_kind_of_target(target):
    net = classifier()
    expected = LayerFam(net, net.last).attribute(IMAGES, target=2)
    assert torch.equal(LayerFam(net, net.last).attribute(IMAGES, target=target), expected)


def test_tuple_targets_for_outputs_of_more_dimensions():
    class Grid(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = classifier()

        def forward(self, x):
            return self.inner(x)[:, :4].reshape(-1, 2, 2)

    net = Grid()
    flat = LayerFam(net.inner, net.inner.last).attribute(IMAGES, target=[3, 1, 2])
    for target in ([(1, 1), (0, 1), (1, 0)],):
        assert torch.equal(LayerFam(net, net.inner.last).attribute(IMAGES, target=target), flat)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, "more than one score per image: pass target="),
        (5, "target 5 is out of range: the model has 5 outputs, so targets go from 0 to 4"),
        (-6, "out of range"),
        (1.0, "is a float: pass an int"),
        ("cat", "is a str: pass an int"),
        (torch.tensor(1.0), r"dtype torch.float32: pass integers"),
        (torch.tensor([0, 9, 0]), "target 9 is out of range"),
        (torch.tensor([0, -1, 0]), "target -1 is out of range"),
        (torch.tensor([0, 1]), "not valid"),
        ([0, 1], "does not match"),
        ([0, 1, 7], "target 7 is out of range"),
        ([0.5, 1.0, 0.0], "not valid"),
        ((0, 0), "Cannot choose target column"),
        ((9,), "does not fit an output of shape"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", ["classifier", "cosine"])
def test_bad_targets_raise_as_captums_do(target, message, kind):
    model = MODELS[kind]()
    before = State.of(model)
    with pytest.raises(AssertionError, match=message):
        LayerFam(model, "last").attribute(IMAGES, target=target)
    before.assert_unchanged(model)


def test_one_number_an_image_needs_no_target():
    net = classifier()
    expected = LayerFam(net, net.last).attribute(IMAGES, target=1)
    for scalar in (lambda x: net(x)[:, 1], lambda x: net(x)[:, 1:2], lambda x: net(x)[:, 1].sum()):
        assert torch.equal(LayerFam(scalar, net.last).attribute(IMAGES), expected)
    _, delta = LayerFam(lambda x: net(x)[:, 1:2], net.last, rule="additive").attribute(
        IMAGES, return_convergence_delta=True
    )
    assert delta.shape == (3,)
    assert delta.abs().max() < 1e-5


def test_a_model_that_returns_no_tensor_is_refused():
    net = classifier()
    with pytest.raises(TypeError, match=r"returns a dict.*lambda x: model\(x\)"):
        LayerFam(lambda x: {"logits": net(x)}, net.last).attribute(IMAGES, target=0)
    with pytest.raises(TypeError, match="returns a tuple"):
        select_scores((torch.ones(1),), None)


def test_inputs_and_further_arguments_as_captum_passes_them():
    net = classifier()

    def forward(x, y, scale, offset=0.0):
        return net(x + y) * scale + offset

    explainer = LayerFam(forward, net.last, rule="additive")
    maps = explainer.attribute((IMAGES, IMAGES), 1, additional_forward_args=(2.0, 1.0))
    expected = 2 * LayerFam(net, net.last, rule="additive").attribute(2 * IMAGES, 1)
    torch.testing.assert_close(maps, expected)
    many = explainer.attribute_references(
        (IMAGES, IMAGES), [[1, 2]] * 3, additional_forward_args=(2.0, 1.0)
    )
    torch.testing.assert_close(many[:, 0], expected)
    with pytest.raises(TypeError, match="must be a tensor or a tuple"):
        explainer.attribute("images", 1)


class Stack(nn.Module):
    """Feature maps ``[B, 4, ...]`` of any number of dimensions, pooled to ``[B, 4]``."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Tanh()

    def forward(self, x):
        x = self.layer(x)
        return x.flatten(2).mean(dim=2) if x.dim() > 2 else x


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 5), (2, 4, 3, 5), (2, 4, 2, 3, 5)], ids=len)
@pytest.mark.parametrize("rule", ["fam", "additive", "centred", "gradcam"])
def test_layers_of_two_to_five_dimensions(shape, rule):
    net, x = Stack(), torch.randn(shape)
    explainer = LayerFam(net, net.layer, rule=rule)
    assert explainer.attribute(x, 1).shape == (2, 1, *shape[2:])
    full = explainer.attribute(x, 1, attr_dim_summation=False)
    assert full.shape == shape
    torch.testing.assert_close(full.sum(1, keepdim=True), explainer.attribute(x, 1))
    if rule == "gradcam":
        torch.testing.assert_close(
            explainer.attribute(x, 1), LayerGradCam(net, net.layer).attribute(x, 1).detach()
        )


def test_negative_values_can_be_cut_off_but_not_from_the_delta():
    explainer = LayerFam(classifier(), "features", rule="additive")
    maps = explainer.attribute(IMAGES, 1)
    assert maps.min() < 0
    cut, delta = explainer.attribute(
        IMAGES, 1, relu_attributions=True, return_convergence_delta=True
    )
    assert torch.equal(cut, maps.clamp_min(0))
    _, same = explainer.attribute(IMAGES, 1, return_convergence_delta=True)
    assert torch.equal(delta, same)


def test_the_layer_input_can_be_explained():
    net = classifier()
    at_input = LayerFam(net, "pool").attribute(IMAGES, 1, attribute_to_layer_input=True)
    torch.testing.assert_close(at_input, LayerFam(net, "last").attribute(IMAGES, 1))


@pytest.mark.parametrize("at_input", [True, False])
def test_the_constant_term_is_that_of_the_place_explained(at_input):
    """Zeros in front of the head leave its bias, zeros behind it nothing."""
    net = classifier()
    explainer = LayerFam(net, "head", rule="additive")
    maps, delta = explainer.attribute(
        IMAGES, 1, attribute_to_layer_input=at_input, return_convergence_delta=True
    )
    bias = net.head.bias[1].item() if at_input else 0
    torch.testing.assert_close(maps.sum(1) + bias, net(IMAGES)[:, 1].detach())
    assert delta.abs().max() < 1e-6
    assert not delta.requires_grad
    found = explainer.compute_convergence_delta(
        maps + 1, IMAGES, 1, attribute_to_layer_input=at_input
    )
    torch.testing.assert_close(found, torch.ones(3))


def test_arguments_of_autograd_reach_it():
    class Two(nn.Module):
        def forward(self, x):
            return x, 2 * x

    net = nn.Sequential(Two(), nn.Module())
    net[1].forward = lambda parts: parts[0]
    x = torch.randn(2, 4)
    assert LayerFam(net, net[0]).attribute(x, 1)[1].eq(0).all()
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        LayerFam(net, net[0]).attribute(x, 1, grad_kwargs={"allow_unused": False})


def test_layers_with_several_tensors_give_a_tuple():
    class Pair(nn.Module):
        def forward(self, x):
            return x, 2 * x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            a, b = self.pair(x)
            return a + 3 * b

    net, x = Net(), torch.randn(2, 4)
    maps = LayerFam(net, net.pair, rule="additive").attribute(x, 1)
    assert isinstance(maps, tuple)
    torch.testing.assert_close(maps[0][:, 0], x[:, 1])
    torch.testing.assert_close(maps[1][:, 0], 6 * x[:, 1])
    _, delta = LayerFam(net, net.pair, rule="additive").attribute(
        x, 1, return_convergence_delta=True
    )
    assert delta.abs().max() < 1e-5


class TestTransform:
    class Tokens(nn.Module):
        """Tokens ``[B, 1 + h*w, C]``, a class token first; averaged over the others."""

        def __init__(self):
            super().__init__()
            self.net = classifier()
            self.tokens = nn.Identity()

        def forward(self, x):
            maps = self.net.features(self.net.relu(self.net.norm(self.net.conv(x))))
            tokens = maps.flatten(2).transpose(1, 2)
            tokens = self.tokens(torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1))
            return self.net.head(tokens[:, 1:].mean(dim=1))

    @staticmethod
    def to_map(tokens):
        return tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, 4, 4)

    @pytest.mark.parametrize("rule", ["fam", "additive", "centred", "gradcam"])
    def test_tokens_give_the_map_they_were_made_of(self, rule):
        net = self.Tokens().eval()
        ours = LayerFam(net, net.tokens, rule=rule, reshape_transform=self.to_map)
        expected = LayerFam(net, net.net.features, rule=rule)
        torch.testing.assert_close(ours.attribute(IMAGES, 1), expected.attribute(IMAGES, 1))

    @pytest.mark.parametrize(
        ("transform", "message"),
        [
            (lambda t: t.flatten(), r"not \[3, C, h, w\].*keeps the batch first"),
            (lambda t: t.reshape(1, 6, -1), "keeps the batch first"),
            (lambda t: None, "gives NoneType"),
        ],
    )
    def test_a_wrong_shape_is_refused(self, transform, message):
        net = self.Tokens().eval()
        before = State.of(net)
        with pytest.raises(ValueError, match=message):
            LayerFam(net, net.tokens, reshape_transform=transform).attribute(IMAGES, 1)
        before.assert_unchanged(net)


def test_a_layer_without_channels_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Identity()

        def forward(self, x):
            return self.one(x.sum(dim=(1, 2, 3)))

    net = Net()
    with pytest.raises(ValueError, match=r"gives \(3,\) for 3 images"):
        LayerFam(net, net.one).attribute(IMAGES)


def test_a_delta_is_refused_where_nothing_adds_up():
    net = classifier()
    for rule in ("fam", "centred", "gradcam"):
        explainer = LayerFam(net, "last", rule=rule)
        assert not explainer.has_convergence_delta()
        with pytest.raises(ValueError, match='use LayerFam.*rule="additive"'):
            explainer.attribute(IMAGES, 1, return_convergence_delta=True)
        with pytest.raises(ValueError, match='use LayerFam.*rule="additive"'):
            explainer.compute_convergence_delta(torch.ones(1), IMAGES, 1)
    assert net.calls == 0


def test_an_unknown_rule_is_refused_at_construction():
    with pytest.raises(ValueError, match="did you mean 'additive'"):
        LayerFam(classifier(), "last", rule="aditive")


def test_contrast_under_fam_warns_and_elsewhere_does_not(recwarn):
    model = similarity_model(contrast="others")
    for rule in ("additive", "centred", "gradcam"):
        LayerFam(model, "last", rule=rule).attribute(IMAGES, 1)
    LayerFam(similarity_model(), "last").attribute(IMAGES, 1)
    assert not recwarn
    with pytest.warns(UserWarning, match='with contrast use rule="centred"'):
        LayerFam(model, "last").attribute(IMAGES, 1)


def test_there_is_no_asynchronous_form():
    with pytest.raises(NotImplementedError, match="call attribute"):
        LayerFam(classifier(), "last").attribute_future()
