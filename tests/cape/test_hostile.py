"""What users do by mistake: each is refused by name, and the model stays as it was.

A row is a call, the class of its error, and the words of the message that name the way out.
"""

# ruff: noqa: E501  (a table reads better with one row to a line)
from __future__ import annotations

import copy
import math
import tempfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from fam_plugins import CAPE, LayerCape
from fam_plugins.cape import (
    CapeHead,
    calibrate_temperature,
    cape_loss,
    fit_cape_head,
    with_cape_head,
)
from fam_plugins.cape import upsample_conserving_mass as up
from tests.networks import State

from .conftest import QUIET, small_network

torch.manual_seed(0)
MODEL = with_cape_head(small_network()).eval()
HEAD = CapeHead(6, 4)
IMAGES, LABELS = torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
MAPS, LOGITS, CLASSES = torch.rand(3, 6, 5, 4), torch.randn(3, 4), torch.tensor([0, 3, 1])
ARRAY, PICTURE = np.ones((4, 1, 6, 6), np.float32), Image.new("L", (6, 6))
TOP = ClassifierOutputTarget(0)


class Out(nn.Module):
    """A classifier whose output is handed on in another form."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = small_network(), change

    def forward(self, images):
        return self.change(self.net(images))


def last(layer):
    network = small_network()
    network[-1] = layer
    return network


def spoilt(value=math.nan):
    model = copy.deepcopy(MODEL)
    with torch.no_grad():
        model.head.t1.fill_(value)
    return model


def fit(loader=(IMAGES,), m=MODEL, **options):
    return fit_cape_head(m, loader, **{"epochs": 1, **QUIET, **options})


def calibrate(loader=((IMAGES, LABELS),), m=MODEL, **options):
    return calibrate_temperature(m, loader, **options)


def loss(h=HEAD, f=MAPS, l=LOGITS, y=CLASSES, **options):  # noqa: E741
    return cape_loss(h, f, l, y, **options)


# fmt: off
WITH_CAPE_HEAD_ROWS = [
    (lambda: with_cape_head(None), TypeError, "must be a plain torch.nn.Module"),
    (lambda: with_cape_head("resnet18"), TypeError, "must be a plain torch.nn.Module"),
    (lambda: with_cape_head(small_network), TypeError, "must be a plain torch.nn.Module"),
    (lambda: with_cape_head(nn.Sequential), TypeError, "must be a plain torch.nn.Module"),
    (lambda: with_cape_head(small_network().state_dict()), TypeError, "must be a plain torch.nn.Module"),
    (lambda: with_cape_head(ARRAY), TypeError, "must be a plain torch.nn.Module"),
    (lambda: with_cape_head(nn.Linear(3, 2)), ValueError, "no convolution found to size the input: pass example_input=images"),
    (lambda: with_cape_head(nn.Conv2d(1, 2, 3)), ValueError, "returns the logits (remove a softmax at the end)"),
    (lambda: with_cape_head(nn.Identity()), ValueError, "no convolution found to size the input: pass example_input=images"),
    (lambda: with_cape_head(nn.Sequential()), ValueError, "no convolution found to size the input: pass example_input=images"),
    (lambda: with_cape_head(MODEL), TypeError, "use model.head, or pass model.model"),
    (lambda: with_cape_head(MODEL.head), TypeError, "use model.head, or pass model.model"),
    (lambda: with_cape_head(CapeHead(8, 3)), TypeError, "use model.head, or pass model.model"),
    (lambda: with_cape_head(nn.DataParallel(MODEL)), TypeError, "use model.head, or pass model.model"),
    (lambda: with_cape_head(nn.Sequential(MODEL)), TypeError, "use model.head, or pass model.model"),
    (lambda: with_cape_head(torch.jit.script(small_network())), TypeError, "must be a plain torch.nn.Module"),
    (lambda: with_cape_head(torch.jit.trace(small_network().eval(), IMAGES)), TypeError, "must be a plain torch.nn.Module"),
    (lambda: with_cape_head(small_network().to("meta")), ValueError, "load its weights first"),
    (lambda: with_cape_head(small_network(), "layer4"), ValueError, "There are '0', '1', '2'"),
    (lambda: with_cape_head(small_network(), 2), TypeError, "such as model.layer4, or its name 'layer4'"),
    (lambda: with_cape_head(small_network(), -1), TypeError, "such as model.layer4, or its name 'layer4'"),
    (lambda: with_cape_head(small_network(), small_network()[2]), ValueError, "pass one of its own, or a name"),
    (lambda: with_cape_head(small_network(), "0"), ValueError, "CAPE needs global average pooling followed directly by one nn.Linear"),
    (lambda: with_cape_head(small_network(), None, "0"), TypeError, "must be an nn.Linear to copy"),
    (lambda: with_cape_head(small_network(), None, 6), TypeError, "such as model.layer4, or its name 'layer4'"),
    (lambda: with_cape_head(small_network(), None, nn.Linear(8, 3)), ValueError, "pass one of its own, or a name"),
    (lambda: with_cape_head(small_network(), IMAGES), TypeError, "such as model.layer4, or its name 'layer4'"),
    (lambda: with_cape_head(small_network(), example_input=ARRAY), ValueError, "pass images that it accepts as example_input="),
    (lambda: with_cape_head(small_network(), example_input=PICTURE), ValueError, "pass images that it accepts as example_input="),
    (lambda: with_cape_head(small_network(), example_input="cat.jpg"), ValueError, "pass images that it accepts as example_input="),
    (lambda: with_cape_head(small_network(), example_input=(IMAGES,)), ValueError, "pass images that it accepts as example_input="),
    (lambda: with_cape_head(small_network(), example_input={"image": IMAGES}), ValueError, "pass images that it accepts as example_input="),
    (lambda: with_cape_head(small_network(), example_input=[IMAGES]), ValueError, "pass images that it accepts as example_input="),
    (lambda: with_cape_head(small_network(), example_input=IMAGES[0]), ValueError, "pass images that it accepts as example_input="),
    (lambda: with_cape_head(small_network(), example_input=IMAGES[0, 0]), ValueError, "pass images that it accepts as example_input="),
    (lambda: with_cape_head(small_network(), example_input=IMAGES[:0]), ValueError, "pass real images as example_input="),
    (lambda: with_cape_head(small_network(), example_input=IMAGES * math.nan), ValueError, "pass real images as example_input="),
    (lambda: with_cape_head(small_network(), example_input=(255 * IMAGES).byte()), ValueError, "pass images that it accepts as example_input="),
    (lambda: with_cape_head(small_network(), example_input=IMAGES.double()), ValueError, "pass images that it accepts as example_input="),
    (lambda: with_cape_head(small_network(), example_input=IMAGES.to("meta")), ValueError, "pass images that it accepts as example_input="),
    (lambda: with_cape_head(small_network(), example_input=IMAGES.expand(4, 3, 6, 6)), ValueError, "pass images that it accepts as example_input="),
    (lambda: with_cape_head(small_network(), example_input=IMAGES[..., :1, :1]), ValueError, "CAPE needs global average pooling followed directly by one nn.Linear"),
    (lambda: with_cape_head(small_network(), head=nn.Linear(8, 3)), TypeError, "head must be a CapeHead"),
    (lambda: with_cape_head(small_network(), head=CapeHead), TypeError, "head must be a CapeHead"),
    (lambda: with_cape_head(small_network(), head=MODEL.head.state_dict()), TypeError, "head must be a CapeHead"),
    (lambda: with_cape_head(small_network(), head=CapeHead(9, 3)), ValueError, "attach it to the model it was fitted for"),
    (lambda: with_cape_head(small_network(), head="head.pt"), TypeError, "head must be a CapeHead"),
    (lambda: with_cape_head(nn.Sequential(small_network(), nn.Softmax(1))), ValueError, "returns the logits (remove a softmax at the end)"),
    (lambda: with_cape_head(nn.Sequential(small_network(), nn.Sigmoid())), ValueError, "returns the logits (remove a softmax at the end)"),
    (lambda: with_cape_head(Out(lambda x: (x, x))), ValueError, "wrap it to return the logits [B, K]"),
    (lambda: with_cape_head(Out(lambda x: {"logits": x})), ValueError, "wrap it to return the logits [B, K]"),
    (lambda: with_cape_head(Out(lambda x: x.argmax(1))), ValueError, "returns the logits (remove a softmax at the end)"),
    (lambda: with_cape_head(Out(lambda x: 2 * x)), ValueError, "returns the logits (remove a softmax at the end)"),
    (lambda: with_cape_head(last(nn.Linear(8, 1))), ValueError, "a binary classifier needs two outputs"),
    (lambda: with_cape_head(torch.jit.script(small_network()), example_input=IMAGES), TypeError, "must be a plain torch.nn.Module"),
    (lambda: with_cape_head(torch.jit.trace(small_network().eval(), IMAGES), example_input=IMAGES), TypeError, "must be a plain torch.nn.Module"),
    (lambda: with_cape_head(nn.Module()), ValueError, "no convolution found to size the input: pass example_input=images"),
    (lambda: with_cape_head(nn.ModuleList([small_network()])), ValueError, "pass images that it accepts as example_input="),
]
FIT_CAPE_HEAD_ROWS = [
    (lambda: fit_cape_head(None, [IMAGES]), TypeError, "pass what with_cape_head(model) returned"),
    (lambda: fit_cape_head(small_network(), [IMAGES]), TypeError, "pass what with_cape_head(model) returned"),
    (lambda: fit_cape_head(MODEL.head, [IMAGES]), TypeError, "pass what with_cape_head(model) returned"),
    (lambda: fit_cape_head(nn.DataParallel(MODEL), [IMAGES]), TypeError, "pass what with_cape_head(model) returned"),
    (lambda: fit_cape_head(torch.compile(MODEL, backend="eager"), [IMAGES]), TypeError, "pass what with_cape_head(model) returned"),
    (lambda: fit_cape_head("m.pt", [IMAGES]), TypeError, "pass what with_cape_head(model) returned"),
    (lambda: fit_cape_head(MODEL.state_dict(), [IMAGES]), TypeError, "pass what with_cape_head(model) returned"),
    (lambda: fit(m=spoilt()), ValueError, "re-create it with with_cape_head(model.model)"),
    (lambda: fit(m=spoilt(math.inf)), ValueError, "re-create it with with_cape_head(model.model)"),
    (lambda: fit(m=copy.deepcopy(MODEL).to("meta")), ValueError, "re-create it with with_cape_head(model.model)"),
    (lambda: fit(None), TypeError, "loader must be a DataLoader or a list"),
    (lambda: fit(IMAGES), ValueError, "wrap the data set in torch.utils.data.DataLoader"),
    (lambda: fit(ARRAY), TypeError, "it must give image tensors"),
    (lambda: fit("data/train"), TypeError, "it must give image tensors"),
    (lambda: fit(5), TypeError, "loader must be a DataLoader or a list"),
    (lambda: fit([]), ValueError, "check the data set, drop_last and used-up iterators"),
    (lambda: fit({}), ValueError, "check the data set, drop_last and used-up iterators"),
    (lambda: fit([None]), TypeError, "it must give image tensors"),
    (lambda: fit([ARRAY]), TypeError, "it must give image tensors"),
    (lambda: fit([PICTURE]), TypeError, "it must give image tensors"),
    (lambda: fit([[PICTURE, PICTURE]]), TypeError, "it must give image tensors"),
    (lambda: fit(["a.jpg"]), TypeError, "it must give image tensors"),
    (lambda: fit([{"x": IMAGES, "label": LABELS}]), TypeError, "a dict of 'x', 'label': it must give image tensors"),
    (lambda: fit([{"image": IMAGES, "img": IMAGES}]), TypeError, "dicts with one of ('image', 'images', 'img',"),
    (lambda: fit({"image": IMAGES}), TypeError, "it must give image tensors"),
    (lambda: fit([(LABELS, IMAGES)]), TypeError, "images.float() / 255 for bytes"),
    (lambda: fit([IMAGES[0]]), ValueError, "wrap the data set in torch.utils.data.DataLoader"),
    (lambda: fit([(IMAGES[0], 0)]), ValueError, "wrap the data set in torch.utils.data.DataLoader"),
    (lambda: fit(torch.utils.data.TensorDataset(IMAGES, LABELS)), ValueError, "wrap the data set in torch.utils.data.DataLoader"),
    (lambda: fit([IMAGES[:0]]), ValueError, "wrap the data set in torch.utils.data.DataLoader"),
    (lambda: fit([IMAGES * math.nan]), ValueError, "repair or drop them"),
    (lambda: fit([IMAGES / 0]), ValueError, "repair or drop them"),
    (lambda: fit([(255 * IMAGES).byte()]), TypeError, "images.float() / 255 for bytes"),
    (lambda: fit([IMAGES > 0]), TypeError, "images.float() / 255 for bytes"),
    (lambda: fit([IMAGES.to(torch.complex64)]), TypeError, "images.float() / 255 for bytes"),
    (lambda: fit([IMAGES.expand(4, 3, 6, 6)]), ValueError, "the model did not accept images of shape (4, 3, 6, 6)"),
    (lambda: fit([IMAGES, IMAGES[..., :5, :5]], cache=True), ValueError, "resize the images to one size, or cache=False"),
    (lambda: fit((x for x in [IMAGES]), epochs=2), TypeError, "pass a DataLoader, or cache=True"),
    (lambda: fit(iter([IMAGES]), epochs=3), TypeError, "pass a DataLoader, or cache=True"),
    (lambda: fit(lambda: IMAGES), TypeError, "loader must be a DataLoader or a list"),
    (lambda: fit(MODEL), TypeError, "loader must be a DataLoader or a list"),
    (lambda: fit(epochs=0), ValueError, "must be an int, at least 1, not"),
    (lambda: fit(epochs=-1), ValueError, "must be an int, at least 1, not"),
    (lambda: fit(epochs=1.0), ValueError, "must be an int, at least 1, not"),
    (lambda: fit(epochs="3"), ValueError, "must be an int, at least 1, not"),
    (lambda: fit(epochs=None), ValueError, "must be an int, at least 1, not"),
    (lambda: fit(epochs=torch.tensor(2)), ValueError, "must be an int, at least 1, not"),
    (lambda: fit(epochs=np.int64(1)), ValueError, "must be an int, at least 1, not"),
    (lambda: fit(lr=0), ValueError, "must be a float above 0, not"),
    (lambda: fit(lr=-1e-3), ValueError, "must be a float above 0, not"),
    (lambda: fit(lr=math.nan), ValueError, "must be a float above 0, not"),
    (lambda: fit(lr="1e-3"), ValueError, "must be a float above 0, not"),
    (lambda: fit(lr=None), ValueError, "must be a float above 0, not"),
    (lambda: fit(lr=torch.tensor(1e-3)), ValueError, "must be a float above 0, not"),
    (lambda: fit(lr=[1e-3]), ValueError, "must be a float above 0, not"),
    (lambda: fit(momentum=1), ValueError, "must be a float in [0, 1), not"),
    (lambda: fit(momentum=None), ValueError, "must be a float in [0, 1), not"),
    (lambda: fit(weight_decay=-1), ValueError, "must be a float, at least 0, not"),
    (lambda: fit(weight_decay=math.inf), ValueError, "must be a float, at least 0, not"),
    (lambda: fit(step_size=0), ValueError, "must be an int, at least 1, not"),
    (lambda: fit(step_size=2.5), ValueError, "must be an int, at least 1, not"),
    (lambda: fit(gamma=0), ValueError, "must be a float in (0, 1], not"),
    (lambda: fit(gamma="0.1"), ValueError, "must be a float in (0, 1], not"),
    (lambda: fit(temperature=0), ValueError, "must be a float above 0, not"),
    (lambda: fit(temperature=-2), ValueError, "must be a float above 0, not"),
    (lambda: fit(temperature=math.nan), ValueError, "must be a float above 0, not"),
    (lambda: fit(checkpoint=tempfile.gettempdir()), ValueError, "is a folder: pass a file"),
    (lambda: fit(checkpoint="/no/such/x.pt"), ValueError, "create it first"),
    (lambda: fit(checkpoint=5), TypeError, "os.PathLike"),
    (lambda: fit(checkpoint=True), TypeError, "os.PathLike"),
]
CALIBRATE_TEMPERATURE_ROWS = [
    (lambda: calibrate_temperature(None, [(IMAGES, LABELS)]), TypeError, "pass what with_cape_head(model) returned"),
    (lambda: calibrate_temperature(small_network(), [(IMAGES, LABELS)]), TypeError, "pass what with_cape_head(model) returned"),
    (lambda: calibrate_temperature(MODEL.head, [(IMAGES, LABELS)]), TypeError, "pass what with_cape_head(model) returned"),
    (lambda: calibrate_temperature(nn.DataParallel(MODEL), [(IMAGES, LABELS)]), TypeError, "pass what with_cape_head(model) returned"),
    (lambda: calibrate_temperature(torch.compile(MODEL, backend="eager"), [(IMAGES, LABELS)]), TypeError, "pass what with_cape_head(model) returned"),
    (lambda: calibrate(m=spoilt()), ValueError, "re-create it with with_cape_head(model.model)"),
    (lambda: calibrate(m=copy.deepcopy(MODEL).to("meta")), ValueError, "re-create it with with_cape_head(model.model)"),
    (lambda: calibrate(None), TypeError, "loader must be a DataLoader or a list"),
    (lambda: calibrate(IMAGES), ValueError, "wrap the data set in torch.utils.data.DataLoader"),
    (lambda: calibrate(IMAGES, LABELS), TypeError, "pass what with_cape_head(model) returned"),
    (lambda: calibrate((IMAGES, LABELS)), ValueError, "yield (images, labels)"),
    (lambda: calibrate([]), ValueError, "check the data set, drop_last and used-up iterators"),
    (lambda: calibrate(iter([])), ValueError, "check the data set, drop_last and used-up iterators"),
    (lambda: calibrate([IMAGES]), ValueError, "yield (images, labels)"),
    (lambda: calibrate([(IMAGES,)]), ValueError, "yield (images, labels)"),
    (lambda: calibrate([(IMAGES, None)]), ValueError, "yield (images, labels)"),
    (lambda: calibrate([(IMAGES, [0, 1, 2, 0])]), ValueError, "yield (images, labels)"),
    (lambda: calibrate([(IMAGES, np.array([0, 1, 2, 0]))]), ValueError, "yield (images, labels)"),
    (lambda: calibrate([(IMAGES, ("a", "b", "c", "d"))]), ValueError, "yield (images, labels)"),
    (lambda: calibrate([{"image": IMAGES, "label": LABELS, "target": LABELS}]), TypeError, "at most one of ('label', 'labels', 'target')"),
    (lambda: calibrate([{"image": IMAGES, "class": LABELS}]), ValueError, "yield (images, labels)"),
    (lambda: calibrate([(LABELS, IMAGES)]), TypeError, "images.float() / 255 for bytes"),
    (lambda: calibrate([(IMAGES, LABELS + 1)]), ValueError, "classes go from 0 to 2"),
    (lambda: calibrate([(IMAGES, LABELS - 1)]), ValueError, "classes go from 0 to 2"),
    (lambda: calibrate([(IMAGES, LABELS.float())]), TypeError, "see labels.argmax(dim=1)"),
    (lambda: calibrate([(IMAGES, LABELS > 0)]), TypeError, "see labels.argmax(dim=1)"),
    (lambda: calibrate([(IMAGES, F.one_hot(LABELS))]), ValueError, "pass one class index for each of the"),
    (lambda: calibrate([(IMAGES, F.one_hot(LABELS).float())]), TypeError, "see labels.argmax(dim=1)"),
    (lambda: calibrate([(IMAGES, LABELS[:2])]), ValueError, "pass one class index for each of the"),
    (lambda: calibrate([(IMAGES, LABELS[:, None])]), ValueError, "pass one class index for each of the"),
    (lambda: calibrate([(IMAGES, LABELS[0])]), ValueError, "pass one class index for each of the"),
    (lambda: calibrate([(IMAGES * math.nan, LABELS)]), ValueError, "repair or drop them"),
    (lambda: calibrate([(IMAGES[0], LABELS[:1])]), ValueError, "wrap the data set in torch.utils.data.DataLoader"),
    (lambda: calibrate([(ARRAY, LABELS)]), TypeError, "it must give image tensors"),
    (lambda: calibrate([(IMAGES.byte(), LABELS)]), TypeError, "images.float() / 255 for bytes"),
    (lambda: calibrate([(IMAGES[:0], LABELS[:0])]), ValueError, "wrap the data set in torch.utils.data.DataLoader"),
    (lambda: calibrate([(IMAGES.expand(4, 3, 6, 6), LABELS)]), ValueError, "the model did not accept images of shape (4, 3, 6, 6)"),
    (lambda: calibrate([(IMAGES, LABELS + 10**9)]), ValueError, "classes go from 0 to 2"),
    (lambda: calibrate(bounds=(1, 2)), ValueError, "must be (low, high) around 0, within ±50, not"),
    (lambda: calibrate(bounds=(-1,)), ValueError, "must be (low, high) around 0, within ±50, not"),
    (lambda: calibrate(bounds=5), ValueError, "must be (low, high) around 0, within ±50, not"),
    (lambda: calibrate(bounds=None), ValueError, "must be (low, high) around 0, within ±50, not"),
    (lambda: calibrate(bounds="wide"), ValueError, "must be (low, high) around 0, within ±50, not"),
    (lambda: calibrate(bounds=(1, -1)), ValueError, "must be (low, high) around 0, within ±50, not"),
    (lambda: calibrate(bounds=(math.nan, 1)), ValueError, "must be (low, high) around 0, within ±50, not"),
    (lambda: calibrate(bounds=(-math.inf, math.inf)), ValueError, "must be (low, high) around 0, within ±50, not"),
    (lambda: calibrate(bounds=(-1, 0, 1)), ValueError, "must be (low, high) around 0, within ±50, not"),
    (lambda: calibrate(bounds=torch.tensor([-1.0, 1.0])), ValueError, "must be (low, high) around 0, within ±50, not"),
    (lambda: calibrate(5), TypeError, "loader must be a DataLoader or a list"),
    (lambda: calibrate("val"), TypeError, "it must give image tensors"),
    (lambda: calibrate(lambda: 1), TypeError, "loader must be a DataLoader or a list"),
]
CAPE_LOSS_ROWS = [
    (lambda: loss(None), TypeError, "head must be a CapeHead"),
    (lambda: loss(nn.Linear(6, 4)), TypeError, "head must be a CapeHead"),
    (lambda: loss(MODEL), TypeError, "head must be a CapeHead"),
    (lambda: loss("head"), TypeError, "head must be a CapeHead"),
    (lambda: loss(nn.DataParallel(HEAD)), TypeError, "head must be a CapeHead"),
    (lambda: loss(f=None), TypeError, "torch.as_tensor(features).float()"),
    (lambda: loss(f=MAPS.numpy()), TypeError, "torch.as_tensor(features).float()"),
    (lambda: loss(f=MAPS.mean((2, 3))), ValueError, "add a batch axis with features.unsqueeze(0)"),
    (lambda: loss(f=MAPS.flatten(2)), ValueError, "add a batch axis with features.unsqueeze(0)"),
    (lambda: loss(f=MAPS.long()), TypeError, "torch.as_tensor(features).float()"),
    (lambda: loss(f=MAPS.double()), TypeError, "use .to(torch.float32)"),
    (lambda: loss(f=MAPS.movedim(1, -1)), ValueError, "pass features.movedim(-1, 1)"),
    (lambda: loss(f=MAPS[:, :5]), ValueError, "pass the map that enters the pooling layer"),
    (lambda: loss(f=MAPS[:0], l=LOGITS[:0], y=CLASSES[:0]), ValueError, "pass at least one image and region"),
    (lambda: loss(f=MAPS[:, :, :0]), ValueError, "pass at least one image and region"),
    (lambda: loss(f=[MAPS]), TypeError, "torch.as_tensor(features).float()"),
    (lambda: loss(f=(MAPS, LOGITS)), TypeError, "torch.as_tensor(features).float()"),
    (lambda: loss(l=None), TypeError, "torch.as_tensor(logits).float()"),
    (lambda: loss(l=LOGITS.numpy()), TypeError, "torch.as_tensor(logits).float()"),
    (lambda: loss(l=LOGITS[0]), ValueError, "logits must be [B, K], [3, 4]"),
    (lambda: loss(l=LOGITS[:2]), ValueError, "logits must be [B, K], [3, 4]"),
    (lambda: loss(l=LOGITS[:, :3]), ValueError, "logits must be [B, K], [3, 4]"),
    (lambda: loss(l=LOGITS[..., None]), ValueError, "logits must be [B, K], [3, 4]"),
    (lambda: loss(l=CLASSES), TypeError, "torch.as_tensor(logits).float()"),
    (lambda: loss(l=LOGITS.long()), TypeError, "torch.as_tensor(logits).float()"),
    (lambda: loss(l=LOGITS > 0), TypeError, "torch.as_tensor(logits).float()"),
    (lambda: loss(y=None), ValueError, "pass them, or alpha=0"),
    (lambda: loss(y=0), TypeError, "see labels.argmax(dim=1)"),
    (lambda: loss(y=[0, 3, 1]), TypeError, "see labels.argmax(dim=1)"),
    (lambda: loss(y=CLASSES.numpy()), TypeError, "see labels.argmax(dim=1)"),
    (lambda: loss(y=("cat", "dog", "cat")), TypeError, "see labels.argmax(dim=1)"),
    (lambda: loss(y=CLASSES.float()), TypeError, "see labels.argmax(dim=1)"),
    (lambda: loss(y=CLASSES > 0), TypeError, "see labels.argmax(dim=1)"),
    (lambda: loss(y=F.one_hot(CLASSES, 4)), ValueError, "pass one class index for each of the"),
    (lambda: loss(y=F.one_hot(CLASSES, 4).float()), TypeError, "see labels.argmax(dim=1)"),
    (lambda: loss(y=CLASSES + 2), ValueError, "classes go from 0 to 3"),
    (lambda: loss(y=CLASSES - 1), ValueError, "classes go from 0 to 3"),
    (lambda: loss(y=CLASSES[:2]), ValueError, "pass one class index for each of the"),
    (lambda: loss(alpha=-1), ValueError, "alpha and beta must be floats from 0 and not both 0"),
    (lambda: loss(alpha=None), ValueError, "alpha and beta must be floats from 0 and not both 0"),
    (lambda: loss(alpha="1"), ValueError, "alpha and beta must be floats from 0 and not both 0"),
    (lambda: loss(alpha=math.nan), ValueError, "alpha and beta must be floats from 0 and not both 0"),
    (lambda: loss(alpha=math.inf), ValueError, "alpha and beta must be floats from 0 and not both 0"),
    (lambda: loss(alpha=0, beta=0), ValueError, "alpha and beta must be floats from 0 and not both 0"),
    (lambda: loss(beta=-1), ValueError, "alpha and beta must be floats from 0 and not both 0"),
    (lambda: loss(temperature=0), ValueError, "alpha and beta must be floats from 0 and not both 0"),
    (lambda: loss(temperature=-1), ValueError, "alpha and beta must be floats from 0 and not both 0"),
    (lambda: loss(temperature=None), ValueError, "alpha and beta must be floats from 0 and not both 0"),
    (lambda: loss(temperature=math.inf), ValueError, "alpha and beta must be floats from 0 and not both 0"),
    (lambda: loss(temperature="2"), ValueError, "alpha and beta must be floats from 0 and not both 0"),
]
CAPEHEAD_ROWS = [
    (lambda: CapeHead(6, 1), ValueError, "a binary classifier needs two outputs"),
    (lambda: CapeHead(6, 0), ValueError, "a binary classifier needs two outputs"),
    (lambda: CapeHead(0, 4), ValueError, "a binary classifier needs two outputs"),
    (lambda: CapeHead(-6, 4), ValueError, "a binary classifier needs two outputs"),
    (lambda: CapeHead(6, -4), ValueError, "a binary classifier needs two outputs"),
    (lambda: CapeHead(6.0, 4), ValueError, "a binary classifier needs two outputs"),
    (lambda: CapeHead(6, 4.5), ValueError, "a binary classifier needs two outputs"),
    (lambda: CapeHead("6", 4), ValueError, "a binary classifier needs two outputs"),
    (lambda: CapeHead(None, 4), ValueError, "a binary classifier needs two outputs"),
    (lambda: CapeHead([6], 4), ValueError, "a binary classifier needs two outputs"),
    (lambda: CapeHead(nn.Linear(6, 4), 4), ValueError, "a binary classifier needs two outputs"),
    (lambda: CapeHead(6, 4, dtype="float32"), TypeError, "torch.dtype"),
    (lambda: CapeHead.from_linear(None), TypeError, "from_linear takes an nn.Linear, such as model.fc"),
    (lambda: CapeHead.from_linear(nn.Conv2d(6, 4, 1)), TypeError, "from_linear takes an nn.Linear, such as model.fc"),
    (lambda: CapeHead.from_linear(nn.Linear), TypeError, "from_linear takes an nn.Linear, such as model.fc"),
    (lambda: CapeHead.from_linear(torch.rand(4, 6)), TypeError, "from_linear takes an nn.Linear, such as model.fc"),
    (lambda: CapeHead.from_linear(nn.Linear(6, 1)), ValueError, "a binary classifier needs two outputs"),
    (lambda: CapeHead.from_linear(small_network()), TypeError, "from_linear takes an nn.Linear, such as model.fc"),
    (lambda: CapeHead.from_linear(nn.Linear(6, 4).state_dict()), TypeError, "from_linear takes an nn.Linear, such as model.fc"),
    (lambda: CapeHead.from_released_state_dict({}), ValueError, "our own are read by load_state_dict"),
    (lambda: CapeHead.from_released_state_dict(None), TypeError, "pass what torch.load(path) returned"),
    (lambda: CapeHead.from_released_state_dict("x.pth"), TypeError, "pass what torch.load(path) returned"),
    (lambda: CapeHead.from_released_state_dict({"state_dict": {}}), ValueError, "our own are read by load_state_dict"),
    (lambda: CapeHead.from_released_state_dict(HEAD.state_dict()), ValueError, "our own are read by load_state_dict"),
    (lambda: CapeHead(6, 4).load_state_dict(CapeHead(6, 5).state_dict()), RuntimeError, "size mismatch for weight"),
    (lambda: HEAD(None), TypeError, "torch.as_tensor(features).float()"),
    (lambda: HEAD("x"), TypeError, "torch.as_tensor(features).float()"),
    (lambda: HEAD(MAPS.numpy()), TypeError, "torch.as_tensor(features).float()"),
    (lambda: HEAD([MAPS]), TypeError, "torch.as_tensor(features).float()"),
    (lambda: HEAD(MAPS[0]), ValueError, "add a batch axis with features.unsqueeze(0)"),
    (lambda: HEAD(MAPS.mean((2, 3))), ValueError, "add a batch axis with features.unsqueeze(0)"),
    (lambda: HEAD(MAPS.flatten(2)), ValueError, "add a batch axis with features.unsqueeze(0)"),
    (lambda: HEAD(MAPS.long()), TypeError, "torch.as_tensor(features).float()"),
    (lambda: HEAD(MAPS > 0), TypeError, "torch.as_tensor(features).float()"),
    (lambda: HEAD(MAPS.double()), TypeError, "use .to(torch.float32)"),
    (lambda: HEAD(MAPS.to(torch.complex64)), TypeError, "torch.as_tensor(features).float()"),
    (lambda: HEAD(MAPS.movedim(1, -1)), ValueError, "pass features.movedim(-1, 1)"),
    (lambda: HEAD(MAPS[:, :5]), ValueError, "pass the map that enters the pooling layer"),
    (lambda: HEAD(MAPS[:0]), ValueError, "pass at least one image and region"),
    (lambda: HEAD(MAPS[:, :, :0]), ValueError, "pass at least one image and region"),
    (lambda: HEAD.probability_maps(MAPS[0]), ValueError, "add a batch axis with features.unsqueeze(0)"),
    (lambda: HEAD.relative_maps(None), TypeError, "torch.as_tensor(features).float()"),
    (lambda: HEAD.class_maps(MAPS.numpy()), TypeError, "torch.as_tensor(features).float()"),
    (lambda: HEAD.soft_log_probs((MAPS,)), TypeError, "torch.as_tensor(features).float()"),
]
LAYERCAPE_ROWS = [
    (lambda: LayerCape(None).attribute(IMAGES, 0), ValueError, "with_cape_head(model), or pass the CapeHead to read as the layer"),
    (lambda: LayerCape("m").attribute(IMAGES, 0), ValueError, "with_cape_head(model), or pass the CapeHead to read as the layer"),
    (lambda: LayerCape(small_network()).attribute(IMAGES, 0), ValueError, "with_cape_head(model), or pass the CapeHead to read as the layer"),
    (lambda: LayerCape(nn.Sequential(MODEL, CapeHead(8, 3))).attribute(IMAGES, 0), ValueError, "with_cape_head(model), or pass the CapeHead to read as the layer"),
    (lambda: LayerCape(MODEL, "layer4").attribute(IMAGES, 0), ValueError, "There are 'model', 'model.0'"),
    (lambda: LayerCape(MODEL, 5).attribute(IMAGES, 0), TypeError, "such as model.layer4, or its name 'layer4'"),
    (lambda: LayerCape(MODEL, "0").attribute(IMAGES, 0), ValueError, "There are 'model', 'model.0'"),
    (lambda: LayerCape(MODEL, "model.0").attribute(IMAGES, 0), ValueError, "leave the layer out"),
    (lambda: LayerCape(MODEL, [MODEL.head]).attribute(IMAGES, 0), TypeError, "such as model.layer4, or its name 'layer4'"),
    (lambda: LayerCape(MODEL, small_network()[2]).attribute(IMAGES, 0), ValueError, "leave the layer out"),
    (lambda: LayerCape(MODEL, CapeHead(8, 3)).attribute(IMAGES, 0), AssertionError, "choose a layer that the model calls for these inputs"),
    (lambda: LayerCape(MODEL.vanilla).attribute(IMAGES, 0), AssertionError, "choose a layer that the model calls for these inputs"),
    (lambda: LayerCape(lambda x: MODEL(x)).attribute(IMAGES, 0), ValueError, "with_cape_head(model), or pass the CapeHead to read as the layer"),
    (lambda: LayerCape(lambda x: MODEL(x), "head").attribute(IMAGES, 0), ValueError, "with_cape_head(model), or pass the CapeHead to read as the layer"),
    (lambda: LayerCape(lambda x: MODEL(x)[:, 1:], MODEL.head).attribute(IMAGES, 0), ValueError, "explain the model itself, with the class of its head"),
    (lambda: LayerCape(lambda x: MODEL(x).flip(1), MODEL.head).attribute(IMAGES, 0), ValueError, "explain the model itself, with the class of its head"),
    (lambda: LayerCape(lambda x: MODEL(x).exp(), MODEL.head).attribute(IMAGES, 0), ValueError, "explain the model itself, with the class of its head"),
    (lambda: LayerCape(lambda x: MODEL.both(x), MODEL.head).attribute(IMAGES, 0), TypeError, "pass a function that picks the scores out of it"),
    (lambda: LayerCape(lambda x: None, MODEL.head).attribute(IMAGES, 0), AssertionError, "choose a layer that the model calls for these inputs"),
    (lambda: LayerCape(lambda x: MODEL(x) + MODEL(x), MODEL.head).attribute(IMAGES, 0), RuntimeError, "ran twice in one forward pass"),
    (lambda: LayerCape(MODEL).attribute(None, 0), TypeError, "inputs must be a tensor or a tuple of tensors"),
    (lambda: LayerCape(MODEL).attribute(ARRAY, 0), TypeError, "inputs must be a tensor or a tuple of tensors"),
    (lambda: LayerCape(MODEL).attribute(PICTURE, 0), TypeError, "inputs must be a tensor or a tuple of tensors"),
    (lambda: LayerCape(MODEL).attribute("x", 0), TypeError, "inputs must be a tensor or a tuple of tensors"),
    (lambda: LayerCape(MODEL).attribute([IMAGES], 0), TypeError, "inputs must be a tensor or a tuple of tensors"),
    (lambda: LayerCape(MODEL).attribute({"image": IMAGES}, 0), TypeError, "inputs must be a tensor or a tuple of tensors"),
    (lambda: LayerCape(MODEL).attribute(IMAGES[:0], 0), ValueError, "pass at least one image"),
    (lambda: LayerCape(MODEL).attribute(IMAGES * math.nan, 0), ValueError, "check the input and the weights"),
    (lambda: LayerCape(MODEL).attribute(IMAGES), AssertionError, "pass target=, the index of the class"),
    (lambda: LayerCape(MODEL).attribute(IMAGES, 3), AssertionError, "targets go from 0 to 2"),
    (lambda: LayerCape(MODEL).attribute(IMAGES, -4), AssertionError, "targets go from 0 to 2"),
    (lambda: LayerCape(MODEL).attribute(IMAGES, "cat"), AssertionError, "pass an int, a tensor of ints [B]"),
    (lambda: LayerCape(MODEL).attribute(IMAGES, 1.0), AssertionError, "pass an int, a tensor of ints [B]"),
    (lambda: LayerCape(MODEL).attribute(IMAGES, [0, 1, 2, 3]), AssertionError, "targets go from 0 to 2"),
    (lambda: LayerCape(MODEL).attribute(IMAGES, LABELS.float()), AssertionError, "pass integers (target.long())"),
    (lambda: LayerCape(MODEL).attribute(IMAGES, np.array([0, 1, 2, 0])), AssertionError, "pass an int, a tensor of ints [B]"),
    (lambda: LayerCape(MODEL).attribute(IMAGES, 0, attribute_to_layer_input=True), ValueError, "leave both out"),
    (lambda: LayerCape(MODEL).attribute(IMAGES, 0, attr_dim_summation=False), ValueError, "leave both out"),
    (lambda: LayerCape(MODEL, relative=True).attribute(IMAGES, 0, return_convergence_delta=True), ValueError, "use relative=False"),
    (lambda: LayerCape(spoilt()).attribute(IMAGES, 0), ValueError, "check the input and the weights"),
    (lambda: LayerCape(torch.jit.trace(copy.deepcopy(MODEL).eval(), IMAGES)).attribute(IMAGES, 0), ValueError, "with_cape_head(model), or pass the CapeHead to read as the layer"),
    (lambda: LayerCape(MODEL).compute_convergence_delta(IMAGES, IMAGES), AssertionError, "pass target=, the index of the class"),
]
CAPE_CAM_ROWS = [
    (lambda: CAPE(None), TypeError, "model must be a torch.nn.Module"),
    (lambda: CAPE("m"), TypeError, "model must be a torch.nn.Module"),
    (lambda: CAPE(small_network()), ValueError, "with_cape_head(model), or pass the CapeHead to read as the layer"),
    (lambda: CAPE(MODEL.head)(IMAGES), ValueError, "pass the map that enters the pooling layer"),
    (lambda: CAPE(lambda x: MODEL(x)), TypeError, "model must be a torch.nn.Module"),
    (lambda: CAPE(MODEL.vanilla), TypeError, "model must be a torch.nn.Module"),
    (lambda: CAPE(nn.Sequential(MODEL, CapeHead(8, 3))), ValueError, "with_cape_head(model), or pass the CapeHead to read as the layer"),
    (lambda: CAPE(torch.jit.trace(copy.deepcopy(MODEL).eval(), IMAGES)), ValueError, "with_cape_head(model), or pass the CapeHead to read as the layer"),
    (lambda: CAPE(MODEL, MODEL.head), TypeError, "target_layers must be a list or None"),
    (lambda: CAPE(MODEL, "head"), TypeError, "target_layers must be a list or None"),
    (lambda: CAPE(MODEL, ["layer4"]), ValueError, "There are 'model', 'model.0'"),
    (lambda: CAPE(MODEL, ["model.0"]), ValueError, "leave the layer out"),
    (lambda: CAPE(MODEL, [5]), TypeError, "such as model.layer4, or its name 'layer4'"),
    (lambda: CAPE(MODEL, [small_network()[2]]), ValueError, "leave the layer out"),
    (lambda: CAPE(MODEL, [CapeHead(8, 3)])(IMAGES), AssertionError, "choose a layer that the model calls for these inputs"),
    (lambda: CAPE(MODEL, reshape_transform="auto"), ValueError, "takes no reshape_transform"),
    (lambda: CAPE(MODEL, None, lambda t: t), ValueError, "takes no reshape_transform"),
    (lambda: CAPE(MODEL)(None), TypeError, "torch.as_tensor(images) of an array"),
    (lambda: CAPE(MODEL)(ARRAY), TypeError, "torch.as_tensor(images) of an array"),
    (lambda: CAPE(MODEL)(PICTURE), TypeError, "torch.as_tensor(images) of an array"),
    (lambda: CAPE(MODEL)("x"), TypeError, "torch.as_tensor(images) of an array"),
    (lambda: CAPE(MODEL)([IMAGES]), TypeError, "torch.as_tensor(images) of an array"),
    (lambda: CAPE(MODEL)({"image": IMAGES}), TypeError, "torch.as_tensor(images) of an array"),
    (lambda: CAPE(MODEL)(IMAGES[0]), ValueError, "a single image needs a batch dimension (image[None])"),
    (lambda: CAPE(MODEL)(IMAGES[0, 0]), ValueError, "a single image needs a batch dimension (image[None])"),
    (lambda: CAPE(MODEL)(IMAGES[:0]), ValueError, "pass at least one image and region"),
    (lambda: CAPE(MODEL)(IMAGES.long()), TypeError, "images scaled and normalised as in training"),
    (lambda: CAPE(MODEL)(IMAGES * math.nan, [TOP] * 4), ValueError, "check the input and the weights"),
    (lambda: CAPE(MODEL)(IMAGES, [0, 1, 2, 0]), TypeError, "wrap it, ClassifierOutputTarget("),
    (lambda: CAPE(MODEL)(IMAGES, [TOP] * 2), ValueError, "pass one target per image"),
    (lambda: CAPE(MODEL)(IMAGES, LABELS), TypeError, "wrap it, ClassifierOutputTarget("),
    (lambda: CAPE(MODEL)(IMAGES, "cat"), ValueError, "pass one target per image"),
    (lambda: CAPE(MODEL)(IMAGES, [ClassifierOutputTarget(3)] * 4), ValueError, "the CAPE head has 3 classes, 0 to 2"),
    (lambda: CAPE(MODEL)(IMAGES, [ClassifierOutputTarget(-1)] * 4), ValueError, "the CAPE head has 3 classes, 0 to 2"),
    (lambda: CAPE(MODEL)(IMAGES, [ClassifierOutputTarget("cat")] * 4), ValueError, "the CAPE head has 3 classes, 0 to 2"),
    (lambda: CAPE(MODEL)(IMAGES, [ClassifierOutputTarget(None)] * 4), ValueError, "pass ClassifierOutputTarget(class_index)"),
    (lambda: CAPE(MODEL)(IMAGES, [ClassifierOutputTarget(1.5)] * 4), ValueError, "the CAPE head has 3 classes, 0 to 2"),
    (lambda: CAPE(MODEL)(IMAGES, [lambda o: o[0]] * 4), ValueError, "pass ClassifierOutputTarget(class_index)"),
    (lambda: CAPE(MODEL)(IMAGES, [nn.Identity()] * 4), ValueError, "pass ClassifierOutputTarget(class_index)"),
    (lambda: CAPE(MODEL)(IMAGES, [None] * 4), TypeError, "wrap it, ClassifierOutputTarget("),
    (lambda: CAPE(MODEL)(IMAGES, [TOP] * 4, eigen_smooth=True), ValueError, "leave it out"),
    (lambda: CAPE(spoilt())(IMAGES, [TOP] * 4), ValueError, "check the input and the weights"),
    (lambda: CAPE(MODEL)(IMAGES, [TOP] * 4, True, True), ValueError, "leave it out"),
]
UPSAMPLE_CONSERVING_MASS_ROWS = [
    (lambda: up(None, 14), TypeError, "torch.as_tensor(maps).float()"),
    (lambda: up("x", 14), TypeError, "torch.as_tensor(maps).float()"),
    (lambda: up(ARRAY, 14), TypeError, "torch.as_tensor(maps).float()"),
    (lambda: up(PICTURE, 14), TypeError, "torch.as_tensor(maps).float()"),
    (lambda: up([IMAGES], 14), TypeError, "torch.as_tensor(maps).float()"),
    (lambda: up(IMAGES[0], 14), ValueError, "maps must be [B, K, h, w], not"),
    (lambda: up(IMAGES[0, 0], 14), ValueError, "maps must be [B, K, h, w], not"),
    (lambda: up(IMAGES[None], 14), ValueError, "maps must be [B, K, h, w], not"),
    (lambda: up(IMAGES[:0], 14), ValueError, "maps must be [B, K, h, w], not"),
    (lambda: up(IMAGES[..., :0], 14), ValueError, "maps must be [B, K, h, w], not"),
    (lambda: up(IMAGES.long(), 14), TypeError, "torch.as_tensor(maps).float()"),
    (lambda: up(IMAGES > 0, 14), TypeError, "torch.as_tensor(maps).float()"),
    (lambda: up(IMAGES.to(torch.complex64), 14), TypeError, "torch.as_tensor(maps).float()"),
    (lambda: up(IMAGES, None), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, 0), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, -7), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, 14.0), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, "14"), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, (14,)), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, (14, 14, 14)), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, (14, 0)), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, (14, -1)), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, (14.5, 14)), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, (14, None)), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, ("a", "b")), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, []), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, IMAGES.shape), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, torch.tensor([14, 14])), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, np.array([14, 14])), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, {14, 15}), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, iter([14, 14])), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, PICTURE), ValueError, "two whole numbers (height, width) above 0, not"),
    (lambda: up(IMAGES, 14, "bicubic"), ValueError, "mode must be 'nearest' or 'bilinear', not"),
    (lambda: up(IMAGES, 14, "Nearest"), ValueError, "mode must be 'nearest' or 'bilinear', not"),
    (lambda: up(IMAGES, 14, None), ValueError, "mode must be 'nearest' or 'bilinear', not"),
    (lambda: up(IMAGES, 14, 1), ValueError, "mode must be 'nearest' or 'bilinear', not"),
    (lambda: up(IMAGES, 14, ["nearest"]), ValueError, "mode must be 'nearest' or 'bilinear', not"),
    (lambda: up(IMAGES, 14, F.interpolate), ValueError, "mode must be 'nearest' or 'bilinear', not"),
    (lambda: up(MODEL, 14), TypeError, "torch.as_tensor(maps).float()"),
    (lambda: up((IMAGES,), 14), TypeError, "torch.as_tensor(maps).float()"),
]
# fmt: on

TABLE = {
    "with_cape_head": WITH_CAPE_HEAD_ROWS,
    "fit_cape_head": FIT_CAPE_HEAD_ROWS,
    "calibrate_temperature": CALIBRATE_TEMPERATURE_ROWS,
    "cape_loss": CAPE_LOSS_ROWS,
    "CapeHead": CAPEHEAD_ROWS,
    "LayerCape": LAYERCAPE_ROWS,
    "CAPE": CAPE_CAM_ROWS,
    "upsample_conserving_mass": UPSAMPLE_CONSERVING_MASS_ROWS,
}
CASES = [
    pytest.param(*row, id=f"{name}-{number}")
    for name, rows in TABLE.items()
    for number, row in enumerate(rows)
]


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("use", "error", "words"), CASES)
def test_it_is_refused_by_name_and_leaves_no_trace(use, error, words):
    states = [(module, State.of(module)) for module in (MODEL, HEAD)]
    with pytest.raises(error) as caught:
        use()
    assert words in str(caught.value)
    for module, state in states:
        state.assert_unchanged(module)


def test_the_table_is_long_enough():
    assert all(len(rows) >= 30 for rows in TABLE.values())
