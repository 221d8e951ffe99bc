"""Features computed once, so that an epoch of post-fitting costs the head alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["FeatureCache"]


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
