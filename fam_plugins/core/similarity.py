"""How alike two embeddings are: a value, and the linear form that splits over regions.

A score that is linear in the embedding splits exactly over channels and regions. Cosine and
Euclidean similarity become linear once their normaliser is held constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_plugins.core.messages import unknown_name

__all__ = ["SIMILARITIES", "Similarity", "as_similarity", "find_similarity", "on_unit_length"]


@dataclass(frozen=True)
class Similarity:
    """One way to compare embeddings, oriented so that larger means more alike.

    Attributes:
        name: The name users choose it by.
        compare: Embeddings ``[B, D]`` and references ``[N, D]`` -> scores ``[B, N]``.
        linear: ``(embeddings, references, frozen_at)`` -> ``[B, N]``: the change of the score with
            its normaliser held constant at the embeddings ``frozen_at`` ``[B, D]``; linear in the
            first argument, and zero for zeros. ``None`` if there is no such form: then maps
            follow the true gradient and are first-order statements.
        scale_free: Whether the length of an embedding does not matter: a zero embedding, which
            has no direction, then scores 0, and supports are L2-normalised before they are
            averaged.
        by_reference: Whether each reference is scored apart from the others, so that a few of
            them can be scored alone.
        whole: Whether the linear form is the score itself, and not its change alone.
        averages: Whether the mean score against many references is the score against their mean
            (of unit vectors where ``scale_free``), up to a weight and a shift.

    Example:
        >>> halved = Similarity("halved", lambda z, t: z @ t.T / 2, lambda z, t, at: z @ t.T / 2)
        >>> halved.compare(torch.eye(2), torch.eye(2))[0]
        tensor([0.5000, 0.0000])
    """

    name: str
    compare: Callable[[Tensor, Tensor], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    scale_free: bool = False
    by_reference: bool = True
    averages: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if not callable(self.compare) or not (self.linear is None or callable(self.linear)):
            raise TypeError(f"{self.name!r} must be a function of embeddings and references")

    def scores(self, embeddings: Tensor, references: Tensor) -> Tensor:
        """The score ``[B, N]``, refused if it has another shape."""
        return self._checked(self.compare(embeddings, references), embeddings, references)

    def _checked(self, scores: Any, embeddings: Tensor, references: Tensor) -> Tensor:
        expected = (embeddings.shape[0], references.shape[0])  # len() would fix a traced batch
        if not isinstance(scores, Tensor) or tuple(scores.shape) != expected:
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"similarity {self.name!r} returns {shape} for {expected[0]} embeddings and "
                f"{expected[1]} references: return scores [B, N], larger meaning more alike"
            )
        return scores

    def frozen(self, embeddings: Tensor, references: Tensor, point: Tensor) -> Tensor:
        """The score ``[B, N]`` with the gradient of its linear form, exact at ``point``."""
        if self.linear is None:
            return self.scores(embeddings, references)
        if self.whole:
            return self._checked(self.linear(embeddings, references, point), embeddings, references)
        with torch.no_grad():
            value = self.scores(point, references)
        change = self.linear(embeddings - point, references, point)
        return value + self._checked(change, embeddings, references)


def unit_length(vectors: Tensor, at: Tensor | None = None) -> Tensor:
    """Divide every row ``[B, D]`` by its L2 norm (that of ``at``), however small or large it is.

    A row of zeros stays zero, with a gradient of zero.
    """
    at = vectors if at is None else at
    # By the largest value first: squares of float32 leave its range beyond 1e-22 and 1e19. Divided
    # by infinity, a row of zeros and its gradient are zero.
    scale = at.detach().abs().amax(dim=1, keepdim=True)
    scale = scale.masked_fill(scale == 0, float("inf"))
    length: Tensor = torch.linalg.vector_norm(at / scale, dim=1, keepdim=True).clamp_min(1)
    return vectors / scale / length


def _distance(embeddings: Tensor, references: Tensor) -> Tensor:
    # The direct form: the matrix-product shortcut loses the small distances to cancellation.
    # cdist defines its gradient at distance zero as zero, so its square is safe to differentiate.
    return torch.cdist(embeddings, references, compute_mode="donot_use_mm_for_euclid_dist")


def _cosine(embeddings: Tensor, references: Tensor) -> Tensor:
    return unit_length(embeddings) @ unit_length(references).T


def _cosine_linear(embeddings: Tensor, references: Tensor, frozen_at: Tensor) -> Tensor:
    return unit_length(embeddings, frozen_at) @ unit_length(references).T


def _dot(embeddings: Tensor, references: Tensor) -> Tensor:
    return embeddings @ references.T


def _dot_linear(embeddings: Tensor, references: Tensor, _frozen_at: Tensor) -> Tensor:
    return embeddings @ references.T


def _sqeuclidean(embeddings: Tensor, references: Tensor) -> Tensor:
    return -_distance(embeddings, references).square()


def _sqeuclidean_linear(embeddings: Tensor, references: Tensor, _frozen_at: Tensor) -> Tensor:
    # -|z - t|^2 without -|z|^2, which is the same for every reference (ProtoNet's linear view).
    return 2 * embeddings @ references.T


def _euclidean(embeddings: Tensor, references: Tensor) -> Tensor:
    return -_distance(embeddings, references)


def _euclidean_linear(embeddings: Tensor, references: Tensor, frozen_at: Tensor) -> Tensor:
    # -d = -d^2 / 2d + const to first order: the form of -d^2 times the slope of the root, held
    # constant. At distance zero the slope has no value; the score is at its best there.
    distance = _distance(frozen_at, references)
    slope = torch.where(distance > 0, 0.5 / distance, torch.zeros_like(distance))
    return _sqeuclidean_linear(embeddings, references, frozen_at) * slope


SIMILARITIES: dict[str, Similarity] = {
    similarity.name: similarity
    for similarity in (
        Similarity("cosine", _cosine, _cosine_linear, scale_free=True, averages=True, whole=True),
        Similarity("dot", _dot, _dot_linear, averages=True, whole=True),
        Similarity("sqeuclidean", _sqeuclidean, _sqeuclidean_linear, averages=True),
        Similarity("euclidean", _euclidean, _euclidean_linear),
    )
}

_DISTANCES = "'euclidean' (minus the distance) or 'sqeuclidean' (minus its square)"
_ALIASES = {"l2": _DISTANCES, "squared": "'sqeuclidean'", "inner product": "'dot'"}


def find_similarity(name: str) -> Similarity:
    """The similarity called ``name``; a ValueError suggests the closest."""
    if name not in SIMILARITIES:
        raise ValueError(unknown_name("similarity", name, SIMILARITIES, aliases=_ALIASES))
    return SIMILARITIES[name]


def as_similarity(given: Any) -> Similarity:
    """Understand what a user means by ``similarity=``.

    Args:
        given: A name (``"cosine"``, ``"dot"``, ``"sqeuclidean"``, ``"euclidean"``); a
            :class:`Similarity`; a distance of pytorch-metric-learning (``CosineSimilarity``,
            ``DotProductSimilarity``, ``LpDistance`` with ``p=2`` and ``power`` 1 or 2, negated);
            or a function ``f(embeddings [B, D], references [N, D]) -> [B, N]``, larger meaning
            more alike, which is explained through its true gradient.

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
    if isinstance(given, type):
        raise TypeError(f"similarity is the class {given.__name__}: pass an instance of it")
    if all(hasattr(given, name) for name in ("is_inverted", "normalize_embeddings", "p", "power")):
        return _from_metric_learning(given)
    if given is F.cosine_similarity or isinstance(given, nn.CosineSimilarity):
        return find_similarity("cosine")  # torch's compares row by row
    if callable(given):
        name = getattr(given, "__name__", type(given).__name__)
        return Similarity(name, given, None, by_reference=False)
    raise TypeError(
        f"similarity must be a name such as 'cosine', a Similarity, a function or a distance of "
        f"pytorch-metric-learning, not {type(given).__name__}"
    )


