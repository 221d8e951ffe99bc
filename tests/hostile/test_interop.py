"""from_easyfsl with stand-ins of its classifiers, and the glue for the evaluation harnesses."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam, NoiseTunnel
from PIL import Image
from torch import nn

from fam_plugins import FAM, LayerFam, SimilarityModel, from_easyfsl
from fam_plugins.interop.harnesses import for_captum, for_grad_cam, for_quantus, for_torchcam
from tests.hostile.table import BYTES, MODES, ROWS, X, late, refused, under, warns, works
from tests.networks import classifier, encoder

PICTURE = Image.new("RGB", (8, 8))
LABELS = torch.tensor([0, 3, 1])
CENTRED = partial(LayerFam, rule="centred")


class FewShot(nn.Module):
    """What from_easyfsl reads of a classifier of easyfsl."""

    def __init__(self, scores=None, **changes):
        super().__init__()
        self.backbone = encoder()
        self.prototypes = ROWS
        self.feature_centering = torch.zeros(1)
        self.feature_normalization = None
        self.use_softmax = False
        self.scores = scores or (lambda z, t: -torch.cdist(z, t))
        self.training = False
        for name, value in changes.items():
            setattr(self, name, value)

    @staticmethod
    def is_transductive():
        return False

    def forward(self, images):
        features = self.backbone(images) - self.feature_centering
        if self.feature_normalization is not None:
            features = F.normalize(features, p=self.feature_normalization)
        return self.scores(features, self.prototypes)


class Transductive(FewShot):
    @staticmethod
    def is_transductive():
        return True


def taken(classifier):
    model = from_easyfsl(classifier)
    return torch.allclose(model(X), classifier(X), rtol=1e-4, atol=1e-5)


def few_shot(make, name, *expected, kind=FewShot, **options):
    return make(name, taken, *expected, model=partial(kind, **options))


def cosine(z, t):
    return F.normalize(z) @ F.normalize(t).T


EASYFSL = [
    few_shot(works, "distance"),
    few_shot(works, "squared", scores=lambda z, t: -torch.cdist(z, t).square()),
    few_shot(works, "cosine", scores=cosine),
    few_shot(works, "centred", feature_centering=torch.ones(6)),
    few_shot(works, "normalised", feature_normalization=2.0),
    few_shot(works, "normalised by 1", feature_normalization=1.0),
    few_shot(works, "prototypes with gradient", prototypes=nn.Parameter(ROWS)),
    few_shot(works, "one prototype", prototypes=ROWS[:1]),
    few_shot(works, "expanded prototypes", prototypes=ROWS[:1].expand(3, -1)),
    *(works(name, under(context, taken), model=FewShot) for name, context in MODES.items()),
    few_shot(refused, "not yet fitted", ValueError, "process_support_set", prototypes=None),
    few_shot(refused, "an empty support", ValueError, "process_support_set", prototypes=ROWS[:0]),
    few_shot(refused, "a list", ValueError, "process_support_set", prototypes=ROWS.tolist()),
    few_shot(refused, "an array", ValueError, "process_support_set", prototypes=ROWS.numpy()),
    few_shot(refused, "feature maps", ValueError, "[N, D]", prototypes=X),
    few_shot(refused, "one row", ValueError, "not [N, D]", prototypes=ROWS[0]),
    few_shot(refused, "NaN", ValueError, "class without any support", prototypes=ROWS * torch.nan),
    few_shot(refused, "softmax", ValueError, "use_softmax = False", use_softmax=True),
    few_shot(refused, "transductive", ValueError, "is transductive", kind=Transductive),
    few_shot(refused, "attention", ValueError, "LayerFam(classifier, layer)",
             contextualized_support_features=ROWS),
    few_shot(refused, "Manhattan", ValueError, "LayerFam(classifier, layer)",
             scores=lambda z, t: -torch.cdist(z, t, p=1)),
    few_shot(refused, "not negated", ValueError, "LayerFam(classifier", scores=torch.cdist),
    few_shot(refused, "[B]", ValueError, "LayerFam(classifier", scores=lambda z, t: z[:, 0]),
    few_shot(refused, "a tuple", ValueError, "LayerFam(classifier", scores=lambda z, t: (z, t)),
    few_shot(refused, "None back", ValueError, "LayerFam(classifier", scores=lambda z, t: None),
    few_shot(refused, "a tempered cosine", ValueError, "LayerFam(classifier",
             scores=lambda z, t: 10 * cosine(z, t)),
    few_shot(refused, "no backbone", TypeError, "encoder must be a torch.nn.Module", backbone=None),
    refused("an encoder", from_easyfsl, TypeError, "no backbone", model=encoder),
    refused("a class", lambda m: from_easyfsl(FewShot), TypeError, "build it first"),
    refused("None", lambda m: from_easyfsl(None), TypeError, "a torch.nn.Module"),
    refused("a function", lambda m: from_easyfsl(m.forward), TypeError, "a torch.nn.Module"),
    refused("a similarity model", from_easyfsl, TypeError, "no backbone"),
    refused("contrast Others", lambda m: from_easyfsl(m, contrast="Others"), ValueError, "others",
            model=FewShot),
    refused("contrast narrow", lambda m: from_easyfsl(m, contrast=ROWS[:, :4]), ValueError,
            "contrast has 4 values", model=FewShot),
]  # fmt: skip


def captum(inputs=X, make=CENTRED, target=0, mode="bilinear", **arguments):
    def use(model):
        explain = for_captum(make(model, model.encoder.last), interpolate_mode=mode)
        return explain(inputs, target=target, **arguments)[0].shape == X.shape

    return use


class Several:
    """An attribution of a layer that gives two tensors."""

    forward_func = staticmethod(lambda images: images)

    def attribute(self, images, **_arguments):
        return images, images


CAPTUM = [
    works("images", captum()),
    works("a tuple of one", captum((X,))),
    works("LayerGradCam", captum(make=LayerGradCam)),
    works("a tunnel", captum(make=lambda *parts: _Seeded(CENTRED(*parts)))),
    works("nearest", captum(mode="nearest")),
    works("with gradient", captum(X.clone().requires_grad_())),
    *(works(name, under(context, captum())) for name, context in MODES.items()),
    refused("a model", lambda m: for_captum(m), TypeError, "LayerFam(model, layer)"),
    refused("a class", lambda m: for_captum(LayerFam), TypeError, "LayerFam(model, layer)"),
    refused("a FAM", lambda m: for_captum(FAM(m, ["last"], rule="fam")), TypeError, "LayerFam(mod"),
    refused("maps", lambda m: for_captum(X), TypeError, "LayerFam(model, layer)"),
    refused("None", lambda m: for_captum(None), TypeError, "LayerFam(model, layer)"),
    refused("a name", lambda m: for_captum("fam"), TypeError, "LayerFam(model, layer)"),
    refused("two inputs", captum((X, X)), ValueError, "one tensor of images"),
    refused("no inputs", captum(()), ValueError, "one tensor of images"),
    refused("an array", captum(X.numpy()), TypeError, "torch.as_tensor(images)"),
    refused("a list", captum(list(X)), TypeError, "torch.stack(images)"),
    refused("no image", captum(X[:0]), ValueError, "at least one image"),
    refused("out of range", captum(target=9), AssertionError, "from 0 to 4"),
    refused("no target", captum(target=None), AssertionError, "pass target="),
    late("one image", captum(X[0]), ValueError, "image[None]"),
    late("NaN", captum(X * torch.nan), ValueError, "check the"),
    late("channels", captum(attr_dim_summation=False), ValueError, "sum the channels"),
    late("several maps", lambda m: for_captum(Several())(X), ValueError, "sum the channels"),
    late("another mode", captum(mode="cubic"), NotImplementedError, "bilinear"),
]


class _Seeded:
    """A noise tunnel that leaves the user's random numbers alone."""

    def __init__(self, inner):
        self._tunnel = NoiseTunnel(inner)

    def attribute(self, images, **arguments):
        with torch.random.fork_rng():
            return self._tunnel.attribute(images, nt_samples=2, stdevs=0.01, **arguments)


