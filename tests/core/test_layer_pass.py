"""The one forward pass: what it keeps, what it differentiates, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fam_plugins.core.layer_pass import LayerPass, find_layer
from tests.networks import OwnBackward, classifier

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def gradients(one: LayerPass, score: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Of the sum of scores, without the dimension of cotangents."""
    found = one.gradients(score, torch.ones_like(score)[None])
    return [tuple(part[0] for part in parts) for parts in found]


def test_gradients_of_several_layers_in_sequence_equal_autograd():
    net = classifier()
    names = ["last", "conv", "features"]
    one = LayerPass(net, names)
    out = one.run(lambda: net(IMAGES))
    found = gradients(one, out[:, 2])

    kept = {}
    handles = [
        net.get_submodule(n).register_forward_hook(
            lambda _m, _i, o, n=n: kept.setdefault(n, o).clone()
        )
        for n in names
    ]
    score = net(IMAGES)[:, 2].sum()
    expected = torch.autograd.grad(score, [kept[n] for n in names])
    for handle in handles:
        handle.remove()
    for (gradient,), (activation,), wanted, name in zip(
        found, one.tracked, expected, names, strict=True
    ):
        torch.testing.assert_close(gradient, wanted)
        torch.testing.assert_close(activation, kept[name])


def test_parallel_branches_each_get_their_gradient():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.ReLU(), nn.Sigmoid()

        def forward(self, x):
            return 2 * self.left(x) + 3 * self.right(x)

    net = Branches()
    one = LayerPass(net, ["right", "left"])
    out = one.run(lambda: net(torch.ones(1, 4)))
    (right,), (left,) = gradients(one, out)
    assert right.eq(3).all()
    assert left.eq(2).all()


def test_nothing_before_the_layer_is_kept():
    """Tensors saved for a backward step are what memory goes to; none may come from before."""
    net = classifier()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        one = LayerPass(net, ["last"])
        out = one.run(lambda: net(IMAGES))
        gradients(one, out[:, 0])
    assert saved, "the tail does save something"
    before = {tuple(net.conv(IMAGES).shape), tuple(IMAGES.shape)}
    assert not before & {tuple(s) for s in saved}


def test_the_layer_input_can_be_explained_instead():
    net = classifier()
    at_input = LayerPass(net, ["pool"], at_input=True)
    at_output = LayerPass(net, ["last"])
    for one in (at_input, at_output):
        out = one.run(lambda: net(IMAGES))
        one.found = gradients(one, out[:, 0])
    torch.testing.assert_close(at_input.found[0][0], at_output.found[0][0])
    torch.testing.assert_close(at_input.tracked[0][0], at_output.tracked[0][0])


def test_zeros_give_the_constant_term():
    net = classifier()
    out = LayerPass(net, ["last"], replace=torch.zeros_like).run(lambda: net(IMAGES))
    torch.testing.assert_close(out, net.head.bias.detach().expand(2, -1))


def test_a_tensor_the_score_ignores_has_zero_gradient():
    class Pair(nn.Module):
        def forward(self, x):
            return [x, 2 * x, None]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            first, _, _ = self.pair(x)
            return first.sum(dim=1)

    net = Net()
    one = LayerPass(net, ["pair"])
    out = one.run(lambda: net(torch.ones(2, 3)))
    ((used, ignored),) = gradients(one, out)
    assert used.eq(1).all()
    assert ignored.eq(0).all()


def test_integers_are_no_feature_map():
    net = nn.Sequential(nn.Identity())
    one = LayerPass(net, ["0"])
    with pytest.raises(TypeError, match="gives torch.int64"):
        one.run(lambda: net(torch.ones(1, 2, dtype=torch.int64)))


def test_gradients_carry_no_graph():
    net = nn.Sequential(nn.Identity(), nn.Tanh())
    one = LayerPass(net, ["0"])
    out = one.run(lambda: net(IMAGES))
    ((found,),) = one.gradients(out, torch.ones_like(out)[None], create_graph=True)
    assert not found.requires_grad
    torch.testing.assert_close(found[0], 1 - out.detach().square())


def test_a_layer_that_hands_its_input_on_leaves_it_alone():
    net, images = nn.Sequential(nn.Identity()), IMAGES.clone()
    one = LayerPass(net, ["0"])
    one.gradients(one.run(lambda: net(images)), torch.ones_like(images)[None])
    assert not images.requires_grad
    assert images.grad is None


class TestFindLayer:
    def test_by_module_and_by_name(self):
        net = classifier()
        assert find_layer(net, net.last) == (net.last, "last")
        assert find_layer(net, "last") == (net.last, "last")
        assert find_layer(net.forward, "last") == (net.last, "last")
        stranger = nn.ReLU()
        assert find_layer(net, stranger) == (stranger, "ReLU")

    def test_names_may_start_at_the_encoder(self):
        from tests.contracts.explainers import similarity_model

        model = similarity_model()
        assert find_layer(model, "last")[0] is model.encoder.last
        assert find_layer(model, "encoder.last")[0] is model.encoder.last

    def test_the_exact_name_comes_first(self):
        net = nn.ModuleDict({"x": nn.ReLU(), "encoder": nn.ModuleDict({"x": nn.Tanh()})})
        assert find_layer(net, "x") == (net["x"], "x")

    @pytest.mark.parametrize(
        ("model", "layer", "error", "message"),
        [
            (classifier(), "lats", ValueError, "did you mean 'last'"),
            (lambda x: x, "last", ValueError, "in a plain function: pass the module"),
            (classifier(), None, TypeError, "must be a module such as model.layer4"),
            (classifier(), ["last"], TypeError, "must be a module"),
            (classifier(), "", ValueError, "unknown layer"),
        ],
    )
    def test_refuses_what_is_no_layer(self, model, layer, error, message):
        with pytest.raises(error, match=message):
            find_layer(model, layer)


@pytest.mark.parametrize("tail", [lambda z: 2 * z, OwnBackward.apply])
def test_many_cotangents_equal_one_at_a_time(tail):
    net = classifier()
    one = LayerPass(net, ["last", "conv"])
    out = tail(one.run(lambda: net(IMAGES)))
    cotangents = torch.eye(10).reshape(10, 2, 5)
    many = one.gradients(out, cotangents)
    for number in range(10):
        step = one.gradients(out, cotangents[number : number + 1], retain_graph=True)
        for (found,), (wanted,) in zip(many, step, strict=True):
            torch.testing.assert_close(found[number], wanted[0])
