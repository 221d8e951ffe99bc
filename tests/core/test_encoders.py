"""Encoders of transformers and open_clip, small and random: called, picked from, laid out."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from fam_plugins import (
    FAM,
    LayerFam,
    SimilarityModel,
    SimilarityTarget,
    gallery_mean,
    infer_transform,
    tokens_to_map,
)
from fam_plugins.core.encoders import image_call, pick_embeddings, pixels_of
from fam_plugins.core.transforms import prefix_of
from tests.networks import State

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 98,
    "pad_token_id": 0,
}


def small(model: str, config: str | None = None, arguments: dict | None = None, **settings):
    """A model of transformers with random weights, from its configuration."""
    hub = pytest.importorskip("transformers", reason="this is a model of transformers")
    torch.manual_seed(0)
    made = getattr(hub, config or model.replace("Model", "Config"))(**(settings or SMALL))
    return getattr(hub, model)(made, **(arguments or {})).eval()


@cache
def dual(kind: str):
    """CLIPModel or SiglipModel: an image and a text tower."""
    extra = {"projection_size": 16} if kind == "Siglip" else {}
    return small(f"{kind}Model", vision_config=SMALL, text_config=TEXT | extra)


@cache
def clip(image: tuple[tuple[str, object], ...] = (("patch_size", 8),)):
    """open_clip's CLIP with a small ViT, or with another image tower."""
    lib = pytest.importorskip("open_clip", reason="this is a model of open_clip")
    torch.manual_seed(0)
    tower = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, **dict(image)}
    tower |= {"layers": (1, 1, 1, 1), "width": 16} if dict(image).get("resnet") else {}
    tower.pop("resnet", None)
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    return lib.model.CLIP(24, vision_cfg=tower, text_cfg=text).eval()


def pooled(name):
    return lambda net, images: getattr(net(images), name).flatten(1)


