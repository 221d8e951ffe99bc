"""The layer that is left out: found on every family, by both adapters, at the price of one pass."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torchvision import models

from fam_plugins import FAM, LayerFam, SimilarityModel, explain_pair
from fam_plugins.core import messages
from fam_plugins.core.choose_layer import choose_layer
from fam_plugins.core.rules import RULES
from tests.contracts.families import EXACT, FAMILIES, SIZE, encoder_of
from tests.networks import State, TinyNet, encoder

IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
ROWS = {family.example: family for family in FAMILIES[::-1] if family.maps == EXACT}
AS_GOOD = {"torchvision swin_t, head = Identity": "permute"}
"""Where another module than the table's gives the same values."""
EARLIER = {
    "timm vit_tiny_patch16_224": ("blocks.0", "patch_embed.proj"),
    "timm vit_tiny_patch16_224, reg_tokens=4": ("blocks.0", "patch_embed.proj"),
    "torchvision VisionTransformer, heads = Identity": (
        "encoder.layers.encoder_layer_0",
        "conv_proj",
    ),
}
"""Class tokens: the input of the middle block of two, and the patch embedding."""


@pytest.fixture(autouse=True)
def _says_everything_again(monkeypatch):
    monkeypatch.setattr(messages, "_said", set())


def name_of(net: nn.Module, layer: nn.Module | str | None = None, images: Tensor = IMAGES) -> str:
    found = choose_layer(net, layer, net, images)
    return next(name for name, module in net.named_modules() if module is found)


@pytest.mark.parametrize("family", ROWS.values(), ids=str)
def test_every_family_of_the_table(family):
    net, images = encoder_of(family), IMAGES.double()
    width = net(images).shape[1]
    wanted = AS_GOOD.get(family.example, family.layer)
    if family.example in EARLIER:
        wanted, patches = EARLIER[family.example]
        assert name_of(net, "patches", images) == patches
    assert name_of(net, None, images) == wanted
    model = SimilarityModel(net, torch.randn(3, width).double())
    before = State.of(model)
    explainer = LayerFam(model, rule="additive")
    found = explainer.decompose(images, 1)
    before.assert_unchanged(model)
    assert explainer.layer is net.get_submodule(wanted)
    assert found.gap.abs().max() < 1e-12
    if not family.rest:
        torch.testing.assert_close(found.coverage, torch.ones(2).double())
    if family.example not in EARLIER:  # not a token of the wrong place
        told = LayerFam(model, family.layer, rule="additive").decompose(images, 1)
        torch.testing.assert_close(found.maps, told.maps, rtol=0, atol=1e-12)
    with FAM(model, rule="additive") as cam:
        cam(images, [ClassifierOutputTarget(1)] * 2)
        assert torch.equal(cam.attributions[0], found.maps)
        assert cam.target_layers == [explainer.layer]


SMALL = {"img_size": SIZE, "depth": 6, "embed_dim": 24, "num_heads": 3}


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("vit_tiny_patch16_224", {}, "blocks.2"),
        ("vit_tiny_patch16_224", {"depth": 7}, "blocks.2"),
        ("vit_tiny_patch16_224", {"reg_tokens": 4}, "blocks.2"),
        ("vit_tiny_patch16_224", {"depth": 1}, "pos_drop"),
        ("deit_tiny_distilled_patch16_224", {}, "blocks.2"),
        ("vit_base_patch16_clip_224", {}, "blocks.2"),  # a norm in front of the blocks
        ("vit_base_patch16_clip_224", {"depth": 2}, "blocks.0"),  # and as many norms as blocks
        ("vit_base_patch16_siglip_224", {}, "norm"),  # attention pooling
        ("vit_base_patch16_siglip_gap_224", {}, "norm"),
        ("eva02_tiny_patch14_224", {"patch_size": 16}, "blocks.5"),
        ("cait_xxs24_224", {}, "blocks"),  # the class token joins behind them
        ("xcit_nano_12_p16_224", {}, "blocks.5"),
    ],
    ids=str,
)
def test_vits_of_timm(name, options, wanted):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {**SMALL, **options}
    net = timm.create_model(name, num_classes=0, **options).eval()
    assert name_of(net) == wanted
    patches = choose_layer(net, "patches", net, IMAGES)
    assert patches in net.patch_embed.modules()
    seen = []
    with patches.register_forward_hook(lambda _, __, output: seen.append(output.shape)):
        net(IMAGES)
    assert seen == [(2, 24, 4, 4)]


