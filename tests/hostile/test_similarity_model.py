"""SimilarityModel: constructor, from_support, score and forward, state_dict."""

from __future__ import annotations

import copy
import pickle
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fam_plugins import Similarity, SimilarityModel
from tests.hostile.table import (
    BYTES,
    MODES,
    ROWS,
    CosineSimilarity,
    LpDistance,
    X,
    late,
    refused,
    similarity_model,
    under,
    works,
)
from tests.hostile.test_layer_fam import OTHER, Output
from tests.networks import TinyNet, encoder

PICTURE = Image.new("RGB", (8, 8))
READ_ONLY = np.broadcast_to(np.float32(1), (2, 6))


@cache
def on_disk(dtype=np.float32, shape=(5, 6)):
    import tempfile

    path = f"{tempfile.mkdtemp()}/gallery.npy"
    np.save(path, np.ones(shape).astype(dtype))
    return np.load(path, mmap_mode="r")


def built(references=ROWS, **options):
    return lambda net: SimilarityModel(net, references, **options)(X).isfinite().all()


def shaped(change):
    """An encoder whose embeddings go through a function."""

    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = encoder()
            self.training = False

        def forward(self, images):
            return change(self.net(images))

    return Changed


def of_encoder(make, name, change, *expected):
    return make(name, built(X), *expected, model=shaped(change))


