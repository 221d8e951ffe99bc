"""Refuse a feature map that a CAPE head cannot read, with the way out."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["checked_features"]


def checked_features(features: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Return ``features`` in the head's type, or raise.

    Narrower types are widened (a float32 head on a bfloat16 backbone is a sound choice); wider
    ones are refused rather than silently rounded.

    Args:
        features: ``[B, C, h, w]`` or ``[B, C, d, h, w]``.
        channels: C that the head was built for.
        dtype: the head's floating type.

    Returns:
        The features in ``dtype``.

    Raises:
        TypeError: features are not floating point, or wider than ``dtype``.
        ValueError: features are not 4-D or 5-D, are empty, or have other channels.
    """
    shape = tuple(features.shape)
    if features.ndim not in (4, 5):
        raise ValueError(
            f"CapeHead takes a feature map [B, C, h, w] or [B, C, d, h, w], got {features.ndim}-D "
            f"{shape}; add a batch axis with features.unsqueeze(0), or reshape tokens [B, N, C] to "
            "[B, C, h, w]"
        )
    if features.shape[1] != channels:
        hint = "take the map that enters the pooling layer"
        if features.shape[-1] == channels:
            hint = "channels come last here, use features.movedim(-1, 1)"
        raise ValueError(
            f"CapeHead was built for {channels} channels, got {features.shape[1]} in {shape}; "
            f"{hint}"
        )
    if features.numel() == 0:
        raise ValueError(f"the feature map {shape} is empty: pass at least one image and region")
    if not features.is_floating_point():
        raise TypeError(f"features are {features.dtype}: convert them with features.float()")
    if torch.promote_types(features.dtype, dtype) != dtype:
        raise TypeError(
            f"features are {features.dtype} but the head is {dtype}: use head.to({features.dtype}) "
            f"or features.to({dtype})"
        )
    return features.to(dtype)
