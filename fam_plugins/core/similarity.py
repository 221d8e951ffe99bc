"""How alike two embeddings are: scores, and frozen scores that are linear in the embedding.

A score that is linear in the embedding splits exactly over channels and regions. Cosine and
Euclidean similarity are not linear, but become so once their normaliser is held constant. Inside
:func:`frozen_scores` every score of this package keeps its value and sends back the gradient of
that linear form instead of its own. That is all an explainer needs: it runs the model as it is,
in one forward pass, and reads off exact shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fam_plugins.core.messages import unknown_name

__all__ = [
    "NEGATIVE_DISTANCE",
    "SIMILARITIES",
    "Frozen",
    "Similarity",
    "as_similarity",
    "find_similarity",
    "frozen_scores",
    "full_precision",
    "on_unit_length",
    "score",
]


Contrast = Tensor | Literal["others"] | None


@dataclass(frozen=True)
class Similarity:
    """One way to compare embeddings, oriented so that larger means more alike.

    Attributes:
        name: The name users choose it by.
        compare: Embeddings ``[B, D]`` and references ``[N, D]`` -> scores ``[B, N]``.
        linear: The part of the score that is linear in the embeddings once its normaliser is
            taken from the third argument, the embeddings ``[B, D]`` it is frozen at. ``None``
            where there is no such part, as for a user's own function: then scores are explained
            through their true gradient, and maps are first-order statements.
        scale_free: Whether the length of an embedding does not matter; then a zero embedding
            has no score, and supports are L2-normalised before they are averaged.
        by_reference: Whether each reference is scored apart from the others, so that a few of
            them can be scored alone.
    """

    name: str
    compare: Callable[[Tensor, Tensor], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    scale_free: bool = False
    by_reference: bool = True

    @property
    def linear_form(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """:attr:`linear`, of a similarity that has one."""
        assert self.linear is not None
        return self.linear


def _cosine(embeddings: Tensor, references: Tensor) -> Tensor:
    return unit_length(embeddings) @ unit_length(references).T


def _cosine_linear(embeddings: Tensor, references: Tensor, frozen_at: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(frozen_at, dim=1, keepdim=True)
    scores: Tensor = (embeddings / norm) @ unit_length(references).T
    return scores


def _dot(embeddings: Tensor, references: Tensor) -> Tensor:
    return embeddings @ references.T


def _dot_linear(embeddings: Tensor, references: Tensor, _frozen_at: Tensor) -> Tensor:
    return embeddings @ references.T


def _euclidean(embeddings: Tensor, references: Tensor) -> Tensor:
    # The direct form: the matrix-product shortcut loses the small distances to cancellation.
    # cdist defines its gradient at distance zero as zero, so the square is safe to differentiate.
    distance = torch.cdist(embeddings, references, compute_mode="donot_use_mm_for_euclid_dist")
    return -distance.square()


def _euclidean_linear(embeddings: Tensor, references: Tensor, _frozen_at: Tensor) -> Tensor:
    # -|z - t|^2 without -|z|^2, which is the same for every reference (ProtoNet's linear view).
    return 2 * embeddings @ references.T - references.square().sum(dim=1)


def unit_length(vectors: Tensor) -> Tensor:
    """Divide every row by its L2 norm, however small that is."""
    return F.normalize(vectors, dim=1, eps=torch.finfo(vectors.dtype).tiny)


SIMILARITIES: dict[str, Similarity] = {
    similarity.name: similarity
    for similarity in (
        Similarity("cosine", _cosine, _cosine_linear, scale_free=True),
        Similarity("dot", _dot, _dot_linear),
        Similarity("euclidean", _euclidean, _euclidean_linear),
    )
}


def find_similarity(name: str) -> Similarity:
    """Return the similarity called ``name``.

    Args:
        name: ``"cosine"``, ``"dot"`` or ``"euclidean"`` (negative squared distance).

    Raises:
        ValueError: If there is no such similarity; the closest name is suggested.

    Example:
        >>> find_similarity("cosine").scale_free
        True
    """
    if name not in SIMILARITIES:
        raise ValueError(unknown_name("similarity", name, SIMILARITIES))
    return SIMILARITIES[name]


@dataclass
class Frozen:
    """The embeddings at which the scores of a forward pass were frozen.

    A second pass over the same inputs can replay them, so that both passes evaluate the very same
    linear function. That is how the constant term of a score is measured.

    Attributes:
        points: Embeddings ``[B, D]``, detached, in the order in which they were scored.
        contrasted: Whether any of the scores had a contrast set.
    """

    points: list[Tensor] = field(default_factory=list)
    contrasted: bool = False
    _replay: Iterator[Tensor] | None = None

    def at(self, embeddings: Tensor) -> Tensor:
        """Return the embeddings to freeze at: these ones, or the remembered ones on a replay."""
        if self._replay is not None:
            return next(self._replay)
        self.points.append(embeddings.detach())
        return self.points[-1]

    @property
    def replaying(self) -> bool:
        """Whether the current pass reuses the points of an earlier one."""
        return self._replay is not None


_active: ContextVar[Frozen | None] = ContextVar("fam_plugins_frozen_scores", default=None)


@contextmanager
def frozen_scores(frozen: Frozen | None = None, *, replay: bool = False) -> Iterator[Frozen]:
    """Within the block, similarity scores differentiate with their normaliser held constant.

    The values of the scores stay what they are. The gradient with respect to an embedding ``z``
    and a reference ``t`` becomes ``t / (|t| |z|)`` for cosine, ``t`` for dot, ``2 t`` for
    Euclidean. The Euclidean form is this package's own: the FAM papers do not publish theirs.

    Args:
        frozen: An earlier pass to continue or to replay; a fresh one by default.
        replay: Freeze at the points of ``frozen`` instead of at the embeddings that come by.

    Yields:
        The record of where the scores were frozen.

    Example:
        >>> z = torch.tensor([[3.0, 4.0]], requires_grad=True)
        >>> with frozen_scores():
        ...     value = score("cosine", z, torch.tensor([[1.0, 0.0]]))
        >>> torch.autograd.grad(value.sum(), z)[0]
        tensor([[0.2000, 0.0000]])
    """
    frozen = Frozen() if frozen is None else frozen
    frozen._replay = iter(frozen.points) if replay else None
    token = _active.set(frozen)
    try:
        yield frozen
    finally:
        _active.reset(token)
        frozen._replay = None


def score(
    similarity: str | Similarity,
    embeddings: Tensor,
    references: Tensor,
    contrast: Contrast = None,
) -> Tensor:
    """Score embeddings against references; larger means more alike.

    Half-precision embeddings are compared in float32.

    Args:
        similarity: A name out of ``"cosine"`` (range -1 to 1), ``"dot"``, ``"euclidean"`` (negative
            squared distance, at most 0), or a :class:`Similarity`.
        embeddings: ``[B, D]``.
        references: ``[N, D]``.
        contrast: Embeddings ``[M, D]``, or ``"others"`` for every other reference: the mean score
            against them is subtracted ("why this one rather than those").

    Returns:
        Scores ``[B, N]``.

    Raises:
        ValueError: If widths differ, a value is NaN or infinite, an embedding is zero under
            cosine, or ``"others"`` is asked for with a single reference.

    Example:
        >>> z = torch.tensor([[1.0, 0.0]])
        >>> score("cosine", z, torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        tensor([[1., 0.]])
        >>> score("cosine", z, torch.tensor([[2.0, 0.0], [0.0, 2.0]]), contrast="others")
        tensor([[ 1., -1.]])
    """
    chosen = find_similarity(similarity) if isinstance(similarity, str) else similarity
    frozen = _active.get()
    result_dtype = torch.promote_types(embeddings.dtype, references.dtype)
    compute_dtype = torch.promote_types(result_dtype, torch.float32)
    check_embeddings(
        embeddings,
        width=references.shape[1],
        # Replays look at the constant term, where the embedding is legitimately zero.
        allow_zero=not chosen.scale_free or (frozen is not None and frozen.replaying),
    )
    if isinstance(contrast, str) and len(references) < 2:
        raise ValueError(
            'contrast="others" needs at least 2 references and there is 1; '
            "pass embeddings or images as contrast instead"
        )
    with full_precision(embeddings.device):
        embeddings, references = embeddings.to(compute_dtype), references.to(compute_dtype)
        compare = chosen.compare
        if frozen is not None:
            compare = _frozen_compare(chosen, frozen.at(embeddings))
            frozen.contrasted |= contrast is not None
        scores = compare(embeddings, references)
        if isinstance(contrast, Tensor):
            against = compare(embeddings, contrast.to(compute_dtype))
            scores = scores - against.mean(dim=1, keepdim=True)
        elif isinstance(contrast, str):
            scores = subtract_others(scores)
    return scores.to(result_dtype)


def subtract_others(scores: Tensor) -> Tensor:
    """Subtract from each score ``[B, N]`` the mean of the other ones: ``contrast="others"``.

    Example:
        >>> subtract_others(torch.tensor([[1.0, 2.0, 6.0]]))
        tensor([[-3.0000, -1.5000,  4.5000]])
    """
    frozen = _active.get()
    if frozen is not None:
        frozen.contrasted = True
    others = scores.sum(dim=1, keepdim=True) - scores
    return scores - others / (scores.shape[1] - 1)


def _frozen_compare(
    similarity: Similarity, frozen_at: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """The score with the gradient of its linear part, equal to the score at ``frozen_at``."""
    form = similarity.linear
    if form is None:
        return similarity.compare

    def compare(embeddings: Tensor, references: Tensor) -> Tensor:
        linear = form(embeddings, references, frozen_at)
        with torch.no_grad():
            offset = similarity.compare(frozen_at, references)
            offset -= form(frozen_at, references, frozen_at)
        return linear + offset

    return compare


def check_embeddings(
    embeddings: Tensor,
    *,
    width: int | None = None,
    allow_zero: bool = True,
    what: str = "embedding",
) -> None:
    """Refuse embeddings that cannot be compared, with the fix in the message.

    Args:
        embeddings: ``[B, D]``.
        width: The ``D`` they must have, if known.
        allow_zero: Whether an all-zero row is fine.
        what: What to call them in the message.

    Raises:
        ValueError: On a wrong width, a value that is not finite, or a forbidden zero row.
    """
    if width is not None and embeddings.shape[1] != width:
        raise ValueError(
            f"the {what} has {embeddings.shape[1]} values and the references have {width}: "
            "embed the references with the same encoder"
        )
    with torch.no_grad():
        length = torch.linalg.vector_norm(embeddings, ord=float("inf"), dim=1)
        bad = ~torch.isfinite(length) if allow_zero else ~(torch.isfinite(length) & (length > 0))
        if not bad.any():
            return
        rows = bad.nonzero().flatten().tolist()
        not_finite = not torch.isfinite(length[bad]).all()
    shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    if not_finite:
        raise ValueError(
            f"{what} row {shown} holds NaN or infinite values: check the images, the weights, "
            "and for float16 the range"
        )
    raise ValueError(
        f"{what} row {shown} is all zero, so it has no direction and no cosine: drop it, or use "
        'similarity="dot" or "euclidean"'
    )


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
        given: A name; a :class:`~fam_plugins.core.similarity.Similarity`; a distance of
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


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off, so that float32 operands are really multiplied in float32.

    Args:
        device: Where the operands are. Devices without autocast need nothing.

    Returns:
        A context manager.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(torch.device("cpu")):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    if device.type in ("cpu", "cuda", "xpu"):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
