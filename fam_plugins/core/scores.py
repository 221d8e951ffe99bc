"""From images to embeddings to scores: one score per reference, less a contrast; frozen on demand.

Frozen, a score keeps its value and sends back the gradient of its linear form. That is all that an
explainer needs: it runs the model as it is, in one forward pass, and reads off exact shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from fam_plugins.core.contrast import Contrast, GalleryMean
from fam_plugins.core.encoders import Output, image_call, pick_embeddings, pixels_of
from fam_plugins.core.own_norm import hold_own_norm
from fam_plugins.core.similarity import Similarity, as_similarity

__all__ = ["Frozen", "check_embeddings", "embed", "frozen_scores", "score", "takes_images_only"]


@dataclass
class Frozen:
    """What a pass notes of its scores: where they were frozen, and what is to be warned of.

    ``points`` are embeddings ``[B, D]`` in the order in which they were scored, each with the
    lengths that the encoder divided by, if it ends in a norm. A second pass over the same inputs
    can replay them, so that both passes evaluate the very same linear function: that is how the
    constant term of a score is measured. Without ``freeze`` scores are only noted: whether any was
    ``contrasted``, and, where length does not matter, which rows are ``zero``. ``traced``: there
    are no values to check, only shapes. With ``doubts``, a list, checks of values wait for the end
    of the block, see :func:`doubt`.
    """

    points: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    freeze: bool = True
    contrasted: bool = False
    traced: bool = False
    zero: list[Tensor] = field(default_factory=list)
    doubts: list[tuple[Tensor, Any]] | None = None
    _replay: Iterator[tuple[Tensor, Tensor | None]] | None = None

    def at(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings to score, and those to freeze at: the same, or on a replay the noted."""
        length = hold_own_norm(embeddings)
        if self._replay is None:
            self.points.append((embeddings.detach(), length))
            return embeddings, self.points[-1][0]
        point, noted = next(self._replay, (None, None))
        if point is None:
            raise RuntimeError("there are more scores to replay than were noted: replay only once")
        if noted is not None and length is not None:
            embeddings = embeddings * (length / noted)  # as if divided by the noted length
        return embeddings, point

    @property
    def replaying(self) -> bool:
        """Whether the current pass reuses the points of an earlier one."""
        return self._replay is not None


ACTIVE: ContextVar[Frozen | None] = ContextVar("fam_plugins_frozen_scores", default=None)


