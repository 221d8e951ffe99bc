"""Which channel counts where: from activations and gradients to a map.

Pure tensor functions of an activation ``A`` and the gradient ``G`` of a score with respect to it,
both ``[B, C, ...]``; everything behind the channel dimension is a region. With ``[B, C]`` there is
a single region.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fam_plugins.core.messages import unknown_name
from fam_plugins.core.similarity import full_precision

__all__ = [
    "RULES",
    "Rule",
    "additive",
    "centred",
    "contributions",
    "fam",
    "fam_weights",
    "find_rule",
    "gradcam",
    "gradcam_weights",
    "map_many",
]


def contributions(activation: Tensor, gradient: Tensor) -> Tensor:
    """Each channel's share of the frozen score: the sum over regions of ``G * A``.

    For a cosine over a pooled layer this is ``q_k s_k`` of the FAM paper (arXiv 2307.05017), with
    both embeddings at unit length, and sums to the cosine.

    Args:
        activation: ``[B, C, ...]``.
        gradient: Gradient of the frozen score, of the same shape.

    Returns:
        ``[B, C]``, in the units of the score.

    Example:
        >>> contributions(torch.ones(1, 2, 3), torch.tensor([[[1.0, 1, 1], [2, 2, 2]]]))
        tensor([[3., 6.]])
    """
    return torch.einsum("bcr,bcr->bc", _regions(activation), _regions(gradient))


def fam_weights(contribution: Tensor) -> Tensor:
    """Min-max normalise contributions over the channels (FAM, arXiv 2307.05017).

    Args:
        contribution: ``[B, C]``.

    Returns:
        Weights ``[B, C]`` in [0, 1]; all ones for an image whose contributions are all equal.

    Example:
        >>> fam_weights(torch.tensor([[1.0, 2.0, 5.0]]))
        tensor([[0.0000, 0.2500, 1.0000]])
    """
    low = contribution.amin(dim=1, keepdim=True)
    spread = contribution.amax(dim=1, keepdim=True) - low
    return torch.where(spread > 0, (contribution - low) / spread, torch.ones_like(contribution))


def gradcam_weights(gradient: Tensor) -> Tensor:
    """Mean over the regions of the true gradient (Grad-CAM, arXiv 1610.02391, equation 1).

    Args:
        gradient: ``[B, C, ...]``.

    Returns:
        Weights ``[B, C]``.

    Example:
        >>> gradcam_weights(torch.tensor([[[1.0, 3.0]]]))
        tensor([[2.]])
    """
    return _regions(gradient).mean(dim=2)


def fam(activation: Tensor, gradient: Tensor, *, sum_channels: bool = True) -> Tensor:
    """The published Feature Activation Map: ``sum_k w_k A_k``, no ReLU (arXiv 2307.05017).

    ``w`` are the min-max normalised contributions of the channels.

    Args:
        activation: ``[B, C, ...]``.
        gradient: Gradient of the frozen score, of the same shape.
        sum_channels: Sum over the channels, or return each channel's part.

    Returns:
        ``[B, 1, ...]``, or ``[B, C, ...]`` without the sum; in the units of the activation.

    Example:
        >>> fam(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]))
        tensor([[[3., 4.]]])
    """
    return _weigh(activation, fam_weights(contributions(activation, gradient)), sum_channels)


def additive(activation: Tensor, gradient: Tensor, *, sum_channels: bool = True) -> Tensor:
    """Signed shares ``sum_k G_k * A_k``: over all regions they add up to the frozen score.

    Exactly so, a constant term aside, when what follows the layer is linear; on a classifier with
    global average pooling this is CAM.

    Args:
        activation: ``[B, C, ...]``.
        gradient: Gradient of the frozen score, of the same shape.
        sum_channels: Sum over the channels, or return each channel's part.

    Returns:
        ``[B, 1, ...]``, or ``[B, C, ...]`` without the sum; in the units of the score.

    Example:
        >>> additive(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.5, -0.5]]]))
        tensor([[[ 0.5000, -1.0000]]])
    """
    if not sum_channels:
        return activation * gradient
    summed = torch.einsum("bcr,bcr->br", _regions(activation), _regions(gradient))
    return summed.reshape(activation.shape[0], 1, *activation.shape[2:])


def centred(activation: Tensor, gradient: Tensor, *, sum_channels: bool = True) -> Tensor:
    """``additive`` minus its mean over the regions; sums to zero.

    Positive where a region supports the match more than the average of the image does. With a
    single region (a ``[B, C]`` layer) it is zero.

    Args:
        activation: ``[B, C, ...]``.
        gradient: Gradient of the frozen score, of the same shape.
        sum_channels: Sum over the channels, or return each channel's part.

    Returns:
        ``[B, 1, ...]``, or ``[B, C, ...]`` without the sum; in the units of the score.

    Example:
        >>> centred(torch.tensor([[[1.0, 3.0]]]), torch.ones(1, 1, 2))
        tensor([[[-1.,  1.]]])
    """
    shares = additive(activation, gradient, sum_channels=sum_channels)
    return shares - _regions(shares).mean(dim=2).reshape(_beside(shares))


def gradcam(activation: Tensor, gradient: Tensor, *, sum_channels: bool = True) -> Tensor:
    """Grad-CAM, signed: ``sum_k w_k A_k`` with ``w`` the mean true gradient (arXiv 1610.02391).

    Args:
        activation: ``[B, C, ...]``.
        gradient: TRUE gradient of the score, of the same shape.
        sum_channels: Sum over the channels, or return each channel's part.

    Returns:
        ``[B, 1, ...]``, or ``[B, C, ...]`` without the sum.

    Example:
        >>> gradcam(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[2.0, 4.0]]]))
        tensor([[[3., 6.]]])
    """
    return _weigh(activation, gradcam_weights(gradient), sum_channels)


@dataclass(frozen=True)
class Rule:
    """A rule and what it expects.

    Attributes:
        name: The name users choose it by.
        apply: ``(activation, gradient, sum_channels=...)`` -> map.
        frozen: Whether the gradient is that of the frozen score, or the true one.
        adds_up: Whether the map sums to the frozen score.
    """

    name: str
    apply: Callable[..., Tensor]
    frozen: bool = True
    adds_up: bool = False

    def map(self, activation: Tensor, gradient: Tensor, *, sum_channels: bool = True) -> Tensor:
        """Apply the rule in at least float32, and return the dtype of the activation.

        Half precision is widened because a sum over hundreds of channels loses what the map is
        about: the differences between regions.
        """
        dtype = torch.promote_types(activation.dtype, torch.float32)
        with full_precision(activation.device):
            attribution = self.apply(
                activation.to(dtype), gradient.to(dtype), sum_channels=sum_channels
            )
        return attribution.to(activation.dtype)


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("fam", fam),
        Rule("additive", additive, adds_up=True),
        Rule("centred", centred),
        Rule("gradcam", gradcam, frozen=False),
    )
}


def find_rule(name: str) -> Rule:
    """Return the rule called ``name``.

    Args:
        name: ``"fam"``, ``"additive"``, ``"centred"`` or ``"gradcam"``.

    Raises:
        ValueError: If there is no such rule; the closest name is suggested.

    Example:
        >>> find_rule("additive").adds_up
        True
    """
    if name not in RULES:
        raise ValueError(unknown_name("rule", name, RULES))
    return RULES[name]


def _regions(tensor: Tensor) -> Tensor:
    """``[B, C, ...]`` -> ``[B, C, R]``."""
    return tensor.reshape(*tensor.shape[:2], -1)


def _beside(tensor: Tensor) -> tuple[int, ...]:
    """The shape that broadcasts one value per image and channel over the regions."""
    return (*tensor.shape[:2], *(1,) * (tensor.dim() - 2))


def _weigh(activation: Tensor, weights: Tensor, sum_channels: bool) -> Tensor:
    if not sum_channels:
        return activation * weights.reshape(_beside(activation))
    summed = torch.einsum("bcr,bc->br", _regions(activation), weights)
    return summed.reshape(activation.shape[0], 1, *activation.shape[2:])


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
        >>> from fam_plugins.core.rules import RULES
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
