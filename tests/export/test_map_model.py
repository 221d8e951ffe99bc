"""``MapModel``: the maps of LayerFam as a graph, wherever graphs go."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import VisionTransformer

from fam_plugins import LayerCape, LayerFam, SimilarityModel, gallery_mean
from fam_plugins.cape import with_cape_head
from fam_plugins.core.gallery import Gallery
from fam_plugins.core.smooth import smoothed
from fam_plugins.export import MapModel
from tests.networks import State

RULES = ("additive", "centred", "gradcam", "fam")


def images(count: int, size: int = 16, seed: int = 0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).double()


class Normalised(nn.Module):
    """A contrastive encoder: trunk, pooling, head, unit length."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return nn.functional.normalize(self.head(self.trunk(x).mean((2, 3))), dim=1)


class Hidden(nn.Module):
    """A head with a hidden layer, behind layer norm: no matrix that images share."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU())
        self.head = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x):
        return self.head(self.trunk(x).mean((2, 3)))


class AttentionPooling(nn.Module):
    """Tokens read by a query, as in SigLIP."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 4, 4)
        self.patch_size, self.image_size = 4, 16
        self.norm = nn.LayerNorm(8)
        self.query = nn.Parameter(torch.randn(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))

    def forward(self, x):
        tokens = self.norm(self.trunk(x).flatten(2).transpose(1, 2))
        query = self.query.expand(x.shape[0], -1, -1)
        return self.head(self.attention(query, tokens, tokens, need_weights=False)[0][:, 0])


def vit():
    net = VisionTransformer(16, 4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16)
    net.heads = nn.Linear(8, 4)
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return net