CONFIG = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
CONFIG |= {"num_attention_heads": 4, "image_size": SIZE, "patch_size": 16}
SWIN = {"image_size": SIZE, "patch_size": 4, "embed_dim": 12, "window_size": 4}
SWIN |= {"depths": [1, 1, 1], "num_heads": [2, 2, 2]}
CONVNEXT = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
HUGGING_FACE = [
    (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {**CONFIG, "projection_dim": 32},
        "layers.1",
    ),
    ("SiglipVisionModel", "SiglipVisionConfig", CONFIG, "post_layernorm"),
    ("Dinov2Model", "Dinov2Config", CONFIG, "layer.1"),
    ("ViTModel", "ViTConfig", CONFIG, ("layers.1", "layer.1")),
    ("SwinModel", "SwinConfig", SWIN, "layernorm"),
    ("ConvNextModel", "ConvNextConfig", CONVNEXT, "stages.3"),
]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("model", "config", "sizes", "wanted"), HUGGING_FACE)
def test_models_of_transformers(model, config, sizes, wanted, attention):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = getattr(transformers, model)
    if not kind._supports_sdpa and attention == "sdpa":
        return
    settings = getattr(transformers, config)(**sizes, attn_implementation=attention)
    net = kind(settings).eval().double()
    width = {"SwinModel": 48, "ConvNextModel": 16}.get(model, 32)
    fair = SimilarityModel(net, torch.randn(2, width).double())
    explainer = LayerFam(fair, rule="additive")
    assert explainer.decompose(IMAGES.double(), 1).gap.abs().max() < 1e-12
    assert next(n for n, m in net.named_modules() if m is explainer.layer).endswith(wanted)
    patches = LayerFam(fair, "patches", rule="additive")
    if "Conv" in model:
        with pytest.raises(ValueError, match=r"gives patch tokens \[B, T, C\]"):
            patches.attribute(IMAGES.double(), 1)
    else:
        maps = patches.attribute(IMAGES.double(), 1)
        assert maps.shape[2:] == ((16, 16) if "Swin" in model else (4, 4))
        assert isinstance(patches.layer, nn.Conv2d)


@pytest.mark.parametrize(
    ("vision", "wanted", "patches"),
    [
        ({"layers": 4}, "encoder.visual.transformer.resblocks.1", "encoder.visual.conv1"),
        ({"layers": 2}, "encoder.visual.transformer.resblocks.0", "encoder.visual.conv1"),
        ({"layers": 4, "pool_type": "avg"}, "encoder.visual.ln_post", "encoder.visual.conv1"),
        (
            {"layers": 2, "attentional_pool": True, "attn_pooler_heads": 4},
            "encoder.visual.attn_pool.ln_k",
            "encoder.visual.conv1",
        ),
        ({"layers": [1, 1, 1, 1], "patch_size": None, "width": 8}, "encoder.visual.layer4", None),
    ],
    ids=str,
)
def test_models_of_open_clip(vision, wanted, patches):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    sizes = {"image_size": SIZE, "width": 32, "head_width": 8, "patch_size": 16, **vision}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    net = open_clip.CLIP(24, sizes, text).eval()
    model = SimilarityModel(net, torch.randn(2, 24))
    assert name_of(model) == wanted
    if patches:
        assert name_of(model, "patches") == patches


class PostNorm(nn.Module):
    """torch's own encoder: [B, C, h, w] -> tokens, a class token last of all read."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 16, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.token, self.pool = nn.Parameter(torch.randn(1, 1, 16)), pool

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        tokens = self.blocks(torch.cat([self.token.expand(len(images), 1, 16), tokens], dim=1))
        return tokens[:, 0] if self.pool == "token" else tokens[:, 1:].mean(dim=1)


def test_post_norm_and_a_token_mean_are_told_apart_by_numbers():
    torch.manual_seed(0)
    assert name_of(PostNorm("token").eval()) == "blocks.layers.1"
    assert name_of(PostNorm("mean").eval()) == "blocks"


class Unfolded(nn.Module):
    """Patches cut out behind a normalised image, and embedded by a matrix."""

    def __init__(self, scale) -> None:
        super().__init__()
        self.scale, self.embed = scale, nn.Linear(3 * 256, 8)
        self.place, self.block = nn.Parameter(torch.randn(16, 8)), nn.LayerNorm(8)

    def forward(self, images: Tensor) -> Tensor:
        patches = nn.functional.unfold(self.scale(images), 16, stride=16).transpose(1, 2)
        return self.block(self.embed(patches) + self.place).mean(dim=1)


@pytest.mark.parametrize("scale", [nn.BatchNorm2d(3), lambda images: 2 * images])
def test_patches_embedded_by_a_matrix(scale):
    net = Unfolded(scale).eval()
    assert name_of(net, "patches") == "embed"
    assert name_of(net) == "block"


def test_other_networks():
    assert name_of(encoder()) == "last"
    assert name_of(models.squeezenet1_1(weights=None).eval()) == "classifier.2"
    assert name_of(models.vgg11(weights=None, init_weights=False).eval()) == "features"
    small = IMAGES[:, :, :32, :32]  # layer4 has one region left
    assert name_of(models.resnet18(weights=None).eval(), None, small) == "layer3"
    sound = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    assert name_of(sound, None, torch.randn(2, 2, 9)) == "1"
    volume = nn.Sequential(nn.Conv3d(2, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    assert name_of(volume, None, torch.randn(2, 2, 5, 5, 5)) == "0"


class Forked(nn.Module):
    """Two branches: nothing of either is all that the output follows from."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.left, self.right = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images)
        return torch.cat([branch(stem).mean((2, 3)) for branch in (self.left, self.right)], dim=1)


