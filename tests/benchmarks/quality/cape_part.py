"""CAPE, mu-CAPE, CAM and Grad-CAM on the digits classifier, by the CAPE paper's protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor
from torch.utils.data import DataLoader

from fam_plugins.cape import CapeModel, calibrate_temperature, fit_cape_head, with_cape_head
from tests.benchmarks.quality import cape_metrics as metrics
from tests.benchmarks.quality import problems  # noqa: F401  (makes the examples importable)

import cape_head  # isort: skip

Columns = dict[str, np.ndarray]
Explain = Callable[[CapeModel, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ClassMap:
    """A row: maps ``[B, h, w]`` of a class, and the head that they explain."""

    name: str
    head: str
    explain: Explain


def class_maps() -> list[ClassMap]:
    """The rows in the order of the table."""
    return [
        ClassMap("CAPE", "CAPE", _cape),
        ClassMap("mu-CAPE", "CAPE", _mu_cape),
        ClassMap("CAM", "vanilla", _cam),
        ClassMap("Grad-CAM", "vanilla", _grad_cam),
        ClassMap("random", "vanilla", _random),
    ]


def fitted_model(
    seed: int, *, train_epochs: int = 15, fit_epochs: int = 30
) -> tuple[CapeModel, Tensor, str]:
    """The classifier of the CAPE example with a fitted, calibrated head; test images; facts."""
    torch.manual_seed(seed)
    train_set, held_set, test_set = cape_head.load_splits(seed)
    loader = DataLoader(train_set, batch_size=32, shuffle=True)
    network = cape_head.small_network()
    cape_head.train(network, loader, torch.device("cpu"), epochs=train_epochs)
    images, labels = test_set.tensors
    model = with_cape_head(network, example_input=images[:2])
    fit_cape_head(model, loader, epochs=fit_epochs, cache=True, progress=False)
    calibrate_temperature(model, DataLoader(held_set, batch_size=64))
    with torch.no_grad():
        log_p, logits = model.both(images)
    vanilla, cape = (
        (output.argmax(dim=1) == labels).double().mean().item() for output in (logits, log_p)
    )
    same, confidence, vanilla_confidence = cape_head.agreement_and_confidence(model, images)
    return (
        model,
        images,
        f"accuracy {vanilla:.1%} (CAPE head {cape:.1%}), heads agree on {same:.1%}, mean "
        f"confidence {vanilla_confidence:.2f} (CAPE head {confidence:.2f})",
    )


def measure(model: CapeModel, images: Tensor, judge: str) -> dict[str, Columns]:
    """Columns by name of method.

    Args:
        model: A model with a CAPE head.
        images: ``[B, ...]`` that no training saw.
        judge: Whose confidence counts: ``"own"`` (each method is judged by the head it explains,
            on that head's top class, as in the paper), or ``"vanilla"`` (the classifier judges all,
            on its top class).
    """
    torch.manual_seed(0)
    rows = {}
    for method in class_maps():
        head = method.head if judge == "own" else "vanilla"
        whole = confidences(model, images, head)
        first, second = whole.topk(2, dim=1).indices.unbind(dim=1)
        rows[method.name] = _columns(model, images, method.explain, head, first, second)
    return rows


def confidences(model: CapeModel, images: Tensor, head: str) -> Tensor:
    """Probabilities ``[B, K]`` of one of the two heads."""
    with torch.no_grad():
        log_p, logits = model.both(images)
    return log_p.exp() if head == "CAPE" else logits.softmax(dim=1)


def _columns(
    model: CapeModel, images: Tensor, explain: Explain, head: str, first: Tensor, second: Tensor
) -> Columns:
    def mask(inputs: Tensor, targets: Tensor) -> Tensor:
        maps = explain(model, inputs, targets).detach()
        size = inputs.shape[2:]
        return metrics.scaled(F.interpolate(maps[:, None], size, mode="bilinear")[:, 0])

    def confidence(inputs: Tensor) -> Tensor:
        return confidences(model, inputs, head).gather(1, first[:, None])[:, 0]

    maps = mask(images, first)
    masked = images * maps[:, None]
    whole = confidence(images)
    drop = metrics.average_drop(whole, confidence(masked))
    coherent = metrics.coherency(maps, mask(masked, first))
    return {
        "average drop": drop.numpy(),
        "increase": metrics.increase_in_confidence(whole, confidence(masked)).numpy(),
        "drop in deletion": metrics.drop_in_deletion(
            whole, confidence(images * (1 - maps[:, None]))
        ).numpy(),
        "ADCC": metrics.adcc(drop, coherent, metrics.complexity(maps)),
        "coherency": coherent.numpy(),
        "complexity": metrics.complexity(maps).numpy(),
        "top-2 overlap": metrics.overlap(maps, mask(images, second)),
    }


def _pick(maps: Tensor, targets: Tensor) -> Tensor:
    return maps[torch.arange(len(maps)), targets]


def _cape(model: CapeModel, images: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad():
        return _pick(model.head.probability_maps(model.features(images)), targets)


def _mu_cape(model: CapeModel, images: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad():
        return _pick(model.head.relative_maps(model.features(images)), targets)


def _cam(model: CapeModel, images: Tensor, targets: Tensor) -> Tensor:
    # Class activation mapping (arXiv 1512.04150, equation 2): no bias, no ReLU.
    with torch.no_grad():
        weights = model.classifier.weight[targets]
        return torch.einsum("bc,bchw->bhw", weights, model.features(images))


def _grad_cam(model: CapeModel, images: Tensor, targets: Tensor) -> Tensor:
    explainer = LayerGradCam(model.vanilla, model.feature_map)
    return explainer.attribute(images, target=targets, relu_attributions=True)[:, 0]


def _random(model: CapeModel, images: Tensor, targets: Tensor) -> Tensor:
    return torch.rand(_cape(model, images, targets).shape)
