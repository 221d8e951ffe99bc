"""The protocol of the CAPE paper for a classifier's maps; one value per image.

``Y`` is the confidence in the explained class on the image, ``O`` on the image times its map, ``D``
on the image times one minus its map; maps are scaled to [0, 1] first.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import hmean
from torch import Tensor


def scaled(maps: Tensor) -> Tensor:
    """Each map ``[B, H, W]`` from its minimum to its maximum onto [0, 1]; 0 if it is constant."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), torch.zeros_like(maps))


def average_drop(whole: Tensor, masked: Tensor) -> Tensor:
    """``max(0, Y - O) / Y`` (Grad-CAM++, arXiv 1710.11063: "average drop %"); lower is better."""
    return (whole - masked).clamp_min(0) / whole


def increase_in_confidence(whole: Tensor, masked: Tensor) -> Tensor:
    """1 where ``Y < O`` (Grad-CAM++, "% increase in confidence"); higher is better."""
    return (masked > whole).to(whole.dtype)


def drop_in_deletion(whole: Tensor, inverted: Tensor) -> Tensor:
    """``(Y - D) / Y`` (Jung and Oh, arXiv 2102.05228, "average drop in deletion").

    Higher is better. Not cut at 0: a map whose removal raises the confidence counts against it.
    """
    return (whole - inverted) / whole


def coherency(maps: Tensor, maps_of_masked: Tensor) -> Tensor:
    """``(Pearson + 1) / 2`` of the map and the map of the masked image (arXiv 2104.10252).

    The rescaling to [0, 1] is that of the authors' code, as is 0 where either map is constant.
    """
    a, b = (m.flatten(1) - m.flatten(1).mean(dim=1, keepdim=True) for m in (maps, maps_of_masked))
    norm = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(norm > 0, ((a * b).sum(dim=1) / norm + 1) / 2, torch.zeros_like(norm))


def complexity(maps: Tensor) -> Tensor:
    """Mean of the scaled map (arXiv 2104.10252): how much of the image it claims."""
    return maps.abs().mean(dim=(1, 2))


def adcc(drop: Tensor, coherent: Tensor, complex_: Tensor) -> np.ndarray:
    """Harmonic mean of coherency, 1 - complexity and 1 - drop (ADCC, arXiv 2104.10252).

    Higher is better; 0 if one of the three is 0.
    """
    parts = torch.stack([coherent, 1 - complex_, 1 - drop]).clamp(0, 1)
    return np.asarray(hmean(parts.double().numpy(), axis=0))


def overlap(first: Tensor, second: Tensor) -> np.ndarray:
    """Soft intersection over union of two classes' scaled maps; lower tells the classes apart.

    ``sum min / sum max``; NaN where both are empty.
    """
    low = torch.minimum(first, second).sum(dim=(1, 2)).numpy()
    high = torch.maximum(first, second).sum(dim=(1, 2)).numpy()
    return np.divide(low, high, out=np.full(len(low), np.nan), where=high > 0)
