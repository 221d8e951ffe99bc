"""Every explainer of the package behind one call, so that one set of tests holds for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pytorch_grad_cam.base_cam import BaseCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from fam_plugins import CAPE, FAM, LayerCape, LayerFam, SimilarityModel
from fam_plugins.cape import CapeModel, with_cape_head
from fam_plugins.core.rules import RULES
from tests.networks import classifier, encoder


@dataclass(frozen=True)
class Explainer:
    """``explain(model, layer, images, targets)`` -> signed maps ``[B, 1, h, w]``."""

    name: str
    explain: Callable[[nn.Module, nn.Module | str, Tensor, list[int]], Tensor]
    keeps_mode: bool
    """Whether it runs the model in the mode it finds it in (Captum), or in eval mode."""

    def __str__(self) -> str:
        return self.name


def _call(cam: BaseCAM, images: Tensor, targets: list[int]) -> Tensor:
    result = cam(images, [ClassifierOutputTarget(t) for t in targets])
    assert result.shape == (len(images), *images.shape[2:])
    assert result.dtype == "float32"
    assert result.min() >= 0
    assert result.max() <= 1
    return cam.attributions[0]


def layer_fam(rule: str) -> Explainer:
    return Explainer(
        f"LayerFam-{rule}",
        lambda model, layer, images, targets: LayerFam(model, layer, rule=rule).attribute(
            images, target=targets
        ),
        keeps_mode=True,
    )


def fam(rule: str) -> Explainer:
    def explain(
        model: nn.Module, layer: nn.Module | str, images: Tensor, targets: list[int]
    ) -> Tensor:
        cam = FAM(model, [layer], rule=rule)
        return _call(cam, images, targets)

    return Explainer(f"FAM-{rule}", explain, keeps_mode=False)


def layer_cape(relative: bool) -> Explainer:
    return Explainer(
        f"LayerCape-{'relative' if relative else 'probability'}",
        lambda model, layer, images, targets: LayerCape(model, layer, relative=relative).attribute(
            images, target=targets
        ),
        keeps_mode=True,
    )


def cape(relative: bool) -> Explainer:
    def explain(
        model: nn.Module, layer: nn.Module | str, images: Tensor, targets: list[int]
    ) -> Tensor:
        cam = CAPE(model, [layer], relative=relative)
        return _call(cam, images, targets)

    name = f"CAPE-{'relative' if relative else 'probability'}"
    return Explainer(name, explain, keeps_mode=False)


RULED = [make(rule) for make in (layer_fam, fam) for rule in RULES]
CAPES = [make(flag) for make in (layer_cape, cape) for flag in (False, True)]

# Every explainer on one model that it explains, and every model under one rule of each adapter:
# what depends on a rule and what depends on a model do not meet anywhere but in core/maps.py.
CASES = [
    *((explainer, "cosine") for explainer in RULED),
    *((explainer, "cape") for explainer in CAPES),
    *(
        (make("additive"), kind)
        for make in (layer_fam, fam)
        for kind in ("classifier", "dot", "sqeuclidean", "contrast")
    ),
]
TROUBLED = [layer_fam("additive"), layer_fam("gradcam"), fam("additive")]
"""Errors depend on the adapter, and on whether scores are frozen."""


def similarity_model(similarity: str = "cosine", contrast: object = None) -> SimilarityModel:
    rows = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    return SimilarityModel(encoder(), rows, similarity=similarity, contrast=contrast)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "classifier": classifier,
    "cosine": similarity_model,
    "dot": lambda: similarity_model("dot"),
    "sqeuclidean": lambda: similarity_model("sqeuclidean"),
    "contrast": lambda: similarity_model("sqeuclidean", "others"),
    "cape": lambda: cape_model(),
}


def cape_model() -> CapeModel:
    return with_cape_head(classifier(), example_input=torch.rand(1, 3, 8, 8))


def network(model: nn.Module) -> nn.Module:
    """The network inside: the encoder of a similarity model, or the classifier itself."""
    return getattr(model, "encoder", getattr(model, "model", model))
