"""``tail=`` in every explainer: what is held constant behind the layer, and where the rest went."""

from __future__ import annotations

import pytest
import torch
from captum.attr import LayerGradientXActivation
from torch import nn
from torchvision.models import VisionTransformer

from fam_plugins import (
    FAM,
    LayerFam,
    SimilarityModel,
    SimilarityTarget,
    explain_pair,
    frozen_scores,
    frozen_tail,
)
from fam_plugins.core.maps import TAILS
from tests.networks import State, TinyNet, encoder

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
HELD = {"frozen": {}, "norms": {"attention": False, "gates": False}}


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def vit() -> nn.Module:
    torch.manual_seed(0)
    net = VisionTransformer(16, 4, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16)
    net.heads = nn.Identity()
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return net.eval().double()


@pytest.fixture
def model():
    torch.manual_seed(1)
    return SimilarityModel(vit(), torch.randn(3, 8).double())


LAYER = "encoder.layers.encoder_layer_1"


@pytest.mark.parametrize("tail", TAILS)
def test_is_gradient_times_activation_with_that_much_held_constant(model, tail):
    layer = model.encoder.get_submodule(LAYER)
    if tail == "true":
        with frozen_scores():
            shares = LayerGradientXActivation(model, layer).attribute(IMAGES, target=1)
    else:
        with frozen_tail(**HELD[tail]), frozen_scores():
            shares = LayerGradientXActivation(model, layer).attribute(IMAGES, target=1)
    by_token = shares.detach().sum(dim=2)
    maps = LayerFam(model, LAYER, rule="additive", tail=tail).attribute(IMAGES, 1)
    close(maps.flatten(1), by_token[:, 1:])
    assert (maps - LayerFam(model, LAYER, rule="gradcam").attribute(IMAGES, 1)).abs().max() > 1e-4


def test_the_three_differ_and_the_rules_choose(model):
    maps = {t: LayerFam(model, LAYER, rule="additive", tail=t).attribute(IMAGES, 1) for t in TAILS}
    for one, other in (("frozen", "norms"), ("norms", "true"), ("frozen", "true")):
        assert (maps[one] - maps[other]).abs().max() > 1e-4
    for rule, tail in {
        "additive": "frozen",
        "centred": "norms",
        "gradcam": "true",
        "fam": "true",
    }.items():
        chosen = LayerFam(model, LAYER, rule=rule).attribute(IMAGES, 1)
        asked = LayerFam(model, LAYER, rule=rule, tail=tail).attribute(IMAGES, 1)
        assert torch.equal(chosen, asked)
        other = "frozen" if tail == "true" else "true"
        differs = LayerFam(model, LAYER, rule=rule, tail=other).attribute(IMAGES, 1)
        assert (chosen - differs).abs().max() > 1e-4


@pytest.mark.parametrize("tail", TAILS)
def test_every_explainer_takes_it(model, tail):
    explainer = LayerFam(model, LAYER, rule="additive", tail=tail)
    maps = explainer.attribute(IMAGES, 1)
    close(explainer.attribute_references(IMAGES)[:, 1], maps)
    cam = FAM(model, [LAYER], rule="additive", tail=tail)
    cam.attribute_references(IMAGES, [[1, 0]] * 2)
    close(cam.attributions[0][:, 0], maps)
    target = SimilarityTarget(model.references[1])
    with FAM(model.encoder, [LAYER], rule="additive", tail=tail) as cam:
        cam(IMAGES, [target] * 2)
        close(cam.attributions[0], maps)
    pair = explain_pair(
        model.encoder,
        LAYER,
        IMAGES,
        IMAGES.flip(0),
        tail=tail,
        contrast=model.references[:1],
        return_convergence_delta=True,
    )
    for query, reference, found, delta in (
        (IMAGES, IMAGES.flip(0), pair.map_a, pair.delta_a),
        (IMAGES.flip(0), IMAGES, pair.map_b, pair.delta_b),
    ):
        one = SimilarityModel(model.encoder, reference, contrast=model.references[:1])
        by_layer_fam = LayerFam(one, LAYER, rule="additive", tail=tail)
        wanted, gap = by_layer_fam.attribute(query, [0, 1], return_convergence_delta=True)
        close(found, wanted)
        close(delta, gap)


@pytest.mark.parametrize("rule", ["additive", "centred"])
@pytest.mark.parametrize("head", ["pooled", "linear", "relu"])
def test_behind_linear_tails_nothing_changes_to_the_bit(rule, head):
    torch.manual_seed(0)
    heads = {
        "pooled": nn.Identity(),
        "linear": nn.Linear(6, 6),
        "relu": nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)),
    }
    net = TinyNet(head=heads[head]).eval()
    model = SimilarityModel(net, torch.randn(4, 6), contrast="others")
    images = torch.rand(3, 3, 8, 10)
    frozen, true = (LayerFam(model, "last", rule=rule, tail=tail) for tail in ("frozen", "true"))
    assert torch.equal(frozen.attribute(images, 1), true.attribute(images, 1))
    assert torch.equal(frozen.attribute_references(images), true.attribute_references(images))


@pytest.mark.parametrize("similarity", ["cosine", "dot", "sqeuclidean", "euclidean"])
def test_parts_of_a_class_token_by_hand(similarity):
    torch.manual_seed(1)
    references = torch.randn(3, 8).double()
    model = SimilarityModel(vit(), references, similarity=similarity, contrast=references[:2])
    found = LayerFam(model, LAYER, rule="centred").decompose(IMAGES, 2)
    layer = model.encoder.get_submodule(LAYER)
    with frozen_tail(), frozen_scores():
        shares = LayerGradientXActivation(model, layer).attribute(IMAGES, target=2)
    by_token = shares.detach().sum(dim=2)
    close(found.parts["regions"], by_token[:, 1:].sum(dim=1))
    close(found.parts["class token"], by_token[:, 0])
    assert set(found.parts) - {"offset"} == {"regions", "class token", "bias"}
    assert ("offset" in found.parts) == ("euclidean" in similarity)
    close(found.gap, torch.zeros(2).double())
    close(found.score, model(IMAGES)[:, 2].detach())
    assert found.parts["bias"].abs().min() > 1e-6