# Each with its own library's way to the embedding, a layer by the model's own name, the layout
# there and the tokens in front of it.
ROWS = {
    "CLIP": (
        partial(dual, "CLIP"),
        lambda net, images: net.get_image_features(images).pooler_output,
        "vision_model.encoder.layers.0",
        tokens_to_map(4, 4, skip=1),
        {"class token": 1},
    ),
    "SigLIP": (
        partial(dual, "Siglip"),
        lambda net, images: net.vision_model(images).pooler_output,
        "vision_model.post_layernorm",
        tokens_to_map(4, 4, skip=0),
        {},
    ),
    "CLIPVisionModel": (
        partial(small, "CLIPVisionModel"),
        pooled("pooler_output"),
        "encoder.layers.1.layer_norm1",
        tokens_to_map(4, 4, skip=1),
        {"class token": 1},
    ),
    "CLIPVisionModelWithProjection": (
        partial(small, "CLIPVisionModelWithProjection", "CLIPVisionConfig"),
        pooled("image_embeds"),
        "vision_model.encoder.layers.0",
        tokens_to_map(4, 4, skip=1),
        {"class token": 1},
    ),
    "SiglipVisionModel": (
        partial(small, "SiglipVisionModel"),
        pooled("pooler_output"),
        "post_layernorm",
        tokens_to_map(4, 4, skip=0),
        {},
    ),
    "Dinov2": (
        partial(small, "Dinov2Model"),
        pooled("pooler_output"),
        "encoder.layer.1.norm1",
        tokens_to_map(4, 4, skip=1),
        {"class token": 1},
    ),
    "Dinov2 with registers": (
        partial(small, "Dinov2WithRegistersModel"),
        pooled("pooler_output"),
        "encoder.layer.0",
        tokens_to_map(4, 4, skip=5),
        {"class token": 1, "registers": 4},
    ),
    "DINOv3": (
        partial(small, "DINOv3ViTModel", **SMALL, num_register_tokens=3),
        pooled("pooler_output"),
        "model.layer.0",
        tokens_to_map(4, 4, skip=4),
        {"class token": 1, "registers": 3},
    ),
    "ViT": (
        partial(small, "ViTModel"),
        pooled("pooler_output"),
        "embeddings",
        tokens_to_map(4, 4, skip=1),
        {"class token": 1},
    ),
    "DeiT": (
        partial(small, "DeiTModel"),
        pooled("pooler_output"),
        "embeddings",
        tokens_to_map(4, 4, skip=2),
        {"class token": 1, "distillation token": 1},
    ),
    "Swin": (
        partial(
            small, "SwinModel", image_size=32, patch_size=4, embed_dim=8, depths=[1, 1],
            num_heads=[1, 2], window_size=2,
        ),
        pooled("pooler_output"),
        "layernorm",
        tokens_to_map(4, 4, skip=0),
        {},
    ),
    "ConvNext": (
        partial(small, "ConvNextModel", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
        pooled("pooler_output"),
        "encoder.stages.1",
        None,
        {},
    ),
    "ResNet": (
        partial(small, "ResNetModel", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        pooled("pooler_output"),
        "encoder.stages.1",
        None,
        {},
    ),
    "open_clip ViT": (
        clip,
        lambda net, images: net.encode_image(images),
        "visual.transformer.resblocks.0",
        tokens_to_map(4, 4, skip=1),
        {"class token": 1},
    ),
    "open_clip ResNet": (
        partial(clip, (("resnet", True),)),
        lambda net, images: net.encode_image(images),
        "visual.layer3",
        None,
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_model_as_it_comes(name):
    build, embedded, layer, transform, prefix = ROWS[name]
    net = build()
    before = State.of(net)
    given = {"pixel_values": IMAGES, "input_ids": torch.zeros(1)}  # as a processor returns both
    model = SimilarityModel(net, given, labels=["a", "b", "c"])
    with torch.no_grad():
        z = embedded(net, IMAGES)
        unit = F.normalize(z)
        torch.testing.assert_close(model.references, z)
        torch.testing.assert_close(model(IMAGES), unit @ unit.T)
        assert torch.equal(model(given), model(IMAGES))
    # The model's own layer names, in front of which nothing stands.
    explainer = LayerFam(model, layer, rule="additive")
    maps = explainer.attribute(IMAGES, target="b")
    assert maps.shape == (3, 1, *((4, 4) if name != "open_clip ResNet" else (2, 2)))
    assert torch.equal(maps, explainer.attribute(IMAGES, target=1))
    by_hand = LayerFam(model, layer, rule="additive", reshape_transform=transform)
    assert torch.equal(maps, by_hand.attribute(IMAGES, target=1))
    cam = FAM(model, [layer], rule="centred")
    assert cam(IMAGES).shape == (3, 32, 32)
    # Also without a similarity model around it.
    assert infer_transform(net, layer, IMAGES) == transform
    assert prefix_of(model, layer) == prefix == prefix_of(net, net.get_submodule(layer))
    assert sum(prefix.values()) == (0 if transform is None else transform.skip)
    before.assert_unchanged(net)


WAYS = "eager", "sdpa"
NO_CHOICE = "ConvNext", "ResNet", "open_clip ViT", "open_clip ResNet"


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, how) for name in ROWS for how in (["as it is"] if name in NO_CHOICE else WAYS)],
)
def test_the_parts_of_a_score_add_up(name, attention):
    build, _, layer, _, prefix = ROWS[name]
    net = copy.deepcopy(build()).double()
    if attention in WAYS:
        net.set_attn_implementation(attention)
    torch.manual_seed(1)
    with torch.no_grad():  # fresh networks have biases of zeros
        for value in net.parameters():
            value.add_(0.1 * torch.randn_like(value))
    images = IMAGES.double()
    model = SimilarityModel(net, images.flip(0))
    found = LayerFam(model, layer, rule="additive").decompose(images, [0, 1, 1])
    assert found.gap.abs().max() < 1e-12
    assert set(prefix) <= set(found.parts)
    torch.testing.assert_close(sum(found.parts.values()), found.score, rtol=0, atol=1e-12)
    float32 = SimilarityModel(net.float(), IMAGES.flip(0))
    single = LayerFam(float32, layer, rule="additive").decompose(IMAGES, [0, 1, 1])
    assert (single.gap.abs() / single.score.abs()).max() < 1e-5


def test_a_layer_in_front_of_where_the_class_token_is_added_has_none():
    net = small("ViTModel")
    assert infer_transform(net, "embeddings.patch_embeddings", IMAGES) == tokens_to_map(4, 4, 0)


@pytest.mark.parametrize(
    ("build", "layer", "size", "grid", "kwargs"),
    [
        (partial(small, "Dinov2Model"), "encoder.layer.0", (24, 48), (3, 6), None),
        # As many patches as the 4 x 4 that the model is made for.
        (partial(small, "Dinov2Model"), "encoder.layer.0", (16, 64), (2, 8), None),
        (partial(small, "DINOv3ViTModel"), "model.layer.0", (16, 40), (2, 5), None),
        (partial(small, "ViTModel"), "embeddings", (24, 48), (3, 6), True),
        (partial(dual, "CLIP"), "vision_model.encoder.layers.0", (24, 40), (3, 5), True),
        (partial(small, "SiglipVisionModel"), "post_layernorm", (16, 24), (2, 3), True),
        (ROWS["Swin"][0], "layernorm", (24, 40), (3, 5), None),
        (ROWS["Swin"][0], "layernorm", (36, 40), (5, 5), None),  # 9 x 10 patches, padded to 5 x 5
    ],
)
def test_images_of_another_size(build, layer, size, grid, kwargs):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    options = {"forward_kwargs": {"interpolate_pos_encoding": True}} if kwargs else {}
    model = SimilarityModel(build(), images, **options)
    maps = LayerFam(model, layer, rule="additive").attribute(images, target=0)
    assert maps.shape == (2, 1, *grid)
    if kwargs:  # the model's own refusal stands without it
        with pytest.raises((ValueError, RuntimeError), match="doesn't match|must match"):
            SimilarityModel(build(), images)


def test_a_grid_that_may_be_either_is_refused_with_both():
    images = torch.randn(2, 3, 16, 64, generator=torch.Generator().manual_seed(1))
    net, kwargs = small("ViTModel"), {"interpolate_pos_encoding": True}
    model = SimilarityModel(net, images, forward_kwargs=kwargs)
    message = r"pass tokens_to_map\(h=2, w=8, skip=1\) if .*tokens_to_map\(h=4, w=4, skip=1\)"
    with pytest.raises(ValueError, match=message):
        LayerFam(model, "embeddings", rule="additive").attribute(images, target=0)


def test_tokens_that_come_first_are_refused_with_the_fix():
    """As open_clip's blocks before 2.26, whose sequence-first tokens may look like a batch."""
    net = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=False))
    net.eval()
    with pytest.raises(
        ValueError, match=r"tokens first, \(17, 3, 16\): 17 = 1 \+ 4 x 4.*transpose"
    ):
        infer_transform(_Tokens(net), "net.0", IMAGES)
    images = IMAGES[:1].expand(17, -1, -1, -1)
    with pytest.raises(ValueError, match="tokens first"):
        LayerFam(_Tokens(net), "net.0", rule="additive").attribute(images, target=0)
    to_map = tokens_to_map(4, 4, skip=1)
    explainer = LayerFam(
        _Tokens(net), "net.0", rule="additive",
        reshape_transform=lambda x: to_map(x.transpose(0, 1)),
    )  # fmt: skip
    assert explainer.attribute(IMAGES, target=0).shape == (3, 1, 4, 4)


