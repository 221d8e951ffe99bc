"""What a loader yields, checked before it reaches a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fam_plugins.cape.loss import check_labels
from fam_plugins.cape.model import CapeModel

__all__ = ["FeatureCache", "checked_batches", "computed_features", "refuse_one_shot"]


def checked_batches(
    loader: Iterable[Any], model: CapeModel, *, labelled: bool
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield ``(images, labels)`` on the model's device and in its type.

    Args:
        loader: yields image batches ``[B, ...]`` or tuples that start with images (and labels).
        model: whose device and floating type the images are moved to.
        labelled: whether labels are needed; they are ignored otherwise.

    Yields:
        Images and, when ``labelled``, labels ``[B]`` int64, else None.

    Raises:
        TypeError: something other than tensors, or images that are not floating point.
        ValueError: wrong shapes, NaN or infinity in an image, labels missing or out of range, or
            a loader that yields nothing.
    """
    parameter = next(model.parameters())
    count = 0
    for number, batch in enumerate(loader):
        where = f"batch {number} of the loader"
        images, labels = _split(batch, where)
        if not images.is_floating_point():
            raise TypeError(
                f"{where}: images are {images.dtype}; scale and normalise them as in training, "
                "images.float() / 255 for bytes"
            )
        if images.ndim not in (4, 5) or images.numel() == 0:
            raise ValueError(
                f"{where}: images are {tuple(images.shape)}, expected a batch [B, C, H, W]; wrap "
                "the data set in torch.utils.data.DataLoader"
            )
        if not torch.isfinite(images).all():
            raise ValueError(
                f"{where}: images hold NaN or infinity; repair or drop them (check "
                "torch.isfinite(images))"
            )
        images = images.to(device=parameter.device, dtype=parameter.dtype, non_blocking=True)
        if labelled:
            if labels is None:
                raise ValueError(f"{where} has no tensor of labels: yield (images, labels)")
            check_labels(labels, images=images.shape[0], classes=model.head.num_classes)
            labels = labels.to(device=parameter.device, dtype=torch.int64, non_blocking=True)
        count += 1
        yield images, labels if labelled else None
    if count == 0:
        raise ValueError(
            "the loader is empty: check the data set (and drop_last with few images), or, when it "
            "is a generator, that it was not used up before"
        )


def refuse_one_shot(loader: Iterable[Any]) -> None:
    """Refuse an iterator, which would be empty from the second epoch on."""
    if iter(loader) is loader:
        raise TypeError(
            "the loader is an iterator and can be read once only: pass a DataLoader or a list of "
            "batches, or cache=True"
        )


def computed_features(model: CapeModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Feature map and the model's own logits of checked images, without gradients.

    Raises:
        ValueError: the model did not accept the images.
    """
    try:
        with torch.no_grad():
            return model.features_and_logits(images)
    except torch.cuda.OutOfMemoryError:
        raise  # no fault of the images: a smaller batch is what helps
    except RuntimeError as error:
        raise ValueError(
            f"the model did not accept images of shape {tuple(images.shape)}: yield what it was "
            f"trained on ({error})"
        ) from error


def _split(batch: Any, where: str) -> tuple[Tensor, Tensor | None]:
    parts = batch if isinstance(batch, (tuple, list)) else (batch,)
    images = parts[0] if parts else None
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{where} is a {type(batch).__name__} without an image tensor in front: yield images "
            "or (images, labels)"
        )
    labels = parts[1] if len(parts) > 1 else None
    return images, labels if isinstance(labels, Tensor) else None


class FeatureCache:
    """Feature maps and the teacher's logits of a whole data set, in host memory.

    Args:
        batches: feature maps ``[B, C, h, w]`` and logits ``[B, K]``; what is kept has the size of
            all maps together, and takes twice that while they are collected.

    Raises:
        ValueError: maps of different sizes.
    """

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        features: list[Tensor] = []
        logits: list[Tensor] = []
        for batch_features, batch_logits in batches:
            self._device = batch_features.device
            if features and batch_features.shape[1:] != features[0].shape[1:]:
                raise ValueError(
                    f"feature maps of {tuple(features[0].shape[1:])} and "
                    f"{tuple(batch_features.shape[1:])} cannot share a cache: resize the images "
                    "to one size, or cache=False"
                )
            features.append(batch_features.cpu())
            logits.append(batch_logits.cpu())
        self._batch_size = len(features[0])
        self._features = torch.cat(features)
        self._logits = torch.cat(logits)

    def __len__(self) -> int:
        """Number of batches, of the size that came first."""
        return math.ceil(len(self._features) / self._batch_size)

    def shuffled(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all maps and logits in new batches, on the device they came from.

        Args:
            epoch: seeds the order, so that a resumed fit goes on as if it had never stopped.
        """
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(self._features), generator=generator)
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            yield self._features[chosen].to(self._device), self._logits[chosen].to(self._device)