@contextmanager
def frozen_scores(frozen: Frozen | None = None, *, replay: bool = False) -> Iterator[Frozen]:
    """Within the block, similarity scores differentiate with their normaliser held constant.

    The values of the scores stay what they are. The gradient with respect to an embedding ``z``
    and a reference ``t`` becomes ``t / (|t| |z|)`` for cosine, ``t`` for dot, ``2 t`` for squared
    Euclidean and ``t / |z - t|`` for Euclidean. The Euclidean forms are this package's own: the
    FAM papers (arXiv 2307.05017, 2506.01636) do not publish theirs.

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
    token = ACTIVE.set(frozen)
    try:
        yield frozen
        _settle(frozen.doubts or [])
    finally:
        ACTIVE.reset(token)
        frozen._replay = None


def doubt(flag: Tensor, consequence: Callable[[], None] | Exception) -> None:
    """Call a consequence, or raise it, if a bool on the device is true.

    At once, or at the end of an explainer's pass: one transfer, so that a GPU is waited for once.
    """
    noted = ACTIVE.get()
    if noted is not None and noted.traced:
        return None
    if noted is None or noted.doubts is None:
        return _settle([(flag, consequence)])
    return noted.doubts.append((flag, consequence))


def _settle(doubts: list[tuple[Tensor, Any]]) -> None:
    noted, doubts[:] = doubts[:], []
    flags = [flag.to(noted[0][0].device) for flag, _ in noted]
    for _, consequence in compress(noted, torch.stack(flags).tolist() if flags else []):
        if isinstance(consequence, Exception):
            raise consequence
        consequence()


def score(
    similarity: str | Similarity,
    embeddings: Tensor,
    references: Tensor,
    contrast: Contrast = None,
) -> Tensor:
    """Score embeddings against references; larger means more alike.

    Half-precision embeddings are compared in float32. Under cosine an embedding of zeros scores 0.

    Args:
        similarity: A name or a :class:`~fam_plugins.Similarity`.
        embeddings: ``[B, D]``.
        references: ``[N, D]``.
        contrast: Embeddings ``[M, D]``, their mean (:func:`~fam_plugins.gallery_mean`), or
            ``"others"`` for every other reference: the mean score against them is subtracted
            ("why this one rather than those").

    Returns:
        Scores ``[B, N]``.

    Raises:
        ValueError: If widths differ, a value is NaN or infinite, also in the result, or a mean was
            taken for another similarity.

    Example:
        >>> z = torch.tensor([[1.0, 0.0]])
        >>> score("cosine", z, torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        tensor([[1., 0.]])
        >>> score("cosine", z, torch.tensor([[2.0, 0.0], [0.0, 2.0]]), contrast="others")
        tensor([[ 1., -1.]])
    """
    chosen = similarity if isinstance(similarity, Similarity) else as_similarity(similarity)
    frozen = ACTIVE.get()
    check_embeddings(embeddings, width=references.shape[1])
    given = torch.promote_types(embeddings.dtype, references.dtype)
    wide = torch.promote_types(given, torch.float32)
    with full_precision(embeddings.device):
        embeddings = embeddings.to(wide)
        compare: Callable[[Tensor, Tensor], Tensor] = chosen.scores
        if frozen is not None and chosen.scale_free and not frozen.replaying:
            frozen.zero.append((embeddings.detach() == 0).all(dim=1))
        if frozen is not None and frozen.freeze:
            embeddings, point = frozen.at(embeddings)
            compare = partial(chosen.frozen, point=point)
        scores = compare(embeddings, references.to(wide))
        if isinstance(contrast, GalleryMean):
            contrast.check(chosen)
            mean = contrast.to(scores)
            scores = _less(scores, mean.terms[0] * compare(embeddings, mean.row) + mean.terms[1])
        elif isinstance(contrast, Tensor):
            against = compare(embeddings, contrast.to(wide)).mean(dim=1, keepdim=True)
            scores = _less(scores, against)
        elif contrast is not None:
            scores = subtract_others(scores)
    narrow = scores.to(given)
    if given == torch.float16:
        fix = "score in bfloat16 or float32, or use cosine"
        error = ValueError(f"scores do not fit into float16: {fix}")
        doubt(~torch.isfinite(narrow).all(), error)
    return narrow


def subtract_others(scores: Tensor) -> Tensor:
    """Subtract from each score ``[B, N]`` the mean of the other ones: ``contrast="others"``."""
    others = scores.sum(dim=1, keepdim=True) - scores
    return _less(scores, others / (scores.shape[1] - 1))


def _less(scores: Tensor, against: Tensor) -> Tensor:
    frozen = ACTIVE.get()
    if frozen is not None:
        frozen.contrasted = True
    return scores - against


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off, so that float32 operands are really multiplied in float32."""
    if device.type in ("cpu", "cuda", "xpu"):  # the others have no autocast, or none in torch 2.3
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def embed(
    encoder: nn.Module,
    images: Tensor | Mapping[str, Any],
    *further: Any,
    output: Output = None,
    forward_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Run an encoder and make sure that what it returns are embeddings ``[B, D]``."""
    if isinstance(images, Mapping):
        images, *further = pixels_of(images)  # type: ignore[assignment]
    if isinstance(images, Tensor) and images.dim() > 0 and images.shape[0] == 0:
        raise ValueError("the batch is empty: pass at least one image")
    if isinstance(images, Tensor) and images.dim() == 5 and takes_images_only(encoder):
        raise ValueError(
            f"the encoder takes images [B, C, H, W], not {tuple(images.shape)}: flatten an "
            "episode, x.flatten(0, 1), or give it whole as the references of SimilarityModel"
        )
    count = images.shape[0]  # len() would fix a traced batch; behind a layer looks are seen
    try:
        given = image_call(encoder)(images, *further, **(forward_kwargs or {}))
    except ValueError as error:  # of a batch norm, or of B, C, H, W = images.shape
        if not isinstance(images, Tensor) or images.dim() != 3 or further:
            raise
        raise ValueError(
            f"the encoder refuses {tuple(images.shape)}, a single image is image[None]: {error}"
        ) from error
    embeddings = pick_embeddings(given, output)
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"output= picks a {type(embeddings).__name__}, not a tensor [B, D]")
    shape = embeddings.shape
    if len(shape) != 2:
        raise ValueError(
            f"the encoder returns shape {tuple(shape)}, not embeddings [B, D]: append "
            "pooling, nn.Sequential(encoder, nn.AdaptiveAvgPool2d(1), nn.Flatten()), or pick a "
            "token, SimilarityModel(..., output=lambda out: out.last_hidden_state[:, 0])"
        )
    if shape[0] != count:
        raise ValueError(
            f"the encoder returns {shape[0]} embeddings for {count} inputs: "
            "a single image needs a batch dimension (image[None])"
        )
    return embeddings


def takes_images_only(encoder: nn.Module) -> bool:
    """Whether ``[N, K, C, H, W]`` are no volumes or clips to it: its convolutions are of images."""
    two, three = (any(isinstance(m, k) for m in encoder.modules()) for k in (nn.Conv2d, nn.Conv3d))
    return two and not three and not hasattr(getattr(encoder, "config", None), "num_frames")


def check_floats(given: object, what: str) -> None:
    """Refuse what is no tensor of floating point, such as an image of bytes."""
    if not isinstance(given, Tensor):
        kind = type(given).__name__
        raise TypeError(f"{what} must be a tensor, not {kind}: torch.as_tensor(images) of an array")
    if not given.is_floating_point():
        raise TypeError(
            f"{what} of {given.dtype}: pass floating-point embeddings, or images scaled and "
            "normalised as in training (images.float() / 255 for bytes)"
        )


def check_embeddings(
    embeddings: Tensor, *, width: int | None = None, what: str = "embedding"
) -> None:
    """Refuse what is no ``[B, D]``, embeddings of another width, or not finite."""
    if not isinstance(embeddings, Tensor) or embeddings.dim() != 2:
        kind = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings)
        raise ValueError(f"{what} is {kind}, not a tensor [B, D]: a single one is z[None]")
    if width is not None and embeddings.shape[1] != width:
        raise ValueError(
            f"the {what} has {embeddings.shape[1]} values and the references have {width}: "
            "embed the references with the same encoder"
        )
    finite = torch.isfinite(embeddings.detach())

    def refuse() -> None:
        rows = (~finite).any(dim=1).nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise ValueError(
            f"{what} row {shown} holds NaN or infinite values: check the images, the weights, "
            "and for float16 the range"
        )

    doubt(~finite.all(), refuse)