class _Tokens(nn.Module):
    """A ViT that runs its blocks on ``[T, B, C]``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.net = nn.Conv2d(3, 16, 8, 8), net

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).permute(2, 0, 1)
        tokens = torch.cat([patches.mean(dim=0, keepdim=True), patches])
        return self.net(tokens).mean(dim=0)


def test_siglip_2_for_any_shape_takes_all_of_its_processors_tensors():
    settings = {name: value for name, value in SMALL.items() if name != "image_size"}
    net = small("Siglip2VisionModel", num_patches=16, **settings)
    generator = torch.Generator().manual_seed(0)
    given = {
        "pixel_values": torch.randn(3, 8, 192, generator=generator),
        "pixel_attention_mask": torch.ones(3, 8),
        "spatial_shapes": torch.tensor([[2, 4]] * 3),
    }
    model = SimilarityModel(net, given, chunk_size=2)
    with torch.no_grad():
        z = net(**given).pooler_output
        torch.testing.assert_close(model.references, z)
        torch.testing.assert_close(model(given).diagonal(), torch.ones(3))
    explainer = LayerFam(
        model, "post_layernorm", rule="additive", reshape_transform=tokens_to_map(2, 4, skip=0)
    )
    assert explainer.attribute(tuple(given.values()), target=1).shape == (3, 1, 2, 4)


def test_a_field_is_named_or_picked():
    net = small("ViTModel", arguments={"add_pooling_layer": False})
    message = "BaseModelOutputWithPooling of last_hidden_state, not a tensor: name a field"
    with pytest.raises(TypeError, match=message):
        SimilarityModel(net, IMAGES)
    with pytest.raises(ValueError, match=r"shape \(3, 17, 16\).*out.last_hidden_state\[:, 0\]"):
        SimilarityModel(net, IMAGES, output="last_hidden_state")
    with pytest.raises(TypeError, match="of last_hidden_state, which has no tensor 'cls'"):
        SimilarityModel(net, IMAGES, output="cls")
    with pytest.raises(TypeError, match="output= picks a tuple, not a tensor"):
        SimilarityModel(net, IMAGES, output=tuple)
    with torch.no_grad():
        token = net(IMAGES).last_hidden_state[:, 0]
    options = {"output": lambda out: out.last_hidden_state[:, 0], "contrast": IMAGES[:2]}
    for model in (
        SimilarityModel(net, IMAGES, **options),
        SimilarityModel.from_support(net, {"pixel_values": IMAGES}, "abc", **options),
    ):
        with torch.no_grad():
            torch.testing.assert_close(model.embed(IMAGES), token)
        maps = LayerFam(model, "layers.0", rule="centred").attribute(IMAGES, target=0)
        assert maps.abs().sum() > 0


def test_a_contrast_and_a_loader_of_processed_images():
    net = small("Dinov2Model")
    given = {"pixel_values": IMAGES}
    model = SimilarityModel(net, IMAGES, contrast=given)
    assert torch.equal(
        model.contrast.row, SimilarityModel(net, IMAGES, contrast=IMAGES).contrast.row
    )
    assert torch.equal(gallery_mean(net, [given]).row, gallery_mean(net, [IMAGES]).row)


@dataclass
class Out:
    pooler_output: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    count: int = 3


def test_what_is_picked_and_in_which_order():
    a, b = torch.rand(2, 5), torch.rand(2, 5)
    assert pick_embeddings(a) is a
    assert pick_embeddings(Out(a, b)) is b
    assert pick_embeddings(Out(a)) is a
    assert pick_embeddings(Out(a, None, b)) is b
    assert pick_embeddings(Out(a, b), "pooler_output") is a
    assert pick_embeddings({"pooler_output": a}) is a
    assert pick_embeddings(namedtuple("Named", "pooler_output")(a)) is a
    assert torch.equal(pick_embeddings({"pooler_output": a[..., None, None]}), a)
    # A map is not the encoder's own pooling, and nothing to flatten.
    assert pick_embeddings({"pooler_output": torch.ones(2, 5, 1, 2)}).shape == (2, 5, 1, 2)
    for given, listed in (
        (Out(), "an? Out of count, not a tensor"),
        ({}, "a dict, not a tensor"),
        ((a, b), "a tuple, not a tensor"),
        (namedtuple("Named", "x y")(a, b), "a Named of x, y, not a tensor"),
    ):
        with pytest.raises(TypeError, match=f"returns {listed}: name a field"):
            pick_embeddings(given)
    with pytest.raises(TypeError, match="a Tensor, which has no tensor 'T'"):
        pick_embeddings(a, "T")


def test_a_model_of_texts_has_no_image_tower_and_is_refused_before_any_work():
    class Text(nn.Module):
        def encode_text(self, tokens):
            raise AssertionError

    rows = torch.eye(3)
    text = {"vocab_size": 99, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    for net in (
        Text(),
        small("CLIPTextModel", "CLIPTextConfig", **TEXT),
        small("BertModel", intermediate_size=16, **text),
    ):
        with pytest.raises(ValueError, match="has no image tower: pass the whole model"):
            SimilarityModel(net, rows)
    lib = pytest.importorskip("open_clip", reason="this is a model of open_clip")
    with pytest.raises(ValueError, match="TextTransformer has no image tower"):
        SimilarityModel(lib.transformer.TextTransformer(width=16, heads=2, layers=1), rows)


def test_helpers_of_ones_own_are_no_towers():
    """A module that has ``encode_image`` beside a forward of its own is called as it is."""

    class Mine(nn.Flatten):
        def encode_image(self, images):
            raise AssertionError

    net = Mine()
    assert image_call(net) is net
    assert SimilarityModel(net, torch.eye(2))(torch.ones(1, 2)).shape == (1, 2)


def test_the_pixels_of_a_mapping_come_first():
    mask = torch.ones(2, 4)
    found = pixels_of({"input_ids": mask, "pixel_attention_mask": mask, "pixel_values": IMAGES})
    assert found[0] is IMAGES
    assert found[1] is mask
    assert len(found) == 2


def test_a_named_field_survives_pickling():
    net = small("CLIPVisionModel")
    model = SimilarityModel(net, IMAGES, output="pooler_output", labels=["a", "b", "c"])
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))
    assert again.index("c") == 2


class Logits(nn.Module):
    """What users of a classifier of transformers had to write."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images).logits