MAPS = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def cam(maps=MAPS, size=(8, 8)):
    return lambda _model: for_grad_cam(maps, size).shape == (len(maps), *size)


GRAD_CAM = [
    works("maps", cam()),
    works("torch's size", cam(size=X.shape[2:])),
    works("upright", cam(size=(9, 7))),
    works("float64", cam(MAPS.double())),
    works("half precision", cam(MAPS.half())),
    works("with gradient", cam(MAPS.clone().requires_grad_())),
    works("expanded", cam(MAPS[:1].expand(3, -1, -1, -1))),
    works("huge", cam(MAPS * 1e30)),
    works("tiny", cam(MAPS * 1e-30)),
    *(works(name, under(context, cam())) for name, context in MODES.items()),
    refused("an array", cam(MAPS.numpy()), ValueError, "maps have shape ndarray"),
    refused("None", cam(None), ValueError, "maps have shape NoneType"),
    refused("a tuple", cam((MAPS, MAPS)), ValueError, "maps have shape tuple"),
    refused("one map", cam(MAPS[0]), ValueError, "[B, 1, h, w]"),
    refused("no dimension of channels", cam(MAPS[:, 0]), ValueError, "[B, 1, h, w]"),
    refused("channels", cam(X), ValueError, "sum the channels"),
    refused("of many references", cam(MAPS[:, None]), ValueError, "[B, 1, h, w]"),
    refused("empty", cam(MAPS[:0]), ValueError, "[B, 1, h, w]"),
    refused("NaN", cam(MAPS * torch.nan), ValueError, "NaN"),
    refused("zeros", cam(MAPS * 0), ValueError, "use another rule"),
    refused("constant", cam(torch.ones(1, 1, 4, 4)), ValueError, "use another rule"),
    refused("negative", cam(-MAPS.abs()), ValueError, "use another rule"),
    refused("a side", cam(size=8), ValueError, "images.shape[2:]"),
    refused("a whole shape", cam(size=X.shape), ValueError, "images.shape[2:]"),
    refused("the images", cam(size=X), ValueError, "images.shape[2:]"),
    refused("size None", cam(size=None), ValueError, "images.shape[2:]"),
    refused("floats", cam(size=(8.0, 8.0)), ValueError, "images.shape[2:]"),
    refused("zero", cam(size=(0, 8)), ValueError, "images.shape[2:]"),
    refused("negative size", cam(size=(-8, 8)), ValueError, "images.shape[2:]"),
    refused("words", cam(size="88"), ValueError, "images.shape[2:]"),
]


