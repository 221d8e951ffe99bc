"""FAM: constructor, call, attribute_references; SimilarityTarget."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from fam_plugins import FAM, Rule, Similarity, SimilarityModel, SimilarityTarget, tokens_to_map
from tests.hostile.table import (
    BYTES,
    MODES,
    ROWS,
    LpDistance,
    X,
    late,
    refused,
    under,
    warns,
    works,
)
from tests.hostile.test_layer_fam import INDICES, OTHER, Output, Returns
from tests.networks import encoder

PICTURE = Image.new("RGB", (8, 8))


def built(layers=("last",), **options):
    return lambda model: FAM(model, layers, **{"rule": "fam", **options})


CONSTRUCTOR = [
    refused("rule in capitals", built(rule="CENTRED"), ValueError, "did you mean 'centred'"),
    refused("rule with spaces", built(rule="grad cam"), ValueError, "did you mean 'gradcam'"),
    refused("rule as a class", built(rule=Rule), TypeError, "such as 'centred' or a Rule"),
    refused("rule False", built(rule=False), TypeError, "such as 'centred' or a Rule"),
    refused("one layer", lambda m: built(m.encoder.last)(m), TypeError, "such as [model.layer4]"),
    refused("one name", built("last"), TypeError, "such as [model.layer4]"),
    refused("a generator", lambda m: built(m.modules())(m), TypeError, "a list of layers"),
    refused("a dict", lambda m: built(dict(m.named_modules()))(m), TypeError, "a list of layers"),
    refused("a set", built({"last"}), TypeError, "a list of layers"),
    works("layers None", built(None)),
    refused("no layers", built([]), ValueError, "pass at least one"),
    refused("layers in lists", built([["last"]]), TypeError, "not a list"),
    refused("a class of layers", built([nn.ReLU]), TypeError, "model.layer4"),
    refused("an index", built([-1]), TypeError, "model.layer4"),
    refused("None among them", built(["last", None]), TypeError, "model.layer4"),
    refused("misspelt", built(["last", "featurs"]), ValueError, "did you mean"),
    refused("a name with a dot in front", built([".last"]), ValueError, "There are 'encoder'"),
    refused("transform by name", built(reshape_transform="swin"), ValueError, 'must be "auto"'),
    refused(
        "transform as a class", built(reshape_transform=tokens_to_map), TypeError, "tokens_to_map(h"
    ),
    refused("transform as a size", built(reshape_transform=14), TypeError, "tokens_to_map(h, w"),
    refused(
        "model None",
        lambda m: FAM(None, [m.encoder.last], rule="fam"),
        TypeError,
        "a torch.nn.Module",
    ),
    refused(
        "a function", lambda m: FAM(m.forward, ["last"], rule="fam"), TypeError, "wrap a function"
    ),
    refused(
        "a class", lambda m: FAM(SimilarityModel, ["last"], rule="fam"), TypeError, "build it first"
    ),
    refused(
        "a state",
        lambda m: FAM(m.state_dict(), ["last"], rule="fam"),
        TypeError,
        "a torch.nn.Module",
    ),
    refused(
        "a path", lambda m: FAM("net.pt", ["last"], rule="fam"), TypeError, "a torch.nn.Module"
    ),
    works("layers twice", built(["last", "last"])),
    works("layers in a tuple", lambda m: FAM(m, (m.encoder.last,), rule="fam")),
    works("a module list", lambda m: FAM(m, list(nn.ModuleList([m.encoder.last])), rule="fam")),
    works("a rule of one's own", built(rule=Rule("mean", lambda a, g: g))),
    works("another model's layer, yet", built([OTHER.last])),
    *(works(name, under(context, built())) for name, context in MODES.items()),
]


def called(images=X, targets=None, layers=("last",), **options):
    def use(model):
        cam = FAM(model, layers, rule="centred")
        found = cam(images, targets, **options)
        return found.shape == (len(images), *images.shape[2:]) and np.isfinite(found).all()

    return use


def moved(_model):
    model = SimilarityModel(encoder(), ROWS)
    cam = FAM(model, ["last"], rule="centred")
    model.double()
    return cam(X.double()).shape == (3, 8, 8)


FIRST = [ClassifierOutputTarget(0)] * 3


def of_output(make, name, change, *expected, targets=FIRST):
    use = called(targets=targets, layers=["net.last"])
    return make(name, use, *expected, model=partial(Returns, change))


CALL = [
    refused("an array", called(X.numpy()), TypeError, "torch.as_tensor(images)"),
    refused("an array, smoothed", called(X.numpy(), aug_smooth=True), TypeError, "as_tensor"),
    refused("a list", called(list(X)), TypeError, "input_tensor must be a tensor"),
    refused("a picture", called(PICTURE), TypeError, "input_tensor"),
    refused("a path", called("cat.png"), TypeError, "input_tensor"),
    refused("None", called(None), TypeError, "input_tensor"),
    refused("bytes", called(BYTES), TypeError, "/ 255 for bytes"),
    refused("bools", called(X > 0.5), TypeError, "input_tensor"),
    refused("complex", called(X * 1j), TypeError, "input_tensor"),
    refused("one image", called(X[0]), ValueError, "image[None]"),
    refused("one image, smoothed", called(X[0], aug_smooth=True), ValueError, "image[None]"),
    refused("no image", called(X[:0]), ValueError, "at least one image"),
    refused("volumes, smoothed", called(X[..., None], aug_smooth=True), ValueError, "leave it out"),
    late("NaN", called(X * torch.nan), ValueError, "check the"),
    refused("a target alone", called(targets=FIRST[0]), TypeError, "[target] * len(input_tensor)"),
    refused("an int", called(targets=1), TypeError, "[target] * len(input_tensor)"),
    refused("ints", called(targets=[0, 1, 2]), TypeError, "ClassifierOutputTarget(0)"),
    refused("a tensor of ints", called(targets=torch.arange(3)), TypeError, "wrap it"),
    refused("an array of ints", called(targets=np.arange(3)), TypeError, "wrap it"),
    refused("too few", called(targets=FIRST[:2]), ValueError, "one target per image"),
    refused("too many", called(targets=FIRST * 2), ValueError, "one target per image"),
    refused("no targets", called(targets=[]), ValueError, "one target per image"),
    refused("a generator", called(targets=(t for t in FIRST)), TypeError, "pass a list"),
    refused("None among them", called(targets=[None] * 3), TypeError, "cannot be called"),
    refused("a dict", called(targets=dict(enumerate(FIRST))), TypeError, "pass a list"),
    late(
        "out of range",
        called(targets=[ClassifierOutputTarget(5)] * 3),
        IndexError,
        "target 5 does not fit the model's output of shape (5,) per image: targets go from 0 to 4",
    ),
    late("the whole output", called(targets=[lambda z: z] * 3), ValueError, "pick an output"),
    late("a number", called(targets=[lambda z: 1.0] * 3), ValueError, "pick an output"),
    late("a class", called(targets=[ClassifierOutputTarget] * 3), ValueError, "pick an output"),
    late(
        "a similarity on scores",
        called(targets=[SimilarityTarget(ROWS[0])] * 3),
        ValueError,
        "embed the references with the same encoder",
    ),
    late(
        "no gradient",
        called(targets=[lambda z: z[0].detach()] * 3),
        RuntimeError,
        "remove torch.no_grad()",
    ),
    late("another model's layer", called(layers=[OTHER.last]), AssertionError, "did not run"),
    of_output(late, "a dict", lambda z: {"logits": z}, TypeError, "picks one tensor"),
    of_output(late, "a tuple", lambda z: (z, z), TypeError, "picks one tensor"),
    of_output(late, "a dataclass", Output, TypeError, "picks one tensor"),
    of_output(late, "None", lambda z: None, TypeError, "picks one tensor"),
    of_output(
        late, "a dict, highest", lambda z: {"z": z}, ValueError, "pass targets", targets=None
    ),
    of_output(late, "[B], highest", lambda z: z[:, 0], ValueError, "pass targets", targets=None),
    of_output(works, "[B, 1]", lambda z: z[:, :1]),
    of_output(late, "another batch", lambda z: z[:2], TypeError, "one output per image"),
    works("highest", called()),
    works("moved later", moved),
    works("no ints but numpy's", called(targets=[ClassifierOutputTarget(np.int64(1))] * 3)),
    works("layers twice", called(layers=["last", "last"])),
    works("two layers", called(layers=["last", "relu"])),
    works("zeros", called(X * 0)),
    works("constant", called(torch.ones_like(X))),
    works("huge", called(X * 1e18)),
    works("with gradient", called(X.clone().requires_grad_())),
    works("channels last", called(X.to(memory_format=torch.channels_last))),
    works("not contiguous", called(X.transpose(2, 3))),
    works("expanded", called(X[:1].expand(4, -1, -1, -1))),
    works("smoothed", called(aug_smooth=True, eigen_smooth=True)),
    *(works(name, under(context, called(targets=FIRST))) for name, context in MODES.items()),
]


def many(indices=None, images=X, **options):
    def use(model):
        cam = FAM(model, ["last"], rule="centred")
        return cam.attribute_references(images, indices, **options).shape[2:] == images.shape[2:]

    return use


REFERENCES = [
    works("all", many()),
    works("an array", many(INDICES)),
    works("a nested list", many(INDICES.tolist())),
    refused("an array of images", many(images=X.numpy()), TypeError, "torch.as_tensor(images)"),
    refused("bytes", many(images=BYTES), TypeError, "/ 255 for bytes"),
    refused("one image", many(images=X[0]), ValueError, "image[None]"),
    refused("no image", many(images=X[:0]), ValueError, "at least one image"),
    refused("images None", many(images=None), TypeError, "input_tensor must be"),
    refused("targets instead", many(FIRST), TypeError, "nested list of integers"),
    refused("floats", many(INDICES / 2), TypeError, "pass integers [B, k]"),
    refused("one row", many([0, 1]), ValueError, "[row] * 3"),
    refused("too few rows", many(INDICES[:1]), ValueError, "one row per image"),
    refused("negative", many([[-1]] * 3), IndexError, "faiss fills up with -1"),
    refused("out of range", many([[5]] * 3), IndexError, "indices go from 0 to 4"),
    refused("a mask", many(INDICES > 1), TypeError, "or a mask"),
    refused("chunks of none", many(references_per_chunk=0), ValueError, "at least 1"),
    refused("chunks of a half", many(references_per_chunk=0.5), ValueError, "an int"),
    late("NaN", many(images=X * torch.nan), ValueError, "check the"),
    works("constant", many(images=torch.ones_like(X))),
    *(works(name, under(context, many(INDICES))) for name, context in MODES.items()),
]

Z = torch.linspace(1, 2, 6)


def target(reference=Z, *options, output=Z, **more):
    return lambda _model: torch.isfinite(
        SimilarityTarget(reference, *options, **more)(output)
    ).all()


def half(_model):
    return SimilarityTarget(Z)(Z.half()).dtype == torch.float16


TARGET = [
    works("[D]", target()),
    works("[1, D]", target(Z[None])),
    works("a list", target(Z.tolist())),
    works("an array", target(Z.numpy())),
    works("float64", target(Z.double())),
    refused("ints", target([1, 2, 3, 4, 5, 6]), TypeError, "pass floating-point"),
    works("read only", target(np.broadcast_to(np.float32(1), (6,)))),
    works("with gradient", target(Z.clone().requires_grad_())),
    works("expanded", target(Z[:1].expand(6))),
    works("zeros", target(Z * 0)),
    works("huge", target(Z * 1e30)),
    works("half precision", half),
    works("a batch", target(output=torch.stack([Z, -Z]))),
    works("a contrast [D]", target(contrast=-Z)),
    works("a contrast [M, D]", target(contrast=torch.stack([Z, -Z]))),
    refused("several", target(torch.stack([Z, Z])), ValueError, "fam_plugins.prototypes"),
    refused("images", target(X), ValueError, "embed images with the encoder"),
    refused("a number", target(1.0), ValueError, "pass embeddings [D]"),
    refused("empty", target([]), ValueError, "pass embeddings [D]"),
    refused("None", target(None), TypeError, "must be a tensor or an array"),
    refused("a word", target("cat"), TypeError, "must be a tensor or an array"),
    refused("a list of tensors", target([Z, Z]), TypeError, "torch.stack"),
    refused("ragged", target([[1.0], [1.0, 2.0]]), TypeError, "must be a tensor or an array"),
    refused("a picture", target(PICTURE), TypeError, "to_tensor(image)"),
    refused("a model", target(nn.ReLU()), TypeError, "must be a tensor or an array"),
    refused("masked", target(np.ma.ones(6)), TypeError, "masked array"),
    refused("complex", target(Z * 1j), TypeError, "pass floating-point embeddings"),
    refused("bools", target(Z > 1), TypeError, "pass floating-point embeddings"),
    refused("NaN", target(Z * torch.nan), ValueError, "check the images"),
    refused("infinity", target(Z / 0), ValueError, "check the images"),
    refused("contrast others", target(contrast="others"), TypeError, "contrast must be a tensor"),
    refused("contrast of another width", target(contrast=Z[:4]), ValueError, "has 4 values"),
    refused("contrast empty", target(contrast=Z[:0]), ValueError, "contrast has shape (1, 0)"),
    refused("contrast NaN", target(contrast=Z * torch.nan), ValueError, "contrast row 0"),
    refused("similarity Cosine", target(Z, "Cosine"), ValueError, "did you mean 'cosine'"),
    refused("similarity l2", target(Z, "l2"), ValueError, "did you mean 'euclidean'"),
    refused("similarity None", target(Z, None), TypeError, "a name such as 'cosine'"),
    refused("similarity a class", target(Z, LpDistance), TypeError, "pass an instance"),
    refused("similarity the class", target(Z, Similarity), TypeError, "pass an instance"),
    refused("of another width", target(output=Z[:4]), ValueError, "has 4 values"),
    refused("output a dict", target(output={"z": Z}), TypeError, "picks the embeddings"),
    refused("output an array", target(output=Z.numpy()), TypeError, "picks the embeddings"),
    refused("output a map", target(output=X), ValueError, "append pooling"),
    refused("output one number", target(output=Z[0]), ValueError, "append pooling"),
    refused("output NaN", target(output=Z * torch.nan), ValueError, "check the images"),
    *(works(name, under(context, target(Z.tolist()))) for name, context in MODES.items()),
]

WARN = [
    warns(
        "a contrast under fam",
        lambda m: FAM(m, ["last"], rule="fam")(X),
        'use rule="centred"',
        model=lambda: SimilarityModel(encoder(), ROWS, contrast="others"),
    ),
    warns(
        "an embedding of zeros",
        lambda m: FAM(m, ["last"], rule="centred")(X * 0),
        "row 0, 1, 2 is all zero",
        model=lambda: SimilarityModel(_unbiased(), ROWS),
    ),
]


def _unbiased():
    net = encoder()
    for part in (net.conv, net.features):
        nn.init.zeros_(part.bias)
    return net


@pytest.mark.parametrize("row", CONSTRUCTOR)
def test_constructor(row):
    row.check()


@pytest.mark.parametrize("row", CALL)
def test_call(row):
    row.check()


@pytest.mark.parametrize("row", REFERENCES)
def test_attribute_references(row):
    row.check()


@pytest.mark.parametrize("row", TARGET)
def test_similarity_target(row):
    row.check()


@pytest.mark.parametrize("row", WARN)
def test_warnings(row):
    row.check()
