"""Every row of the table: which explainer, at which contrast, smoothed or not."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_grad_cam
import torch
from torch import Tensor, nn

from fam_plugins import SimilarityModel
from fam_plugins.core.layer_pass import LayerPass
from fam_plugins.quality.evaluate import explain

SETTINGS = (
    (None, False),
    ("others", False),
    ("others", True),
    # Behind one reference per class all but the same as the others; once is enough.
    ("gallery", True),
)
"""Contrast, and whether maps are smoothed."""
RULES = ("additive", "centred", "gradcam")
PEERS = ("GradCAM", "GradCAMPlusPlus", "LayerCAM")
"""Not HiResCAM, which is GradCAM where regions are pooled, as in all networks here."""


def explainers(contrast: str | None, smooth: bool) -> dict[str, Any]:
    """What is measured at a contrast and a smoothing, by name.

    The published rule undoes a contrast and EigenCAM reads no score, so both stand without one;
    ScoreCAM takes as many passes as there are channels and is measured at one setting only.
    """
    found: dict[str, Any] = {
        **{rule: rule for rule in RULES},
        **{name: getattr(pytorch_grad_cam, name) for name in PEERS},
    }
    if (contrast, smooth) == ("others", True):
        found["ScoreCAM"] = partial(_quietly, pytorch_grad_cam.ScoreCAM)
    if contrast is None:
        found |= {"fam": "fam", "EigenCAM": pytorch_grad_cam.EigenCAM}
        found |= {"channel mean": _channel_mean, "random": _random, "uniform": _uniform}
    return found


def row(name: str, contrast: str | None, smooth: bool) -> str:
    """The label of a row."""
    against = f", contrast {contrast}" if contrast else ""
    return f"{name}{against}{', smoothed' if smooth else ''}"


def _quietly(
    method: Callable[..., Any],
    model: SimilarityModel,
    layer: nn.Module,
    images: Tensor,
    targets: Tensor,
) -> Tensor:
    def batched(*given: Any) -> Any:
        cam = method(*given)
        cam.batch_size = 128
        return cam

    batched.get_cam_image = None  # type: ignore[attr-defined]  # a method of pytorch-grad-cam
    with contextlib.redirect_stderr(io.StringIO()):  # it draws a bar for every image
        return explain(batched, model, layer, images, targets, False)[0]


def _activation(model: SimilarityModel, layer: nn.Module, images: Tensor) -> Tensor:
    one = LayerPass(model, [layer], differentiate=False)
    one.run(lambda: model(images))
    ((activation,),) = one.tracked
    return activation


def _channel_mean(
    model: SimilarityModel, layer: nn.Module, images: Tensor, _targets: Tensor
) -> Tensor:
    return _activation(model, layer, images).mean(dim=1)


def _random(model: SimilarityModel, layer: nn.Module, images: Tensor, _targets: Tensor) -> Tensor:
    return torch.rand(_activation(model, layer, images).mean(dim=1).shape)


def _uniform(model: SimilarityModel, layer: nn.Module, images: Tensor, _targets: Tensor) -> Tensor:
    return torch.ones_like(_activation(model, layer, images).mean(dim=1))