ARRAY, INTS = X.numpy(), LABELS.numpy()


def quantus(inputs=ARRAY, targets=INTS, method=CENTRED, layer="last", **options):
    def use(model):
        maps = for_quantus(method, layer, **options)(model, inputs, targets)
        return maps.shape == (len(inputs), 1, 8, 8)

    return use


QUANTUS = [
    works("arrays", quantus()),
    works("tensors", quantus(X, LABELS)),
    works("float64", quantus(X.double().numpy())),
    works("lists", quantus(X.tolist(), LABELS.tolist())),
    works("one target", quantus(targets=1)),
    works("targets [B, 1]", quantus(targets=LABELS.numpy()[:, None])),
    works("small ints", quantus(targets=LABELS.numpy().astype(np.uint8))),
    works("read only", quantus(np.broadcast_to(X.numpy(), (3, 3, 8, 8)))),
    works("FAM", quantus(method=FAM, rule="centred")),
    works("LayerGradCam", quantus(method=LayerGradCam)),
    works("a classifier", quantus(classifier=True), model=classifier),
    *(works(name, under(context, quantus())) for name, context in MODES.items()),
    refused("floats", quantus(targets=np.array([0.2, 1.7, 2.9])), TypeError, "pass integers [B]"),
    refused("whole floats", quantus(targets=np.ones(3)), TypeError, "pass integers [B]"),
    refused("bools", quantus(targets=np.ones(3, bool)), TypeError, "pass integers [B]"),
    refused("complex", quantus(targets=np.ones(3) * 1j), TypeError, "pass integers [B]"),
    refused("words", quantus(targets=["cat"] * 3), TypeError, "targets must be a tensor"),
    refused("None", quantus(targets=None), TypeError, "targets must be a tensor"),
    refused("masked", quantus(targets=np.ma.ones(3, int)), TypeError, "masked array"),
    refused("too few", quantus(targets=LABELS[:2]), AssertionError, "a list of one per image"),
    refused("too many", quantus(targets=LABELS.repeat(2)), AssertionError, "a list of one per"),
    refused("too few for FAM", quantus(targets=LABELS[:2], method=FAM, rule="fam"), ValueError,
            "one target per image"),
    refused("out of range", quantus(targets=LABELS + 9), AssertionError, "from 0 to 4"),
    refused("negative", quantus(targets=-LABELS), AssertionError, "from 0 to 4"),
    refused("bytes", quantus(BYTES.numpy()), TypeError, "/ 255 for bytes"),
    refused("a picture", quantus(PICTURE), TypeError, "to_tensor(image)"),
    refused("a path", quantus("cat.png"), TypeError, "inputs must be a tensor"),
    refused("no image", quantus(X[:0].numpy()), ValueError, "at least one image"),
    late("one image", quantus(X[0].numpy()), ValueError, "image[None]"),
    late("NaN", quantus(X.numpy() * np.nan), ValueError, "check the"),
    refused("a model, not scores", quantus(), ValueError, "classifier=True", model=classifier),
    refused("an encoder", quantus(), ValueError, "SimilarityModel(encoder", model=encoder),
    refused("no model", lambda m: quantus()(m.forward), TypeError, "a torch.nn.Module"),
    refused("an object", lambda m: quantus(method=LayerFam(m, "last", rule="fam"))(m), TypeError,
            "a class such as LayerFam"),
    refused("a FAM object", lambda m: quantus(method=FAM(m, ["last"], rule="fam"))(m), TypeError,
            "a class such as LayerFam"),
    refused("a name", quantus(method="LayerFam"), TypeError, "a class such as LayerFam"),
    refused("None for method", quantus(method=None), TypeError, "a class such as LayerFam"),
    refused("layer misspelt", quantus(layer="featurs"), ValueError, "did you mean"),
    refused("layers", quantus(layer=["last"]), TypeError, "not a list"),
    refused("an unknown option", quantus(rules="fam"), TypeError, "rules"),
    refused("rule Centred", quantus(method=LayerFam, rule="Centred"), ValueError, "mean 'centred'"),
]  # fmt: skip


