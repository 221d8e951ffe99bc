"""Embeddings that stay on disk: a gallery of any size, of which only what is needed is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fam_plugins.core.messages import with_progress

__all__ = ["Gallery", "is_on_disk"]


def is_on_disk(references: object) -> bool:
    """Whether references are a memory-mapped array, to be read in parts instead of copied."""
    return isinstance(references, np.memmap)


class Gallery:
    """A memory-mapped array of embeddings ``[N, D]``, kept by reference, also by a deep copy.

    ``values_per_part`` bounds how many numbers :meth:`chunks` reads at a time (at least a row), and
    so the memory that scoring the whole gallery takes.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "gallery.npy"
        >>> np.save(path, np.eye(3, dtype=np.float32))
        >>> gallery = Gallery(np.load(path, mmap_mode="r"))
        >>> gallery.rows(torch.tensor([2, 0]), like=torch.zeros(1))
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """

    def __init__(self, array: Any) -> None:
        if array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise TypeError(
                f"the gallery has dtype {array.dtype}: store embeddings as float16, float32 or "
                "float64 (quantised codes must be decoded first)"
            )
        if array.ndim != 2 or len(array) == 0:
            raise ValueError(
                f"the gallery has shape {array.shape}: pass embeddings [N, D] with at least one "
                "row; np.memmap without shape= is flat, so give it shape=(N, D)"
            )
        self.array = array
        self.values_per_part = 2**22

    def __len__(self) -> int:
        return len(self.array)

    def __deepcopy__(self, _memo: dict[int, Any]) -> Gallery:
        return self

    @property
    def shape(self) -> torch.Size:
        """``[N, D]``."""
        return torch.Size(self.array.shape)

    def rows(self, indices: Tensor, *, like: Tensor) -> Tensor:
        """Copy rows ``[n]`` -> ``[n, D]``, on the device and in the dtype of ``like``."""
        wanted = indices.cpu().numpy()
        return self._checked(np.array(self.array[wanted]), wanted, like)

    def chunks(self, *, like: Tensor) -> Iterator[Tensor]:
        """Copy all rows, in parts of at most :attr:`values_per_part` numbers."""
        step = max(1, self.values_per_part // self.shape[1])
        for start in range(0, len(self), step):
            part = np.array(self.array[start : start + step])
            yield self._checked(part, np.arange(start, start + len(part)), like)

    def parts(self) -> Iterable[Tensor]:
        """All rows as :meth:`chunks`, in float64 on the host, with a progress bar."""
        like = torch.empty(0, dtype=torch.float64, device="cpu")
        return with_progress(self.chunks(like=like), "averaging the gallery")

    def _checked(self, part: Any, numbers: Any, like: Tensor) -> Tensor:
        """``[n, D]`` as a tensor, refused with the row's number where it cannot be compared."""
        rows = torch.from_numpy(part.astype(part.dtype.newbyteorder("="), copy=False)).to(like)
        bad = ~torch.isfinite(rows).all(dim=1)
        if bad.any():
            raise ValueError(
                f"gallery row {numbers[int(bad.nonzero()[0])]} holds NaN, infinite values, or "
                f"values beyond {like.dtype}: write it again, or leave it out"
            )
        return rows
