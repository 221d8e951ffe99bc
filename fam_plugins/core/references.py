"""What a query is compared with: images embedded once, prototypes, the mean of a gallery."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fam_plugins.core.contrast import GalleryMean, check_averages, mean_of, reduced
from fam_plugins.core.encoders import as_encoder, pixels_of
from fam_plugins.core.eval_mode import eval_mode, place_of
from fam_plugins.core.gallery import Gallery, is_on_disk
from fam_plugins.core.messages import with_progress
from fam_plugins.core.scores import check_embeddings, check_floats, embed
from fam_plugins.core.similarity import Similarity, as_similarity, unit_length

__all__ = [
    "as_tensor",
    "at_home",
    "batch_parts",
    "embed_contrast",
    "embed_once",
    "gallery_mean",
    "listed",
    "prototypes",
]
_NAMES = ("image", "images", "img", "pixel_values"), ("label", "labels", "target")


def prototypes(
    embeddings: Tensor,
    labels: Iterable[Hashable] | Tensor | None = None,
    similarity: str | Similarity | Callable[..., Tensor] = "cosine",
) -> Tensor:
    """Average the supports of each class into one reference.

    For cosine the mean of the L2-normalised supports (FAM, arXiv 2307.05017: the same as averaging
    the channel contributions over the shots); otherwise the plain mean (ProtoNet, arXiv
    1703.05175).

    Args:
        embeddings: Supports ``[S, D]``; or ``[N, K, D]``, ``K`` of each class, without labels.
        labels: One label each; any hashable values, not necessarily 0, 1, 2.
        similarity: The similarity they will be used with.

    Returns:
        ``[N, D]``, detached, one row per class in sorted order of the labels.

    Raises:
        ValueError: On an unknown similarity, another number of labels than embeddings, or
            embeddings that cannot be compared.

    Example:
        >>> prototypes(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), [4, 9, 9])
        tensor([[1., 0.],
                [0., 1.]])
    """
    chosen = as_similarity(similarity)
    check_floats(embeddings, "supports")
    if labels is None and embeddings.dim() == 3:
        labels = np.arange(len(embeddings)).repeat(embeddings.shape[1])
        embeddings = embeddings.flatten(0, 1)
    if embeddings.dim() != 2 or len(embeddings) == 0:
        hint = f"of at least one row, or [N, K, D] without labels, not {tuple(embeddings.shape)}"
        raise ValueError(f"supports must be a tensor [S, D] {hint}")
    names = listed(() if labels is None else labels, len(embeddings))
    supports = embeddings.detach()
    check_embeddings(supports, what="support")
    if chosen.scale_free:
        # Through float32, where the squared length of a half-precision vector cannot overflow.
        wide = supports.to(torch.promote_types(supports.dtype, torch.float32))
        supports = unit_length(wide).to(embeddings.dtype)
    rows = [
        supports[[i for i, name in enumerate(names) if name == label]].mean(dim=0)
        for label in unique_labels(names)
    ]
    return torch.stack(rows)


def unique_labels(labels: Iterable[Hashable]) -> list[Any]:
    """The distinct labels, sorted; in order of appearance where they cannot be sorted."""
    distinct = list(dict.fromkeys(listed(labels)))
    try:
        return sorted(distinct)
    except TypeError:
        return distinct


def listed(
    labels: Iterable[Hashable] | Tensor, count: int | None = None, what: str = "supports"
) -> list[Any]:
    """Labels as a list, refused where they are not one hashable value for each of ``count``."""
    given: Any = labels.tolist() if hasattr(labels, "tolist") else labels
    names: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    # A value that is not equal to itself is NaN.
    if not all(isinstance(name, Hashable) and name == name for name in names):
        fix = "of [S, 1] labels.flatten(), of one-hot labels labels.argmax(1)"
        raise ValueError(f"labels must be one value for each of the {what}, without NaN: {fix}")
    if count is not None and len(names) != count:
        raise ValueError(f"there are {count} {what} and {len(names)} labels: give one label each")
    return names


def gallery_mean(
    encoder: Any,
    loader: Any = None,
    *,
    similarity: str | Similarity | Callable[..., Tensor] = "cosine",
) -> GalleryMean:
    """Reduce a gallery to one row, batch by batch, holding one batch at a time.

    Use it as ``contrast=gallery_mean(encoder, loader)``: "why this one rather than any?". Scores
    and maps are those with all embeddings of the gallery as contrast. ``gallery_mean(embeddings)``
    is for a gallery that is embedded already.

    Args:
        encoder: As for :class:`~fam_plugins.SimilarityModel`; run in eval mode, without gradient.
            Its training mode is then restored.
        loader: Batches of images, tuples or lists that start with them, or dicts of ``image``,
            ``images``, ``img`` or ``pixel_values``, moved to the encoder's device and dtype. Its
            ``len``, if any, sets the length of the progress bar. Or embeddings ``[M, D]``, a
            tensor or an array; a memory-mapped one is read in parts.
        similarity: What the mean will be used with.

    Raises:
        TypeError: If a batch holds no tensor of images, or the encoder returns no tensor.
        ValueError: On an unknown similarity; one without such a form, as ``"euclidean"`` and
            functions of your own; an empty loader; embeddings that are not finite.

    Example:
        >>> batches = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]])]
        >>> gallery_mean(nn.Flatten(), batches).row
        tensor([[0.5000, 0.5000]])
        >>> gallery_mean(torch.tensor([[3.0, 0.0], [0.0, 5.0]]), similarity="dot").row
        tensor([[1.5000, 2.5000]])
    """
    chosen = as_similarity(similarity)
    check_averages(chosen)
    if loader is None:
        if isinstance(encoder, (nn.Module, Mapping)):
            raise TypeError("there is no gallery: pass gallery_mean(encoder, loader)")
        encoder, loader = nn.Identity(), encoder
    encoder = as_encoder(encoder)
    with eval_mode(encoder):
        return mean_of(chosen, _gallery(encoder, loader))


def _gallery(encoder: nn.Module, loader: Any) -> Iterator[Tensor]:
    """What :func:`gallery_mean` was given, as embeddings ``[B, D]``, part by part."""
    if is_on_disk(loader):
        yield from Gallery(loader).parts()
        return
    if isinstance(loader, (Tensor, np.ndarray)):
        yield embed_once(encoder, as_tensor(loader, "gallery"), "gallery")
        return
    if isinstance(loader, str) or not isinstance(loader, Iterable):
        kind = type(loader).__name__
        raise TypeError(f"a {kind} gives no batches: pass a DataLoader, or embeddings [M, D]")
    for batch in with_progress(loader, "averaging the gallery"):
        found = embed(encoder, at_home(batch_parts(batch)[0], encoder, "images of the loader"))
        check_embeddings(found, what="gallery embedding")
        yield found


def embed_contrast(
    encoder: nn.Module,
    contrast: Tensor | Mapping[str, Any] | GalleryMean,
    similarity: Similarity,
    chunk_size: int = 32,
    *,
    width: int | None = None,
    **reading: Any,
) -> Tensor | GalleryMean:
    """A contrast as a user gives it, reduced to one row where the similarity has such a form."""
    if not isinstance(contrast, GalleryMean):
        rows = embed_once(encoder, contrast, "contrast", chunk_size, width=width, **reading)
        return reduced(similarity, rows)
    contrast.check(similarity)
    check_embeddings(contrast.row, width=width, what="contrast")
    return contrast.to(at_home(contrast.row, encoder, "contrast"))


def embed_once(
    encoder: nn.Module,
    images_or_embeddings: Tensor | Mapping[str, Any],
    what: str,
    chunk_size: int = 32,
    *,
    width: int | None = None,
    **reading: Any,
) -> Tensor:
    """Images ``[S, ...]`` (or embeddings, taken as they are) -> ``[S, D]``, detached and copied.

    Images are embedded in chunks, in eval mode, without gradient, with a progress bar; an image
    processor's output is taken for its tensors. ``reading`` is passed on to ``embed``.
    """
    check_chunk_size(chunk_size)
    # Outside inference mode, so that the result can take part in autograd later on.
    with torch.inference_mode(False), torch.no_grad():
        first, *further = tensors_of(images_or_embeddings, what)
        given = at_home(first, encoder, what)
        if given.dim() < 2:
            raise ValueError(
                f"{what} of shape {tuple(given.shape)}: pass embeddings [N, D] or images "
                "[N, C, H, W]; a single one needs a first dimension (x[None])"
            )
        if given.shape[0] == 0:
            raise ValueError(f"{what} are empty: pass at least one")
        if given.dim() > 2:
            with eval_mode(encoder):
                parts = [torch.split(t.to(given.device), chunk_size) for t in (given, *further)]
                chunks = [
                    embed(encoder, *chunk, **reading).clone()
                    for chunk in with_progress(list(zip(*parts, strict=True)), f"embedding {what}")
                ]
            found = torch.cat(chunks)
        else:
            found = given.clone()
    check_embeddings(found, width=width, what=what)
    return found


def check_chunk_size(chunk_size: object) -> None:
    """Refuse what is no number of images or texts per forward pass."""
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be an int of at least 1, not {chunk_size!r}")


def tensors_of(given: Any, what: str) -> tuple[Tensor, ...]:
    """What a model takes: images or embeddings alone, or all of an image processor's output."""
    return pixels_of(given, what) if isinstance(given, Mapping) else (as_tensor(given, what),)