@pytest.mark.parametrize(
    ("kind", "layer", "settings"),
    [
        ("ViTForImageClassification", "vit.layers.1.layernorm_before", SMALL),
        ("Dinov2ForImageClassification", "dinov2.encoder.layer.1.norm1", SMALL),
        (
            "ResNetForImageClassification",
            "resnet.encoder.stages.1",
            {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]},
        ),
    ],
)
def test_a_classifier_is_explained_by_its_logits(kind, layer, settings):
    config = kind.removesuffix("ForImageClassification") + "Config"
    net = small(kind, config, **settings, num_labels=4)
    before, alone = State.of(net), Logits(net)
    module = net.get_submodule(layer)
    targets = [ClassifierOutputTarget(2)] * 3
    with FAM(net, [module], rule="centred") as cam, FAM(alone, [module], rule="centred") as other:
        assert (cam(IMAGES, targets) == other(IMAGES, targets)).all()
        assert (cam(IMAGES) == other(IMAGES)).all()
        assert torch.equal(cam.outputs, net(IMAGES).logits)
        assert (cam.attribute_references(IMAGES) == other.attribute_references(IMAGES)).all()
        with pytest.raises(IndexError, match="target 9 does not fit .* from 0 to 3"):
            cam(IMAGES, [ClassifierOutputTarget(9)] * 3)
    ours, theirs = (LayerFam(of, module, rule="additive") for of in (net, alone))
    assert torch.equal(ours.attribute(IMAGES, 1), theirs.attribute(IMAGES, 1))
    found = ours.decompose(IMAGES, 1)
    torch.testing.assert_close(found.score, net(IMAGES).logits[:, 1])
    with pytest.raises(AssertionError, match="from 0 to 3"):
        ours.attribute(IMAGES, 4)
    # Left out, the layer is found in the one as in the other.
    ours, theirs = (LayerFam(of, rule="centred") for of in (net, alone))
    assert torch.equal(ours.attribute(IMAGES, 1), theirs.attribute(IMAGES, 1))
    assert ours.layer is theirs.layer
    before.assert_unchanged(net)