def pooled():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def flattened():
    return nn.Sequential(nn.Conv2d(3, 2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(98, 4))


ENCODERS = {
    "pooled": (pooled, "1"),
    "flattened": (flattened, "1"),
    "normalised": (Normalised, "trunk"),
    "hidden": (Hidden, "trunk"),
    "attention": (AttentionPooling, "norm"),
    "class token": (vit, "encoder.layers.encoder_layer_0"),
}


def made(name: str, **options):
    torch.manual_seed(0)
    build, layer = ENCODERS[name]
    encoder = build().double().eval()
    return SimilarityModel(encoder, torch.randn(3, 4).double(), **options), layer


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ENCODERS)
def test_equals_layer_fam_on_images_and_batches_it_has_not_seen(name, rule):
    recommended = rule == "centred"
    model, layer = made(name, contrast="others" if recommended else None)
    graph = MapModel(model, layer, rule=rule, smooth=recommended, example=images(1))
    for count in (1, 5):
        batch = images(count, seed=7)
        scores, maps = graph(batch)
        explainer = LayerFam(model, layer, rule=rule, smooth=recommended)
        wanted = explainer.attribute_references(batch)[:, :, 0]
        torch.testing.assert_close(maps, wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(scores, model(batch), rtol=0, atol=1e-12)


@pytest.mark.parametrize("contrast", ["others", "mean", "embeddings"])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "sqeuclidean", "euclidean"])
def test_every_similarity_and_contrast(similarity, contrast):
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).double()
    if contrast == "mean" and similarity != "euclidean":  # which has none
        contrast = gallery_mean(rows, similarity=similarity)
    elif contrast != "others":
        contrast = rows
    model, layer = made("hidden", similarity=similarity, contrast=contrast)
    graph, batch = MapModel(model, layer, rule="additive", example=images(1)), images(3, seed=3)
    wanted = LayerFam(model, layer, rule="additive").attribute_references(batch)
    torch.testing.assert_close(graph(batch)[1], wanted[:, :, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(graph(batch)[0], model(batch), rtol=0, atol=1e-12)


def test_a_map_computed_by_hand():
    encoder = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = SimilarityModel(encoder, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    graph = MapModel(model, "0", rule="additive", example=torch.rand(1, 2, 1, 2))
    scores, maps = graph(torch.tensor([[[[6.0, 0.0]], [[0.0, 8.0]]]]))  # its mean is (3, 4)
    torch.testing.assert_close(scores, torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(maps, torch.tensor([[[[0.6, 0.0]], [[0.0, 0.8]]]]))


def test_hundreds_of_references_behind_a_linear_head():
    torch.manual_seed(0)
    head = nn.Sequential(*pooled(), nn.Linear(4, 6)).double()
    model = SimilarityModel(head, torch.randn(150, 6).double())
    graph, batch = MapModel(model, "1", rule="additive", example=images(2)), images(2, seed=2)
    wanted = LayerFam(model, "1", rule="additive").attribute_references(batch)
    torch.testing.assert_close(graph(batch)[1], wanted[:, :, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_a_classifier(rule):
    torch.manual_seed(0)
    net = nn.Sequential(*pooled(), nn.Linear(4, 70)).double().eval()
    graph, batch = MapModel(net, "1", rule=rule, example=images(1)), images(3, seed=2)
    scores, maps = graph(batch)
    wanted = LayerFam(net, "1", rule=rule).attribute_references(batch)
    torch.testing.assert_close(scores, net(batch))
    torch.testing.assert_close(maps, wanted[:, :, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("smooth", [False, True])
def test_a_cape_head_gives_probabilities_and_maps_that_sum_to_them(smooth):
    torch.manual_seed(0)
    model = with_cape_head(nn.Sequential(*pooled(), nn.Linear(4, 5)).double().eval())
    graph, batch = MapModel(model, smooth=smooth, example=images(1)), images(3, seed=2)
    scores, maps = graph(batch)
    torch.testing.assert_close(scores, model(batch).exp())
    torch.testing.assert_close(maps.sum(dim=(2, 3)), scores)
    wanted = LayerCape(model).attribute(batch, target=2)
    torch.testing.assert_close(maps[:, 2:3], smoothed(wanted, 2) if smooth else wanted)


def test_nothing_of_autograd_and_no_hook_is_left():
    model, layer = made("attention")
    model.train()
    before = State.of(model)
    graph = MapModel(model, layer, rule="additive", example=images(1))
    before.assert_unchanged(model)
    calls = []
    handle = model.encoder.register_forward_hook(lambda *_: calls.append(1))
    scores, maps = graph(images(2).requires_grad_())
    handle.remove()
    assert not calls
    assert not [*graph.parameters()]
    assert not graph.train().training
    with torch.inference_mode():
        torch.testing.assert_close(graph(images(2))[1], maps.detach())
    assert scores.shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["pooled", "attention"])
def test_half_precision(name, dtype):
    model, layer = made(name)
    model, batch = model.to(dtype), images(2, seed=4).to(dtype)
    graph = MapModel(model, layer, rule="additive", example=images(1).to(dtype))
    found = graph(batch.to(memory_format=torch.channels_last))[1]
    wanted = LayerFam(model, layer, rule="additive").attribute_references(batch)[:, :, 0]
    assert found.dtype == dtype
    gap = (found - wanted).abs().max()
    assert gap <= 8 * torch.finfo(dtype).eps * wanted.abs().max()


def test_a_state_dict_holds_all_of_it():
    model, layer = made("hidden")
    graph, other = (MapModel(m, layer, rule="centred", example=images(1)) for m in (model, model))
    for value in other.buffers():
        value.data = torch.zeros_like(value)
    other.load_state_dict(graph.state_dict())
    torch.testing.assert_close(other(images(2))[1], graph(images(2))[1])


class TestExample:
    @pytest.mark.parametrize(
        "build",
        [
            lambda: VisionTransformer(32, 16, 1, 2, 8, 16),
            lambda: torchvision.models.resnet18(),
        ],
    )
    def test_left_out_is_of_the_size_the_model_states_or_the_usual(self, build):
        torch.manual_seed(0)
        graph = MapModel(build().eval(), rule="additive")
        assert graph.image_shape in ((3, 32, 32), (3, 224, 224))

    def test_another_size_is_refused_with_the_fix(self):
        model, layer = made("pooled")
        graph = MapModel(model, layer, rule="additive", example=images(1))
        with pytest.raises(ValueError, match=r"build MapModel\(\.\.\., example=images\)"):
            graph(images(2, size=20))


class Odd(nn.Module):
    """An encoder whose code cannot be recorded, each kind for its own reason."""

    def __init__(self, kind: str):
        super().__init__()
        self.trunk, self.kind = nn.Conv2d(3, 4, 3), kind

    def forward(self, x):
        x = self.trunk(x)
        if self.kind == "len":
            return x.reshape(len(x), 4, -1).mean(dim=2)
        if self.kind == "branch" and x.max() > 100:
            return x.mean((2, 3)) * 2
        if self.kind == "random":
            return (x * torch.rand_like(x)).mean((2, 3))
        return x.mean((2, 3))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("len", "fixes the batch at 2 images"),
        ("branch", "branch on values"),
        ("random", "draw random numbers"),
    ],
)
def test_what_cannot_be_recorded_is_refused_with_the_reason(kind, reason):
    model = SimilarityModel(Odd(kind).eval(), torch.rand(2, 4))
    before = State.of(model)
    with pytest.raises(ValueError, match=reason):
        MapModel(model, "trunk", rule="additive", example=images(1).float())
    before.assert_unchanged(model)


class TestRefused:
    def test_many_references_behind_a_tail_that_does_not_pool(self):
        torch.manual_seed(0)
        model = SimilarityModel(AttentionPooling().eval(), torch.randn(65, 4))
        with pytest.raises(ValueError, match="export at most 64"):
            MapModel(model, "norm", rule="additive", example=images(1).float())

    def test_references_on_disk(self, tmp_path):
        import numpy as np

        rows = np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.float32, (3, 4))
        rows[:] = np.random.default_rng(0).normal(size=(3, 4))
        model = SimilarityModel(pooled().eval(), rows)
        assert isinstance(model.references, Gallery)
        with pytest.raises(ValueError, match="stay on disk"):
            MapModel(model, "1", rule="additive", example=images(1).float())

    def test_no_module(self):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
            MapModel(lambda x: x, "1")

    def test_a_misspelt_layer(self):
        model, _ = made("hidden")
        with pytest.raises(ValueError, match="trunk"):
            MapModel(model, "trnk", rule="additive", example=images(1))

    def test_outputs_that_are_no_scores(self):
        with pytest.raises(ValueError, match=r"not scores \[B, N\]"):
            MapModel(nn.Sequential(nn.Conv2d(3, 4, 3)).double(), "0", rule="fam", example=images(1))
