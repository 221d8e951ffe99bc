"""Where a score went: what its regions carry, what constants carry, and what is left over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fam_plugins.core.layer_pass import LayerTensors
from fam_plugins.core.messages import warn_user
from fam_plugins.core.rules import Rule
from fam_plugins.core.scores import doubt

__all__ = ["Decomposition", "region_sum", "warn_of_coverage"]

TOKENS = {"class token", "registers", "residual"}  # what earlier layers hold in their regions


@dataclass(frozen=True)
class Decomposition:
    """A score ``[B]``, part by part.

    Attributes:
        maps: ``[B, 1, h, w]``: the shares of the regions; a tuple if the layer gives several.
        parts: The score by name, ``[B]`` each. ``"regions"``: the sum of the maps. Where they are:
            ``"bias"``, of what is behind the layer; ``"class token"`` and ``"registers"``, which
            stand for no place; ``"residual"``, what bypasses the layer; ``"position"``, embeddings
            added behind it; ``"offset"``, the score of an embedding of zeros, such as minus the
            squared lengths in a squared distance.
        score: ``[B]``: the score that is explained, less its contrast.
        gap: ``[B]``: the sum of the parts minus the score. Zero to rounding behind a frozen tail,
            with ``tail="true"`` the size of the first-order error.
        coverage: ``[B]``: the regions' share of the score. Near 1 the map tells the whole story;
            near 0 it is about a small rest; NaN for a score of zero without regions.
    """

    maps: Tensor | LayerTensors
    parts: dict[str, Tensor]
    score: Tensor
    gap: Tensor
    coverage: Tensor

    @classmethod
    def of(
        cls, maps: Tensor | LayerTensors, parts: dict[str, Tensor], score: Tensor
    ) -> Decomposition:
        """Work out the gap and the coverage."""
        gap = torch.stack(list(parts.values())).sum(dim=0) - score
        return cls(maps, parts, score, gap, parts["regions"] / score)


def region_sum(maps: Tensor | LayerTensors) -> Tensor:
    """The sum of each image's maps, ``[B]``."""
    parts = maps if isinstance(maps, tuple) else (maps,)
    total: Tensor = sum(p.flatten(1).sum(dim=1) for p in parts)  # type: ignore[assignment]
    return total


def warn_of_coverage(
    rule: Rule, constants: Mapping[str, Tensor], *sums_and_scores: tuple[Tensor, Tensor]
) -> None:
    """Warn, once for all of them, of regions that carry less than half of a score shared out.

    What regions carry is meant before a mean is subtracted. The pattern of a centred map stands for
    more than shares, so it takes less than a tenth, and tokens among ``constants``, the rest by
    name.
    """
    if not rule.adds_up and not (rule.centred and TOKENS & {*constants}):
        return
    least = 0.5 if rule.adds_up else 0.1
    # One score for the whole batch is left out.
    pairs = [(r, s, r.abs() < s.abs() * least) for r, s in sums_and_scores if r.shape == s.shape]

    def warn() -> None:
        regions, scores, low = next(pair for pair in pairs if pair[2].any())
        where = tuple(low.nonzero()[0].tolist())
        total, part = float(scores[where]), float(regions[where])
        most = max(constants, key=lambda name: float(constants[name].abs().sum()), default="")
        fix = "read the map as shares of that"
        if most in TOKENS:
            fix = f"the {most} has most of the rest, so explain an earlier layer or 'patches'"
        warn_user(
            f"the regions carry {part:.3g} of a score of {total:.3g} (image {where[0]}): "
            f"{fix}; LayerFam.decompose names the rest"
        )

    if pairs:
        doubt(torch.cat([low.flatten() for *_, low in pairs]).any(), warn)