def test_a_bare_clip_embeds_images_under_a_target():
    net, reference = dual("CLIP"), torch.randn(512, generator=torch.Generator().manual_seed(1))
    layer = net.vision_model.encoder.layers[0]
    model = SimilarityModel(net, reference[None])
    with (
        FAM(net, [layer], rule="centred") as cam,
        FAM(model, [layer], rule="centred") as expected,
    ):
        assert (cam(IMAGES, [SimilarityTarget(reference)] * 3) == expected(IMAGES)).all()
    maps = LayerFam(net, layer, rule="additive").attribute(IMAGES, 5)
    assert maps.shape == (3, 1, 4, 4)


def test_what_is_read_of_a_model_follows_from_what_it_returns():
    """Of a model that says nothing of its input, too: not every author names it."""
    hub = pytest.importorskip("transformers")

    class Own(hub.PreTrainedModel):
        config_class = hub.PretrainedConfig
        answer = staticmethod(lambda z: z)

        def __init__(self, config):
            super().__init__(config)
            self.conv = nn.Conv2d(3, 4, 8)

        def forward(self, images):
            return self.answer(self.conv(images).relu().mean(dim=(2, 3)))

    net = Own(hub.PretrainedConfig()).eval()
    expected = LayerFam(net, "conv", rule="additive").attribute(IMAGES, 1)
    assert expected.any()
    Own.answer = staticmethod(lambda z: Out(image_embeds=z))
    assert torch.equal(LayerFam(net, "conv", rule="additive").attribute(IMAGES, 1), expected)
    Own.answer = staticmethod(lambda z: (z, z))
    with pytest.raises(TypeError, match="returns a tuple, not a tensor: name a field"):
        LayerFam(net, "conv", rule="additive").attribute(IMAGES, 1)
