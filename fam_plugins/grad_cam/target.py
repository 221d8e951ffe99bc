"""A similarity as a target for every pytorch-grad-cam method and metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fam_plugins.core.contrast import GalleryMean, reduced
from fam_plugins.core.references import as_tensor
from fam_plugins.core.scores import check_embeddings, check_floats, score
from fam_plugins.core.similarity import Similarity, as_similarity

__all__ = ["SimilarityTarget"]


class SimilarityTarget:
    """How alike an embedding is to a reference, as a target for any pytorch-grad-cam method.

    For an encoder that returns embeddings. (A :class:`~fam_plugins.SimilarityModel` returns scores
    instead: there, reference ``j`` is ``ClassifierOutputTarget(j)``.)

    Args:
        reference: The embedding to compare with, ``[D]`` or ``[1, D]``; copied and detached.
        similarity: As for :class:`~fam_plugins.SimilarityModel`: a name, a
            :class:`~fam_plugins.Similarity`, a distance of pytorch-metric-learning or a function.
        contrast: Embeddings ``[M, D]`` or ``[D]``, or :func:`~fam_plugins.gallery_mean`; the mean
            similarity to them is subtracted.

    Raises:
        TypeError: If ``similarity`` is of no such kind.
        ValueError: On an unknown similarity, or embeddings that are not finite or of
            another shape.

    Example:
        >>> target = SimilarityTarget(torch.tensor([1.0, 0.0]))
        >>> target(torch.tensor([3.0, 4.0]))
        tensor(0.6000)
        >>> target(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([0.6000, 0.0000])
    """

    def __init__(
        self,
        reference: Tensor,
        similarity: str | Similarity | Callable[..., Tensor] = "cosine",
        contrast: Tensor | GalleryMean | None = None,
    ) -> None:
        self._similarity = as_similarity(similarity)
        self.similarity = self._similarity.name
        self.reference = _rows(reference, "reference")
        if len(self.reference) != 1:
            raise ValueError(
                f"there are {len(self.reference)} references: pass one embedding [D]; average "
                "several shots with fam_plugins.prototypes first"
            )
        width = self.reference.shape[1]
        if isinstance(contrast, GalleryMean):
            contrast.check(self._similarity)
            check_embeddings(contrast.row, width=width, what="contrast")
        elif contrast is not None:
            contrast = reduced(self._similarity, _rows(contrast, "contrast", width))
        self.contrast = contrast

    def __call__(self, model_output: Tensor) -> Tensor:
        """Score one embedding ``[D]`` -> scalar, or a batch ``[B, D]`` -> ``[B]``.

        Raises:
            TypeError: If the model returns no tensor.
            ValueError: If it has another shape or width.
        """
        if not isinstance(model_output, Tensor):
            raise TypeError(
                f"the model returns a {type(model_output).__name__}, not embeddings: wrap it in a "
                "module whose forward picks the embeddings [B, D] out of it"
            )
        if model_output.dim() not in (1, 2):
            raise ValueError(
                f"the model gives shape {tuple(model_output.shape)} where an embedding [D] is "
                "expected: append pooling and nn.Flatten() to it"
            )
        contrast = None if self.contrast is None else self.contrast.to(model_output)
        embeddings = model_output.reshape(-1, model_output.shape[-1])
        reference = self.reference.to(model_output)
        scores = score(self._similarity, embeddings, reference, contrast)[:, 0]
        return scores[0] if model_output.dim() == 1 else scores


def _rows(embeddings: Any, what: str, width: int | None = None) -> Tensor:
    """Embeddings ``[D]`` or ``[M, D]``, copied, as ``[M, D]``."""
    with torch.inference_mode(False):
        rows = as_tensor(embeddings, what).detach().clone()
    if rows.dim() == 1:
        rows = rows[None]
    check_floats(rows, what)
    if rows.dim() != 2 or rows.numel() == 0:
        raise ValueError(
            f"{what} has shape {tuple(rows.shape)}: pass embeddings [D] or [M, D]; embed images "
            "with the encoder first"
        )
    check_embeddings(rows, width=width, what=what)
    return rows
