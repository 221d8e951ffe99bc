"""All references from one forward pass, against explaining them one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fam_plugins import FAM, LayerFam, SimilarityModel
from fam_plugins.core.layer_pass import LayerPass
from fam_plugins.core.rules import RULES
from tests.networks import OwnBackward, State, TinyNet, classifier, encoder

IMAGES = torch.randn(3, 3, 8, 10, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
INDICES = torch.tensor([[4, 0], [8, 4], [2, 2]])

pytestmark = pytest.mark.filterwarnings('ignore:rule "fam" rescales')


def one_by_one(explainer, images, indices):
    columns = [explainer.attribute(images, target=column) for column in indices.T]
    return torch.stack(columns, dim=1)


class Tail(nn.Module):
    """An encoder whose tail is not a pooling of all regions alike."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.net = encoder()
        self.net.pool, self.net.head = nn.Identity(), tail

    def forward(self, images):
        return self.net(images)


class CallsOwnBackward(nn.Module):
    def forward(self, x):
        return OwnBackward.apply(x)


class SumOfRegions(nn.Module):
    def forward(self, maps):
        return maps.sum(dim=(2, 3))


class RowsThenColumns(nn.Module):
    def forward(self, maps):
        return maps.mean(dim=3).mean(dim=2)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.inner(x).tanh()


def with_head(head: nn.Module) -> TinyNet:
    torch.manual_seed(0)
    return TinyNet(head=head).eval()


torch.manual_seed(5)
TAILS = {
    "pooled": encoder,
    "linear head": lambda: with_head(nn.Linear(6, 6)),
    "batch norm neck": lambda: with_head(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6))),
    "hidden layer": lambda: with_head(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))),
    "regions weighted": lambda: Tail(nn.Linear(6 * 4 * 5, 6)),
    "largest region": lambda: with_pool(nn.AdaptiveMaxPool2d(1)),
    "sum over regions": lambda: with_pool(SumOfRegions()),
    "pooled twice": lambda: with_pool(RowsThenColumns()),
    "residual head": lambda: with_head(Residual()),
    "no vectorised backward": lambda: with_head(CallsOwnBackward()),
}


def with_pool(pool: nn.Module) -> TinyNet:
    net = encoder()
    net.pool = pool
    return net


