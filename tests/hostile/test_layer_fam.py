"""LayerFam: constructor, attribute, attribute_references, compute_convergence_delta."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fam_plugins import LayerFam, Rule, SimilarityModel, infer_transform, tokens_to_map
from tests.hostile.table import (
    MODES,
    ROWS,
    X,
    late,
    refused,
    similarity_model,
    under,
    works,
)
from tests.networks import classifier, encoder

LONE = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
OTHER = encoder()


@dataclass
class Output:
    scores: torch.Tensor


class Returns(nn.Module):
    """Hands on what a function makes of the class scores ``[B, 5]``."""

    def __init__(self, change) -> None:
        super().__init__()
        self.net, self.change = classifier(), change
        self.training = False

    def forward(self, images):
        return self.change(self.net(images))


def built(rule="fam", **options):
    return lambda model: LayerFam(model, "last", rule=rule, **options)


def ran(model, layer="last", images=X, target=0, rule="centred", **options):
    maps = LayerFam(model, layer, rule=rule, **options).attribute(images, target)
    return maps.shape[:2] == (len(images), 1)


def on(layer, **options):
    return lambda model: ran(model, layer, **options)


CONSTRUCTOR = [
    refused("rule in capitals", built(rule="Centred"), ValueError, "did you mean 'centred'"),
    refused("rule with a space", built(rule=" centred"), ValueError, "did you mean 'centred'"),
    refused("rule as the other dialect", built(rule="centered"), ValueError, "mean 'centred'"),
    refused("rule of another tool", built(rule="GradCAM++"), ValueError, "mean 'gradcam'"),
    refused("rule empty", built(rule=""), ValueError, "There are 'fam'"),
    refused("rule as a class", built(rule=Rule), TypeError, "such as 'centred' or a Rule"),
    refused("rule as a function", built(rule=torch.relu), TypeError, "'centred' or a Rule"),
    refused("rule as a number", built(rule=0), TypeError, "such as 'centred' or a Rule"),
    refused("rule as a list", built(rule=["centred"]), TypeError, "'centred' or a Rule"),
    refused("transform named", built(reshape_transform="vit"), ValueError, "tokens_to_map(h, w"),
    refused("transform Auto", built(reshape_transform="Auto"), ValueError, 'must be "auto"'),
    refused(
        "transform as a class", built(reshape_transform=tokens_to_map), TypeError, "tokens_to_map(h"
    ),
    refused("transform as sizes", built(reshape_transform=(14, 14)), TypeError, "tokens_to_map(h"),
    refused("transform True", built(reshape_transform=True), TypeError, "tokens_to_map(h, w"),
    refused(
        "transform as an array", built(reshape_transform=np.ones(2)), TypeError, "tokens_to_map(h"
    ),
    refused("layer as a list", on(["last"]), TypeError, "not a list"),
    refused("layer as a module list", lambda m: ran(m, [m.encoder.last]), TypeError, "not a list"),
    refused("layer as a class", on(nn.ReLU), TypeError, "model.layer4"),
    refused("layer as an index", on(4), TypeError, "model.layer4"),
    works("layer None", on(None)),
    refused("layer as its weight", lambda m: ran(m, m.encoder.conv.weight), TypeError, "layer4"),
    refused("layer misspelt", on("lst"), ValueError, "There are 'encoder'"),
    refused("layer empty", on(""), ValueError, "There are 'encoder'"),
    refused("layer of a part", on("last.weight"), ValueError, "There are"),
    refused(
        "layer by the end of its name",
        lambda m: ran(nn.Sequential(nn.Sequential(m)), "last"),
        ValueError,
        "did you mean '0.0.encoder.last'",
    ),
    late("layer of another model", on(OTHER.last), AssertionError, "choose a layer that the model"),
    late("layer never called", lambda m: ran(m, nn.ReLU()), AssertionError, "did not run"),
    refused(
        "layer name of a function",
        lambda m: ran(lambda images: m(images), "last"),
        ValueError,
        "pass the module",
    ),
    refused("model as a name", lambda m: ran("resnet50", m.encoder.last), TypeError, "build it"),
    refused("model None", lambda m: ran(None, m.encoder.last), TypeError, "build it"),
    refused("model as its weights", lambda m: ran(m.state_dict(), "last"), TypeError, "build it"),
    refused("model as a class", lambda m: ran(SimilarityModel, "last"), ValueError, "pass the mod"),
    late(
        "layer deleted",
        lambda m: (fam := LayerFam(m, OTHER.last, rule="fam")) and fam.attribute(X, 0),
        AssertionError,
        "did not run",
    ),
    works("layer set later", lambda m: setattr(LayerFam(m, None, rule="fam"), "layer", "last")),
    works("a rule as it is", lambda m: ran(m, rule=Rule("mean", lambda a, g: g))),
    works("the model moved later", lambda m: _moved(m)),
    works("device_ids of a GPU", lambda m: ran(m, device_ids=[0])),
]


def _moved(_model):
    model = similarity_model()
    explainer = LayerFam(model, "last", rule="centred")
    model.double()
    return explainer.attribute(X.double(), 0).dtype == torch.float64


def explained(images=X, target=0, rule="centred", **options):
    return lambda model: ran(model, images=images, target=target, rule=rule, **options)


def with_output(change, target=0):
    def use(model):
        return ran(model, "net.last", target=target)

    return {"use": use, "model": partial(Returns, change)}


def of_output(make, name, change, *expected, target=0):
    parts = with_output(change, target)
    return make(name, parts["use"], *expected, model=parts["model"])


def compiled(make):
    """A similarity model of a scripted or traced encoder, without torch's warnings about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SimilarityModel(make(), ROWS)


