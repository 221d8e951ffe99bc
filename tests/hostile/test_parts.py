"""Rule, Similarity and frozen_scores; tokens_to_map, channels_last_to_map and infer_transform."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import VisionTransformer

from fam_plugins import (
    FAM,
    LayerFam,
    Rule,
    Similarity,
    SimilarityModel,
    channels_last_to_map,
    frozen_scores,
    infer_transform,
    tokens_to_map,
)
from tests.hostile.table import MODES, ROWS, X, late, refused, under, warns, works
from tests.networks import TinyNet, encoder


def ruled(weights, **options):
    """The rule in each adapter, for one reference and for many."""

    def use(model):
        rule = Rule("mine", weights, **options)
        one = LayerFam(model, "last", rule=rule)
        found = [one.attribute(X, 0), one.attribute_references(X)[:, 0]]
        cam = FAM(model, ["last"], rule=rule)
        cam(X)
        return [part.isfinite().all() for part in (*found, *cam.attributions)] == [True] * 3

    return use


def gradient(_activations, gradients):
    return gradients


RULE = [
    works("gradients", ruled(gradient)),
    works("one weight per channel", ruled(lambda a, g: g.mean(3, keepdim=True))),
    works("a weight per region", ruled(lambda a, g: g + 0 * a[:, None])),
    works("true gradients", ruled(gradient, frozen=False)),
    works("centred", ruled(gradient, centred=True)),
    works("zeros", ruled(lambda a, g: 0 * g)),
    works("huge", ruled(lambda a, g: 1e30 * g)),
    works("in place", ruled(lambda a, g: g.mul_(2))),
    works("float64", ruled(lambda a, g: g.double().float())),
    works("equal to itself", lambda m: Rule("a", gradient) == Rule("a", gradient)),
    works("hashable", lambda m: len({Rule("a", gradient), Rule("a", gradient)}) == 1),
    works("pickled", lambda m: pickle.loads(pickle.dumps(Rule("a", gradient))).name == "a"),
    *(works(name, under(context, ruled(gradient))) for name, context in MODES.items()),
    refused("weights None", ruled(None), TypeError, "must be a function of activations"),
    refused("weights a number", ruled(1.0), TypeError, "must be a function of activations"),
    refused("weights a tensor", ruled(ROWS), TypeError, "must be a function of activations"),
    refused("weights a name", ruled("mean"), TypeError, "must be a function of activations"),
    refused("weights missing", lambda m: Rule("mine"), TypeError, "'weights'"),
    late("returns None", ruled(lambda a, g: None), ValueError, "(B, k, C, R)"),
    late("returns an array", ruled(lambda a, g: g.numpy()), ValueError, "(B, k, C, R)"),
    late("returns a number", ruled(lambda a, g: 1.0), ValueError, "(B, k, C, R)"),
    late("returns a scalar", ruled(lambda a, g: g.mean()), ValueError, "(B, k, C, R)"),
    late("returns a tuple", ruled(lambda a, g: (g, g)), ValueError, "(B, k, C, R)"),
    late("drops the dimension", ruled(lambda a, g: g.mean(3)), ValueError, "(B, k, C, R)"),
    late("drops the channels", ruled(lambda a, g: g.mean(2)), ValueError, "(B, k, C, R)"),
    late("activations alone", ruled(lambda a, g: a), ValueError, "(B, k, C, R)"),
    late("too few channels", ruled(lambda a, g: g[:, :, :2]), ValueError, "(B, k, C, R)"),
    late("other regions", ruled(lambda a, g: g.repeat(1, 1, 1, 2)), ValueError, "(B, k, C, R)"),
    late("NaN", ruled(lambda a, g: g * torch.nan), ValueError, "NaN"),
    late("infinite", ruled(lambda a, g: g + torch.inf), ValueError, "NaN or infinite"),
    works("copied", lambda m: copy.deepcopy(Rule("a", gradient)).name == "a"),
]  # fmt: skip


def alike(compare, linear=None, rule="additive", **options):
    def use(model):
        own = Similarity("mine", compare, linear, **options)
        net = SimilarityModel(model.encoder, ROWS, similarity=own)
        net(X)
        return LayerFam(net, "last", rule=rule).attribute(X, 0).isfinite().all()

    return use


def dot(z, t):
    return z @ t.T


def dot_linear(z, t, _at):
    return z @ t.T


SIMILARITY = [
    works("dot", alike(dot)),
    works("dot, linear", alike(dot, dot_linear)),
    works("gradcam", alike(dot, rule="gradcam")),
    warns(
        "coupled",
        alike(lambda z, t: dot(z, t).softmax(1), by_reference=False),
        "the regions carry",
    ),
    # Its true gradient sums to zero: without a linear form a score by direction has no shares.
    warns(
        "scale free",
        alike(lambda z, t: dot(z, t) / z.norm(dim=1, keepdim=True), None),
        "the regions carry",
    ),
    works("pickled", lambda m: pickle.loads(pickle.dumps(Similarity("a", dot))).name == "a"),
    works("hashable", lambda m: len({Similarity("a", dot), Similarity("a", dot)}) == 1),
    *(works(name, under(context, alike(dot, dot_linear))) for name, context in MODES.items()),
    refused("compare None", alike(None), TypeError, "must be a function of embeddings"),
    refused("compare a name", alike("dot"), TypeError, "must be a function of embeddings"),
    refused("compare missing", lambda m: Similarity("a"), TypeError, "'compare'"),
    refused("linear a name", alike(dot, "dot"), TypeError, "must be a function of embeddings"),
    late("compare [B]", alike(lambda z, t: z[:, 0]), ValueError, "return scores [B, N]"),
    late("compare [N, B]", alike(lambda z, t: t @ z.T), ValueError, "return scores [B, N]"),
    late("compare a number", alike(lambda z, t: 1.0), ValueError, "return scores [B, N]"),
    late("compare None back", alike(lambda z, t: None), ValueError, "return scores [B, N]"),
    late("compare a pair", alike(lambda z, t: (z, t)), ValueError, "return scores [B, N]"),
    late("linear [B, 1]", alike(dot, lambda z, t, at: z[:, :1]), ValueError, "scores [B, N]"),
    late("linear [B, D]", alike(dot, lambda z, t, at: z), ValueError, "scores [B, N]"),
    late("linear None back", alike(dot, lambda z, t, at: None), ValueError, "scores [B, N]"),
    late("NaN", alike(lambda z, t: dot(z, t) * torch.nan), ValueError, "NaN"),
    late("detached", alike(lambda z, t: dot(z, t).detach()), RuntimeError, ".detach() between"),
]


def frozen(use=lambda m: m(X)):
    def run(model):
        with frozen_scores() as noted:
            use(model)
        return len(noted.points) > 0

    return run


def nested(model):
    with frozen_scores() as outer, frozen_scores() as inner:
        model(X)
    return (len(outer.points), len(inner.points)) == (0, 1)


def failing(model):
    with pytest.raises(KeyError), frozen_scores():
        raise KeyError
    leaf = ROWS.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model.score(leaf).sum(), leaf)
    return (slope * ROWS).sum(1).abs().max() < 1e-4  # the true gradient of a cosine is orthogonal


def replayed(model, times=1):
    with frozen_scores() as noted:
        model(X)
    with frozen_scores(noted, replay=True):
        for _ in range(times):
            model(X)


def explained(model):
    with frozen_scores():
        inside = LayerFam(model, "last", rule="gradcam").attribute(X, 0)
    return torch.equal(inside, LayerFam(model, "last", rule="gradcam").attribute(X, 0))


FROZEN = [
    works("scores", frozen()),
    works("twice", frozen(lambda m: (m(X), m(X)))),
    works("embeddings", frozen(lambda m: m.score(ROWS))),
    works("zeros", frozen(lambda m: m.score(ROWS * 0))),
    works("nested", nested),
    works("an error within", failing),
    works("replayed", replayed),
    works("another explanation within", explained),
    late("replayed too often", partial(replayed, times=2), RuntimeError, "only once"),
    late("within, an error", frozen(lambda m: m(X * torch.nan)), ValueError, "check the images"),
    *(works(name, under(context, frozen())) for name, context in MODES.items()),
]  # fmt: skip

TOKENS = torch.rand(2, 17, 6, generator=torch.Generator().manual_seed(0))


def laid(h=4, w=4, skip=1, given=TOKENS):
    return lambda _net: tokens_to_map(h, w, skip=skip)(given).shape == (len(given), 6, h, w)


def last(given):
    return lambda _net: channels_last_to_map(given).dim() == 4


TRANSFORMS = [
    works("tokens", laid()),
    works("numpy's integers", laid(np.int64(4), np.int32(4), np.uint8(1))),
    works("half precision", laid(given=TOKENS.half())),
    works("with gradient", laid(given=TOKENS.clone().requires_grad_())),
    works("expanded", laid(given=TOKENS[:1].expand(5, -1, -1))),
    works("not contiguous", laid(given=TOKENS.transpose(1, 2).contiguous().transpose(1, 2))),
    works("an empty batch", laid(given=TOKENS[:0])),
    works("no skip", laid(1, 17, 0)),
    refused("a root", laid(16**0.5, 16**0.5), ValueError, "h and w are ints"),
    refused("words", laid("4", "4"), ValueError, "h and w are ints"),
    refused("None", laid(None, 4), ValueError, "h and w are ints"),
    refused("a pair", laid((4, 4), 1), ValueError, "h and w are ints"),
    refused("zero", laid(0, 4), ValueError, "of at least 1"),
    refused("negative", laid(-4, -4), ValueError, "of at least 1"),
    refused("skip negative", laid(skip=-1), ValueError, "skip of 0"),
    refused("skip None", laid(skip=None), ValueError, "h and w are ints"),
    refused("one size", lambda net: tokens_to_map(14), TypeError, "'w'"),
    refused("another grid", laid(3, 3), ValueError, "tokens_to_map(4, 4, skip=1)"),
    refused("a map", laid(given=X), ValueError, "[B, C, h, w] needs no transform"),
    refused("one row of tokens", laid(given=TOKENS[0]), ValueError, "takes tokens [B, T, C]"),
    refused("an array", laid(given=TOKENS.numpy()), ValueError, "the layer gives a ndarray"),
    refused("several tensors", laid(given=(TOKENS, TOKENS)), ValueError, "the layer gives a tuple"),
    refused("nothing", laid(given=None), ValueError, "the layer gives a NoneType"),
    works("channels last", last(X)),
    works("channels last, of a view", last(X.permute(0, 2, 3, 1))),
    refused("tokens for a map", last(TOKENS), ValueError, "tokens_to_map(h, w, skip=1)"),
    refused("an array for a map", last(X.numpy()), ValueError, "the layer gives a ndarray"),
    refused("a tuple for a map", last((X,)), ValueError, "the layer gives a tuple"),
    refused("None for a map", last(None), ValueError, "the layer gives a NoneType"),
    refused("volumes", last(X[..., None]), ValueError, "takes [B, h, w, C]"),
    *(works(name, under(context, laid())) for name, context in MODES.items()),
]


def vit():
    torch.manual_seed(0)
    return VisionTransformer(32, 8, 1, 2, 16, 16).eval()


PIXELS = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def inferred(layer="last", images=X, expected=None, net=None):
    return lambda model: infer_transform(net or model, layer, images) == expected


GRID = tokens_to_map(4, 4, skip=1)
of_vit = {"model": vit}

INFER = [
    works("a map", inferred()),
    works("tokens", inferred("encoder", PIXELS, GRID), **of_vit),
    works("a layer itself", lambda net: inferred(net.encoder, PIXELS, GRID)(net), **of_vit),
    works("a batch", inferred("encoder", PIXELS.expand(2, -1, -1, -1), GRID), **of_vit),
    works("with gradient", inferred("encoder", PIXELS.clone().requires_grad_(), GRID), **of_vit),
    works("embeddings", inferred("head")),
    works("other sizes", inferred(images=X[..., :6])),
    *(works(n, under(c, inferred("encoder", PIXELS, GRID)), **of_vit) for n, c in MODES.items()),
    refused("one image", inferred(images=X[0]), TypeError, "image[None]"),
    refused("an array", inferred(images=X.numpy()), TypeError, "a tensor of images"),
    refused("a picture", inferred(images=Image.new("RGB", (8, 8))), TypeError, "a tensor of"),
    refused("a size", inferred(images=(1, 3, 8, 8)), TypeError, "a tensor of images"),
    refused("None", inferred(images=None), TypeError, "a tensor of images"),
    refused("no image", inferred(images=X[:0]), TypeError, "a tensor of images"),
    refused("layer misspelt", inferred("featurs"), ValueError, "did you mean 'features'"),
    refused("layers in a list", inferred(["last"]), TypeError, "not a list"),
    refused("layer None", inferred(None), TypeError, "model.layer4"),
    late("another model's", inferred(encoder().last), AssertionError, "did not run"),
    refused("a function", lambda n: inferred(n.last, net=n.forward)(n), TypeError, "wrap a"),
    refused("a class", lambda n: inferred(n.last, net=TinyNet)(n), TypeError, "build it first"),
    refused("a name", lambda n: inferred(n.last, net="vit")(n), TypeError, "build it"),
]  # fmt: skip


@pytest.mark.parametrize("row", RULE)
def test_rule(row):
    row.check()


@pytest.mark.parametrize("row", SIMILARITY)
def test_similarity(row):
    row.check()


@pytest.mark.parametrize("row", FROZEN)
def test_frozen_scores(row):
    row.check()


@pytest.mark.parametrize("row", TRANSFORMS)
def test_transforms(row):
    row.on(encoder).check()


@pytest.mark.parametrize("row", INFER)
def test_infer_transform(row):
    row.on(encoder).check()
