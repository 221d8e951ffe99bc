"""Captions as references: the library's own zero-shot scores, without their scale."""

from __future__ import annotations

import string
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fam_plugins import FAM, LayerFam, SimilarityModel
from tests.core.test_encoders import IMAGES, SMALL, TEXT, clip, dual, small
from tests.networks import State, encoder

CAPTIONS = ["a cat", "a dog", "cats and dogs"]
TEMPLATES = ["a photo of {}.", lambda caption: f"{caption}, drawn"]


@cache
def words():
    """A tokenizer of transformers that reads letter by letter."""
    hub = pytest.importorskip("transformers", reason="this is its tokenizer")
    letters = [*string.ascii_lowercase, *",."]
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{a}</w>" for a in letters)]
    return hub.CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[])


@cache
def hub_model(kind: str):
    """A dual model whose texts are long enough for whole captions."""
    text = TEXT | {"max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 1}
    extra = {"projection_size": 16} if kind == "Siglip" else {}
    return small(f"{kind}Model", vision_config=SMALL, text_config=text | extra)


def by_open_clip(texts):
    lib = pytest.importorskip("open_clip", reason="this is its tokenizer")
    return clip().encode_text(lib.SimpleTokenizer(context_length=16)(texts))


def by_hub(kind, padding):
    def embed(texts):
        tokens = words()(texts, padding=padding, max_length=24, return_tensors="pt")
        return hub_model(kind).get_text_features(**tokens).pooler_output

    return embed


def cases():
    lib = pytest.importorskip("open_clip", reason="this is its tokenizer")
    hub = pytest.importorskip("transformers", reason="this is its processor")
    return {
        "open_clip": (clip(), lib.SimpleTokenizer(context_length=16), by_open_clip),
        # For CLIP, padding to the longest text is the same as to the longest possible one.
        "CLIP": (hub_model("CLIP"), words(), by_hub("CLIP", "longest")),
        "CLIP's processor": (
            hub_model("CLIP"),
            hub.CLIPProcessor(image_processor=hub.CLIPImageProcessor(), tokenizer=words()),
            by_hub("CLIP", True),
        ),
        "SigLIP": (hub_model("Siglip"), words(), by_hub("Siglip", "max_length")),
    }


NAMES = ["open_clip", "CLIP", "CLIP's processor", "SigLIP"]


@pytest.mark.parametrize("name", NAMES)
def test_captions_are_embedded_as_the_library_does(name):
    net, tokenizer, embed = cases()[name]
    net.train()
    before = State.of(net)
    model = SimilarityModel.from_text(net, tokenizer, CAPTIONS, chunk_size=2)
    before.assert_unchanged(net)
    net.eval()
    model.eval()
    with torch.no_grad():
        rows = F.normalize(embed(CAPTIONS))
        torch.testing.assert_close(model.references, rows)
        torch.testing.assert_close(model(IMAGES), F.normalize(model.embed(IMAGES)) @ rows.T)
    assert not model.references.requires_grad
    assert model.labels == tuple(CAPTIONS)
    assert model.index(["cats and dogs", "a cat"]) == [2, 0]


@pytest.mark.parametrize("name", NAMES)
def test_templates_are_averaged_as_in_clips_zero_shot_code(name):
    net, tokenizer, embed = cases()[name]
    model = SimilarityModel.from_text(net, tokenizer, CAPTIONS, TEMPLATES, chunk_size=4)
    with torch.no_grad():
        for row, caption in zip(model.references, CAPTIONS, strict=True):
            units = F.normalize(embed([f"a photo of {caption}.", f"{caption}, drawn"]))
            torch.testing.assert_close(row, F.normalize(units.mean(dim=0), dim=0))
    one = SimilarityModel.from_text(net, tokenizer, CAPTIONS, "a photo of {}.")
    listed = SimilarityModel.from_text(net, tokenizer, CAPTIONS, ["a photo of {}."])
    assert torch.equal(one.references, listed.references)


def test_the_models_logits_are_these_scores_stretched_and_shifted():
    """Scale and bias are the same for every caption, and kept out of the map."""
    net = hub_model("Siglip")
    tokens = words()(CAPTIONS, padding="max_length", max_length=24, return_tensors="pt")
    model = SimilarityModel.from_text(net, words(), CAPTIONS)
    with torch.no_grad():
        logits = net(pixel_values=IMAGES, **tokens).logits_per_image
        scaled = model(IMAGES) * net.logit_scale.exp() + net.logit_bias
    torch.testing.assert_close(logits, scaled)


def test_why_this_caption_and_not_the_others():
    net = hub_model("CLIP")
    plain = SimilarityModel.from_text(net, words(), CAPTIONS)
    model = SimilarityModel.from_text(net, words(), CAPTIONS, contrast="others")
    layer = "vision_model.encoder.layers.0"
    with torch.no_grad():
        scores = plain(IMAGES)
        others = (scores.sum(dim=1, keepdim=True) - scores) / 2
        torch.testing.assert_close(model(IMAGES), scores - others)
    maps = LayerFam(model, layer, rule="centred").attribute(IMAGES, target="a dog")
    assert torch.equal(maps, LayerFam(model, layer, rule="centred").attribute(IMAGES, target=1))
    cam = FAM(model, [layer], rule="centred")
    targets = [lambda scores: scores[model.index("a dog")]] * 3
    assert cam(IMAGES, targets).shape == (3, 32, 32)


def test_targets_by_label():
    labels = ["cat", "dog", "cow", "owl", "owl"]
    net, images = encoder(), IMAGES[..., :8, :8]
    rows = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    explainer = LayerFam(SimilarityModel(net, rows, labels=labels), "last", rule="additive")
    by_row = explainer.attribute(images, target=[2, 0, 1])
    assert torch.equal(explainer.attribute(images, target=["cow", "cat", "dog"]), by_row)
    assert torch.equal(explainer.attribute(images, target=("cow", "cat", "dog")), by_row)
    assert explainer.decompose(images, target="cow").score.shape == (3,)
    calls = net.calls
    for target, message in (
        ("cwo", "unknown label 'cwo': did you mean 'cow'"),
        ("owl", r"'owl' is that of rows \[3, 4\]: pass the row that you mean"),
        (["cat", "dog"], "target"),
    ):
        with pytest.raises(AssertionError, match=message):
            explainer.attribute(images, target=target)
    for model in (net, SimilarityModel(net, rows), lambda x: net(x)):
        with pytest.raises(AssertionError, match="'cat' is a str: pass an int.*labels="):
            LayerFam(model, net.last, rule="additive").attribute(images, target="cat")
    assert net.calls <= calls + 2  # those that are no SimilarityModel are asked for their output


def test_labels_of_other_kinds_have_rows_too():
    model = SimilarityModel(nn.Flatten(), torch.eye(3), labels=torch.tensor([30, 10, 20]))
    assert model.labels == (30, 10, 20)
    assert model.index(20) == 2
    assert SimilarityModel(nn.Flatten(), torch.eye(2), labels=[("a", 1), None]).index(("a", 1)) == 0
    with pytest.raises(ValueError, match="the references have no labels"):
        SimilarityModel(nn.Flatten(), torch.eye(2)).index("cat")


class Tower(nn.Module):
    """One tower of two; to run it is a fault."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, self.forward)

    def forward(self, *_args, **_kwargs):
        raise AssertionError("nothing may run")


BOTH = Tower("encode_image", "encode_text")


@pytest.mark.parametrize(
    ("model", "tokenizer", "captions", "templates", "error", "message"),
    [
        (BOTH, str.split, [], None, ValueError, "captions are empty"),
        (BOTH, str.split, ["a", " "], None, ValueError, "no empty string"),
        (BOTH, str.split, "a cat", None, TypeError, "a list of strings"),
        (BOTH, str.split, [1, 2], None, TypeError, "a list of strings"),
        (BOTH, str.split, ["a"], ["a photo"], ValueError, r"'a photo' has no {} for the caption"),
        (BOTH, str.split, ["a"], "a photo", ValueError, r'write it as "a photo of a {}."'),
        (BOTH, "ViT-B-32", ["a"], None, TypeError, "str is no tokenizer: pass open_clip.get_token"),
        (BOTH, None, ["a"], None, TypeError, "NoneType is no tokenizer"),
        (Tower("encode_text"), str.split, ["a"], None, ValueError, "not both an image and a text"),
        (Tower("encode_image"), str.split, ["a"], None, ValueError, "not both an image and a text"),
        (Tower("get_text_features"), str.split, ["a"], None, ValueError, "pass the whole model"),
        (Tower("get_image_features"), str.split, ["a"], None, ValueError, "such as CLIPModel"),
        (nn.Flatten(), str.split, ["a"], None, ValueError, "Flatten has not both"),
        (str.split, str.split, ["a"], None, TypeError, "must be a torch.nn.Module"),
    ],
)
def test_refused_before_any_work(model, tokenizer, captions, templates, error, message):
    with pytest.raises(error, match=message):
        SimilarityModel.from_text(model, tokenizer, captions, templates)


def test_chunks_of_no_text_are_refused():
    with pytest.raises(ValueError, match="chunk_size must be an int of at least 1, not 0"):
        SimilarityModel.from_text(BOTH, str.split, ["a"], chunk_size=0)


def test_an_image_processor_is_no_tokenizer():
    hub = pytest.importorskip("transformers", reason="this is its image processor")
    with pytest.raises(TypeError, match="CLIPImageProcessor.* is no tokenizer"):
        SimilarityModel.from_text(dual("CLIP"), hub.CLIPImageProcessor(), ["a cat"])
    with pytest.raises(ValueError, match="CLIPVisionModel has not both"):
        SimilarityModel.from_text(small("CLIPVisionModel"), words(), ["a cat"])


def test_in_half_precision_and_after_a_change_of_precision():
    net = small("CLIPModel", vision_config=SMALL, text_config=TEXT).bfloat16()
    model = SimilarityModel.from_text(net, words(), ["a cat", "a dog"], TEMPLATES[0])
    assert model.references.dtype == torch.bfloat16
    assert model(IMAGES.bfloat16()).isfinite().all()
