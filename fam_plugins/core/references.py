"""What a query is compared with: embedding images once, prototypes, contrast sets."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_plugins.core.eval_mode import eval_mode, place_of
from fam_plugins.core.messages import with_progress
from fam_plugins.core.similarity import Similarity, as_similarity, check_embeddings

__all__ = ["embed", "embed_once", "gallery_mean", "prototypes", "unique_labels"]


def prototypes(
    embeddings: Tensor,
    labels: Sequence[Hashable] | Tensor,
    similarity: str | Similarity | Callable[..., Tensor] = "cosine",
) -> Tensor:
    """Average the supports of each class into one reference.

    For cosine the mean of the L2-normalised supports (FAM, arXiv 2307.05017: the same as averaging
    the channel contributions over the shots); otherwise the plain mean (ProtoNet, arXiv
    1703.05175).

    Args:
        embeddings: Supports ``[S, D]``.
        labels: One label each; any hashable values, not necessarily 0, 1, 2.
        similarity: The similarity they will be used with.

    Returns:
        ``[N, D]``, detached, one row a class in sorted order of the labels.

    Raises:
        ValueError: On an unknown similarity, another number of labels than embeddings, or
            embeddings that cannot be compared.

    Example:
        >>> prototypes(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), [4, 9, 9])
        tensor([[1., 0.],
                [0., 1.]])
    """
    chosen = as_similarity(similarity)
    _check_matrix(embeddings, "supports")
    names = _listed(labels)
    if len(names) != len(embeddings):
        raise ValueError(
            f"there are {len(embeddings)} supports and {len(names)} labels: give one label each"
        )
    supports = embeddings.detach()
    check_embeddings(supports, allow_zero=not chosen.scale_free, what="support")
    if chosen.scale_free:
        # Through float32, where the squared length of a half-precision vector cannot overflow.
        wide = supports.to(torch.promote_types(supports.dtype, torch.float32))
        supports = nn.functional.normalize(wide, dim=1).to(embeddings.dtype)
    rows = [
        supports[[i for i, name in enumerate(names) if name == label]].mean(dim=0)
        for label in unique_labels(names)
    ]
    return torch.stack(rows)


def unique_labels(labels: Sequence[Hashable] | Tensor) -> list[Any]:
    """Return the distinct labels, sorted; in order of appearance where they cannot be sorted.

    Example:
        >>> unique_labels(["dog", "cat", "dog"])
        ['cat', 'dog']
    """
    distinct = list(dict.fromkeys(_listed(labels)))
    try:
        return sorted(distinct)
    except TypeError:
        return distinct


def embed(encoder: nn.Module, images: Tensor) -> Tensor:
    """Run an encoder and make sure that what it returns are embeddings ``[B, D]``.

    Raises:
        TypeError: If it returns something other than a tensor.
        ValueError: If the batch is empty or the tensor is not ``[B, D]``.

    Example:
        >>> embed(nn.Flatten(), torch.zeros(2, 3, 1, 1)).shape
        torch.Size([2, 3])
    """
    if isinstance(images, Tensor) and images.dim() > 0 and images.shape[0] == 0:
        raise ValueError("the batch is empty: pass at least one image")
    embeddings = encoder(images)
    if not isinstance(embeddings, Tensor):
        raise TypeError(
            f"the encoder returns a {type(embeddings).__name__}, not a tensor: wrap it in a module "
            "whose forward picks the embeddings [B, D] out of it"
        )
    if embeddings.dim() != 2:
        raise ValueError(
            f"the encoder returns a tensor of shape {tuple(embeddings.shape)}, not embeddings "
            "[B, D]: append pooling, such as nn.Sequential(encoder, nn.AdaptiveAvgPool2d(1), "
            "nn.Flatten())"
        )
    if len(embeddings) != len(images):
        raise ValueError(
            f"the encoder returns {len(embeddings)} embeddings for {len(images)} inputs: "
            "a single image needs a batch dimension (image[None])"
        )
    return embeddings


def embed_once(
    encoder: nn.Module, images_or_embeddings: Tensor, what: str, chunk_size: int
) -> Tensor:
    """Turn images into embeddings in chunks, or take embeddings as they are.

    Images are embedded in eval mode and without gradient; the training mode is then restored. A
    progress bar appears when it takes more than two seconds.

    Args:
        encoder: Images ``[S, ...]`` -> embeddings ``[S, D]``.
        images_or_embeddings: A 2-D tensor is taken for embeddings, anything above for images.
        what: What they are, for messages.
        chunk_size: Images per forward pass.

    Returns:
        ``[S, D]``, detached and copied, on the device and in the dtype of the encoder.

    Raises:
        TypeError: If not given a tensor or an array.
        ValueError: If there are none, they have one dimension, or a value is not finite.

    Example:
        >>> embed_once(nn.Flatten(), torch.ones(3, 2, 1, 1), "references", 2).shape
        torch.Size([3, 2])
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    # Outside inference mode, so that the result can take part in autograd later on.
    with torch.inference_mode(False), torch.no_grad():
        given = _as_tensor(images_or_embeddings, what)
        device, dtype = place_of(encoder)
        given = given.detach().to(device=device, dtype=dtype or _floating(given.dtype))
        if given.dim() < 2:
            raise ValueError(
                f"{what} of shape {tuple(given.shape)}: pass embeddings [N, D] or images "
                "[N, C, H, W]; a single one needs a first dimension (x[None])"
            )
        if given.shape[0] == 0:
            raise ValueError(f"{what} are empty: pass at least one")
        if given.dim() == 2:
            check_embeddings(given, what=what)
            return given.clone()
        with eval_mode(encoder):
            chunks = [
                embed(encoder, chunk).clone()
                for chunk in with_progress(torch.split(given, chunk_size), f"embedding {what}")
            ]
        embeddings = torch.cat(chunks)
    check_embeddings(embeddings, what=what)
    return embeddings