def last(model: nn.Module) -> nn.Module:
    return next(m for n, m in model.named_modules() if n.endswith("last"))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("similarity", "contrast"),
    [("cosine", None), ("cosine", "others"), ("dot", ROWS[:2]), ("sqeuclidean", "others")],
    ids=["cosine", "cosine-others", "dot-rows", "euclidean-others"],
)
def test_equals_one_reference_at_a_time(tail, rule, similarity, contrast):
    model = SimilarityModel(TAILS[tail](), ROWS, similarity=similarity, contrast=contrast)
    explainer = LayerFam(model, last(model), rule=rule)
    maps = explainer.attribute_references(IMAGES, INDICES, references_per_chunk=4)
    assert maps.shape == (3, 2, 1, 4, 5)
    torch.testing.assert_close(maps, one_by_one(explainer, IMAGES, INDICES), rtol=1e-5, atol=1e-6)
    everything = explainer.attribute_references(IMAGES, references_per_chunk=4)
    assert everything.shape == (3, 9, 1, 4, 5)
    indices = torch.arange(9).expand(3, -1)
    torch.testing.assert_close(
        everything, one_by_one(explainer, IMAGES, indices), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("rule", RULES)
def test_float64_agrees_to_rounding(rule):
    for tail in TAILS.values():
        model = SimilarityModel(tail(), ROWS).double()
        explainer = LayerFam(model, last(model), rule=rule)
        maps = explainer.attribute_references(IMAGES.double(), INDICES)
        expected = one_by_one(explainer, IMAGES.double(), INDICES)
        torch.testing.assert_close(maps, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = SimilarityModel(encoder(), ROWS).to(dtype)
    explainer = LayerFam(model, "last", rule="additive")
    maps = explainer.attribute_references(IMAGES.to(dtype), INDICES)
    assert maps.dtype == dtype
    expected = one_by_one(explainer, IMAGES.to(dtype), INDICES)
    assert torch.equal(maps, expected)


class NearlyLinear(nn.Linear):
    """Off a matrix by a ten-thousandth, which no float32 rounding explains."""

    def forward(self, x):
        x = super().forward(x)
        return x + 1e-4 * (9 * x).tanh()


class AroundThePooling(TinyNet):
    """Off a pooling by 1e-5 of one region, which the pooled tensor knows nothing of."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(head=nn.Identity())
        self.eval()

    def forward(self, images):
        maps = self.last(self.features(self.relu(self.norm(self.conv(images)))))
        return self.pool(maps).flatten(1) + 1e-5 * maps[..., 0, 0]


@pytest.fixture
def steps(monkeypatch):
    """How many cotangents each step through the tail carried."""
    seen, real = [], LayerPass.gradients

    def gradients(self, output, cotangents, *also, **kwargs):
        seen.append(len(cotangents))
        return real(self, output, cotangents, *also, **kwargs)

    monkeypatch.setattr(LayerPass, "gradients", gradients)
    return seen


@pytest.mark.parametrize(
    ("tail", "images", "count", "expected"),
    [
        (encoder, 3, 9, [1]),  # one probe shows that the regions are averaged
        (TAILS["linear head"], 1, 2, [1]),
        (TAILS["hidden layer"], 3, 9, [1]),  # and from there on only the head is differentiated
        (lambda: with_head(NearlyLinear(6, 6)), 3, 9, [1]),
        (TAILS["no vectorised backward"], 3, 9, [1]),
        (TAILS["sum over regions"], 3, 9, [1]),
        (TAILS["pooled twice"], 3, 9, [1]),
        (TAILS["residual head"], 3, 9, [1]),
        (TAILS["linear head"], 3, 1, [1]),  # one reference takes no probe
        (TAILS["regions weighted"], 3, 9, [1, 4, 4, 1]),
        (TAILS["largest region"], 3, 9, [1, 4, 4, 1]),
        (lambda: AroundThePooling(), 3, 9, [1, 4, 4, 1]),  # one region has a way of its own
        (lambda: encoder().bfloat16(), 3, 9, [4, 4, 1]),  # where rounding hides the difference
    ],
)
def test_the_tail_is_passed_no_oftener_than_needed(steps, tail, images, count, expected):
    model = SimilarityModel(tail(), ROWS)
    given = IMAGES[:images].to(model.references.dtype)
    indices = torch.arange(count).expand(images, -1)
    LayerFam(model, last(model)).attribute_references(given, indices, references_per_chunk=4)
    assert steps == expected


@pytest.mark.parametrize("head", ["linear head", "hidden layer of ReLUs"])
def test_a_recording_takes_no_side_of_a_relu_for_granted(head):
    """The images it is made with may all be on one side of every ReLU, others are not."""
    export = pytest.importorskip("fam_plugins.export")
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    net = TinyNet(head=nn.Linear(6, 6) if head == "linear head" else hidden).eval()
    model, images = SimilarityModel(net, ROWS), 20 * IMAGES
    recorded = export.MapModel(model, "last", rule="additive", example=IMAGES[:1])
    wanted = LayerFam(model, "last", rule="additive").attribute_references(images)
    torch.testing.assert_close(recorded(images)[1], wanted[:, :, 0], rtol=1e-5, atol=1e-6)


def test_64_references_are_worked_on_at_a_time(steps):
    model = SimilarityModel(TAILS["hidden layer"](), torch.randn(100, 6))
    LayerFam(model, "last").attribute_references(IMAGES)
    FAM(model, ["last"]).attribute_references(IMAGES)
    assert steps == [1] * 2
    model = SimilarityModel(TAILS["regions weighted"](), torch.randn(100, 6))
    LayerFam(model, last(model)).attribute_references(IMAGES)
    FAM(model, [last(model)]).attribute_references(IMAGES)
    assert steps[2:] == [1, 64, 36] * 2


def test_more_images_than_are_grouped():
    images = torch.randn(17, 3, 8, 10, generator=torch.Generator().manual_seed(2))
    indices = torch.randint(9, (17, 2), generator=torch.Generator().manual_seed(3))
    explainer = LayerFam(SimilarityModel(encoder(), ROWS), "last", rule="additive")
    maps = explainer.attribute_references(images, indices)
    expected = one_by_one(explainer, images, indices)
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["additive", "gradcam"])
def test_a_subclass_with_scores_of_its_own_is_explained_as_it_is(rule):
    class Probabilities(SimilarityModel):
        def forward(self, images):
            return super().forward(images).softmax(dim=1)

    explainer = LayerFam(Probabilities(encoder(), ROWS), "last", rule=rule)
    maps = explainer.attribute_references(IMAGES, INDICES)
    torch.testing.assert_close(maps, one_by_one(explainer, IMAGES, INDICES))
    plain = LayerFam(SimilarityModel(encoder(), ROWS), "last", rule=rule)
    assert (maps - plain.attribute_references(IMAGES, INDICES)).abs().max() > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_an_ordinary_classifier_and_any_layer(rule):
    model = classifier()
    indices = torch.tensor([[4, 0], [1, 4], [2, 2]])
    for layer in (model.last, model.conv, model.pool, model.head):
        explainer = LayerFam(model, layer, rule=rule)
        maps = explainer.attribute_references(IMAGES, indices)
        expected = one_by_one(explainer, IMAGES, indices)
        torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-6)


def test_channels_last_layers_are_rearranged():
    class Last(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    back = Last()
    back.forward = lambda x: x.permute(0, 3, 1, 2)
    net = encoder()
    net.last = nn.Sequential(nn.ReLU(), Last(), back)
    explainer = LayerFam(
        SimilarityModel(net, ROWS), net.last[1], reshape_transform=lambda t: t.movedim(3, 1)
    )
    plain = LayerFam(SimilarityModel(encoder(), ROWS), "last")
    torch.testing.assert_close(
        explainer.attribute_references(IMAGES, INDICES),
        plain.attribute_references(IMAGES, INDICES),
    )


def test_a_layer_with_several_tensors():
    class Split(nn.Module):
        def forward(self, x):
            return x[:, :2], x[:, 2:]

    class Join(nn.Module):
        def forward(self, parts):
            return torch.cat(parts, dim=1)

    net = encoder()
    net.last = nn.Sequential(nn.ReLU(), Split(), Join())
    explainer = LayerFam(SimilarityModel(net, ROWS), net.last[1], rule="additive")
    maps = explainer.attribute_references(IMAGES, INDICES)
    one = explainer.attribute(IMAGES, target=INDICES[:, 1])
    for many, single in zip(maps, one, strict=True):
        torch.testing.assert_close(many[:, 1], single)


def test_regions_that_no_score_reaches_are_refused():
    class FirstToken(nn.Module):
        def forward(self, tokens):
            return tokens[:, 0]

    net = nn.Sequential(nn.Flatten(2), nn.Identity(), FirstToken())
    model = SimilarityModel(net, torch.randn(3, 20))
    tokens = torch.rand(2, 5, 20)
    explainer = LayerFam(model, "encoder.1", reshape_transform=lambda t: t[:, 1:].mT)
    for explain in (
        lambda: explainer.attribute(tokens, 0),
        lambda: explainer.attribute_references(tokens),
    ):
        with pytest.raises(ValueError, match="only through what the transform drops"):
            explain()


def test_relu_and_chunks_change_nothing_else():
    explainer = LayerFam(SimilarityModel(encoder(), ROWS), "last", rule="centred")
    maps = explainer.attribute_references(IMAGES)
    for chunk in (1, 4, 100):
        again = explainer.attribute_references(IMAGES, references_per_chunk=chunk)
        torch.testing.assert_close(again, maps)
    positive = explainer.attribute_references(IMAGES, relu_attributions=True)
    assert torch.equal(positive, maps.clamp_min(0))
    assert maps.min() < 0


def test_indices_as_neighbour_searches_return_them():
    explainer = LayerFam(SimilarityModel(encoder(), ROWS), "last")
    expected = explainer.attribute_references(IMAGES, INDICES)
    for given in (
        INDICES.tolist(),
        INDICES.numpy(),
        INDICES.numpy().astype(np.int32),
        INDICES.numpy().astype(np.uint64),
        INDICES.to(torch.uint8),
    ):
        assert torch.equal(explainer.attribute_references(IMAGES, given), expected)


@pytest.mark.parametrize("rule", ["additive", "gradcam"])
@pytest.mark.parametrize("model", [None, "classifier"])
def test_scores_of_the_same_pass_choose_the_indices(rule, model):
    model = SimilarityModel(encoder(), ROWS, contrast="others") if model is None else classifier()
    explainer = LayerFam(model, "last" if model.__class__ is TinyNet else "encoder.last", rule=rule)
    net = getattr(model, "encoder", model)
    net.calls = 0
    with torch.inference_mode():
        maps, scores, indices = explainer.attribute_references(
            IMAGES, lambda scores: scores.topk(2).indices, return_scores=True
        )
    assert net.calls == 1
    with torch.no_grad():
        best = model(IMAGES).topk(2)
    torch.testing.assert_close(scores, best.values)
    assert torch.equal(indices, best.indices)
    assert not scores.requires_grad
    expected = explainer.attribute_references(IMAGES, best.indices)
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-6)
    _, of_all, every = explainer.attribute_references(IMAGES, return_scores=True)
    torch.testing.assert_close(of_all, model(IMAGES).detach())
    assert torch.equal(every, torch.arange(of_all.shape[1]).expand(3, -1))


@pytest.mark.parametrize(
    ("choose", "error", "message"),
    [
        (lambda scores: scores.topk(2).values, TypeError, "may be the distances"),
        (lambda scores: scores.argmax(1), ValueError, r"pass \[B, k\]"),
        (lambda scores: [[99]] * len(scores), IndexError, "index 99 is out of range"),
    ],
)
def test_what_a_function_chooses_is_checked_too(choose, error, message):
    model = SimilarityModel(encoder(), ROWS)
    before = State.of(model)
    with pytest.raises(error, match=message):
        LayerFam(model, "encoder.last", rule="additive").attribute_references(IMAGES, choose)
    before.assert_unchanged(model)


def test_one_forward_pass_and_nothing_left_behind():
    for model in (SimilarityModel(encoder(), ROWS), classifier()):
        net = getattr(model, "encoder", model)
        model(IMAGES).sum().backward()
        images, random_state = IMAGES.clone(), torch.get_rng_state()
        before = State.of(model)
        net.calls = 0
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                maps = LayerFam(model, net.last).attribute_references(images)
                assert not maps.requires_grad
        assert net.calls == 3
        before.assert_unchanged(model)
        assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (torch.tensor([0, 1, 2]), ValueError, r"shape \(3,\): pass \[B, k\]"),
        (torch.tensor([[0]]), ValueError, "1 rows and there are 3 images"),
        (torch.zeros(3, 0, dtype=torch.long), ValueError, r"shape \(3, 0\): pass \[B, k\]"),
        (torch.zeros(3, 2), TypeError, "float32.*may be the distances"),
        (torch.ones(3, 2, dtype=torch.bool), TypeError, "bool.*mask"),
        ([[0, 1], [2], [3, 4]], TypeError, "rows of equal length"),
        (torch.tensor([[0], [9], [1]]), IndexError, "index 9 is out of range: there are 9"),
        (torch.tensor([[0], [-1], [1]]), IndexError, "faiss fills up with -1"),
    ],
)
def test_bad_indices_are_refused_before_any_work(indices, error, message):
    model = SimilarityModel(encoder(), ROWS)
    before = State.of(model)
    with pytest.raises(error, match=message):
        LayerFam(model, "last").attribute_references(IMAGES, indices)
    assert model.encoder.calls == 0
    before.assert_unchanged(model)


def test_other_trouble_is_refused_and_leaves_nothing_behind():
    model = classifier()
    before = State.of(model)
    with pytest.raises(IndexError, match="index 5 is out of range: there are 5"):
        LayerFam(model, "last").attribute_references(IMAGES, [[5]] * 3)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        LayerFam(model, "last").attribute_references(IMAGES, references_per_chunk=0)
    with pytest.raises(ValueError, match="batch is empty"):
        LayerFam(model, "last").attribute_references(IMAGES[:0])
    with pytest.raises(ValueError, match=r"not scores \[B, N\]"):
        LayerFam(lambda x: model(x).sum(1), model.last).attribute_references(IMAGES)
    with pytest.raises(TypeError, match="returns a dict"):
        LayerFam(lambda x: {"a": model(x)}, model.last).attribute_references(IMAGES)
    with pytest.raises(RuntimeError, match="does not depend on layer"):
        LayerFam(lambda x: model(x).detach(), model.last).attribute_references(IMAGES)
    before.assert_unchanged(model)


@pytest.mark.filterwarnings("default")
def test_the_published_rule_warns_of_contrast():
    model = SimilarityModel(encoder(), ROWS, contrast="others")
    with pytest.warns(UserWarning, match="undoes the contrast") as caught:
        LayerFam(model, "last").attribute_references(IMAGES)
    assert caught[0].filename == __file__
