"""From what transformers give, tokens or channels last, to a map ``[B, C, h, w]``.

Every transform here only moves and selects values, so that it serves activations and gradients
alike: as ``activation_transform`` of :class:`fam_plugins.captum.LayerFam`, and as
``reshape_transform`` of :class:`fam_plugins.grad_cam.FAM` and of every method of pytorch-grad-cam.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["channels_last_to_map", "refuse_unreached", "suggest_grid", "tokens_to_map"]


# The constructor is the public function, so its name is a function's.
@dataclass(frozen=True)
class tokens_to_map:  # noqa: N801
    """Lay out patch tokens as a map: ``[B, skip + h * w, C]`` -> ``[B, C, h, w]``.

    Tokens in front that stand for no place, the class token and register tokens, are left out;
    what they contribute to the score is then in no region, and the convergence delta tells it.

    Args:
        h: Rows of patches.
        w: Columns of patches.
        skip: How many tokens stand in front: 1 for a class token, 0 for none, 5 for a class token
            and four registers.

    Raises:
        ValueError: If ``h`` or ``w`` is not positive or ``skip`` negative; when called, if the
            tensor is not ``[B, skip + h * w, C]``.

    Example:
        >>> import torch
        >>> to_map = tokens_to_map(2, 3, skip=1)
        >>> to_map(torch.rand(4, 7, 192)).shape
        torch.Size([4, 192, 2, 3])
    """

    h: int
    w: int
    skip: int = 1

    def __post_init__(self) -> None:
        if self.h < 1 or self.w < 1 or self.skip < 0:
            raise ValueError(
                f"{self} is no grid of patches: h and w are at least 1 and skip at least 0, "
                "such as tokens_to_map(14, 14, skip=1) for 224 pixels and patches of 16"
            )

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, skip + h * w, C]`` -> map ``[B, C, h, w]``."""
        if tokens.dim() != 3:
            raise ValueError(
                f"{self} takes tokens [B, T, C] and the layer gives {tuple(tokens.shape)}: "
                "channels_last_to_map is for [B, h, w, C], and [B, C, h, w] needs no transform"
            )
        if tokens.shape[1] != self.skip + self.h * self.w:
            raise ValueError(
                f"{self} takes {self.skip + self.h * self.w} tokens and the layer gives "
                f"{tokens.shape[1]}: {suggest_grid(tokens.shape[1], self.skip)}"
            )
        batch, _, channels = tokens.shape
        grid = tokens[:, self.skip :].reshape(batch, self.h, self.w, channels)
        return grid.permute(0, 3, 1, 2)


def channels_last_to_map(activation: Tensor) -> Tensor:
    """Put the channels second: ``[B, h, w, C]`` -> ``[B, C, h, w]``, a view (Swin).

    Raises:
        ValueError: If the tensor has not 4 dimensions.

    Example:
        >>> import torch
        >>> channels_last_to_map(torch.rand(2, 7, 7, 768)).shape
        torch.Size([2, 768, 7, 7])
    """
    if activation.dim() != 4:
        raise ValueError(
            f"channels_last_to_map takes [B, h, w, C] and the layer gives "
            f"{tuple(activation.shape)}: tokens [B, T, C] need tokens_to_map(h, w, skip=1)"
        )
    return activation.permute(0, 3, 1, 2)


def refuse_unreached(before: Tensor, after: Tensor, name: str) -> None:
    """Refuse a map of regions that the score does not depend on.

    After the last block a class token is the embedding, and no patch of that layer has a share in
    it: every rule would draw a picture of nothing.

    Args:
        before: The gradient as the layer has it.
        after: The same, transformed into a map.
        name: The layer's name, for the message.

    Raises:
        ValueError: If only what the transform drops has a gradient.

    Example:
        >>> import torch
        >>> gradient = torch.ones(1, 5, 3)
        >>> refuse_unreached(gradient, tokens_to_map(2, 2)(gradient), "norm")
    """
    if after.numel() < before.numel() and not after.any() and before.any():
        raise ValueError(
            f"the score reaches layer {name!r} only through what the transform drops (the class "
            "token), so no region of it has a share in the score: explain an earlier layer, such "
            "as the last block's first norm (timm: blocks[-1].norm1, torchvision: "
            "encoder.layers[-1].ln_1), or embed by the mean of the patches (timm: "
            'global_pool="avg")'
        )


def suggest_grid(tokens: int, skip: int) -> str:
    """Say which ``tokens_to_map`` would fit a number of tokens, for an error message.

    Example:
        >>> suggest_grid(197, 0)[:16]
        '197 = 1 + 14 x 1'
    """
    for front in dict.fromkeys((skip, 1, 0, 5, 2)):
        side = math.isqrt(max(tokens - front, 0))
        if side > 0 and side * side == tokens - front:
            return (
                f"{tokens} = {front} + {side} x {side}, so for a square grid behind {front} tokens "
                f"pass tokens_to_map({side}, {side}, skip={front})"
            )
    return (
        "pass tokens_to_map(h, w, skip=...) with h * w patches and skip tokens in front of them "
        "that add up to it"
    )