def _as_tensor(values: Any, what: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{what} must be a tensor or an array, not {type(values).__name__}: stack a list of "
            "images with torch.stack(images)"
        ) from error


def _check_matrix(embeddings: Tensor, what: str) -> None:
    if not isinstance(embeddings, Tensor) or embeddings.dim() != 2 or embeddings.shape[0] == 0:
        shape = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings)
        raise ValueError(f"{what} must be a tensor [S, D] with at least one row, not {shape}")


def _floating(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.get_default_dtype()


def _listed(labels: Sequence[Hashable] | Tensor) -> list[Any]:
    return labels.tolist() if hasattr(labels, "tolist") else list(labels)


def gallery_mean(
    encoder: nn.Module,
    loader: Iterable[Any],
    *,
    similarity: str | Similarity | Callable[..., Tensor] = "cosine",
) -> Tensor:
    """Average the embeddings of a gallery batch by batch, holding one batch at a time.

    Use it as ``SimilarityModel(..., contrast=gallery_mean(encoder, loader))``: "why this one rather
    than any?". Under ``"dot"`` that subtracts exactly the mean score of the gallery. Under
    ``"cosine"`` it subtracts the cosine to the average direction, which is the mean cosine of the
    gallery scaled up to a vector of length one; under ``"euclidean"`` the score of the average.

    Args:
        encoder: Images ``[B, ...]`` -> embeddings ``[B, D]``; run in eval mode, without gradient.
            Its training mode is then restored.
        loader: Batches of images, or tuples or lists whose first entry are the images, such as a
            :class:`torch.utils.data.DataLoader` gives. Batches are moved to the encoder's device
            and dtype. Its ``len``, if any, sets the length of the progress bar.
        similarity: What the mean will be used with: for ``"cosine"`` embeddings are L2-normalised
            before they are averaged.

    Returns:
        ``[1, D]``, detached, on the device and in the dtype of the embeddings.

    Raises:
        TypeError: If a batch holds no tensor of images, or the encoder returns no tensor.
        ValueError: On an unknown similarity, an empty loader, or embeddings that are not finite
            or, for cosine, zero.

    Example:
        >>> batches = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]])]
        >>> gallery_mean(nn.Flatten(), batches)
        tensor([[0.5000, 0.5000]])
    """
    scale_free = as_similarity(similarity).scale_free
    device, dtype = place_of(encoder)
    total: Tensor | None = None
    count = 0
    like = torch.empty(0)
    with torch.inference_mode(False), torch.no_grad(), eval_mode(encoder):
        for batch in with_progress(loader, "averaging the gallery"):
            images = _images(batch)
            like = embed(encoder, images.to(device=device, dtype=dtype or _floating(images.dtype)))
            check_embeddings(like, allow_zero=not scale_free, what="gallery embedding")
            # In float64 on the CPU: a million float32 summands would lose digits, and not every
            # device has float64.
            rows = like.cpu().double()
            part = (F.normalize(rows, dim=1) if scale_free else rows).sum(dim=0)
            total = part if total is None else total + part
            count += len(rows)
        if total is None:
            raise ValueError("the loader is empty: pass at least one batch of images")
        return (total / count)[None].to(like)


def _images(batch: Any) -> Tensor:
    first = batch[0] if isinstance(batch, (tuple, list)) and len(batch) > 0 else batch
    if not isinstance(first, Tensor):
        raise TypeError(
            f"the loader gives {type(first).__name__}: it must give image tensors, or tuples whose "
            "first entry is one; for others, (batch['image'] for batch in loader)"
        )
    return first
