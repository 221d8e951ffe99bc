"""What a few-shot classifier of easyfsl consists of: an encoder, prototypes and a similarity."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_plugins.core.similarity import (
    Similarity,
    find_similarity,
    on_unit_length,
)

NEGATIVE_DISTANCE = find_similarity("euclidean")
from_easyfsl = None
__all__ = ["Features", "read_easyfsl"]


class Features(nn.Module):
    """A backbone whose features are centred, and normalised if asked for.

    Args:
        backbone: Images -> features ``[B, D]``.
        centre: What to subtract, ``[D]`` or a single number.
        power: Divide by the norm of this order; ``None`` for none.

    Example:
        >>> Features(nn.Flatten(), torch.ones(2), None)(torch.tensor([[3.0, 4.0]]))
        tensor([[2., 3.]])
    """

    centre: Tensor

    def __init__(self, backbone: nn.Module, centre: Tensor, power: float | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.power = power
        self.register_buffer("centre", centre.detach().clone(), persistent=True)
        self.training = backbone.training

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, ...]`` -> features ``[B, D]``."""
        features: Tensor = self.backbone(images) - self.centre
        return features if self.power is None else F.normalize(features, p=self.power, dim=1)


def read_easyfsl(classifier: Any) -> tuple[nn.Module, Tensor, Similarity]:
    """Take a classifier of easyfsl apart, and check that the parts score as it does.

    Which distance it uses is found by letting it score made-up features, not from its class.

    Args:
        classifier: One that has seen its support set.

    Returns:
        Encoder, prototypes ``[N, D]``, similarity.

    Raises:
        TypeError: If it is no classifier of this kind.
        ValueError: If it has no support set yet, or its scores cannot be reproduced exactly.

    Example:
        See :meth:`fam_plugins.SimilarityModel.from_easyfsl`.
    """
    kind = type(classifier).__name__
    needed = ("backbone", "prototypes", "feature_centering", "feature_normalization", "use_softmax")
    missing = [name for name in needed if not hasattr(classifier, name)]
    if missing or not isinstance(classifier, nn.Module):
        raise TypeError(
            f"{kind} has no {missing[0] if missing else 'forward'}: pass a classifier of easyfsl "
            "such as PrototypicalNetworks(backbone)"
        )
    if getattr(classifier, "is_transductive", bool)():
        raise ValueError(
            f"{kind} is transductive: the score of a query depends on the other queries, so it is "
            "no similarity to a prototype"
        )
    if classifier.use_softmax:
        raise ValueError(
            f"{kind} has use_softmax=True: a probability depends on all prototypes at once; set "
            "classifier.use_softmax = False to explain the score itself"
        )
    prototypes = classifier.prototypes
    if hasattr(classifier, "contextualized_support_features"):
        raise ValueError(
            f"{kind} gives log-probabilities of an attention over its whole support set, so no "
            "score belongs to one reference; it is a model [B, N] already: explain it as it is, "
            "LayerFam(classifier, layer)"
        )
    if not isinstance(prototypes, Tensor) or prototypes.numel() == 0:
        raise ValueError(
            f"{kind} has no prototypes yet: call process_support_set(images, labels) first"
        )
    if prototypes.dim() != 2:
        raise ValueError(
            f"{kind} has prototypes of shape {tuple(prototypes.shape)}, not [N, D]: it compares "
            "feature maps, not embeddings"
        )
    if not torch.isfinite(prototypes).all():
        raise ValueError(
            f"{kind} has a prototype that is not finite: a class without any support? Labels must "
            "be 0 to n_way - 1, each with at least one shot"
        )
    prototypes = prototypes.detach()
    power = classifier.feature_normalization
    for similarity, kept in _candidates(power):
        if _scores_alike(classifier, prototypes, similarity, kept):
            return _encoder(classifier, kept), prototypes, similarity
    raise ValueError(
        f"{kind} scores by something other than the cosine or the Euclidean distance to its "
        "prototypes, so its scores cannot be reproduced exactly; it is a model [B, N] already: "
        "explain it as it is, LayerFam(classifier, layer)"
    )


def _candidates(power: Any) -> list[tuple[Similarity, float | None]]:
    """Similarities to try, each with the normalisation that the encoder keeps beside it."""
    if power == 2:
        # As part of the similarity the norm can be held constant, and maps stay exact.
        squared = find_similarity("sqeuclidean")
        return [
            (find_similarity("cosine"), None),
            (on_unit_length(NEGATIVE_DISTANCE, references_too=False), None),
            (on_unit_length(squared, references_too=False), None),
        ]
    return [
        (find_similarity("cosine"), None),
        (NEGATIVE_DISTANCE, power),
        (find_similarity("sqeuclidean"), power),
    ]


def _encoder(classifier: Any, power: float | None) -> nn.Module:
    centre = classifier.feature_centering
    backbone: nn.Module = classifier.backbone
    if power is None and not centre.any():
        return backbone
    return Features(backbone, centre, power)


def _scores_alike(
    classifier: Any, prototypes: Tensor, similarity: Similarity, power: float | None
) -> bool:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(9, prototypes.shape[1], generator=generator).to(prototypes)
    features = noise * prototypes.abs().mean() + prototypes.mean(dim=0)
    # A shallow copy of it that takes features for images; the classifier itself is not touched.
    alike = copy.copy(classifier)
    alike.__dict__["_modules"] = {**classifier._modules, "backbone": nn.Identity()}
    with torch.no_grad():
        theirs = alike(features)
        ours = similarity.compare(_encoder(alike, power)(features), prototypes)
    wanted = (len(features), len(prototypes))
    if not isinstance(theirs, Tensor) or tuple(theirs.shape) != wanted:
        return False
    # Their distances go through a matrix product for many prototypes, which costs digits.
    return torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3 * float(ours.abs().mean()))
