"""An encoder, its layer and labelled images: what the similarity maps are measured on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fam_plugins.core.similarity import find_similarity

# The examples are scripts, not a package: they find each other by their folder.
sys.path.insert(0, str(Path(__file__).parents[3] / "compat_examples"))

import digits as digits_data

KINDS = {
    "linear head": {"head": True, "similarity": "cosine"},
    "pooled features": {"head": False, "similarity": "cosine"},
    "Euclidean ProtoNet": {"head": False, "similarity": "sqeuclidean"},
}
"""Kinds of embedding that are trained on the digits, and how they are compared."""


@dataclass(frozen=True)
class Problem:
    """What one network is asked: the arguments of :func:`fam_plugins.quality.evaluate`."""

    encoder: nn.Module
    layer: str
    dataset: Any
    similarity: str


def digits_problem(kind: str, seed: int, steps: int = 250) -> Problem:
    """Train an embedding on scikit-learn's digits; what is asked comes from the held-out ones."""
    digits = digits_data.load(seed)
    encoder = digits_data.train_encoder(digits, steps=steps, seed=seed, **KINDS[kind])
    fields = digits_data.place(digits.held_out, torch.Generator().manual_seed(1000 + seed))
    dataset = TensorDataset(fields, digits.held_out_labels)
    return Problem(encoder, "features", dataset, KINDS[kind]["similarity"])


def folder_problem(
    folder: str, arch: str, weights: str | None, *, similarity: str = "cosine", size: int = 224
) -> Problem:
    """A torchvision network on an image folder, one subfolder a class.

    Args:
        folder: As :class:`torchvision.datasets.ImageFolder` takes it.
        arch: A convolutional torchvision classifier; its last linear layers are taken off.
        weights: ``"DEFAULT"`` (downloads), the path of a state dict, or ``None`` (untrained).
        similarity: How embeddings are compared.
        size: Height and width in pixels of one image.

    Raises:
        ValueError: If the network does not fit.
    """
    given = torchvision.models.get_model_weights(arch).DEFAULT if weights == "DEFAULT" else None
    network = torchvision.models.get_model(arch, weights=given).eval()
    if weights is not None and given is None:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        network.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        )
    _remove_classifier(network)
    settings = given.transforms() if given is not None else None
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(size),
            torchvision.transforms.CenterCrop(size),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(
                settings.mean if settings else [0.485, 0.456, 0.406],
                settings.std if settings else [0.229, 0.224, 0.225],
            ),
        ]
    )
    dataset = torchvision.datasets.ImageFolder(folder, transform)
    layer = last_map(network, torch.zeros(1, 3, 2 * size, 2 * size))
    return Problem(network, layer, dataset, similarity)


def last_map(network: nn.Module, images: Tensor) -> str:
    """Name of the last layer that gives a feature map ``[B, C, h, w]`` of several regions.

    Raises:
        ValueError: If there is none, as in vision transformers.
    """
    found: list[str] = []
    handles = [
        module.register_forward_hook(
            lambda _m, _i, out, name=name: (
                found.append(name)
                if isinstance(out, Tensor) and out.dim() == 4 and min(out.shape[2:]) > 1
                else None
            )
        )
        for name, module in network.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError("no layer of the network gives a feature map [B, C, h, w]: use a ConvNet")
    return found[-1]


def check_similarity(name: str) -> str:
    """Refuse unknown names before anything is trained."""
    return find_similarity(name).name


def _remove_classifier(network: nn.Module) -> None:
    for name in ("fc", "classifier", "head"):
        if isinstance(getattr(network, name, None), nn.Module):
            setattr(network, name, nn.Identity())
            return
    raise ValueError(f"{type(network).__name__} has no fc, classifier or head to take off")
