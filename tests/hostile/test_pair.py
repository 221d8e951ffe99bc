"""explain_pair, and what queries are compared with: gallery_mean, prototypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fam_plugins import Rule, Similarity, explain_pair, gallery_mean, prototypes, tokens_to_map
from tests.hostile.table import BYTES, MODES, ROWS, X, late, refused, under, works
from tests.hostile.test_layer_fam import LONE, OTHER, Output
from tests.hostile.test_similarity_model import shaped
from tests.networks import TinyNet, encoder


@pytest.fixture(autouse=True)
def _hinted(monkeypatch):
    """What is said once per process has been said: these tables are of everything else."""
    monkeypatch.setattr("fam_plugins.core.side.warn_once", lambda message: None)


def headed(head):
    torch.manual_seed(0)
    return TinyNet(head=head).eval()


PICTURE = Image.new("RGB", (8, 8))
READ_ONLY = np.broadcast_to(np.float32(1), (2, 6))


def pair(a=X, b=X, layer="last", net=None, **options):
    def use(model):
        found = explain_pair(model if net is None else net, layer, a, b, **options)
        return found.score.isfinite().all() and found.map_a.shape[:2] == (len(a), 1)

    return use


PAIR = [
    works("as usual", pair()),
    works("everything", pair(difference=True, return_convergence_delta=True)),
    works("other sizes", pair(b=X[..., :6])),
    works("joint", pair(b=X[..., :6], joint=True)),
    works("joint of everything", pair(difference=True, return_convergence_delta=True, smooth=True,
                                      contrast=ROWS, joint=True)),
    works("joint, pooled", pair(embedding="pooled", joint=True)),
    works("joint of a linear head", pair(joint=True),
          model=lambda: headed(nn.Linear(6, 4, bias=False))),
    works("joint of zeros of pixels", pair(X * 0, joint=True)),
    works("joint, constant", pair(torch.ones_like(X), joint=True)),
    works("joint, huge", pair(X * 1e15, joint=True)),
    works("joint, expanded", pair(X[:1].expand(3, -1, -1, -1), joint=True)),
    works("joint, not contiguous", pair(X.transpose(2, 3), joint=True)),
    works("joint, channels last", pair(X.to(memory_format=torch.channels_last), joint=True)),
    works("joint, with gradient", pair(X.clone().requires_grad_(), joint=True)),
    *(works(f"joint, {name}", under(context, pair(joint=True))) for name, context in MODES.items()),
    *(works(f"joint of a linear head, {name}", under(context, pair(joint=True)),
            model=lambda: headed(nn.Linear(6, 4, bias=False))) for name, context in MODES.items()),
    refused("joint of a function", pair(similarity=lambda z, t: z @ t.T, joint=True), ValueError,
            "has none: use"),
    late("joint behind a norm", pair(joint=True), ValueError, "what follows it is not",
         model=lambda: headed(nn.LayerNorm(6))),
    late("joint behind a ReLU", pair(joint=True), ValueError, 'pass embedding="pooled"',
         model=lambda: headed(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))),
    works("joint, one of them huge", pair(X * 1e30, similarity="dot", joint=True)),
    works("pooled", pair(embedding="pooled")),
    works("zeros of pixels", pair(X * 0)),
    works("constant", pair(torch.ones_like(X))),
    works("huge", pair(X * 1e18)),
    works("with gradient", pair(X.clone().requires_grad_())),
    works("not contiguous", pair(X.transpose(2, 3))),
    works("channels last", pair(X.to(memory_format=torch.channels_last))),
    works("expanded", pair(X[:1].expand(3, -1, -1, -1))),
    works("an array as contrast", pair(contrast=ROWS.numpy())),
    works("a list as contrast", pair(contrast=ROWS.tolist())),
    works("read only as contrast", pair(contrast=READ_ONLY)),
    works("images as contrast", pair(contrast=X)),
    works("images as contrast, pooled", pair(contrast=X, embedding="pooled")),
    works("a rule of one's own", pair(rule=Rule("mean", lambda a, g: g))),
    works("a function", pair(similarity=lambda z, t: z @ t.T)),
    *(works(name, under(context, pair(difference=True))) for name, context in MODES.items()),
    refused("an array", pair(X.numpy()), TypeError, "a (ndarray) cannot go into an encoder"),
    refused("an array as b", pair(b=X.numpy()), TypeError, "b (ndarray) cannot go"),
    refused("a picture", pair(PICTURE, PICTURE), TypeError, "pass transform="),
    refused("a path", pair("a.png", "b.png"), TypeError, "pass transform="),
    refused("a list", pair(list(X)), TypeError, "a (list)"),
    refused("None", pair(None), TypeError, "a (NoneType)"),
    refused("bytes", pair(BYTES), TypeError, "pass transform="),
    refused("bools", pair(X > 0.5), TypeError, "a (torch.bool)"),
    refused("complex", pair(X * 1j), TypeError, "a (torch.complex64)"),
    refused("one row", pair(X[0, 0, 0]), ValueError, "at least one image"),
    refused("no images", pair(X[:0], X[:0]), ValueError, "at least one image"),
    refused("more a than b", pair(b=X[:2]), ValueError, "pass one b for each a"),
    late("NaN", pair(X * torch.nan), ValueError, "check the images"),
    late("infinity", pair(b=X / 0), ValueError, "check the"),
    refused("layer misspelt", pair(layer="featurs"), ValueError, "did you mean 'features'"),
    refused("layers in a list", pair(layer=["last"]), TypeError, "not a list: explain several"),
    refused("a class of layers", pair(layer=nn.ReLU), TypeError, "model.layer4"),
    refused("an index", pair(layer=-1), TypeError, "model.layer4"),
    works("layer None", pair(layer=None)),
    late("another model's layer", pair(layer=OTHER.last), AssertionError, "did not run"),
    late("the flat end", pair(layer="head"), ValueError, "[3, C, h, w]"),
    refused("rule Centred", pair(rule="Centred"), ValueError, "did you mean 'centred'"),
    refused("rule None", pair(rule=None), TypeError, "'centred' or a Rule"),
    refused("rule as a class", pair(rule=Rule), TypeError, "'centred' or a Rule"),
    refused("similarity L2", pair(similarity="L2"), ValueError, "did you mean 'euclidean'"),
    refused("similarity None", pair(similarity=None), TypeError, "a name such as 'cosine'"),
    refused("similarity a class", pair(similarity=Similarity), TypeError, "pass an instance"),
    late("a distance [B]", pair(similarity=lambda z, t: z[:, 0]), ValueError, "scores [B, N]"),
    refused("embedding", pair(embedding="Pooled"), ValueError, '"model" or "pooled"'),
    refused("embedding None", pair(embedding=None), ValueError, '"model" or "pooled"'),
    refused(
        "a delta of centred",
        pair(rule="centred", return_convergence_delta=True),
        ValueError,
        'use rule="additive"',
    ),
    works("a mean as contrast", pair(contrast=gallery_mean(ROWS))),
    refused(
        "a mean of dot products",
        pair(contrast=gallery_mean(ROWS, similarity="dot")),
        ValueError,
        "gallery_mean(..., similarity='cosine')",
    ),
    late("a narrow mean", pair(contrast=gallery_mean(ROWS[:, :4])), ValueError, "contrast"),
    refused("contrast others", pair(contrast="others"), TypeError, "contrast must be a tensor"),
    refused("contrast one", pair(contrast=ROWS[0]), ValueError, "x[None]"),
    refused("contrast empty", pair(contrast=ROWS[:0]), ValueError, "pass at least one"),
    refused("contrast bytes", pair(contrast=BYTES), TypeError, "/ 255 for bytes"),
    late("contrast narrow", pair(contrast=ROWS[:, :4]), ValueError, "contrast"),
    refused("contrast NaN", pair(contrast=ROWS * torch.nan), ValueError, "contrast row 0"),
    refused(
        "transform as a class", pair(reshape_transform=tokens_to_map), TypeError, "tokens_to_map(h"
    ),
    refused("transform by name", pair(reshape_transform="vit"), ValueError, "tokens_to_map(h"),
    refused("a function", lambda m: pair(net=m.forward, layer=m.last)(m), TypeError, "wrap a func"),
    refused("a class", lambda m: pair(net=TinyNet, layer=m.last)(m), TypeError, "build it first"),
    refused("a name", lambda m: pair(net="resnet", layer=m.last)(m), TypeError, "build it"),
    late("a dict", pair(layer="net.last"), TypeError, "picks the emb",
         model=shaped(lambda z: {"z": z})),
    late("a dataclass", pair(layer="net.last"), TypeError, "picks the emb", model=shaped(Output)),
    late("a map", pair(layer="net.last"), ValueError, "append pooling",
         model=shaped(lambda z: z[..., None])),
]  # fmt: skip


def mean(*batches, net=None, **options):
    def use(model):
        loader = batches[0] if len(batches) == 1 else list(batches)
        found = gallery_mean(model if net is None else net, loader, **options)
        return found.row.isfinite().all() and found.row.shape == (1, 6)

    return use


def loader(images):
    """Of a generator of its own: a loader takes its seed from the user's random numbers."""
    return DataLoader(images, batch_size=2, generator=torch.Generator())


