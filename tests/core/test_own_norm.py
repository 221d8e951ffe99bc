"""An encoder that ends in a norm is explained like the same encoder under a cosine without it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fam_plugins import FAM, LayerFam, SimilarityModel, SimilarityTarget, explain_pair
from fam_plugins.core.own_norm import hold_own_norm
from fam_plugins.core.rules import RULES
from tests.networks import TinyNet, encoder

NORMS = {
    "F.normalize": F.normalize,
    "F.normalize of tokens": lambda e: F.normalize(e[:, None], dim=-1)[:, 0],
    "F.normalize of maps": lambda e: F.normalize(e[..., None, None]).flatten(1),
    "x / x.norm": lambda e: e / e.norm(dim=1, keepdim=True),
    "x / x.norm[:, None]": lambda e: e / e.norm(p=2, dim=-1)[:, None],
    "linalg": lambda e: e / torch.linalg.vector_norm(e, dim=1, keepdim=True),
    "expanded": lambda e: e.div(e.norm(2, 1, True).clamp_min(1e-12).expand_as(e)),
    "sqrt of a sum": lambda e: e / (e**2).sum(1, keepdim=True).sqrt(),
    "sqrt of a product": lambda e: e / (e * e).sum(1, keepdim=True).sqrt(),
    "rsqrt": lambda e: e * e.pow(2).sum(1, keepdim=True).rsqrt(),
    "reciprocal first": lambda e: (1 / e.norm(dim=1, keepdim=True)) * e,
}
NO_NORMS = {
    "none": lambda e: 2 * e,
    "silu": lambda e: e * e.sigmoid(),
    "a gate of the mean": lambda e: e * e.mean(1, keepdim=True).sigmoid(),
    "the sum of magnitudes": lambda e: F.normalize(e, p=1),
    "standardised": lambda e: (e - e.mean(1, keepdim=True)) / e.std(1, keepdim=True),
    "a ratio of two": lambda e: e / (e.flip(1) + 9),
}
E = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("form", NORMS)
def test_the_length_is_held_constant(form):
    leaf = E.clone().requires_grad_()
    z = NORMS[form](leaf * 1)
    lengths = hold_own_norm(z)
    torch.testing.assert_close(lengths[:, 0], E.norm(dim=1))
    directions = torch.randn(2, 3, 4, dtype=torch.float64)
    one = torch.autograd.grad(z, leaf, directions[0], retain_graph=True)[0]
    torch.testing.assert_close(one, directions[0] / E.norm(dim=1, keepdim=True))
    both = torch.autograd.grad(z, leaf, directions, is_grads_batched=True)[0]
    torch.testing.assert_close(both, directions / E.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("form", NO_NORMS)
def test_what_is_no_norm_keeps_its_gradient(form):
    leaf, other = E.clone().requires_grad_(), E.clone().requires_grad_()
    z = NO_NORMS[form](leaf * 1)
    lengths = hold_own_norm(z)
    assert lengths is None or (lengths == 1).all()
    torch.testing.assert_close(
        torch.autograd.grad(z.sum(), leaf)[0],
        torch.autograd.grad(NO_NORMS[form](other * 1).sum(), other)[0],
        rtol=0,
        atol=0,
    )


def test_tensors_without_a_graph_have_none():
    assert hold_own_norm(F.normalize(E)) is None
    assert hold_own_norm(E.clone().requires_grad_()) is None


class Normed(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.net(images))


IMAGES = torch.rand(3, 3, 8, 10, generator=torch.Generator().manual_seed(1)).double()
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).double()


@pytest.fixture(params=["pooled", "linear head", "head with bias", "hidden"])
def net(request):
    torch.manual_seed(3)
    heads = {
        "pooled": nn.Identity(),
        "linear head": nn.Linear(6, 6, bias=False),
        "head with bias": nn.Linear(6, 6),
        "hidden": nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)),
    }
    return TinyNet(head=heads[request.param]).eval().double()


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.frozen])
@pytest.mark.parametrize("contrast", [None, "others"])
@pytest.mark.filterwarnings('ignore:rule "fam" rescales')
def test_the_map_is_that_of_the_encoder_without_it(net, rule, contrast):
    def explained(encoder, layer):
        model = SimilarityModel(encoder, ROWS, contrast=contrast)
        explainer = LayerFam(model, layer, rule=rule)
        return explainer.attribute(IMAGES, 1), explainer.attribute_references(IMAGES)

    for found, wanted in zip(
        explained(Normed(net), "net.last"), explained(net, "last"), strict=True
    ):
        close(found, wanted)
        assert wanted.abs().max() > 1e-3

    def through_a_target(encoder, layer):
        cam = FAM(encoder, [layer], rule=rule)
        cam(IMAGES, [SimilarityTarget(ROWS[1])] * 3)
        return cam.attributions[0]

    close(through_a_target(Normed(net), "net.last"), through_a_target(net, "last"))
    with_norm, without = (
        explain_pair(
            encoder,
            layer,
            IMAGES[:2],
            IMAGES[1:],
            rule=rule,
            difference=True,
            return_convergence_delta=RULES[rule].adds_up,
            contrast=None if contrast is None else ROWS,
        )
        for encoder, layer in ((Normed(net), "net.last"), (net, "last"))
    )
    for name in ("map_a", "map_b", "difference_a", "difference_b", "score"):
        close(getattr(with_norm, name), getattr(without, name))
    if RULES[rule].adds_up:
        close(with_norm.delta_a, without.delta_a)


@pytest.mark.parametrize("tail", ["frozen", "true"])
def test_the_constant_is_measured_with_the_same_length(net, tail):
    ours, theirs = (
        LayerFam(SimilarityModel(encoder, ROWS), layer, rule="additive", tail=tail).decompose(
            IMAGES, 2
        )
        for encoder, layer in ((Normed(net), "net.last"), (net, "last"))
    )
    assert list(ours.parts) == list(theirs.parts)
    for name, part in ours.parts.items():
        close(part, theirs.parts[name])
    close(ours.gap, theirs.gap)


def test_the_true_gradient_is_left_to_gradcam(net):
    """Grad-CAM's signed map of a cosine behind pooling sums to zero, normalised once or twice."""
    maps = LayerFam(SimilarityModel(Normed(net), ROWS), "net.last", rule="gradcam").attribute(
        IMAGES, 1
    )
    close(maps, LayerFam(SimilarityModel(net, ROWS), "last", rule="gradcam").attribute(IMAGES, 1))


def test_nothing_is_left_in_the_model():
    torch.manual_seed(0)
    normed = Normed(encoder())
    model, images = SimilarityModel(normed, torch.eye(6)), torch.rand(2, 3, 8, 8)
    before = torch.autograd.functional.jacobian(lambda x: normed(x).sum(0), images)
    LayerFam(model, "net.last", rule="additive").attribute(images, 0)
    after = torch.autograd.functional.jacobian(lambda x: normed(x).sum(0), images)
    assert torch.equal(before, after)
