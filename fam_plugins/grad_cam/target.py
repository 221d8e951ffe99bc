"""A similarity as a target for every pytorch-grad-cam method and metric."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fam_plugins.core.similarity import check_embeddings, find_similarity, score

__all__ = ["SimilarityTarget"]


class SimilarityTarget:
    """How alike an embedding is to a reference, as a target for any pytorch-grad-cam method.

    For an encoder that returns embeddings. (A :class:`~fam_plugins.SimilarityModel` returns scores
    instead: there, reference ``j`` is ``ClassifierOutputTarget(j)``.)

    Args:
        reference: The embedding to compare with, ``[D]`` or ``[1, D]``; copied and detached.
        similarity: ``"cosine"``, ``"dot"`` or ``"euclidean"`` (negative squared distance).
        contrast: Embeddings ``[M, D]`` or ``[D]``; the mean similarity to them is subtracted.

    Raises:
        ValueError: On an unknown similarity, or embeddings that are not finite, zero (cosine), or
            of another shape.

    Example:
        >>> target = SimilarityTarget(torch.tensor([1.0, 0.0]))
        >>> target(torch.tensor([3.0, 4.0]))
        tensor(0.6000)
        >>> target(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([0.6000, 0.0000])
    """

    def __init__(
        self, reference: Tensor, similarity: str = "cosine", contrast: Tensor | None = None
    ) -> None:
        allow_zero = not find_similarity(similarity).scale_free
        self.similarity = similarity
        self.reference = _rows(reference, "reference", allow_zero)
        if len(self.reference) != 1:
            raise ValueError(
                f"reference has shape {tuple(reference.shape)}: pass one embedding [D]; average "
                "several shots with fam_plugins.prototypes first"
            )
        self.contrast = None if contrast is None else _rows(contrast, "contrast", allow_zero)
        if self.contrast is not None:
            check_embeddings(self.contrast, width=self.reference.shape[1], what="contrast")

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
        reference, contrast = (
            None if rows is None else rows.to(model_output.device, model_output.dtype)
            for rows in (self.reference, self.contrast)
        )
        assert reference is not None
        embeddings = model_output.reshape(-1, model_output.shape[-1])
        scores = score(self.similarity, embeddings, reference, contrast)[:, 0]
        return scores[0] if model_output.dim() == 1 else scores


def _rows(embeddings: Any, what: Literal["reference", "contrast"], allow_zero: bool) -> Tensor:
    with torch.inference_mode(False):
        rows = torch.as_tensor(embeddings).detach().clone()
    if rows.dim() == 1:
        rows = rows[None]
    if rows.dim() != 2 or rows.numel() == 0:
        raise ValueError(
            f"{what} has shape {tuple(rows.shape)}: pass embeddings [D] or [M, D]; embed images "
            "with the encoder first"
        )
    check_embeddings(rows, allow_zero=allow_zero, what=what)
    return rows