CONSTRUCTOR = [
    works("embeddings", built()),
    works("images", built(X)),
    works("an array", built(ROWS.numpy())),
    works("float64", built(ROWS.double())),
    works("half precision", built(ROWS.half())),
    works("a nested list", built(ROWS.tolist())),
    works("read only", built(READ_ONLY)),
    works("on disk", built(on_disk())),
    works("on disk as a contrast", built(contrast=on_disk())),
    works("not contiguous", built(ROWS.T.contiguous().T)),
    works("expanded", built(ROWS[:1].expand(4, -1))),
    works("zeros", built(ROWS * 0)),
    works("with gradient", built(ROWS.clone().requires_grad_())),
    works("others", built(contrast="others")),
    works("a function", built(similarity=lambda z, t: z @ t.T)),
    works("of metric learning", built(similarity=LpDistance(power=2))),
    works("cosine of metric learning", built(similarity=CosineSimilarity())),
    *(works(name, under(context, built(ROWS.tolist()))) for name, context in MODES.items()),
    *(works(f"{n}, Lp", under(c, built(similarity=LpDistance()))) for n, c in MODES.items()),
    refused("bytes", built(BYTES), TypeError, "/ 255 for bytes"),
    refused("ints", built(ROWS.long()), TypeError, "floating-point embeddings"),
    refused("bools", built(ROWS > 0), TypeError, "floating-point embeddings"),
    refused("complex", built(ROWS * 1j), TypeError, "floating-point embeddings"),
    refused("masked", built(np.ma.ones((2, 6))), TypeError, "drop the masked rows"),
    refused("one embedding", built(ROWS[0]), ValueError, "x[None]"),
    refused("a number", built(1.0), ValueError, "x[None]"),
    refused("none at all", built(ROWS[:0]), ValueError, "pass at least one"),
    refused("no image", built(X[:0]), ValueError, "pass at least one"),
    refused("None", built(None), TypeError, "must be a tensor or an array"),
    refused("a path", built("gallery.npy"), TypeError, "must be a tensor or an array"),
    refused("a picture", built(PICTURE), TypeError, "to_tensor(image)"),
    refused("pictures", built([PICTURE] * 2), TypeError, "to_tensor(image)"),
    refused("a list of images", built(list(X)), TypeError, "torch.stack(images)"),
    refused("a loader", built(iter([X])), TypeError, "must be a tensor or an array"),
    works("a processor's output", built({"pixel_values": X})),
    works("one as a contrast", built(contrast={"pixel_values": X})),
    works("labels", built(labels="abcde")),
    works("labels of a gallery", built(on_disk(), labels=range(5))),
    refused("a dict", built({"cat": ROWS}), TypeError, "pixel_values, and these have cat"),
    refused("texts", built({"input_ids": ROWS}), TypeError, "call the processor with images"),
    refused("an empty dict", built({}), TypeError, "these have nothing"),
    refused("pixels in a list", built({"pixel_values": [X]}), TypeError, 'return_tensors="pt"'),
    refused("few labels", built(labels=["a"]), ValueError, "5 references and 1 labels"),
    refused("few of a gallery", built(on_disk(), labels="a"), ValueError, "give one label each"),
    refused("lists as labels", built(labels=[["a"]] * 5), ValueError, "one value for each"),
    refused("words", built(np.array([["a"]])), TypeError, "must be a tensor or an array"),
    refused("ragged", built([[1.0], [1.0, 2.0]]), TypeError, "must be a tensor or an array"),
    refused("NaN", built(ROWS * torch.nan), ValueError, "references row 0, 1"),
    refused("infinity", built(ROWS / 0), ValueError, "references row 0, 1"),
    late("images of NaN", built(X * torch.nan), ValueError, "references row 0, 1"),
    late("one image", built(X[0]), ValueError, "image[None]"),
    late("another width", built(ROWS[:, :4]), ValueError, "with the same encoder"),
    refused("ints on disk", built(on_disk(np.int8)), TypeError, "must be decoded first"),
    refused("flat on disk", built(on_disk(shape=(6,))), ValueError, "shape=(N, D)"),
    refused(
        "a function on disk",
        built(on_disk(), similarity=lambda z, t: z @ t.T),
        ValueError,
        "choose a named similarity",
    ),
    refused("contrast Others", built(contrast="Others"), ValueError, 'must be "others"'),
    refused("contrast True", built(contrast=True), TypeError, "floating-point embeddings"),
    refused("contrast narrow", built(contrast=ROWS[:, :4]), ValueError, "contrast has 4 values"),
    refused("contrast empty", built(contrast=ROWS[:0]), ValueError, "contrast are empty"),
    refused("contrast one", built(contrast=ROWS[0]), ValueError, "x[None]"),
    refused("contrast NaN", built(contrast=ROWS / 0), ValueError, "contrast row 0"),
    refused("others of one", built(ROWS[:1], contrast="others"), ValueError, "at least 2"),
    refused("Cosine", built(similarity="Cosine"), ValueError, "did you mean 'cosine'"),
    refused("cosine with a space", built(similarity="cosine "), ValueError, "mean 'cosine'"),
    refused("l2", built(similarity="l2"), ValueError, "did you mean 'euclidean'"),
    refused("similarity None", built(similarity=None), TypeError, "a name such as 'cosine'"),
    refused("a class", built(similarity=LpDistance), TypeError, "pass an instance"),
    refused("torch's class", built(similarity=nn.CosineSimilarity), TypeError, "pass an instance"),
    refused("L1", built(similarity=LpDistance(p=1)), ValueError, "lambda z, t: -distance(z, t)"),
    works("torch's function", built(similarity=F.cosine_similarity)),
    works("torch's module", built(similarity=nn.CosineSimilarity())),
    late("rows", built(similarity=lambda z, t: z[:, 0]), ValueError, "return scores [B, N]"),
    late("arrays", built(similarity=lambda z, t: [0]), ValueError, "return scores [B, N]"),
    late(
        "one's own, of another shape",
        built(similarity=Similarity("mine", lambda z, t: (z @ t.T)[:, :1])),
        ValueError,
        "return scores [B, N]",
    ),
    refused("chunks of none", built(chunk_size=0), ValueError, "at least 1"),
    refused("chunks of a half", built(chunk_size=0.5), ValueError, "an int"),
    refused("a function, no encoder", lambda net: built()(net.forward), TypeError, "wrap a"),
    refused("a class for encoder", lambda net: built()(TinyNet), TypeError, "build it first"),
    refused("a name for encoder", lambda net: built()("resnet"), TypeError, "torch.nn.Module"),
    refused("None for encoder", lambda net: built()(None), TypeError, "torch.nn.Module"),
    of_encoder(late, "a dict", lambda z: {"z": z}, TypeError, "returns a dict of z, not a tensor"),
    of_encoder(late, "a tuple", lambda z: (z, z), TypeError, "picks the embeddings"),
    of_encoder(late, "a dataclass", Output, TypeError, "picks the embeddings"),
    of_encoder(late, "an array", lambda z: z.detach().numpy(), TypeError, "picks the embeddings"),
    of_encoder(works, "a pooled map", lambda z: z[:, :, None, None]),
    of_encoder(late, "a map", lambda z: z[..., None, None].repeat(1, 1, 2, 2), ValueError, "appe"),
    of_encoder(late, "[B]", lambda z: z[:, 0], ValueError, "append pooling"),
    of_encoder(late, "another batch", lambda z: z[:2], ValueError, "2 embeddings for 3 inputs"),
    of_encoder(late, "scalar", lambda z: z.sum(), ValueError, "append pooling"),
]  # fmt: skip