def touched(model):
    """A user's hook that removes the layer while it is explained."""
    net = model.encoder
    kept = net.pool
    handle = net.norm.register_forward_hook(lambda *_: setattr(net, "pool", LONE[2]))
    try:
        ran(model, kept)
    finally:
        handle.remove()
        net.pool = kept


ATTRIBUTE = [
    refused("images as an array", explained(X.numpy()), TypeError, "torch.as_tensor(images)"),
    refused("images as a list", explained(list(X)), TypeError, "torch.stack(images)"),
    refused("images None", explained([]), TypeError, "torch.stack(images)"),
    refused("a picture", lambda m: ran(m, images=[Image.new("RGB", (8, 8))]), TypeError, "stack"),
    refused("a path", explained("cat.png"), TypeError, "must be a tensor"),
    refused("a masked array", explained(np.ma.ones((1, 3, 8, 8))), TypeError, "torch.as_tensor"),
    refused("a batch of none", explained(X[:0]), ValueError, "at least one image"),
    refused("a number", lambda m: _ask(m, "centred", X[0, 0, 0, 0]), ValueError, "one image"),
    refused("an empty tuple", explained(()), TypeError, "must be a tensor"),
    late("one image", explained(X[0]), ValueError, "image[None]"),
    late("images of NaN", explained(X * torch.nan), ValueError, "check the"),
    late("images of infinity", explained(X / 0), ValueError, "check the"),
    works("images of zeros", explained(X * 0)),
    works("huge values", explained(X * 1e18)),
    works("tiny values", explained(X * 1e-30)),
    works("constant images", explained(torch.ones_like(X))),
    works("with gradient", explained(X.clone().requires_grad_())),
    works("not contiguous", explained(X.transpose(2, 3))),
    works("channels last", explained(X.to(memory_format=torch.channels_last))),
    works("expanded", explained(X[:1].expand(4, -1, -1, -1))),
    works("a single row of pixels", explained(X[:, :, :1])),
    refused("target out of range", explained(target=5), AssertionError, "from 0 to 4"),
    refused("target far below", explained(target=-6), AssertionError, "from 0 to 4"),
    refused("target huge", explained(target=2**70), AssertionError, "from 0 to 4"),
    refused("target None", explained(target=None), AssertionError, "pass target="),
    refused("target a number", explained(target=1.0), AssertionError, "pass an int"),
    refused("target a word", explained(target="cat"), AssertionError, "pass an int"),
    refused("target floats", explained(target=torch.ones(3)), AssertionError, "target.long()"),
    refused("target bools", explained(target=torch.ones(3).bool()), AssertionError, "long()"),
    refused("target bytes", explained(target=torch.ones(3).byte()), AssertionError, "one per"),
    refused("too few targets", explained(target=[0, 1]), AssertionError, "a list of one per image"),
    refused("too many targets", explained(target=[0] * 4), AssertionError, "a list of one per"),
    refused("targets [B, 1]", explained(target=torch.ones(3, 1).int()), AssertionError, "one per"),
    refused("targets nested", explained(target=[[0], [1], [2]]), AssertionError, "one per image"),
    refused("targets in a tuple", explained(target=(0, 1, 2)), AssertionError, "a list of one per"),
    refused("an array of targets", explained(target=np.arange(3)), AssertionError, "a list of"),
    refused("a target negative in a list", explained(target=[0, -1, 2]), AssertionError, "0 to 4"),
    works("a numpy integer", explained(target=np.int64(2))),
    works("targets of 32 bits", explained(target=torch.tensor([0, 1, 2]))),
    refused("a delta of centred", lambda m: _delta(m, "centred"), ValueError, 'rule="additive"'),
    refused("a delta of gradcam", lambda m: _delta(m, "gradcam"), ValueError, 'rule="additive"'),
    of_output(late, "a dict", lambda z: {"logits": z}, TypeError, "model(x)['logits']"),
    of_output(late, "a tuple", lambda z: (z, z), TypeError, "picks the scores out of it"),
    of_output(late, "a list", lambda z: [z], TypeError, "picks the scores out of it"),
    of_output(late, "a dataclass", Output, TypeError, "picks the scores out of it"),
    of_output(late, "an array", lambda z: z.detach().numpy(), TypeError, "not a tensor"),
    of_output(late, "None", lambda z: None, TypeError, "picks the scores out of it"),
    of_output(late, "[B] with a target", lambda z: z[:, 0], AssertionError, "does not fit"),
    of_output(works, "[B]", lambda z: z[:, 0], target=None),
    of_output(works, "[B, 1]", lambda z: z[:, :1], target=None),
    of_output(works, "[B, 1] and 0", lambda z: z[:, :1]),
    of_output(works, "one number", lambda z: z.sum(), target=None),
    of_output(late, "detached", lambda z: z.detach(), RuntimeError, "remove torch.no_grad()"),
    of_output(late, "integers", lambda z: z.argmax(1), RuntimeError, "differentiated", target=None),
    of_output(late, "constant", lambda z: z * torch.nan, ValueError, "NaN"),
    refused(
        "scripted",
        on("1"),
        TypeError,
        "explain the model as it was",
        model=lambda: compiled(lambda: torch.jit.script(LONE)),
    ),
    refused(
        "traced",
        on("last"),
        TypeError,
        "explain the model as it was",
        model=lambda: compiled(lambda: torch.jit.trace(encoder(), X)),
    ),
    works("fx-traced", lambda m: ran(_fx(), "last")),
    works("parallel", lambda m: ran(nn.DataParallel(m), m.encoder.last)),
    refused(
        "parallel by name",
        lambda m: ran(nn.DataParallel(m), "last"),
        ValueError,
        "did you mean 'module.encoder.last'",
    ),
    works("a method", lambda m: ran(m.forward, "last")),
    works("a function", lambda m: ran(lambda images: m(images), m.encoder.last)),
    late("changed meanwhile", touched, AssertionError, "did not run"),
    *(works(name, under(context, explained())) for name, context in MODES.items()),
    *(works(f"{n}, dot", under(c, explained(), ), model=partial(similarity_model, similarity="dot"))
      for n, c in MODES.items()),
    *(works(f"{n}, delta", under(c, lambda m: _delta(m, "additive"))) for n, c in MODES.items()),
]  # fmt: skip


