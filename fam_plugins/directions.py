"""Where an embedding would have to move to become more alike to each of many references."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fam_plugins.backward import backward_many
from fam_plugins.similarity_model import SimilarityModel

__all__ = ["directions"]

_IMAGES = 8
"""Images per group: bounds what different references for every image cost together."""


def directions(model: SimilarityModel, embeddings: Tensor, indices: Tensor) -> Tensor:
    """Gradient of the score of each chosen reference with respect to the embedding.

    Inside :func:`fam_plugins.frozen_scores` that of the frozen score.

    Args:
        model: The references, their similarity and their contrast.
        embeddings: ``[B, D]``.
        indices: Which references, ``[B, c]``.

    Returns:
        ``[B, c, D]``, detached.

    Raises:
        ValueError: As for scoring the embeddings.

    Example:
        >>> model = SimilarityModel(torch.nn.Flatten(), torch.eye(2), similarity="dot")
        >>> directions(model, torch.ones(1, 2), torch.tensor([[1, 0]]))
        tensor([[[0., 1.],
                 [1., 0.]]])
    """
    groups = zip(torch.split(embeddings, _IMAGES), torch.split(indices, _IMAGES), strict=True)
    return torch.cat([_of_group(model, part, chosen) for part, chosen in groups])


def _of_group(model: SimilarityModel, embeddings: Tensor, indices: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        rows, places = torch.unique(indices, return_inverse=True)
        leaf = embeddings.detach().clone().requires_grad_()
        scores = model.score(leaf, rows)
        (found,) = backward_many(scores, [leaf], F.one_hot(places.T, scores.shape[1]))
    if found is None:
        return leaf.detach().new_zeros(*indices.shape, leaf.shape[1])
    return found.detach().transpose(0, 1)
