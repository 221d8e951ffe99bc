"""The average of a gallery that does not fit into memory, as a contrast."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_plugins.distances import as_similarity
from fam_plugins.eval_mode import eval_mode
from fam_plugins.place import place_of
from fam_plugins.progress import with_progress
from fam_plugins.references import embed
from fam_plugins.similarity import Similarity, check_embeddings

__all__ = ["gallery_mean"]


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


def _floating(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.get_default_dtype()


def _images(batch: Any) -> Tensor:
    first = batch[0] if isinstance(batch, (tuple, list)) and len(batch) > 0 else batch
    if not isinstance(first, Tensor):
        raise TypeError(
            f"the loader gives {type(first).__name__}: it must give image tensors, or tuples whose "
            "first entry is one; for others, (batch['image'] for batch in loader)"
        )
    return first
