"""What makes a similarity map good: pointing, deletion and insertion, rank correlation.

Pure functions of maps ``[B, H, W]``; one value an image.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps ``[B, h, w]`` at the size of the image, bilinearly, as pytorch-grad-cam does."""
    if tuple(maps.shape[1:]) == size:
        return maps
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def energy_share(maps: Tensor, cells: Tensor) -> Tensor:
    """Share of the positive part that lies in the right cell of a 2 x 2 mosaic; chance .25.

    The energy-based pointing game (Score-CAM, arXiv 1910.01279, section 4.3). Zero for a map
    without a positive part.
    """
    per_cell = _by_cell(maps.clamp_min(0)).sum(dim=2)
    total = per_cell.sum(dim=1)
    right = per_cell.gather(1, cells[:, None])[:, 0]
    return torch.where(total > 0, right / total, torch.zeros_like(total))


def brightest_in_cell(maps: Tensor, cells: Tensor) -> Tensor:
    """Whether the brightest point lies in the right cell; chance .25.

    The pointing game (arXiv 1608.00507). Several equally bright points count in proportion, so
    that a constant map scores exactly chance instead of whatever corner argmax prefers.
    """
    brightest = (maps == maps.amax(dim=(1, 2), keepdim=True)).to(maps.dtype)
    per_cell = _by_cell(brightest).sum(dim=2)
    return per_cell.gather(1, cells[:, None])[:, 0] / per_cell.sum(dim=1)


def patch_order(maps: Tensor, patch: int, generator: torch.Generator) -> Tensor:
    """Patches ``[B, P]`` from the brightest to the darkest; equal ones in random order.

    Random, because the reading order would favour or punish maps with large zero areas.
    """
    values = F.avg_pool2d(maps[:, None], patch).flatten(1)
    shuffled = torch.rand(values.shape, generator=generator).argsort(dim=1)
    order = values.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    return shuffled.gather(1, order)


def perturbation_curve(
    score: Callable[[Tensor], Tensor],
    images: Tensor,
    baseline: Tensor,
    order: Tensor,
    patch: int,
    steps: int,
    *,
    insert: bool = False,
    chunk: int = 1024,
) -> Tensor:
    """Scores while patches are deleted, or inserted, in the given order (RISE, arXiv 1806.07421).

    Args:
        score: Images ``[M, C, H, W]`` -> ``[M, S]``; all columns come from the same pass.
        images: ``[B, C, H, W]``.
        baseline: What stands in the place of a deleted patch, of the same shape.
        order: ``[B, P]`` from :func:`patch_order`.
        patch: Height and width of a patch in pixels.
        steps: Number of equal steps from the whole image to none of it.
        insert: Start from the baseline and put patches in, instead.
        chunk: Perturbed images in one pass.

    Returns:
        ``[B, steps + 1, S]``.
    """
    batch, _, height, width = images.shape
    # The place of each patch in the order; the first ones change first.
    place = order.argsort(dim=1).reshape(batch, 1, height // patch, width // patch)
    place = place.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)
    thresholds = torch.linspace(0, order.shape[1], steps + 1).round().long()
    perturbed = torch.stack(
        [
            torch.where((place < threshold) != insert, baseline, images)
            for threshold in thresholds.tolist()
        ],
        dim=1,
    ).flatten(0, 1)
    with torch.no_grad():
        scores = torch.cat([score(part) for part in perturbed.split(chunk)])
    return scores.reshape(batch, steps + 1, -1)


def area(curve: Tensor) -> Tensor:
    """Area under curves ``[B, steps + 1, S]`` over the share of patches, 0 to 1 -> ``[B, S]``."""
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1), dim=1)


def rank_correlation(first: Tensor, second: Tensor) -> np.ndarray:
    """Spearman's rank correlation of two maps an image; NaN where either is constant."""
    ranks = [rankdata(maps.flatten(1).numpy(), axis=1) for maps in (first, second)]
    a, b = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.divide((a * b).sum(axis=1), norm, out=np.full(len(a), np.nan), where=norm > 0)


def _by_cell(maps: Tensor) -> Tensor:
    """``[B, H, W]`` -> ``[B, 4, H/2 * W/2]``, cells in reading order."""
    batch, height, width = maps.shape
    halves = maps.reshape(batch, 2, height // 2, 2, width // 2)
    return halves.permute(0, 1, 3, 2, 4).reshape(batch, 4, -1)