class Halves(nn.Module):
    """One operation gives two tensors, and a module hands on only one of them."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.stem, self.right, self.both = nn.Conv2d(3, 4, 3), nn.Identity(), both

    def forward(self, images: Tensor) -> Tensor:
        left, right = self.stem(images).unflatten(1, (2, 2)).unbind(1)
        right = self.right(right).mean((2, 3))
        return right + left.mean((2, 3)) if self.both else right


class Reused(nn.Module):
    """One ReLU, used twice: its output cannot be explained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(images)))).mean((2, 3))


def test_a_module_that_runs_twice_is_not_chosen():
    net = Reused().eval()
    assert name_of(net) == "second"
    assert LayerFam(net, rule="additive").attribute(IMAGES, 1).shape == (2, 1, 60, 60)


def test_what_does_not_carry_everything_is_not_chosen():
    assert name_of(Forked().eval()) == "stem"
    assert name_of(Halves(both=True).eval()) == "stem"
    assert name_of(Halves(both=False).eval()) == "right"


def test_one_pass_more_once_and_nothing_left_behind():
    net = encoder()
    net.train()
    model = SimilarityModel(net, torch.eye(6))
    images = torch.rand(3, 3, 8, 8).requires_grad_()
    before, state = State.of(model), torch.get_rng_state()
    explainer, cam = LayerFam(model, rule="centred"), FAM(model, rule="centred")
    assert net.calls == 0
    with torch.inference_mode():
        explainer.attribute(images, 0)
    assert net.calls == 2
    explainer.attribute(images, 1)
    explainer.attribute_references(images)
    assert net.calls == 4
    cam(images.detach(), [ClassifierOutputTarget(0)] * 3)
    cam.attribute_references(images.detach())
    assert net.calls == 7
    net.norm.reset_running_stats()
    net.norm.num_batches_tracked.copy_(before.values["encoder.norm.num_batches_tracked"])
    before.assert_unchanged(model)
    assert torch.equal(state, torch.get_rng_state())
    assert images.grad is None


def test_only_the_first_image_is_looked_at_in_eval_mode():
    net, seen = TinyNet().train(), []
    net.conv.register_forward_hook(
        lambda module, _, output: seen.append((len(output), module.training))
    )
    choose_layer(net, None, net, torch.rand(5, 3, 8, 8))
    assert seen == [(1, False)]
    assert net.training


def test_the_message_names_the_layer_and_the_price_once():
    net = models.VisionTransformer(32, 8, 6, 2, 16, 32).eval()
    images = IMAGES[:, :, :32, :32]
    with pytest.warns(UserWarning, match=r"encoder_layer_2.*1\.8 forward.*patches.*2\.7") as told:
        LayerFam(net, rule="gradcam").attribute(images, 1)
    assert len(told) == 1
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LayerFam(net, rule="gradcam").attribute(images, 1)
        LayerFam(net, "patches", rule="gradcam").attribute(images, 1)


def test_patches_in_both_adapters_and_pairs():
    net = models.VisionTransformer(32, 8, 2, 2, 16, 32).eval()
    net.heads = nn.Identity()
    images = IMAGES[:, :, :32, :32]
    model = SimilarityModel(net, torch.randn(2, 16))
    maps = LayerFam(model, "patches", rule="additive").attribute(images, 1)
    told = LayerFam(model, "conv_proj", rule="additive").attribute(images, 1)
    assert torch.equal(maps, told)
    cam = FAM(model, ["patches", "conv_proj"], rule="additive")
    shown = cam(images, [ClassifierOutputTarget(1)] * 2)
    assert torch.equal(cam.attributions[0], maps)
    assert np.isfinite(shown).all()
    pairs = [explain_pair(net, layer, images[:1], images[1:]) for layer in ("patches", "conv_proj")]
    assert torch.equal(pairs[0].map_a, pairs[1].map_a)
    found = explain_pair(net, None, images[:1], images[1:])
    by_name = explain_pair(net, "encoder.layers.encoder_layer_0", images[:1], images[1:])
    assert torch.equal(found.map_b, by_name.map_b)


