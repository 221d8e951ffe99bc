"""Which regions of two images match: the score of a pair as a matrix, regions by regions.

Behind a linear tail an embedding is a sum over regions and a constant: ``z = sum_i z_i + c``. Then
``f <z_a, z_b>``, the linear form of a score, is the sum of all ``f <z_ai, z_bj>``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vector_norm

from fam_plugins.core.maps import MapPass, check_finite
from fam_plugins.core.own_norm import hold_own_norm
from fam_plugins.core.scores import frozen_scores, full_precision

__all__ = ["LinearTail", "joint_shares"]


class LinearTail:
    """The embeddings ``end`` ``[B, D]`` of a pass as sums over regions, or a ValueError.

    ``first`` embeds the first image alone; ``None`` where ``end`` is the mean of the regions.
    """

    def __init__(self, one: MapPass, end: Tensor, first: Callable[[], Tensor] | None) -> None:
        self.maps, self._one, self._end = one.activations[0][0].flatten(2), one, end
        self.regions, self.point = self.maps.shape[2], end.detach()
        held = None if first is None else hold_own_norm(end)
        ones = torch.ones_like(self.point[:, :1])
        self.length = ones if held is None else held.to(ones).where(held > 0, ones)
        self.mean = first is None or self._is_mean()
        precise = end.dtype in (torch.float32, torch.float64)
        if (
            first is not None
            and not self.mean
            and not (precise and one.is_affine(end, self.length, first))
        ):
            raise ValueError(
                "joint= splits what is linear in the layer, and what follows it is not (a ReLU, a "
                f"norm, attention?), or not provably in {end.dtype}: explain a later layer, in "
                'float32, or pass embedding="pooled"'
            )

    def parts(self, start: int, stop: int, scale: Tensor) -> Tensor:
        """Dimensions of the embedding by region, the constant last: ``[B, stop - start, R + 1]``.

        Of a mean, any number at a time; otherwise one. Times a ``scale`` ``[B, 1, 1]``.
        """
        if self.mean:
            return F.pad(
                self.maps[:, start:stop] * (scale / (self.length[..., None] * self.regions)), (0, 1)
            )
        direction = torch.zeros_like(self.point)
        direction[:, start] = 1
        gradient = self._gradient(direction)
        parts = torch.linalg.vecdot(gradient, self.maps, dim=1)
        rest = self.point[:, start] - parts.sum(dim=1)
        size = vector_norm(gradient, dim=(1, 2)) * vector_norm(self.maps, dim=(1, 2))
        return torch.cat([parts, _unless_rounding(rest, size)[:, None]], dim=1)[:, None] * scale

    def _gradient(self, direction: Tensor) -> Tensor:
        return self._one.gradients(self._end, direction[None], retain_graph=True)[0][0][:, 0]

    def _is_mean(self) -> bool:
        if self.point.shape[1] != self.maps.shape[1]:
            return False
        size = vector_norm(self.maps, 1, dim=2).amax(dim=1, keepdim=True) / self.regions
        probe = torch.arange(self.point.shape[1], device=size.device).to(size).cos()
        if _unless_rounding(self.maps.mean(dim=2) - self.point * self.length, size).any():
            return False
        gap = self._gradient(probe * self.length) - probe[:, None] / self.regions
        furthest = vector_norm(gap, torch.inf, dim=(1, 2))
        return not _unless_rounding(furthest, 1 / self.regions).any()


def joint_shares(
    a: LinearTail,
    b: LinearTail,
    alike_a: Callable[[Tensor], Tensor],
    alike_b: Callable[[Tensor], Tensor],
) -> Tensor:
    """The score of each pair by regions of ``a`` and of ``b``: ``[B, Ra + 1, Rb + 1]``.

    ``alike_a`` scores embeddings of ``a`` with those of ``b`` held fixed: ``[B]``; ``alike_b`` the
    reverse. Beside one gradient of the layer, nothing larger than the result is made.
    """
    value, slope_a = _slope(alike_a, a.point)
    slopes, points = torch.stack([slope_a, _slope(alike_b, b.point)[1]]), [b.point, a.point]
    others = torch.stack(points).to(slopes)
    place = others.abs().transpose(0, 1).flatten(1).argmax(dim=1, keepdim=True)
    at_place = [part.transpose(0, 1).flatten(1).gather(1, place) for part in (slopes, others)]
    factor = (at_place[0] / at_place[1]).nan_to_num(nan=0)  # both embeddings are zero
    gap, scale = slopes - factor * others, (factor * others).abs().amax(dim=2, keepdim=True)
    if _unless_rounding(gap, scale).any():
        raise ValueError(
            "joint= splits similarities whose linear form is a multiple of <a, b>, the same for "
            'both images: use "cosine", "dot", "sqeuclidean" or "euclidean"'
        )
    step = min(a.regions, b.regions) if a.mean and b.mean else 1
    # Half of the factor on either side: products of float32 leave its range sooner than cosines.
    root = factor.abs().sqrt()[..., None]
    found = value.new_zeros(len(value), a.regions + 1, b.regions + 1)
    with torch.no_grad(), full_precision(value.device):
        for start in range(0, a.point.shape[1], step):
            rows = a.parts(start, start + step, root)
            columns = b.parts(start, start + step, root * factor.sign()[..., None])
            found.baddbmm_(rows.mT, columns)
        # What is no part of the product, such as the lengths in a distance.
        rest = value - found.sum(dim=(1, 2))
        lengths = vector_norm(others * root[:, 0], dim=2).prod(dim=0)
        found[:, -1, -1] += _unless_rounding(rest, lengths)
    return check_finite(found.to(a.point.dtype))


def _slope(alike: Callable[[Tensor], Tensor], point: Tensor) -> tuple[Tensor, Tensor]:
    """Scores ``[B]`` and the gradient of their linear form ``[B, D]``, in at least float32."""
    with torch.inference_mode(False), torch.enable_grad(), frozen_scores():
        leaf = point.to(torch.promote_types(point.dtype, torch.float32)).clone().requires_grad_()
        value = alike(leaf)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def _unless_rounding(gap: Tensor, scale: Tensor | float) -> Tensor:
    """A difference of numbers of that size, and zero where it is but their rounding."""
    return torch.where(gap.abs() <= 32 * torch.finfo(gap.dtype).eps * scale, 0, gap)