# A class rather than closures, so that a model can be pickled.
@dataclass(frozen=True)
class _OnUnitLength:
    inner: Similarity
    references_too: bool

    def compare(self, embeddings: Tensor, references: Tensor) -> Tensor:
        return self.inner.compare(unit_length(embeddings), self._references(references))

    def linear(self, embeddings: Tensor, references: Tensor, frozen_at: Tensor) -> Tensor:
        assert self.inner.linear is not None  # on_unit_length is called with named ones
        return self.inner.linear(
            unit_length(embeddings, frozen_at),
            self._references(references),
            unit_length(frozen_at),
        )

    def _references(self, references: Tensor) -> Tensor:
        return unit_length(references) if self.references_too else references


def on_unit_length(inner: Similarity, *, references_too: bool = True) -> Similarity:
    """Compare after dividing embeddings by their L2 norm; frozen, the norm is constant."""
    both = _OnUnitLength(inner, references_too)
    name, averages = f"{inner.name} at unit length", references_too and inner.averages
    return Similarity(name, both.compare, both.linear, scale_free=True, averages=averages)


def _from_metric_learning(distance: Any) -> Similarity:
    """What a distance of pytorch-metric-learning computes, checked on random vectors."""
    kind, inverted = type(distance).__name__, distance.is_inverted
    if inverted:
        found = find_similarity("cosine" if distance.normalize_embeddings else "dot")
    else:
        found = find_similarity("euclidean" if distance.power == 1 else "sqeuclidean")
        found = on_unit_length(found) if distance.normalize_embeddings else found
    problem = ""
    if distance.p != 2:
        problem = f"has p={distance.p}, and only the Euclidean norm, p=2, splits exactly"
    elif distance.power not in ((1,) if inverted else (1, 2)):
        powers = "1" if inverted else "1 or 2"
        problem = f"has power={distance.power}, and only power {powers} splits exactly"
    else:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(7, 5, generator=generator, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            theirs = distance(rows[:3], rows[3:]).double() * (1 if inverted else -1)
        if not torch.allclose(theirs, found.compare(rows[:3], rows[3:]), rtol=1e-6):
            problem = "computes no dot product, cosine or Euclidean distance"
    if problem:
        sign = "" if inverted else "-"
        raise ValueError(
            f"{kind} {problem}; to explain it through its true gradient all the same, pass a "
            f"function: lambda z, t: {sign}distance(z, t)"
        )
    return found
