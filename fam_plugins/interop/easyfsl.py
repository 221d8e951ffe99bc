"""Few-shot classifiers of easyfsl as similarity models with the same scores."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fam_plugins.core.contrast import Contrast
from fam_plugins.core.eval_mode import check_module
from fam_plugins.core.similarity import Similarity, find_similarity, on_unit_length
from fam_plugins.core.similarity_model import SimilarityModel

__all__ = ["from_easyfsl"]
_AS_IT_IS = "it is a model [B, N] already, explain it as it is, LayerFam(classifier, layer)"


def from_easyfsl(classifier: nn.Module, *, contrast: Contrast = None) -> SimilarityModel:
    """Take over a few-shot classifier of easyfsl that has processed its support set.

    Its scores are reproduced: the negative distance, not squared, of ``PrototypicalNetworks``, the
    cosine of ``SimpleShot``, with centred and normalised features. Which one it is follows from the
    scores of made-up features, not from the class. The prototypes become a buffer, detached.

    Args:
        classifier: Such as ``PrototypicalNetworks(backbone)``. Its backbone is used, not copied;
            later support sets do not reach the model.
        contrast: As for :class:`~fam_plugins.SimilarityModel`; ``None`` keeps its scores.

    Returns:
        The model; its ``labels`` are 0 to ``n_way - 1``.

    Raises:
        TypeError: If it is no classifier of this kind.
        ValueError: If it has no support set yet, or its scores cannot be reproduced exactly:
            softmax, attention over the support set, transductive methods, training in a call.

    Example:
        >>> from easyfsl.methods import SimpleShot  # doctest: +SKIP
        >>> classifier = SimpleShot(encoder)  # doctest: +SKIP
        >>> classifier.process_support_set(images, labels)  # doctest: +SKIP
        >>> model = from_easyfsl(classifier)  # doctest: +SKIP
    """
    prototypes = _prototypes(classifier)
    for similarity, power in _candidates(classifier.feature_normalization):
        if _scores_alike(classifier, prototypes, similarity, power):
            encoder = _encoder(classifier, power)
            model = SimilarityModel(encoder, prototypes, similarity=similarity, contrast=contrast)
            model.labels = tuple(range(len(prototypes)))
            return model
    raise ValueError(
        f"{type(classifier).__name__} scores by something other than the cosine or the Euclidean "
        f"distance to its prototypes, which is not reproduced exactly: {_AS_IT_IS}"
    )


def _prototypes(classifier: Any) -> Tensor:
    """Return the prototypes ``[N, D]``, and refuse classifiers without a score for each."""
    check_module(classifier, "classifier")
    kind = type(classifier).__name__
    parts = "backbone", "prototypes", "feature_centering", "feature_normalization", "use_softmax"
    for name in parts:
        if not hasattr(classifier, name):
            raise TypeError(f"{kind} has no {name}: pass easyfsl's, PrototypicalNetworks(backbone)")
    rows = classifier.prototypes
    rows = rows if isinstance(rows, Tensor) else torch.empty(0, device="cpu")
    obstacles = {
        "is transductive: a score depends on the other queries too; explain SimpleShot on the same "
        "backbone": getattr(classifier, "is_transductive", bool)(),
        "trains its prototypes anew in every call: call it once, then SimilarityModel("
        "classifier.backbone, classifier.prototypes)": hasattr(classifier, "fine_tuning_steps"),
        "has use_softmax=True: a probability depends on all prototypes at once; set "
        "classifier.use_softmax = False to explain the score itself": classifier.use_softmax,
        "scores by an attention over its whole support set, not by one reference each: "
        f"{_AS_IT_IS}": hasattr(classifier, "contextualized_support_features"),
        "has no prototypes yet: call process_support_set(images, labels) first": not rows.numel(),
        f"has prototypes of shape {tuple(rows.shape)}, not [N, D]: it compares feature maps, not "
        f"embeddings: {_AS_IT_IS}": rows.dim() != 2,
        "has a prototype that is not finite: a class without any support? Labels must be 0 to "
        "n_way - 1, each with at least one shot": not torch.isfinite(rows).all(),
    }
    for reason, found in obstacles.items():
        if found:
            raise ValueError(f"{kind} {reason}")
    return rows.detach()


def _candidates(power: Any) -> list[tuple[Similarity, float | None]]:
    """List the similarities to try, each with the normalisation that the encoder keeps."""
    distances = [find_similarity("euclidean"), find_similarity("sqeuclidean")]
    if power == 2:
        # As part of the similarity the norm can be held constant, and maps stay exact.
        distances, power = [on_unit_length(d, references_too=False) for d in distances], None
    return [(find_similarity("cosine"), None), *((distance, power) for distance in distances)]


def _scores_alike(classifier: Any, rows: Tensor, similarity: Similarity, power: Any) -> bool:
    """Compare scores of made-up features with those that the classifier gives: ``[9, N]``."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(9, rows.shape[1], generator=generator, device="cpu").to(rows)
    features = noise * rows.abs().mean() + rows.mean(dim=0)
    # A shallow copy of it that takes features for images; the classifier itself is not touched.
    alike = copy.copy(classifier)
    alike.__dict__["_modules"] = {**classifier._modules, "backbone": nn.Identity()}
    with torch.no_grad():
        theirs = alike(features)
        ours = similarity.compare(_encoder(alike, power)(features), rows)
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        return False
    # Their distances go through a matrix product for many prototypes, which costs digits.
    return torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3 * float(ours.abs().mean()))


def _encoder(classifier: Any, power: float | None) -> nn.Module:
    """Return the backbone, with the centring and normalisation that its features still need."""
    centre, backbone = classifier.feature_centering, classifier.backbone
    return backbone if power is None and not centre.any() else _Features(backbone, centre, power)


class _Features(nn.Module):
    """Centres the features ``[B, D]`` of a backbone and divides them by the norm of an order."""

    def __init__(self, backbone: nn.Module, centre: Tensor, power: float | None) -> None:
        super().__init__()
        self.centre: Tensor
        self.backbone = backbone
        self.power = power
        self.register_buffer("centre", centre.detach().clone())
        self.training = backbone.training

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, ...]`` -> features ``[B, D]``."""
        features: Tensor = self.backbone(images) - self.centre
        return features if self.power is None else nn.functional.normalize(features, p=self.power)
