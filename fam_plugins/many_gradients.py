"""Rules applied to many gradients of one activation: one map a reference, by matrix products.

The same formulas as :mod:`fam_plugins.rules`, with a reference dimension. A gradient that is the
same at every region, as behind global average pooling, is given once instead of per region; then a
map costs one row of a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fam_plugins.precision import full_precision
from fam_plugins.rules import Rule, fam_weights

__all__ = ["map_many"]


def map_many(rule: Rule, activation: Tensor, gradients: Tensor) -> Tensor:
    """One map for each of many gradients of the same activation.

    Equal to applying ``rule.map`` to every gradient, without repeating the activation.

    Args:
        rule: The rule.
        activation: ``[B, C, ...]``.
        gradients: ``[B, k, C, R]`` with ``R`` the number of regions, or ``[B, k, C, 1]`` for
            gradients that do not differ between regions.

    Returns:
        ``[B, k, 1, ...]``, computed in at least float32, in the dtype of the activation.

    Example:
        >>> from fam_plugins.rules import RULES
        >>> activation = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> gradients = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 2, 1)
        >>> map_many(RULES["additive"], activation, gradients).squeeze(2)
        tensor([[[1., 2.],
                 [3., 4.]]])
    """
    dtype = torch.promote_types(activation.dtype, torch.float32)
    regions = activation.reshape(*activation.shape[:2], -1).to(dtype)
    with full_precision(activation.device):
        maps = _MANY[rule.name](regions, gradients.to(dtype))
    shape = (*gradients.shape[:2], 1, *activation.shape[2:])
    return maps.reshape(shape).to(activation.dtype)


def _fam(regions: Tensor, gradients: Tensor) -> Tensor:
    if gradients.shape[3] == 1:
        contribution = gradients[..., 0] * regions.sum(dim=2)[:, None]
    else:
        contribution = torch.einsum("bcr,bkcr->bkc", regions, gradients)
    weights = fam_weights(contribution.flatten(0, 1)).reshape(contribution.shape)
    return torch.bmm(weights, regions)


def _additive(regions: Tensor, gradients: Tensor) -> Tensor:
    if gradients.shape[3] == 1:
        return torch.bmm(gradients[..., 0], regions)
    return torch.einsum("bcr,bkcr->bkr", regions, gradients)


def _centred(regions: Tensor, gradients: Tensor) -> Tensor:
    shares = _additive(regions, gradients)
    return shares - shares.mean(dim=2, keepdim=True)


def _gradcam(regions: Tensor, gradients: Tensor) -> Tensor:
    return torch.bmm(gradients.mean(dim=3), regions)


_MANY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fam": _fam,
    "additive": _additive,
    "centred": _centred,
    "gradcam": _gradcam,
}