def support(images=X, labels=(0, 1, 1), expected=None, **options):
    def use(net):
        model = SimilarityModel.from_support(net, images, labels, **options)
        return expected is None or model.labels == expected

    return use


SUPPORT = [
    works("a tuple", support(expected=(0, 1))),
    works("a tensor", support(labels=torch.tensor([4, 9, 4]), expected=(4, 9))),
    works("an array", support(labels=np.array([4, 9, 4]), expected=(4, 9))),
    works("words", support(labels=["b", "a", "a"], expected=("a", "b"))),
    works("words in an array", support(labels=np.array(["b", "a", "a"]), expected=("a", "b"))),
    works("a word", support(labels="baa", expected=("a", "b"))),
    works("mixed", support(labels=["b", 1, "b"], expected=("b", 1))),
    works("None among them", support(labels=[None, 1, None], expected=(None, 1))),
    works("tuples", support(labels=[(0, 1), (0, 2), (0, 1)], expected=((0, 1), (0, 2)))),
    works("bools", support(labels=[True, False, True], expected=(False, True))),
    works("floats", support(labels=[0.5, 1.5, 0.5], expected=(0.5, 1.5))),
    works("negative", support(labels=[-1, 7, -1], expected=(-1, 7))),
    works("a generator", lambda net: support(labels=(n for n in "baa"), expected=("a", "b"))(net)),
    works("keys", support(labels={1: 0, 2: 0, 3: 0}.keys(), expected=(1, 2, 3))),
    works("embeddings", support(ROWS[:3])),
    works("an array of embeddings", support(ROWS[:3].numpy())),
    works("read only", support(READ_ONLY, labels="ab")),
    works("a nested list", support(ROWS[:3].tolist())),
    works("one image", support(X[:1], labels=[0])),
    refused("too few", support(labels=[0, 1]), ValueError, "give one label each"),
    refused("too many", support(labels=range(4)), ValueError, "give one label each"),
    refused("none", support(labels=[]), ValueError, "give one label each"),
    refused("None", support(labels=None), ValueError, "give one label each"),
    refused("one label", support(labels=1), ValueError, "give one label each"),
    refused("a 0-d label", support(labels=torch.tensor(1)), ValueError, "one label each"),
    refused("[S, 1]", support(labels=torch.zeros(3, 1)), ValueError, "labels.flatten()"),
    refused("one-hot", support(labels=torch.eye(3)), ValueError, "labels.argmax(1)"),
    refused("in lists", support(labels=[["a"], ["b"], ["a"]]), ValueError, "labels.flatten()"),
    refused("NaN", support(labels=[0.0, float("nan"), 1.0]), ValueError, "without NaN"),
    refused("a list of images", support(list(X)), TypeError, "torch.stack(images)"),
    refused("images None", support(None), TypeError, "must be a tensor or an array"),
    refused("bytes", support(BYTES), TypeError, "/ 255 for bytes"),
    refused("no images", support(X[:0], labels=[]), ValueError, "pass at least one"),
    refused("a number", support(torch.tensor(1.0)), ValueError, "0 supports"),
    late("one unbatched", support(X[0]), ValueError, "image[None]"),
    refused("l2", support(similarity="l2"), ValueError, "did you mean 'euclidean'"),
    refused("chunks of none", support(chunk_size=0), ValueError, "at least 1"),
    refused("contrast Others", support(ROWS[:3], contrast="Others"), ValueError, "others"),
    refused("one class", support(ROWS[:3], "aaa", contrast="others"), ValueError, "at least 2"),
    refused("a function", lambda net: support()(net.forward), TypeError, "wrap a function"),
    *(works(name, under(context, support(labels=[0, 1, 1]))) for name, context in MODES.items()),
]  # fmt: skip


with_others = partial(similarity_model, contrast="others")


def scored(embeddings=ROWS[:3], rows=None):
    return lambda model: model.score(embeddings, rows).isfinite().all()


def run(images):
    return lambda model: model(images).shape == (len(images), 5)