def test_one_pass_and_nothing_left_behind(model):
    calls, before = [], State.of(model)
    handle = model.encoder.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 4, requires_grad=True)

    def gradient():
        return torch.autograd.grad(nn.functional.layer_norm(x, (4,)).square().sum(), x)[0]

    true, explainer = gradient(), LayerFam(model, LAYER, rule="additive")
    explainer.attribute(IMAGES, 1, return_convergence_delta=True)
    explainer.decompose(IMAGES, 1)
    assert len(calls) == 2
    handle.remove()
    assert torch.equal(gradient(), true)
    before.assert_unchanged(model)


class EndsIn(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.net, self.end = encoder(), end

    def forward(self, images):
        return self.end(self.net(images))


@pytest.mark.parametrize("end", [nn.Softmax(dim=1), lambda z: z.square().mean(1, True).sqrt()])
def test_what_is_held_whole_follows_the_true_gradient_and_adds_nothing_unsaid(end):
    net, images = EndsIn(end), torch.rand(2, 3, 8, 8)
    true = LayerFam(net, "net.last", rule="additive", tail="true").attribute(images, 0)
    explainer = LayerFam(net, "net.last", rule="additive")
    if isinstance(end, nn.Softmax):  # keeps its gradient, as the last step
        maps = explainer.attribute(images, 0)
    else:
        with pytest.warns(UserWarning, match='follows the true gradient, tail="true"') as caught:
            maps = explainer.attribute(images, 0)
        assert [each.filename for each in caught if "true gradient" in str(each.message)] == [
            __file__
        ]
    torch.testing.assert_close(maps, true)


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
@pytest.mark.parametrize("how", ["wrapped", "in place", "around"])
def test_a_layer_inside_of_a_compiled_module_is_refused_before_any_work(how):
    net = vit()
    layer, calls = net.get_submodule(LAYER), []
    net.conv_proj.register_forward_hook(lambda *_: calls.append(1))
    model = SimilarityModel(net, torch.randn(3, 8).double())
    if how == "wrapped":
        model.encoder = torch.compile(net, backend="eager")
    elif how == "in place":
        net.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    for rule in ("additive", "centred"):
        with pytest.raises(TypeError, match="compiled.*explain the model as it was before"):
            LayerFam(model, layer, rule=rule).attribute(IMAGES, 1)
    assert not calls
    part = vit()
    part.conv_proj.compile(backend="eager")  # in front of the layer nothing is frozen
    model = SimilarityModel(part, torch.randn(3, 8).double())
    assert LayerFam(model, LAYER, rule="additive").attribute(IMAGES, 1).any()


class Kernel(torch.autograd.Function):
    """Attention as a kernel of another library: one operation, which no mode sees into."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return torch.softmax(q @ k.mT, -1) @ v

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            q, k, v = (part.detach().requires_grad_() for part in ctx.saved_tensors)
            return torch.autograd.grad(torch.softmax(q @ k.mT, -1) @ v, (q, k, v), gradient)


@pytest.mark.parametrize("kernel", [True, False])
def test_attention_that_cannot_be_frozen_shows_in_the_gap(kernel):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.qkv = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24)

        def forward(self, images):
            q, k, v = self.qkv(self.embed(images).flatten(2).mT).chunk(3, dim=2)
            read = Kernel.apply(q, k, v) if kernel else torch.softmax(q @ k.mT, -1) @ v
            return read.mean(1)

    torch.manual_seed(0)
    net = Net().double()
    with torch.no_grad():
        net.qkv.weight.mul_(3)  # attends to some regions
    model = SimilarityModel(net, torch.randn(2, 8).double())
    explainer = LayerFam(model, "embed", rule="additive")
    gap = explainer.decompose(IMAGES, 1).gap
    _, delta = explainer.attribute(IMAGES, 1, return_convergence_delta=True)
    close(delta, gap)
    assert gap.abs().min() > 1e-3 if kernel else gap.abs().max() < 1e-12


@pytest.mark.parametrize("layer", [LAYER, "conv_proj"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gap_is_that_of_the_precision(layer, dtype):
    net, images = vit().to(dtype), IMAGES.to(dtype)
    model = SimilarityModel(net, torch.randn(3, 8, generator=torch.Generator().manual_seed(2)))
    model = model.to(dtype)
    found = LayerFam(model, layer, rule="additive").decompose(images, 1)
    assert found.maps.dtype == dtype
    assert found.gap.dtype == torch.float32
    parts = torch.stack([part.float().abs() for part in found.parts.values()]).sum(0)
    assert (found.gap.abs() < 8 * torch.finfo(dtype).eps * parts).all()
    assert (parts > 0.1).all()


@pytest.mark.parametrize(
    "use",
    [
        lambda tail: LayerFam(encoder(), "last", rule="additive", tail=tail),
        lambda tail: FAM(encoder(), ["last"], rule="additive", tail=tail),
        lambda tail: explain_pair(encoder(), "last", IMAGES, IMAGES, tail=tail),
    ],
)
def test_an_unknown_tail_is_refused(use):
    with pytest.raises(ValueError, match="unknown tail 'froze': did you mean 'frozen'"):
        use("froze")