PAIRS = TensorDataset(X, torch.arange(3))

GALLERY_MEAN = [
    works("a list", mean([X, X])),
    works("a generator", lambda net: mean(x for x in [X, X])(net)),
    works("a loader", mean(loader(TensorDataset(X)))),
    works("images and labels", mean(loader(PAIRS))),
    works("lists", mean([[X, "a"], [X, "b"]])),
    works("split", mean(X.split(2))),
    works("a set", mean({X})),
    works("float64", mean([X.double()])),
    works("half precision", mean([X.half()])),
    works("channels last", mean([X.to(memory_format=torch.channels_last)])),
    works("with gradient", mean([X.clone().requires_grad_()])),
    works("zeros of pixels", mean([X * 0])),
    works("huge", mean([X * 1e18])),
    works("of dot", mean([X], similarity="dot")),
    *(works(name, under(context, mean([X]))) for name, context in MODES.items()),
    works("a tensor of images", mean(X)),
    works("an array of images", mean(X.numpy())),
    works("embeddings", mean(ROWS)),
    works("an array of embeddings", mean(ROWS.numpy())),
    works("embeddings alone", lambda _: mean(None, net=ROWS)(_)),
    works("an array alone", lambda _: mean(None, net=ROWS.double().numpy())(_)),
    refused("an array", mean([X.numpy()]), TypeError, "it must give image tensors"),
    refused("a picture", mean([PICTURE]), TypeError, "it must give image tensors"),
    refused("a path", mean("gallery/"), TypeError, "pass a DataLoader"),
    refused("paths", mean(["a.png"]), TypeError, "it must give image tensors"),
    *(works(f"dicts, {k}", mean([{k: X}])) for k in ("image", "images", "img", "pixel_values")),
    works("dicts and labels", mean([{"image": X, "label": torch.arange(3), "path": "a.png"}])),
    works("dicts in tuples", mean([({"pixel_values": X}, torch.arange(3))])),
    refused("dicts of no image", mean([{"x": X}]), TypeError, "a dict of 'x': it must give image"),
    refused(
        "dicts of two", mean([{"image": X, "img": X}]), TypeError, "a dict of 'image', 'img': it"
    ),
    refused(
        "dicts of two labels",
        mean([{"image": X, "label": 1, "target": 1}]),
        TypeError,
        "at most one of ('label', 'labels', 'target')",
    ),
    refused("dicts of paths", mean([{"image": ["a.png"]}]), TypeError, "a dict of 'image'"),
    refused("None", mean(None), TypeError, "pass gallery_mean(encoder, loader)"),
    refused("one embedding", mean(ROWS[0]), ValueError, "x[None]"),
    refused("no embeddings", mean(ROWS[:0]), ValueError, "at least one"),
    refused("embeddings of NaN", mean(ROWS * torch.nan), ValueError, "gallery row 0"),
    refused("of a distance", mean([X], similarity="euclidean"), ValueError, "pass the embeddings"),
    refused("of a function", mean([X], similarity=lambda z, t: z @ t.T), ValueError, "no single r"),
    refused("a number", mean(32), TypeError, "pass a DataLoader"),
    refused("None within", mean([None]), TypeError, "it must give image tensors"),
    refused("nothing", mean([]), ValueError, "at least one batch"),
    refused("empty batches", mean([X[:0]]), ValueError, "at least one image"),
    refused("empty tuples", mean([()]), TypeError, "it must give image tensors"),
    refused("bytes", mean([BYTES]), TypeError, "/ 255 for bytes"),
    refused("labels first", mean([(torch.arange(3), X)]), TypeError, "images of the loader"),
    refused("a data set", mean(PAIRS), TypeError, "pass a DataLoader"),
    late("NaN", mean([X * torch.nan]), ValueError, "gallery embedding row 0"),
    refused("a function", lambda net: mean([X], net=net.forward)(net), TypeError, "wrap a"),
    refused("a class", mean([X], net=TinyNet), TypeError, "build it first"),
    refused("similarity l2", mean([X], similarity="l2"), ValueError, "did you mean 'euclidean'"),
    refused("similarity a class", mean([X], similarity=Similarity), TypeError, "an instance"),
    late("a dict", mean([X]), TypeError, "picks the embeddings", model=shaped(lambda z: {"z": z})),
    late("a map", mean([X], net=LONE[:2]), ValueError, "append pooling"),
]  # fmt: skip


