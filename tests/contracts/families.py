"""Families of architectures as encoders: which layer to explain, and what its maps add up to.

One list for the tests, which prove every row, and for the table of the README
(``python -m tests.benchmarks.families``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from fam_plugins import channels_last_to_map, tokens_to_map
from fam_plugins.core.transforms import Transform
from tests.contracts.few_shot_networks import Conv4, ResNet12
from tests.networks import narrow_convnext, narrow_vgg

EXACT = "exact"
REFUSED = "refused"
SIZE = 64
"""Height and width of the images, in pixels."""


@dataclass(frozen=True)
class Family:
    """One row: an encoder, a layer of it, and what the ``additive`` map there is.

    Attributes:
        name: The family.
        example: The encoder in words, as a user would make it.
        build: Makes the encoder with random weights.
        layer: The name of the layer.
        maps: ``EXACT`` (the map and the named rest add up to the score) or ``REFUSED`` (an error
            says what to do).
        transform: What lays out the layer at 64 pixels; ``None`` where nothing is needed.
        why: What makes it so.
        rest: What the regions do not carry, by name.
    """

    name: str
    example: str
    build: Callable[[], nn.Module]
    layer: str
    maps: str
    transform: Transform | None = None
    why: str = ""
    rest: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.example}, {self.layer}"


def encoder_of(family: Family) -> nn.Module:
    """The encoder in eval mode and float64, every parameter and statistic of it random.

    A fresh network has zero biases and a batch norm that does nothing, and many tails are exact
    only because of that.
    """
    torch.manual_seed(0)
    net = family.build().double().eval()
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if value.dim() == 1 and value.is_floating_point():
                noise = torch.rand_like(value) if "running_var" in name else torch.randn_like(value)
                value.add_(0.1 * noise)
    return net


def _without(build: Callable[..., nn.Module], classifier: str, **settings: Any) -> nn.Module:
    net = build(**settings)
    setattr(net, classifier, nn.Identity())
    return net


def _without_last(build: Callable[..., nn.Module]) -> nn.Module:
    net = build()
    net.classifier = net.classifier[:-1]
    return net


def _pooled_convnext() -> nn.Module:
    net = narrow_convnext()
    net.classifier = nn.Flatten()
    return net


def _vit() -> nn.Module:
    net = models.VisionTransformer(SIZE, 16, 2, 2, 32, 64)
    net.heads = nn.Identity()
    return net


def _timm(name: str, **settings: Any) -> nn.Module:
    timm = pytest.importorskip("timm", reason="this row is a timm model")
    return timm.create_model(name, num_classes=0, **settings)


def _timm_vit(**settings: Any) -> nn.Module:
    return _timm("vit_tiny_patch16_224", img_size=SIZE, depth=2, **settings)


def _timm_swin() -> nn.Module:
    return _timm("swin_tiny_patch4_window7_224", img_size=SIZE, window_size=2, depths=(1, 1, 1, 1))


POOLED = "the map's mean is the embedding"
NORM_BEHIND = "a layer norm behind the mean, frozen"
TOKEN = "the class token is the embedding"
_4x4 = partial(tokens_to_map, 4, 4)

FAMILIES = [
    Family(
        "ResNet",
        "torchvision resnet18, fc = Identity",
        partial(_without, models.resnet18, "fc"),
        "layer4",
        EXACT,
        None,
        POOLED,
    ),
    Family("ResNet-12 (few-shot)", "own network", ResNet12, "blocks", EXACT, None, POOLED),
    Family(
        "Conv-4 (few-shot)",
        "own network",
        Conv4,
        "layers",
        EXACT,
        None,
        "the map itself, flattened",
    ),
    Family(
        "VGG",
        "torchvision VGG, classifier = Identity",
        partial(_without, narrow_vgg, "classifier"),
        "features",
        EXACT,
        None,
        "the map itself, flattened",
    ),
    Family(
        "VGG",
        "torchvision VGG, classifier[:-1]",
        partial(_without_last, narrow_vgg),
        "features",
        EXACT,
        None,
        "two hidden layers behind the map",
        ("bias",),
    ),
    Family(
        "DenseNet",
        "torchvision densenet121, classifier = Identity",
        partial(_without, models.densenet121, "classifier"),
        "features",
        EXACT,
        None,
        "ReLU, then the mean",
    ),
    Family(
        "MobileNetV2",
        "torchvision mobilenet_v2, classifier = Identity",
        partial(_without, models.mobilenet_v2, "classifier"),
        "features",
        EXACT,
        None,
        POOLED,
    ),
    Family(
        "MobileNetV3",
        "torchvision mobilenet_v3_small, classifier = Identity",
        partial(_without, models.mobilenet_v3_small, "classifier"),
        "features",
        EXACT,
        None,
        POOLED,
    ),
    Family(
        "MobileNetV3",
        "timm mobilenetv3_small_050",
        partial(_timm, "mobilenetv3_small_050"),
        "blocks",
        EXACT,
        None,
        "a hidden layer behind the mean",
        ("bias",),
    ),
    Family(
        "EfficientNet",
        "torchvision efficientnet_b0, classifier = Identity",
        partial(_without, models.efficientnet_b0, "classifier"),
        "features",
        EXACT,
        None,
        POOLED,
    ),
    Family(
        "RegNet",
        "torchvision regnet_y_400mf, fc = Identity",
        partial(_without, models.regnet_y_400mf, "fc"),
        "trunk_output",
        EXACT,
        None,
        POOLED,
    ),
    Family(
        "ConvNeXt",
        "torchvision ConvNeXt, classifier = Flatten",
        _pooled_convnext,
        "features",
        EXACT,
        None,
        POOLED,
    ),
    Family(
        "ConvNeXt",
        "torchvision ConvNeXt, classifier[:-1]",
        partial(_without_last, narrow_convnext),
        "features",
        EXACT,
        None,
        NORM_BEHIND,
        ("bias",),
    ),
    Family(
        "ConvNeXt",
        "timm convnext_atto",
        partial(_timm, "convnext_atto"),
        "stages",
        EXACT,
        None,
        NORM_BEHIND,
        ("bias",),
    ),
    Family(
        "Swin",
        "torchvision swin_t, head = Identity",
        partial(_without, models.swin_t, "head"),
        "norm",
        EXACT,
        channels_last_to_map,
        POOLED,
    ),
    Family(
        "Swin",
        "timm swin_tiny_patch4_window7_224",
        _timm_swin,
        "norm",
        EXACT,
        channels_last_to_map,
        POOLED,
    ),
    Family(
        "ViT, token mean",
        "timm vit_tiny_patch16_224, global_pool='avg', fc_norm=False",
        partial(_timm_vit, global_pool="avg", fc_norm=False),
        "norm",
        EXACT,
        _4x4(),
        "the patches' mean is the embedding",
        ("class token",),
    ),
    Family(
        "ViT, token mean",
        "timm vit_tiny_patch16_224, global_pool='avg'",
        partial(_timm_vit, global_pool="avg"),
        "blocks",
        EXACT,
        _4x4(),
        NORM_BEHIND,
        ("bias", "class token"),
    ),
    Family(
        "ViT, class token",
        "timm vit_tiny_patch16_224",
        _timm_vit,
        "blocks.1.norm1",
        EXACT,
        _4x4(),
        "attention behind the layer, frozen",
        ("bias", "residual", "class token"),
    ),
    Family(
        "ViT, class token, registers",
        "timm vit_tiny_patch16_224, reg_tokens=4",
        partial(_timm_vit, reg_tokens=4),
        "blocks.1.norm1",
        EXACT,
        _4x4(skip=5),
        "attention behind the layer, frozen",
        ("bias", "residual", "class token", "registers"),
    ),
    Family(
        "ViT, class token",
        "torchvision VisionTransformer, heads = Identity",
        _vit,
        "encoder.layers.encoder_layer_1.ln_1",
        EXACT,
        _4x4(),
        "attention behind the layer, frozen",
        ("bias", "residual", "class token"),
    ),
    Family(
        "ViT, class token", "timm vit_tiny_patch16_224", _timm_vit, "norm", REFUSED, _4x4(), TOKEN
    ),
    Family(
        "ViT, class token",
        "torchvision VisionTransformer, heads = Identity",
        _vit,
        "encoder.ln",
        REFUSED,
        _4x4(),
        TOKEN,
    ),
]