def test_a_module_called_patches_is_that_module():
    net = nn.Sequential()
    net.add_module("patches", nn.Conv2d(3, 4, 3))
    net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    assert LayerFam(net, "patches", rule="additive").attribute(IMAGES, 1).shape[2:] == (62, 62)


class Detached(TinyNet):
    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            maps = self.features(self.conv(images))
        return self.head(self.pool(maps).flatten(1))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)), torch.rand(2, 3, 8, 8)),
        (nn.Linear(4, 4), torch.rand(2, 4)),
        (nn.Sequential(nn.Embedding(9, 4), nn.Flatten()), torch.ones(2, 5, dtype=torch.long)),
        (lambda images: images.mean((2, 3)), torch.rand(2, 3, 8, 8)),
        (Detached().eval(), torch.rand(2, 3, 8, 8)),
        (torch.compile(TinyNet().eval(), backend="eager"), torch.rand(2, 3, 8, 8)),
        (torch.jit.trace(TinyNet().eval(), torch.rand(1, 3, 8, 8)), torch.rand(2, 3, 8, 8)),
    ],
    ids=["MLP", "features", "text", "function", "no_grad", "compiled", "traced"],
)
def test_no_layer(model, inputs):
    with pytest.raises(ValueError, match="no layer found.*pass layer="):
        LayerFam(model, rule="additive").attribute(inputs, 1)


def test_several_inputs_want_a_layer():
    class Two(TinyNet):
        def forward(self, images, factor):
            return super().forward(images) * factor

    net, images = Two().eval(), torch.rand(2, 3, 8, 8)
    explainer = LayerFam(net, rule="additive")
    with pytest.raises(ValueError, match="several inputs.*pass layer="):
        explainer.attribute((images, torch.ones(2, 1)), 1)
    with pytest.raises(ValueError, match="several inputs.*pass layer="):
        explainer.attribute(images, 1, torch.ones(2, 1))
    assert net.calls == 0
    assert LayerFam(net, "last", rule="additive").attribute(images, 1, torch.ones(2, 1)).any()


def late(options: dict[str, object]) -> tuple[nn.Module, Tensor]:
    """A ViT whose class token has nearly all of the score before its last block."""
    torch.manual_seed(0)
    net = models.VisionTransformer(32, 8, 2, 2, 16, 32).eval().double()
    net.heads = nn.Identity()
    with torch.no_grad():
        net.class_token.normal_()
        for part in net.encoder.layers[1].parameters():
            part.mul_(options["last"])
    return net, IMAGES[:, :, :32, :32].double()


@pytest.mark.parametrize("explain", ["LayerFam", "FAM", "pair", "references"])
@pytest.mark.parametrize("rule", ["additive", "centred"])
def test_a_late_layer_is_answered_with_coverage(explain, rule):
    net, images = late({"last": 0.05})
    layer = net.encoder.layers[1].ln_1
    model = SimilarityModel(net, net(images).detach())
    calls = {
        "LayerFam": lambda: LayerFam(model, layer, rule=rule).attribute(images, 0),
        "FAM": lambda: FAM(model, [layer], rule=rule)(images, [ClassifierOutputTarget(0)] * 2),
        "pair": lambda: explain_pair(net, layer, images[:1], images[1:], rule=rule),
        "references": lambda: LayerFam(model, layer, rule=rule).attribute_references(images),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calls[explain]()
    told = [str(each.message) for each in caught if "the regions carry" in str(each.message)]
    (one,) = told
    assert "the residual has most of the rest, so explain an earlier" in one
    # A centred map sums to 0: told is what the shares it is the pattern of sum to.
    tail = RULES[rule].tail
    carried = LayerFam(model, layer, rule="additive", tail=tail).attribute(images, 0).sum((1, 2, 3))
    if explain != "pair":
        assert f"the regions carry {float(carried[0]):.3g} of a score of 1 (image 0)" in one


def test_no_word_of_a_centred_map_whose_regions_carry_enough():
    net, images = late({"last": 4.0})
    model = SimilarityModel(net, net(images).detach())
    explainer = LayerFam(model, "encoder.layers.encoder_layer_1.ln_1", rule="centred")
    assert (explainer.decompose(images, 0).coverage.abs() > 0.1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explainer.attribute(images, 0)