def made(embeddings=ROWS, labels=(0, 1, 1, 0, 2), rows=3, **options):
    def use(_model):
        found = prototypes(embeddings, labels, **options)
        return found.isfinite().all() and found.shape == (rows, embeddings.shape[1])

    return use


PROTOTYPES = [
    works("a tuple", made()),
    works("a tensor", made(labels=torch.tensor([0, 1, 1, 0, 2]))),
    works("an array", made(labels=np.array([0, 1, 1, 0, 2]))),
    works("a word", made(labels="abbac")),
    works("a generator", lambda net: made(labels=(n for n in "abbac"))(net)),
    works("all the same", made(labels=[7] * 5, rows=1)),
    works("all different", made(labels=range(5), rows=5)),
    works("mixed", made(labels=["a", 1, None, "a", 1])),
    works("zeros", made(ROWS * 0)),
    works("huge", made(ROWS * 1e30)),
    works("half precision", made(ROWS.half())),
    works("float64", made(ROWS.double())),
    works("not contiguous", made(ROWS.T.contiguous().T)),
    works("with gradient", made(ROWS.clone().requires_grad_())),
    works("dot", made(similarity="dot")),
    *(works(name, under(context, made())) for name, context in MODES.items()),
    refused("an array of embeddings", made(ROWS.numpy()), TypeError, "torch.as_tensor"),
    refused("a list of embeddings", made(ROWS.tolist()), TypeError, "must be a tensor"),
    refused("None", made(None), TypeError, "must be a tensor"),
    refused("images", made(X, [0, 1, 2]), ValueError, "a tensor [S, D]"),
    refused("one", made(ROWS[0], [0]), ValueError, "a tensor [S, D]"),
    refused("empty", made(ROWS[:0], []), ValueError, "at least one row"),
    refused("ints", made(ROWS.long()), TypeError, "pass floating-point"),
    refused("bools", made(ROWS > 0), TypeError, "pass floating-point"),
    refused("complex", made(ROWS * 1j), TypeError, "pass floating-point"),
    refused("NaN", made(ROWS * torch.nan), ValueError, "support row 0"),
    refused("infinity", made(ROWS / 0), ValueError, "support row 0"),
    refused("too few", made(labels=[0, 1]), ValueError, "give one label each"),
    refused("too many", made(labels=range(6)), ValueError, "give one label each"),
    refused("None for labels", made(labels=None), ValueError, "give one label each"),
    refused("one label", made(labels=3), ValueError, "give one label each"),
    refused("[S, 1]", made(labels=torch.zeros(5, 1)), ValueError, "labels.flatten()"),
    refused("one-hot", made(labels=torch.eye(5)), ValueError, "labels.argmax(1)"),
    refused("NaN for a label", made(labels=torch.full((5,), torch.nan)), ValueError, "NaN"),
    refused("similarity Dot", made(similarity="Dot"), ValueError, "did you mean 'dot'"),
    refused("similarity a class", made(similarity=Similarity), TypeError, "pass an instance"),
]


@pytest.mark.parametrize("row", PAIR)
def test_explain_pair(row):
    _check(row)


@pytest.mark.parametrize("row", GALLERY_MEAN)
def test_gallery_mean(row):
    _check(row)


@pytest.mark.parametrize("row", PROTOTYPES)
def test_prototypes(row):
    _check(row)


def _check(row):
    row.on(encoder).check()