def as_tensor(values: Any, what: str) -> Tensor:
    """What a user gave as a tensor; refused where that loses a part of it."""
    if np.ma.isMaskedArray(values):
        raise TypeError(f"{what} are a masked array: drop the masked rows, or fill them")
    try:
        # A copy, because torch warns of arrays that cannot be written, such as memory-mapped ones.
        return values if isinstance(values, Tensor) else torch.tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{what} must be a tensor or an array, not {type(values).__name__}: for an image "
            "torchvision's to_tensor(image), for a list torch.stack(images)"
        ) from error


def at_home(given: Tensor, encoder: nn.Module, what: str) -> Tensor:
    """The same values where the encoder's weights are, in their floating dtype."""
    check_floats(given, what)
    device, dtype = place_of(encoder)
    return given.detach().to(device=device, dtype=dtype or given.dtype)


def batch_parts(batch: Any, where: str = "the loader") -> tuple[Any, ...]:
    """A batch's images (it is them, starts with them or names them), then what comes with them."""
    images, *rest = batch if isinstance(batch, (tuple, list)) and batch else (batch,)
    found = f"a {type(images).__name__}"
    if isinstance(images, Mapping):
        found = f"a dict of {', '.join(map(repr, images)) or 'nothing'}"
        pixels, labels = ([name for name in kind if name in images] for kind in _NAMES)
        if len(pixels) == 1 and len(labels) < 2:
            images, *rest = images[pixels[0]], *(images[name] for name in labels), *rest
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{where} gives {found}: it must give image tensors, tuples that start with one, or "
            f"dicts with one of {_NAMES[0]} and at most one of {_NAMES[1]}"
        )
    return (images, *rest)