def _fx():
    return SimilarityModel(torch.fx.symbolic_trace(encoder()), ROWS)


def _ask(model, rule, images):
    return LayerFam(model, "last", rule=rule).attribute(images, 0)


def _delta(model, rule):
    explainer = LayerFam(model, "last", rule=rule)
    return explainer.attribute(X, 0, return_convergence_delta=True)[1].abs().max() < 1e-5


def many(indices=None, images=X, **options):
    def use(model):
        maps = LayerFam(model, "last", rule="centred").attribute_references(
            images, indices, **options
        )
        return torch.isfinite(maps).all()

    return use


INDICES = np.array([[0, 1], [4, 4], [2, 0]])

REFERENCES = [
    works("all of them", many()),
    works("an array", many(INDICES)),
    works("an array that cannot be written", many(np.broadcast_to(np.array([0, 1]), (3, 2)))),
    works("a nested list", many(INDICES.tolist())),
    works("tuples", many(tuple(map(tuple, INDICES.tolist())))),
    works("unsigned", many(INDICES.astype(np.uint8))),
    works("the same one often", many([[3] * 9] * 3)),
    works("a column", many(torch.tensor([[0], [1], [2]]))),
    works("not contiguous", many(torch.tensor(INDICES).T.contiguous().T)),
    refused("distances", many(INDICES / 2), TypeError, "pass integers [B, k]"),
    refused("whole floats", many(INDICES * 1.0), TypeError, "pass integers [B, k]"),
    refused("bools", many(INDICES > 0), TypeError, "or a mask"),
    refused("complex", many(INDICES * 1j), TypeError, "pass integers [B, k]"),
    refused("masked", many(np.ma.masked_array(INDICES, INDICES > 3)), TypeError, "a mask"),
    refused("one index", many(3), ValueError, "[row] * 3"),
    refused("one row", many([0, 1]), ValueError, "[row] * 3"),
    refused("a cube", many([[[0]]] * 3), ValueError, "[row] * 3"),
    refused("no columns", many([[]] * 3), TypeError, "pass integers"),
    refused("no columns of ints", many(torch.zeros(3, 0).long()), ValueError, "[row] * 3"),
    refused("too few rows", many(INDICES[:2]), ValueError, "one row per image"),
    refused("too many rows", many([[0]] * 4), ValueError, "one row per image"),
    refused("ragged", many([[0], [1, 2], [3]]), TypeError, "rows of equal length"),
    refused("words", many([["a"]] * 3), TypeError, "nested list of integers"),
    refused("a word", many("all"), TypeError, "nested list of integers"),
    refused("a set", many({0, 1}), TypeError, "nested list of integers"),
    refused("a generator", lambda m: many(i for i in [0])(m), TypeError, "nested list of integers"),
    refused("negative", many([[0, -1]] * 3), IndexError, "faiss fills up with -1"),
    refused("out of range", many([[0, 5]] * 3), IndexError, "indices go from 0 to 4"),
    refused("huge", many([[0, 2**40]] * 3), IndexError, "indices go from 0 to 4"),
    refused("beyond integers", many([[0, 2**70]] * 3), TypeError, "nested list of integers"),
    refused("chunks of none", many(references_per_chunk=0), ValueError, "at least 1"),
    refused("chunks of a half", many(references_per_chunk=0.5), ValueError, "an int"),
    refused("chunks in words", many(references_per_chunk="64"), ValueError, "an int"),
    refused("chunks None", many(references_per_chunk=None), ValueError, "an int"),
    refused("an empty batch", many(images=X[:0]), ValueError, "at least one image"),
    refused("an array of images", many(images=X.numpy()), TypeError, "torch.as_tensor(images)"),
    refused("images None", many(images=None), TypeError, "must be a tensor"),
    late("one image", many(images=X[0]), ValueError, "image[None]"),
    late("NaN", many(images=X * torch.nan), ValueError, "check the"),
    late(
        "scores [B]",
        lambda m: LayerFam(m, "net.last", rule="fam").attribute_references(X),
        ValueError,
        "not scores [B, N]",
        model=partial(Returns, lambda z: z[:, 0]),
    ),
    *(works(name, under(context, many())) for name, context in MODES.items()),
    *(works(f"{name}, some", under(context, many(INDICES))) for name, context in MODES.items()),
]  # fmt: skip


