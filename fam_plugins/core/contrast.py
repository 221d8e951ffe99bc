"""What a score is compared against: many embeddings, reduced once to the one row that is exact.

The mean of cosines, of dot products or of squared distances to a million embeddings is one score
against one row, scaled and shifted. So a contrast costs the same however large it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fam_plugins.core.similarity import Similarity, unit_length

__all__ = ["Contrast", "GalleryMean", "check_averages", "mean_of", "reduced"]


@dataclass(frozen=True, eq=False)
class GalleryMean:
    """The mean score against a gallery: ``weight * score(row) + shift``, exactly.

    What :func:`~fam_plugins.gallery_mean` returns; pass it as ``contrast=``.

    Attributes:
        row: ``[1, D]``, the mean; under cosine of the unit vectors, at its own length.
        terms: ``[2]``, weight and shift: under cosine the length of the row and 0, under a squared
            distance 1 and minus the variance around the row.
        similarity: The name of the similarity it is exact for.
    """

    row: Tensor
    terms: Tensor
    similarity: str

    def to(self, like: Tensor) -> GalleryMean:
        """The same where ``like`` is, in its dtype but at least float32."""
        where, wide = like.device, torch.promote_types(like.dtype, torch.float32)
        return GalleryMean(self.row.to(where, wide), self.terms.to(where, wide), self.similarity)

    def check(self, similarity: Similarity) -> None:
        """Refuse another similarity than it was taken for."""
        if self.similarity != similarity.name:
            raise ValueError(
                f"the contrast is a mean of {self.similarity} scores, and these are by "
                f"{similarity.name}: gallery_mean(..., similarity={similarity.name!r})"
            )


Contrast = Tensor | GalleryMean | Literal["others"] | None


# Outside inference mode, so that the result can take part in autograd later on.
@torch.inference_mode(False)
@torch.no_grad()
def mean_of(similarity: Similarity, parts: Iterable[Tensor]) -> GalleryMean:
    """Reduce embeddings ``[B, D]``, part by part and in float64, to their mean."""
    total: Any = 0.0
    scored: Any = 0.0
    count, like, one = 0, None, None
    for part in parts:
        # On the CPU: not every device has float64, and float32 would lose the last of a million.
        rows = part.detach().cpu().double()
        one = rows[:1] if one is None else one
        total = total + (unit_length(rows) if similarity.scale_free else rows).sum(dim=0)
        scored = scored + similarity.scores(one, rows).sum()
        count, like = count + len(rows), part
    if like is None or one is None:
        raise ValueError("the loader is empty: pass at least one batch of images")
    row = total[None] / count
    weight = row.norm() if similarity.scale_free else torch.ones_like(total[0])
    # What the score of any embedding shows, here of the first one, holds for all.
    shift = scored / count - weight * similarity.scores(one, row)[0, 0]
    return GalleryMean(row, torch.stack([weight, shift]), similarity.name).to(like)


def check_averages(similarity: Similarity) -> None:
    """Refuse a similarity whose mean no single row gives."""
    if not similarity.averages:
        raise ValueError(
            f"the mean of {similarity.name!r} scores is no score against a mean, so no single row "
            "is exact: pass the embeddings themselves as contrast"
        )


def reduced(similarity: Similarity, embeddings: Tensor) -> Tensor | GalleryMean:
    """Embeddings ``[M, D]`` as the row that is exact for them, or as they are if there is none."""
    return mean_of(similarity, [embeddings]) if similarity.averages else embeddings
