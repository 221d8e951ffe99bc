"""Where a score went, against sums by hand; and who is told when the regions carry little of it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from fam_plugins import FAM, LayerFam, SimilarityModel, SimilarityTarget, explain_pair
from tests.networks import TinyNet, classifier, encoder

IMAGES = torch.rand(3, 3, 8, 10, generator=torch.Generator().manual_seed(1)).double()
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).double()


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def biased(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(3)
    net = TinyNet(head=nn.Linear(6, 6)).eval().double()
    with torch.no_grad():
        net.head.bias.mul_(scale)
    return net


@pytest.mark.parametrize("contrast", [None, "others", ROWS[:2]], ids=["none", "others", "rows"])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "sqeuclidean"])
@pytest.mark.parametrize("rule", ["additive", "centred"])
def test_parts_by_hand(similarity, contrast, rule):
    net = biased(0.1)
    model = SimilarityModel(net, ROWS, similarity=similarity, contrast=contrast)
    found = LayerFam(model, "last", rule=rule).decompose(IMAGES, 1)
    z, pooled = net(IMAGES).detach(), (net(IMAGES) - net.head.bias).detach()

    def against(t):  # what one reference gives: regions, bias, offset
        if similarity == "cosine":
            unit = t / t.norm() / z.norm(dim=1, keepdim=True)
            return [(pooled * unit).sum(1), (net.head.bias * unit).sum(1), 0 * z[:, 0]]
        if similarity == "dot":
            return [pooled @ t, (net.head.bias @ t).expand(3), 0 * z[:, 0]]
        offset = -z.square().sum(1) - t.square().sum()
        return [2 * pooled @ t, 2 * (net.head.bias @ t).expand(3), offset]

    others = (
        {"others": ROWS[[0, 2, 3]], None: []}.get(contrast, ROWS[:2])
        if (contrast is None or isinstance(contrast, str))
        else contrast
    )
    wanted = against(ROWS[1])
    for t in others:
        wanted = [w - a / len(others) for w, a in zip(wanted, against(t), strict=True)]
    names = ["regions", "bias", "offset"] if similarity == "sqeuclidean" else ["regions", "bias"]
    assert list(found.parts) == names
    for name, part in zip(names, wanted, strict=False):
        close(found.parts[name], part.detach())
    close(found.maps.sum((1, 2, 3)), found.parts["regions"])
    close(found.score, model(IMAGES)[:, 1].detach())
    close(found.gap, torch.zeros(3).double())
    close(found.coverage, found.parts["regions"] / found.score)
    assert not any(part.requires_grad for part in (*found.parts.values(), found.score))


def test_a_classifier_and_the_gap_of_a_curved_tail():
    net = classifier().double()
    found = LayerFam(net, "last", rule="additive").decompose(IMAGES, 2)
    close(found.parts["bias"], net.head.bias[2].detach().expand(3))
    close(found.gap, torch.zeros(3).double())
    curved = TinyNet(head=nn.Sequential(nn.Linear(6, 6), nn.Tanh())).eval().double()
    explainer = LayerFam(curved, "last", rule="additive", tail="true")
    found = explainer.decompose(IMAGES, 2)
    delta = explainer.attribute(IMAGES, 2, return_convergence_delta=True)[1]
    close(found.gap, delta)
    assert found.gap.abs().min() > 1e-6
    held = LayerFam(curved, "last", rule="additive").decompose(IMAGES, 2)
    close(held.gap, torch.zeros(3).double())


def calls(net: nn.Module):
    """Every method that promises shares, on an encoder."""
    model = SimilarityModel(net, ROWS)
    explainer = LayerFam(model, "last", rule="additive")
    cam = FAM(net, ["last"], rule="additive")
    return {
        "attribute": lambda: explainer.attribute(IMAGES, 1),
        "relu": lambda: explainer.attribute(IMAGES, 1, relu_attributions=True),
        "references": lambda: explainer.attribute_references(IMAGES, references_per_chunk=1),
        "FAM": lambda: cam(IMAGES, [SimilarityTarget(ROWS[1])] * 3),
        "FAM references": lambda: FAM(model, ["last"], rule="additive").attribute_references(
            IMAGES
        ),
        "pair": lambda: explain_pair(
            net, "last", IMAGES, IMAGES.flip(0), contrast=ROWS[:1], difference=True
        ),
    }


@pytest.mark.parametrize("method", list(calls(encoder())))
def test_little_coverage_is_told_once_a_call_at_the_users_line(method):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calls(biased(100.0))[method]()
    (one,) = [each for each in caught if "the regions carry" in str(each.message)]
    assert one.filename == __file__
    assert "LayerFam.decompose names the rest" in str(one.message)


@pytest.mark.parametrize("method", list(calls(encoder())))
def test_full_coverage_says_nothing(method):
    net = encoder().double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls(net)[method]()


@pytest.mark.parametrize("rule", ["fam", "centred", "gradcam"])
def test_rules_that_promise_no_shares_say_nothing(rule):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LayerFam(SimilarityModel(biased(100.0), ROWS), "last", rule=rule).attribute(IMAGES, 1)


def test_what_several_tensors_of_a_layer_carry_counts_together():
    class Halves(nn.Module):
        def forward(self, x):
            return x[..., :5], x[..., 5:]

    net = nn.Sequential(Halves(), nn.Module())
    net[1].forward = lambda parts: torch.cat(parts, dim=3).mean((2, 3))
    images = torch.full((1, 2, 8, 10), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # either half alone carries 0.4 or 0.6 of the score
        LayerFam(net, "0", rule="additive").attribute(
            images * torch.tensor([1.2, 0.8]).repeat_interleave(5), 0
        )


def test_the_warning_names_image_and_numbers():
    net = TinyNet(head=nn.Linear(6, 1)).eval().double()
    with torch.no_grad():
        net.head.weight.fill_(1.0)
        net.head.bias.fill_(0.0)
    explainer = LayerFam(net, "last", rule="additive")
    shares = explainer.attribute(IMAGES, 0).sum((1, 2, 3))
    # A bias between the second largest share and the largest: one image is above one half.
    low, high = shares.sort().values[-2:]
    with torch.no_grad():
        net.head.bias.fill_(float(low + high) / 2)
    bias = float(net.head.bias.detach())
    first = int((shares < bias).nonzero()[0])
    total = float(shares[first]) + bias
    text = rf"carry {float(shares[first]):.3g} of a score of {total:.3g} \(image {first}\)"
    with pytest.warns(UserWarning, match=text):
        explainer.attribute(IMAGES, 0)
