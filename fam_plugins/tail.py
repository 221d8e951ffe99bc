"""Many gradients through what follows a layer, at the price of as few backward steps as possible.

Behind a layer there is usually a global average pooling, perhaps followed by a linear projection.
Then the gradient of any direction in the embedding is a matrix product away and the same at every
region. Whether that is so is not guessed from module names but measured: a random direction is
sent back through the tail once and compared with what the matrix predicts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fam_plugins.precision import full_precision

__all__ = ["PooledTail", "find_pooled_tail"]

Backward = Callable[[Tensor], Tensor]
"""Directions ``[c, B, M]`` at the end of the tail -> gradients ``[c, B, C, R]`` at its start."""


class PooledTail:
    """A tail that pools all regions alike and then applies one matrix, the same for every image.

    Args:
        matrix: ``[M, C]``, or ``None`` for the identity: the embedding is the mean itself.
        regions: The number of regions it averages.

    Example:
        >>> PooledTail(None, 4).gradients(torch.ones(1, 1, 2)).flatten()
        tensor([0.2500, 0.2500])
    """

    def __init__(self, matrix: Tensor | None, regions: int) -> None:
        self._matrix = matrix
        self._regions = regions

    def gradients(self, directions: Tensor) -> Tensor:
        """Directions ``[B, c, M]`` -> gradients ``[B, c, C, 1]``, the same at every region."""
        if self._matrix is not None:
            with full_precision(directions.device):
                directions = directions @ self._matrix
        return (directions / self._regions)[..., None]


def find_pooled_tail(
    backward: Backward, end: Tensor, *, count: int, per_chunk: int
) -> PooledTail | None:
    """Find out whether a tail is pooling, or pooling and a matrix, by what it does to directions.

    Args:
        backward: Sends directions back through the tail.
        end: What the tail ends in, ``[B, M]``.
        count: How many directions an image are wanted; the matrix is only looked for where
            finding it takes fewer backward steps than that.
        per_chunk: How many directions may be sent back at once.

    Returns:
        The tail, or ``None`` if it is something else, in half precision (where the comparison
        could not tell) or not worth it.

    Example:
        >>> maps = torch.randn(2, 3, 4, requires_grad=True)
        >>> end = maps.mean(dim=2)
        >>> def backward(directions):
        ...     return torch.stack([torch.autograd.grad(end, maps, d, retain_graph=True)[0]
        ...                         for d in directions])
        >>> find_pooled_tail(backward, end, count=2, per_chunk=2).gradients(torch.ones(2, 1, 3))[0]
        tensor([[[0.2500],
                 [0.2500],
                 [0.2500]]])
    """
    if end.dtype not in (torch.float32, torch.float64) or count < 2:
        return None
    batch, width = end.shape
    # A generator of its own: asking for an explanation must not move the user's random numbers.
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(batch, width, generator=generator, dtype=torch.float64).to(end)
    answer = backward(probe[None])[0]
    channels, regions = answer.shape[1:]
    if not _close(answer[..., :1].expand_as(answer), answer):
        return None
    pooled = PooledTail(None, regions)
    if channels == width and _predicts(pooled, probe, answer):
        return pooled
    steps = -(-width // batch)
    if steps >= count:
        return None
    # Every image carries another row of the matrix; whether they share one is checked below.
    rows = torch.zeros(steps * batch, width, dtype=end.dtype, device=end.device)
    rows[:width] = torch.eye(width, dtype=end.dtype, device=end.device)
    found = [
        backward(chunk)[..., 0].flatten(0, 1)
        for chunk in torch.split(rows.reshape(steps, batch, width), per_chunk)
    ]
    pooled = PooledTail(torch.cat(found)[:width] * regions, regions)
    return pooled if _predicts(pooled, probe, answer) else None


def _predicts(tail: PooledTail, probe: Tensor, answer: Tensor) -> bool:
    return _close(tail.gradients(probe[:, None])[:, 0].expand_as(answer), answer)


def _close(predicted: Tensor, answer: Tensor) -> bool:
    """Equal to the rounding of a matrix product: an error beyond it would show in the maps."""
    scale = answer.abs().amax(dim=(1, 2), keepdim=True)
    gap = (predicted - answer).abs()
    return bool((gap <= 16 * torch.finfo(answer.dtype).eps * scale).all())
