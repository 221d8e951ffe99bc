"""What a score is compared against: many embeddings, reduced once to the one row that is exact.

The mean of cosines, of dot products or of squared distances to a million embeddings is one score
against one row, scaled and shifted. So a contrast costs the same however large it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fam_plugins.core.similarity import Similarity, unit_length

__all__ = ["Contrast", "GalleryMean", "check_mean", "mean_of", "reduced"]


@dataclass(frozen=True, eq=False)
class GalleryMean:
    """The mean score against a gallery: ``weight * score(row) + shift``, exactly.

    What :func:`~fam_plugins.gallery_mean` returns; pass it as ``contrast=``. For cosine the row is
    the mean of the unit vectors and the weight its length; for a squared distance it is the mean,
    and the shift minus the variance around it; for a dot product it is the mean.

    Attributes:
        row: ``[1, D]``.
        terms: ``[2]``: weight and shift.
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
    square: Any = 0.0
    count, like = 0, None
    for part in parts:
        # On the CPU: not every device has float64, and float32 would lose the last of a million.
        rows = part.detach().cpu().double()
        rows = unit_length(rows) if similarity.scale_free else rows
        total = total + rows.sum(dim=0)
        square = square + rows.square().sum()
        count, like = count + len(rows), part
    if like is None:
        raise ValueError("the loader is empty: pass at least one batch of images")
    mean = total / count
    found = check_mean(similarity)(mean, square / count)
    terms = [torch.as_tensor(term, dtype=mean.dtype, device="cpu") for term in found]
    return GalleryMean(mean[None], torch.stack(terms), similarity.name).to(like)


def check_mean(similarity: Similarity) -> Callable[..., tuple[Any, Any]]:
    """The form of a mean of scores, refused where there is none."""
    if similarity.of_mean is None:
        raise ValueError(
            f"the mean of {similarity.name!r} scores is no score against a mean, so no single row "
            "is exact: pass the embeddings themselves as contrast"
        )
    return similarity.of_mean


def reduced(similarity: Similarity, embeddings: Tensor) -> Tensor | GalleryMean:
    """Embeddings ``[M, D]`` as the row that is exact for them, or as they are if there is none."""
    return embeddings if similarity.of_mean is None else mean_of(similarity, [embeddings])
