"""What a loader yields: checked, turned into feature maps, and kept for later epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fam_plugins.cape.model import CapeModel
from fam_plugins.core.eval_mode import place_of
from fam_plugins.core.references import batch_parts
from fam_plugins.core.scores import check_floats

__all__ = ["FeatureCache", "feature_batches"]


def feature_batches(
    loader: Iterable[Any], model: CapeModel
) -> Iterator[tuple[Tensor, Tensor, tuple[Any, ...]]]:
    """Yield per batch the feature map, the model's own logits and what follows the images."""
    number = -1
    for number, batch in enumerate(loader):
        images, *rest = batch_parts(batch, where := f"batch {number} of the loader")
        _check_images(images, where)
        yield *_computed(model, images), tuple(rest)
    if number < 0:
        raise ValueError("the loader is empty: check the data set, drop_last and used-up iterators")


def _check_images(images: Any, where: str) -> None:
    """Refuse what is not a batch of finite images ``[B, C, H, W]`` or volumes."""
    check_floats(images, f"images of {where}")
    if images.dim() not in (4, 5) or images.numel() == 0:
        raise ValueError(
            f"{where}: images must be a batch [B, C, H, W], not {tuple(images.shape)}; wrap the "
            "data set in torch.utils.data.DataLoader"
        )
    if not torch.isfinite(images).all():
        raise ValueError(f"{where}: images hold NaN or infinity; repair or drop them")


def _computed(model: CapeModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Feature map and the model's own logits, without gradients, on the model's device."""
    device, dtype = place_of(model)
    try:
        with torch.no_grad():
            return model.features_and_logits(images.to(device, dtype, non_blocking=True))
    except torch.cuda.OutOfMemoryError:
        raise  # no fault of the images: a smaller batch is what helps
    except RuntimeError as error:
        shape = tuple(images.shape)
        raise ValueError(f"the model did not accept images of shape {shape}: {error}") from error


class FeatureCache:
    """Maps and teacher's logits of a whole data set in host memory; collecting takes twice that."""

    def __init__(self, batches: Iterable[tuple[Any, ...]]) -> None:
        parts: list[tuple[Tensor, Tensor]] = []
        for features, logits, *_ in batches:
            self._device = features.device
            parts.append((features.cpu(), logits.cpu()))
            if features.shape[1:] != parts[0][0].shape[1:]:
                raise ValueError(
                    "feature maps of different sizes cannot share a cache: resize the images to "
                    "one size, or cache=False"
                )
        self._batch_size = len(parts[0][0])
        self._features, self._logits = (torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def __len__(self) -> int:
        """Number of batches, of the size that came first."""
        return math.ceil(len(self._features) / self._batch_size)

    def shuffled(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield maps and logits in new batches, in an order that a resumed fit draws again."""
        generator = torch.Generator("cpu").manual_seed(epoch)
        order = torch.randperm(len(self._features), generator=generator, device="cpu")
        for chosen in torch.split(order, self._batch_size):
            yield self._features[chosen].to(self._device), self._logits[chosen].to(self._device)
