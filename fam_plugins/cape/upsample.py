"""Enlarge a probability map without creating or losing probability."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fam_plugins.cape.head import require_floats

__all__ = ["upsample_conserving_mass"]


def upsample_conserving_mass(
    maps: Tensor, size: int | Sequence[int], mode: Literal["nearest", "bilinear"] = "nearest"
) -> Tensor:
    """Resize maps so that the sum of each one stays what it was.

    Ordinary interpolation keeps *values*; a probability map has to keep its *sum*. Here every
    region hands its whole mass to the output pixels, at any size, along each axis in turn:

    * ``nearest``: in proportion to the area they share with the region. At whole factors this is
      nearest-neighbour enlargement divided by the area factor.
    * ``bilinear``: in proportion to the weights of bilinear interpolation (half-pixel centres),
      rescaled so that a region's weights sum to 1. At whole factors that is bilinear enlargement
      divided by the area factor; at others the density of a constant map ripples slightly, which
      is the price of an exact sum. An axis that shrinks is done as in ``nearest``.

    Source: our own; the bicubic enlargement of the released CAPE code does not keep the sum.

    Args:
        maps: ``[B, K, h, w]``, any sign.
        size: Height and width in pixels, or one number for both.
        mode: How a region's mass is spread.

    Returns:
        ``[B, K, H, W]`` on the same device, sums over the last two axes unchanged to rounding.
        Float16 and bfloat16 come back as float32: one pixel's share is too small for them.

    Raises:
        TypeError: If ``maps`` is not floating point.
        ValueError: If ``maps`` is not 4-D or is empty, or ``size`` or ``mode`` are of other kinds.

    Example:
        >>> large = upsample_conserving_mass(torch.full((1, 2, 7, 7), 1 / 98), (224, 200))
        >>> large.shape
        torch.Size([1, 2, 224, 200])
        >>> torch.allclose(large.sum(), torch.tensor(1.0))
        True
    """
    require_floats(maps=maps)
    if maps.dim() != 4 or maps.numel() == 0:
        raise ValueError(f"maps must be [B, K, h, w], not {tuple(maps.shape)}")
    if mode not in ("nearest", "bilinear"):
        raise ValueError(f"mode must be 'nearest' or 'bilinear', not {mode!r}")
    try:
        pair = [index(n) for n in (size if isinstance(size, Sequence) else (size, size))]
    except TypeError:
        pair = []
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"size must be two whole numbers (height, width) above 0, not {size!r}")
    dtype = torch.promote_types(maps.dtype, torch.float32)
    rows, columns = (
        _shares(old, new, mode).to(maps.device, dtype)
        for old, new in zip(maps.shape[2:], pair, strict=True)
    )
    return rows @ maps.to(dtype) @ columns.mT


def _shares(old: int, new: int, mode: str) -> Tensor:
    """``[new, old]``: the share of each old cell's mass that each new cell receives."""
    # Float64 on the CPU: the matrix is tiny, and its rounding would be the largest error of all.
    if mode == "bilinear" and new >= old:
        identity = torch.eye(old, dtype=torch.float64, device="cpu").unsqueeze(0)
        weights = F.interpolate(identity, size=new, mode="linear", align_corners=False)[0].mT
    else:
        # Overlap of [j, j+1) / new with [i, i+1) / old, in units of 1 / (old * new).
        lower = torch.arange(new, dtype=torch.float64, device="cpu").unsqueeze(1) * old
        cell = torch.arange(old, dtype=torch.float64, device="cpu") * new
        overlap = torch.minimum(lower + old, cell + new) - torch.maximum(lower, cell)
        weights = overlap.clamp(min=0)
    return weights / weights.sum(dim=0, keepdim=True)
