"""Similarities beside the three named ones: distances of other libraries, and functions of users.

pytorch-metric-learning's distances are recognised by their attributes (``is_inverted``,
``normalize_embeddings``, ``p``, ``power``), and what they are taken for is checked by computing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fam_plugins.similarity import SIMILARITIES, Similarity, find_similarity, unit_length

__all__ = ["NEGATIVE_DISTANCE", "as_similarity", "on_unit_length"]


def _distance(embeddings: Tensor, references: Tensor) -> Tensor:
    return torch.cdist(embeddings, references, compute_mode="donot_use_mm_for_euclid_dist")


def _negative_distance(embeddings: Tensor, references: Tensor) -> Tensor:
    return -_distance(embeddings, references)


def _negative_distance_linear(embeddings: Tensor, references: Tensor, at: Tensor) -> Tensor:
    # -d = -d^2 / 2d + const to first order: the linear form of -d^2 times the slope of the root,
    # held constant. At distance zero the slope has no value; the score is at its best there.
    distance = _distance(at, references)
    slope = torch.where(distance > 0, 0.5 / distance, torch.zeros_like(distance))
    return SIMILARITIES["euclidean"].linear_form(embeddings, references, at) * slope


NEGATIVE_DISTANCE = Similarity("negative distance", _negative_distance, _negative_distance_linear)
"""``-|z - t|``, not squared. Frozen, it has the direction of ``"euclidean"`` divided by twice the
distance, so that its maps are the Euclidean ones in other units; the form is this package's own."""


@dataclass(frozen=True)
class _OnUnitLength:
    inner: Similarity
    references_too: bool

    def compare(self, embeddings: Tensor, references: Tensor) -> Tensor:
        return self.inner.compare(unit_length(embeddings), self._references(references))

    def linear(self, embeddings: Tensor, references: Tensor, at: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(at, dim=1, keepdim=True)
        form = self.inner.linear_form
        return form(embeddings / length, self._references(references), at / length)

    def _references(self, references: Tensor) -> Tensor:
        return unit_length(references) if self.references_too else references


def on_unit_length(inner: Similarity, *, references_too: bool = True) -> Similarity:
    """Compare embeddings after dividing them by their L2 norm; frozen, the norm is constant.

    Args:
        inner: How to compare them then.
        references_too: Whether the references are normalised as well.

    Example:
        >>> on_unit_length(NEGATIVE_DISTANCE).compare(torch.eye(2)[:1], 3 * torch.eye(2)[:1])
        tensor([[-0.]])
    """
    both = _OnUnitLength(inner, references_too)
    return Similarity(f"{inner.name} at unit length", both.compare, both.linear, scale_free=True)


@dataclass(frozen=True)
class _Own:
    function: Callable[[Tensor, Tensor], Any]

    def compare(self, embeddings: Tensor, references: Tensor) -> Tensor:
        scores = self.function(embeddings, references)
        expected = (len(embeddings), len(references))
        if not isinstance(scores, Tensor) or tuple(scores.shape) != expected:
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"the similarity function returns {shape} for {expected[0]} embeddings and "
                f"{expected[1]} references: return scores [B, N], larger meaning more alike"
            )
        return scores


def as_similarity(given: Any) -> Similarity:
    """Understand what a user means by ``similarity=``.

    Args:
        given: A name; a :class:`~fam_plugins.similarity.Similarity`; a distance of
            pytorch-metric-learning (``CosineSimilarity``, ``DotProductSimilarity``, ``LpDistance``
            with ``p=2`` and ``power`` 1 or 2; distances are negated, so that larger means more
            alike); or a function ``f(embeddings [B, D], references [N, D]) -> [B, N]``, larger
            meaning more alike. A function has no known linear form: it is explained through its
            true gradient, so that maps are first-order statements which need not add up.

    Raises:
        TypeError: If it is none of these.
        ValueError: On an unknown name, or a distance that cannot be split exactly.

    Example:
        >>> as_similarity("dot").name
        'dot'
        >>> as_similarity(lambda z, t: (z @ t.T).tanh()).linear is None
        True
    """
    if isinstance(given, str):
        return find_similarity(given)
    if isinstance(given, Similarity):
        return given
    if all(hasattr(given, name) for name in ("is_inverted", "normalize_embeddings", "p", "power")):
        return _from_metric_learning(given)
    if callable(given):
        name = getattr(given, "__name__", type(given).__name__)
        return Similarity(name, _Own(given).compare, None, by_reference=False)
    raise TypeError(
        f"similarity must be a name such as 'cosine', a distance of pytorch-metric-learning or a "
        f"function, not {type(given).__name__}"
    )


def _from_metric_learning(distance: Any) -> Similarity:
    kind = type(distance).__name__
    own = "; to explain it through its true gradient all the same, pass a function: " + (
        "lambda z, t: distance(z, t)" if distance.is_inverted else "lambda z, t: -distance(z, t)"
    )
    if distance.p != 2:
        raise ValueError(
            f"{kind} has p={distance.p}: only the Euclidean norm, p=2, splits exactly{own}"
        )
    powers = (1,) if distance.is_inverted else (1, 2)
    if distance.power not in powers:
        raise ValueError(
            f"{kind} has power={distance.power}: a score to that power is not linear in the "
            f"embedding, so it does not split exactly (power {' or '.join(map(str, powers))} "
            f"does){own}"
        )
    if distance.is_inverted:
        found = find_similarity("cosine" if distance.normalize_embeddings else "dot")
    else:
        found = NEGATIVE_DISTANCE if distance.power == 1 else find_similarity("euclidean")
        found = on_unit_length(found) if distance.normalize_embeddings else found
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        theirs = distance(rows[:3], rows[3:])
        theirs = theirs if distance.is_inverted else -theirs
        same = torch.allclose(theirs.double(), found.compare(rows[:3], rows[3:]), rtol=1e-6)
    if not same:
        raise ValueError(
            f"{kind} computes something other than a dot product, a cosine or a Euclidean "
            f"distance, so its split is not known{own}"
        )
    return found
