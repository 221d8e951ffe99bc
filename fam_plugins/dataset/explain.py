"""Whole data sets: loading, explaining and writing side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from fam_plugins.core.eval_mode import eval_mode, place_of
from fam_plugins.core.messages import with_progress
from fam_plugins.dataset.rows import Explain
from fam_plugins.dataset.store import Store, StoredMaps, read_maps

__all__ = ["explain_dataset", "stacked"]


def explain_dataset(
    explainer: Any,
    items: Any,
    out: str | Path,
    *,
    top_k: int | None = None,
    targets: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    on_error: str = "raise",
    progress: bool = True,
    rows_per_part: int = 2**14,
) -> StoredMaps:
    """Write the maps of a data set to Parquet, one forward pass per image; run again to resume.

    A kill or an error leaves whole parts, whose images are not explained again. Under torchrun each
    process takes images of its own, ``Subset(data, range(rank, len(data), world_size))``.

    Args:
        explainer: A :class:`~fam_plugins.LayerFam` with a layer.
        items: A Dataset or iterable of ``(id, image)``, a string or int and a tensor, or a
            DataLoader of ``(ids, images)``. A Dataset's ``ids``, one per row, save loading again.
        out: A folder, made if need be.
        top_k: Explain the references that score best; by default all.
        targets: Or one reference per image: a dict from ids to indices or labels.
        batch_size: Images per pass, halved where memory runs out.
        num_workers: Processes that load.
        on_error: ``"record"`` writes why an image has no map: a Dataset fails to load it, it holds
            NaN, or the item has a string, the reason, in place of it.
        progress: Show a bar.
        rows_per_part: What is kept in memory until it is written, beside all ids.

    Raises:
        ImportError: If pyarrow, the extra ``dataset``, is missing.
        OSError: If ``out`` cannot be written.
        TypeError: If explainer, targets or items are something else.
        ValueError: If ``out`` has other settings, an id comes twice, there are no items, images of
            a batch differ in shape, one is unreadable, or an option is out of range.

    Example:
        >>> explainer = LayerFam(model, "layer4", rule="additive")  # doctest: +SKIP
        >>> stored = explain_dataset(explainer, [("a.png", image)], "maps")  # doctest: +SKIP
    """
    if on_error not in ("raise", "record") or min(batch_size, rows_per_part) < 1:
        raise ValueError('on_error must be "raise" or "record", sizes must be at least 1')
    explain, seen = Explain(explainer, top_k, targets), set[str]()
    store = Store(out, explain.settings, rows_per_part)
    batches = _batches(explain, items, batch_size, num_workers, on_error == "record", store.done)
    mode = eval_mode(explain.model) if isinstance(explain.model, nn.Module) else nullcontext()
    with mode, store:
        for ids, images, failed in with_progress(batches, "explaining") if progress else batches:
            for name in (*ids, *(name for name, _ in failed)):
                if name in seen:
                    raise ValueError(f"id {name!r} comes twice: give every image one of its own")
                seen.add(name)
            new = [row for row, name in enumerate(ids) if name not in store.done]
            failed = [one for one in failed if one[0] not in store.done]
            if len(new) < len(ids):
                ids, images = [ids[row] for row in new], images[new] if new else None
            if new or failed:
                store.add(explain(ids, images, failed))
    if not seen and not store.done:
        raise ValueError("there are no items: an empty folder, or an iterator that was used up?")
    return read_maps(out)


def _batches(
    explain: Explain, items: Any, size: int, num_workers: int, record: bool, done: set[str]
) -> Iterable[Any]:
    if isinstance(items, DataLoader):
        return (stacked(zip(*batch, strict=True), record) for batch in items)
    listed = hasattr(items, "__getitem__") and hasattr(items, "__len__")
    if listed and not isinstance(items, IterableDataset):
        module = isinstance(explain.model, nn.Module)
        pin = module and "cuda" in str(place_of(explain.model)[0])
        loaded: Any = _Batches(items, size, record, done)
        return DataLoader(loaded, batch_size=None, num_workers=num_workers, pin_memory=pin)
    each = iter(
        DataLoader(items, batch_size=None, num_workers=num_workers) if num_workers else items
    )
    return (stacked(some, record) for some in iter(lambda: list(islice(each, size)), []))


class _Batches:
    """Loads a batch of rows at a time, those known to be done left out."""

    def __init__(self, items: Any, size: int, record: bool, done: set[str]) -> None:
        self._items, self._ids, self._record = items, getattr(items, "ids", None), record
        rows = [
            i
            for i in range(len(items))
            if not done or not self._ids or str(self._ids[i]) not in done
        ]
        self._rows = [rows[i : i + size] for i in range(0, len(rows), size)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Any:
        return stacked(map(self._load, self._rows[number]), self._record)

    def _load(self, row: int) -> Any:
        try:
            return self._items[row]
        except Exception as error:
            if not self._record:
                raise
            return self._ids[
                row
            ] if self._ids else f"item {row}", f"{type(error).__name__}: {error}"


def stacked(items: Iterable[Any], record: bool = False) -> Any:
    """Pairs of id and image -> ids, images ``[n, ...]`` or ``None``, and ``(id, reason)`` pairs."""
    ids, images, failed = list[str](), list[Tensor](), list[tuple[str, str]]()
    for item in items:
        pair = isinstance(item, (tuple, list)) and len(item) == 2
        name, image = item if pair else cast(Any, (None, None))
        name = name.item() if hasattr(name, "item") else name
        if not isinstance(name, (str, int)):
            raise TypeError("items must be pairs (id, image), the id a string or an int")
        if isinstance(image, Tensor) and not image.isfinite().all():
            image = "it holds NaN or infinite values"
        if isinstance(image, str) and record:
            failed.append((str(name), image))
        elif isinstance(image, str):
            raise ValueError(f'image {name!r}: {image}; on_error="record" goes on without it')
        elif isinstance(image, Tensor) and image.shape == (images or [image])[0].shape:
            ids.append(str(name))
            images.append(image)
        else:
            raise ValueError(
                f"image {name!r} is {tuple(getattr(image, 'shape', ())) or type(image).__name__}, "
                "not a tensor of the shape of those before it: resize and convert by a transform, "
                "or pass batch_size=1 for several sizes"
            )
    return ids, torch.stack(images) if images else None, failed