def delta(change=lambda maps: maps, target=0, rule="additive"):
    def use(model):
        explainer = LayerFam(model, "last", rule=rule)
        maps = torch.ones(3, 1, 4, 4)
        return explainer.compute_convergence_delta(change(maps), X, target).shape == (3,)

    return use


DELTA = [
    works("maps", delta()),
    works("maps in float64", delta(lambda maps: maps.double())),
    works("maps with gradient", delta(lambda maps: maps.requires_grad_())),
    refused("of centred", delta(rule="centred"), ValueError, 'rule="additive"'),
    refused("of fam", delta(rule="fam"), ValueError, 'rule="additive"'),
    refused("target out of range", delta(target=7), AssertionError, "0 to 4"),
    refused("target None", delta(target=None), AssertionError, "pass target="),
    refused("too few maps", delta(lambda maps: maps[:2]), ValueError, "as attribute returns them"),
    refused("one map", delta(lambda maps: maps[0]), ValueError, "as attribute returns them"),
    refused("maps None", delta(lambda maps: None), ValueError, "as attribute returns them"),
    refused("an array", delta(lambda maps: maps.numpy()), ValueError, "as attribute returns them"),
    refused("a list", delta(lambda maps: [maps]), ValueError, "as attribute returns them"),
]


@pytest.mark.parametrize("row", CONSTRUCTOR)
def test_constructor(row):
    row.check()


@pytest.mark.parametrize("row", ATTRIBUTE)
def test_attribute(row):
    row.check()


@pytest.mark.parametrize("row", REFERENCES)
def test_attribute_references(row):
    row.check()


@pytest.mark.parametrize("row", DELTA)
def test_compute_convergence_delta(row):
    row.check()


def test_infer_transform_is_no_transform():
    with pytest.raises(TypeError):
        ran(similarity_model(), reshape_transform=infer_transform)
