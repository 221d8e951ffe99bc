"""Which channel counts where: from activations and gradients to weights, one row per rule.

Shapes: activations ``[B, C, R]`` with ``R`` regions; gradients of ``k`` scores ``[B, k, C, R]``, or
``[B, k, C, 1]`` where they are the same at every region, as behind global average pooling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fam_plugins.core.messages import unknown_name, warn_once

__all__ = ["RULES", "Rule", "choose_rule", "find_rule"]


@dataclass(frozen=True)
class Rule:
    """How contributions of channels become a map: ``sum over channels of weights * activations``.

    Pass one as ``rule=`` to any explainer of this package to bring your own.

    Attributes:
        name: What to call it.
        weights: ``(activations [B, C, R], gradients [B, k, C, R])`` -> weights ``[B, k, C, R]``,
            or ``[B, k, C, 1]`` for one weight per channel. Gradients arrive as ``[B, k, C, 1]``
            where they do not differ between regions; arithmetic that broadcasts serves both.
        frozen: Whether the gradient is that of the frozen score, or the true one.
        centred: Whether the mean over the regions is subtracted from each map.
        adds_up: Whether the map sums to the frozen score, so that it has a convergence delta.
        unit: What its numbers are, for a colour bar.
        tail: How it differentiates what follows the layer unless told otherwise: ``"frozen"``,
            ``"norms"`` or ``"true"`` (:class:`~fam_plugins.LayerFam`).

    Example:
        >>> LAYER_CAM = Rule("layercam", lambda activations, gradients: gradients.relu(),
        ...                  frozen=False)
        >>> LAYER_CAM.apply(torch.ones(1, 2, 3), torch.tensor([2.0, -1.0]).reshape(1, 1, 2, 1))
        tensor([[[[2., 2., 2.]]]])
    """

    name: str
    weights: Callable[[Tensor, Tensor], Tensor]
    frozen: bool = True
    centred: bool = False
    adds_up: bool = False
    unit: str = "attribution"
    tail: str = "true"

    def __post_init__(self) -> None:
        if not callable(self.weights):
            raise TypeError(f"rule {self.name!r} must be a function of activations and gradients")

    def apply(self, activations: Tensor, gradients: Tensor, *, sum_channels: bool = True) -> Tensor:
        """Activations ``[B, C, R]``, gradients ``[B, k, C, R or 1]`` -> maps ``[B, k, 1 or C, R]``.

        From these, ``centred`` is yet to subtract the mean.

        Raises:
            ValueError: If :attr:`weights` returns another shape than it should.
        """
        weights = self.weights(activations, gradients)
        batch, channels, regions = activations.shape
        wanted = (batch, gradients.shape[1], channels)
        shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        if shape not in ((*wanted, 1), (*wanted, regions)):
            raise ValueError(
                f"rule {self.name!r} returns weights of shape {shape}: return "
                f"{[*wanted, regions]} (B, k, C, R), or {[*wanted, 1]} for one weight per channel"
            )
        if not sum_channels:
            return weights * activations[:, None]
        if weights.shape[-1] == 1:
            return torch.bmm(weights[..., 0], activations)[:, :, None]
        if weights.shape[1] == 1:  # einsum would take a small product per region
            return (weights * activations[:, None]).sum(dim=2, keepdim=True)
        return torch.einsum("bkcr,bcr->bkr", weights, activations)[:, :, None]


def fam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """Contributions of the channels, min-max normalised over them (FAM, arXiv 2307.05017).

    For a cosine over a pooled layer the contributions are ``q_k s_k`` with both embeddings at unit
    length. The weights are all ones where every channel contributes the same, and zeros where none
    contributes, as for an embedding of zeros.
    """
    if gradients.shape[3] == 1:
        contributions = gradients[..., 0] * activations.sum(dim=2)[:, None]
    elif gradients.shape[1] == 1:
        contributions = (gradients * activations[:, None]).sum(dim=3)
    else:
        contributions = torch.einsum("bcr,bkcr->bkc", activations, gradients)
    low = contributions.amin(dim=2, keepdim=True)
    spread = contributions.amax(dim=2, keepdim=True) - low
    weights = torch.where(spread > 0, (contributions - low) / spread, (low != 0).to(low))
    return weights[..., None]


def _gradient(_activations: Tensor, gradients: Tensor) -> Tensor:
    """Signed shares: exact where everything behind the layer is linear, a constant term aside."""
    return gradients


def _mean_gradient(_activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM (arXiv 1610.02391, equation 1)."""
    return gradients.mean(dim=3, keepdim=True)


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("fam", fam_weights, unit="activation, weighted by channel"),
        Rule("additive", _gradient, adds_up=True, unit="share of the score", tail="frozen"),
        Rule(
            "centred",
            _gradient,
            centred=True,
            unit="share of the score above the image's mean",
            tail="norms",  # finds the match best; a map less its mean need not add up
        ),
        Rule("gradcam", _mean_gradient, frozen=False, unit="Grad-CAM, before its ReLU"),
    )
}


def find_rule(rule: str | Rule) -> Rule:
    """The rule of that name, or the rule itself; a ValueError suggests the closest name."""
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"rule must be a name such as 'centred' or a Rule, not {rule!r}")
    if rule not in RULES:
        raise ValueError(unknown_name("rule", rule, RULES))
    return RULES[rule]


def choose_rule(rule: str | Rule | None) -> Rule:
    """As :func:`find_rule`; left out, the published rule, with a warning once per process."""
    if rule is not None:
        return find_rule(rule)
    warn_once(
        'rule= is left out, so this is the published "fam": its map hardly depends on the target '
        '(on a classifier: not at all). Pass rule="centred" to find what matches, rule="gradcam" '
        'for what GradCAM shows, or rule="fam" to keep it.'
    )
    return RULES["fam"]