def torchcam(index=0, images=X, make=CENTRED, scores=True, **options):
    def use(model):
        with for_torchcam(make(model, "last"), **options) as extractor:
            found = extractor.model(images) if images is not None else None
            (maps,) = extractor(index, found if scores is True else scores)
        return maps.shape == (len(images), 4, 4)

    return use


def crashed(model):
    with pytest.raises(KeyError), for_torchcam(CENTRED(model, "last")):
        raise KeyError


TORCHCAM = [
    works("one index", torchcam()),
    works("a list", torchcam([0, 1, 2])),
    works("a tensor", torchcam(LABELS)),
    works("the highest", torchcam(None)),
    works("a classifier", torchcam(classifier=True), model=classifier),
    works("with gradient", torchcam(images=X.clone().requires_grad_())),
    works("an error within", crashed),
    *(works(name, under(context, torchcam())) for name, context in MODES.items()),
    warns("one reference", torchcam(), "add references",
          model=lambda: SimilarityModel(encoder(), ROWS[:1])),
    refused("a model", lambda m: for_torchcam(m), TypeError, "LayerFam(model, layer)"),
    refused("a class", lambda m: for_torchcam(LayerFam), TypeError, "LayerFam(model, layer)"),
    refused("None", lambda m: for_torchcam(None), TypeError, "LayerFam(model, layer)"),
    refused("a FAM", lambda m: for_torchcam(FAM(m, ["last"], rule="fam")), TypeError, "LayerFam("),
    refused("a function", lambda m: for_torchcam(CENTRED(m.forward, "last")), TypeError,
            "explain a module"),
    refused("no model within", lambda m: for_torchcam(_Bare()), TypeError, "explain a module"),
    refused("a classifier without a word", torchcam(), ValueError, "classifier=True",
            model=classifier),
    refused("an encoder", torchcam(), ValueError, "SimilarityModel(encoder", model=encoder),
    refused("no images yet", torchcam(images=None), RuntimeError, "run extractor.model(images)"),
    late("no scores for the highest", torchcam(None, scores=None), TypeError, "pass class_idx"),
    late("out of range", torchcam(9), AssertionError, "from 0 to 4"),
    late("too few", torchcam([0, 1]), AssertionError, "a list of one per image"),
    late("floats", torchcam(torch.ones(3)), AssertionError, "target.long()"),
    late("words", torchcam("cat"), AssertionError, "pass an int"),
    late("an array", torchcam(np.arange(3)), AssertionError, "a list of ints"),
    late("targets", lambda m: _targets(m), ValueError, "pass class_idx"),
    refused("no image", torchcam(images=X[:0]), ValueError, "at least one image"),
    late("NaN", torchcam(images=X * torch.nan), ValueError, "check the"),
    late("one image", torchcam(images=X[0]), ValueError, "image[None]"),
]  # fmt: skip


class _Bare:
    def attribute(self, images):
        return images


def _targets(model):
    with for_torchcam(CENTRED(model, "last")) as extractor:
        extractor(0, extractor.model(X), targets=[0])


@pytest.mark.parametrize("row", EASYFSL)
def test_from_easyfsl(row):
    row.check()


@pytest.mark.parametrize("row", CAPTUM)
def test_for_captum(row):
    row.check()


@pytest.mark.parametrize("row", GRAD_CAM)
def test_for_grad_cam(row):
    row.check()


@pytest.mark.parametrize("row", QUANTUS)
def test_for_quantus(row):
    row.check()


@pytest.mark.parametrize("row", TORCHCAM)
def test_for_torchcam(row):
    row.check()