SCORE = [
    works("embeddings", scored()),
    works("zeros", scored(ROWS[:3] * 0)),
    works("huge", scored(ROWS * 1e30)),
    works("float64", scored(ROWS.double())),
    works("half precision", scored(ROWS.half())),
    works("rows", scored(rows=torch.tensor([1, 4]))),
    works("rows in a list", scored(rows=[1, 4])),
    works("rows in an array", scored(rows=np.array([1, 4]))),
    works("rows of others", scored(rows=[1, 4]), model=with_others),
    works("rows on disk", scored(rows=[1, 4]), model=lambda: SimilarityModel(encoder(), on_disk())),
    refused("one embedding", scored(ROWS[0]), ValueError, "z[None]"),
    refused("a cube", scored(ROWS[None]), ValueError, "not a tensor [B, D]"),
    refused("an array", scored(ROWS.numpy()), ValueError, "not a tensor [B, D]"),
    refused("None", scored(None), ValueError, "not a tensor [B, D]"),
    refused("another width", scored(ROWS[:, :4]), ValueError, "with the same encoder"),
    refused("NaN", scored(ROWS * torch.nan), ValueError, "embedding row 0, 1"),
    refused("a row out of range", scored(rows=torch.tensor([5])), IndexError, "out of bounds"),
    works("the last row", scored(rows=torch.tensor([-1]))),
    refused("rows as floats", scored(rows=torch.tensor([0.5])), IndexError, "must be long"),
    works("a mask of rows", scored(rows=torch.ones(5).bool())),
    refused("rows of words", scored(rows="all"), TypeError, "must be a tensor or an array"),
    works("images", run(X)),
    works("zeros of images", run(X * 0)),
    works("constant images", run(torch.ones_like(X))),
    refused("a batch of none", run(X[:0]), ValueError, "at least one image"),
    late("NaN images", run(X * torch.nan), ValueError, "check the images"),
    late("one image", run(X[0]), ValueError, "image[None]"),
    works("a processor's images", lambda model: model({"pixel_values": X}).shape == (3, 5)),
    refused("no pixels", lambda model: model({"x": X}), TypeError, "and these have x"),
    works("a copy", lambda model: run(X)(copy.deepcopy(model))),
    works("a pickle", lambda model: run(X)(pickle.loads(pickle.dumps(model)))),
    *(works(name, under(context, run(X))) for name, context in MODES.items()),
    *(works(f"{n}, rows", under(c, scored(rows=[1, 4]))) for n, c in MODES.items()),
]  # fmt: skip


def loaded(make, **options):
    return lambda model: model.load_state_dict(make(), **options)


def state(rows=ROWS, **options):
    return lambda: SimilarityModel(encoder(), rows, **options).state_dict()


def without(key):
    return lambda: {name: value for name, value in state()().items() if name != key}


STATE = [
    works("its own", loaded(state())),
    works("of float64", loaded(lambda: {k: v.clone() for k, v in state()().items()})),
    refused("of dot", loaded(state(similarity="dot")), ValueError, "build the model as it was"),
    refused("of other rows and dot", loaded(state(-ROWS, similarity="dot")), ValueError, "saved"),
    refused("with others", loaded(state(contrast="others")), ValueError, "build the model as"),
    refused("with a contrast", loaded(state(contrast=ROWS)), ValueError, "build the model as it"),
    refused("of more rows", loaded(state(ROWS.repeat(2, 1))), RuntimeError, "size mismatch"),
    refused("without references", loaded(without("references")), RuntimeError, '"references"'),
    refused("without a meaning", loaded(without("_extra_state")), RuntimeError, "_extra_state"),
    refused("of a contrast off", loaded(state()), ValueError, "build the model", model=with_others),
    refused("empty", loaded(dict), RuntimeError, "Missing key"),
    refused("None", loaded(lambda: None), TypeError, "dict"),
    refused("a path", loaded(lambda: "model.pt"), TypeError, "dict"),
]  # fmt: skip


@pytest.mark.parametrize("row", CONSTRUCTOR)
def test_constructor(row):
    row.on(encoder).check()


@pytest.mark.parametrize("row", SUPPORT)
def test_from_support(row):
    row.on(encoder).check()


@pytest.mark.parametrize("row", SCORE)
def test_score(row):
    row.check()


@pytest.mark.parametrize("row", STATE)
def test_state_dict(row):
    row.check()


def test_the_other_network_stayed_as_it_was():
    assert not OTHER.training
    assert OTHER.calls == 0
