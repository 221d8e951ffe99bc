"""Average a map with its neighbours, and keep its sum."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["smoothed"]


def smoothed(maps: Tensor, dims: int) -> Tensor:
    """Convolve the last ``dims`` dimensions with ``[1, 2, 1] / 4`` each, edges replicated.

    In two dimensions that is ``[1, 2, 1]ᵀ [1, 2, 1] / 16``. The convolution is a doubly stochastic
    matrix: every region gives away as much as the weights of its neighbours sum to, one in all, so
    that the sum of a map stays what it is. The choice of the kernel is this package's own.

    Example:
        >>> smoothed(torch.tensor([[0.0, 4.0, 0.0, 0.0]]), 1)
        tensor([[1., 2., 1., 0.]])
        >>> smoothed(torch.tensor([[4.0, 0.0, 0.0]]), 1)
        tensor([[3., 1., 0.]])
    """
    for dim in range(-dims, 0):
        size = maps.shape[dim]
        before = torch.cat([maps.narrow(dim, 0, 1), maps.narrow(dim, 0, size - 1)], dim)
        after = torch.cat([maps.narrow(dim, 1, size - 1), maps.narrow(dim, size - 1, 1)], dim)
        maps = (before + 2 * maps + after) / 4
    return maps
