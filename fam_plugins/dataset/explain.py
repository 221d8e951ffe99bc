"""Whole data sets: loading, explaining and writing side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fam_plugins.core.eval_mode import eval_mode, place_of
from fam_plugins.core.messages import with_progress
from fam_plugins.core.scores import check_floats
from fam_plugins.dataset.rows import Explain
from fam_plugins.dataset.store import Store

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
) -> None:
    """Write the maps of a data set to Parquet, one forward pass per image; run again to resume.

    A stop leaves whole parts, whose images are not explained again. Under torchrun each process
    takes images of its own, ``Subset(data, range(rank, len(data), world_size))``.

    Args:
        explainer: A :class:`~fam_plugins.LayerFam` with a layer.
        items: A Dataset or iterable of ``(id, image)``, a string or int and a tensor, or a
            DataLoader of ``(ids, images)``. A Dataset's ``ids``, one per row, save loading again.
        out: A folder, made if need be, for :func:`read_maps`.
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
        TypeError: If explainer or items are something else.
        ValueError: If ``out`` has other settings, an id comes twice, there are no items, images of
            a batch differ in shape, one is unreadable, or an option is out of range.

    Example:
        >>> explainer = LayerFam(model, "layer4", rule="additive")  # doctest: +SKIP
        >>> explain_dataset(explainer, [("a.png", image)], "maps")  # doctest: +SKIP
    """
    if on_error not in ("raise", "record") or min(batch_size, rows_per_part) < 1:
        raise ValueError('on_error must be "raise" or "record", sizes must be at least 1')
    explain, seen, record = Explain(explainer, top_k, targets), set[str](), on_error == "record"
    with eval_mode(explain.module), ThreadPoolExecutor(1) as thread:
        store = Store(out, explain.settings, rows_per_part, thread)
        pin = "cuda" in str(place_of(explain.module)[0])
        batches = _batches(items, batch_size, num_workers, record, store.done, pin)
        for ids, images, failed in with_progress(batches, "explaining") if progress else batches:
            for name in (*ids, *dict(failed)):
                if name in seen:
                    raise ValueError(f"id {name!r} comes twice: give every image one of its own")
                seen.add(name)
            new = [row for row, name in enumerate(ids) if name not in store.done]
            rest = [one for one in failed if one[0] not in store.done]
            if new or rest:
                some = images if len(new) == len(ids) else images[new]
                store.add(explain([ids[row] for row in new], some, rest))
        store.flush()
    if not seen | store.done:
        raise ValueError("there are no items: an empty folder, or an iterator that was used up?")


def stacked(items: Iterable[Any], record: bool = False) -> Any:
    """Pairs of id and image -> ids, images ``[n, ...]`` or ``None``, and ``(id, reason)`` pairs."""
    ids, images, failed = list[str](), list[Tensor](), list[tuple[str, Any]]()
    for item in items:
        pair: Any = item if isinstance(item, (tuple, list)) and len(item) == 2 else (None, None)
        name, image = pair[0].tolist() if hasattr(pair[0], "tolist") else pair[0], pair[1]
        if not isinstance(name, (str, int)):
            raise TypeError("items must be pairs (id, image), the id a string or an int")
        if isinstance(image, Tensor) and not image.isfinite().all():
            image = "it holds NaN or infinite values"
        if isinstance(image, str) and record:
            failed.append((str(name), image))
            continue
        if isinstance(image, str):
            raise ValueError(f'image {name!r}: {image}; on_error="record" goes on without it')
        check_floats(image, f"image {name!r}")
        if image.shape != (images or [image])[0].shape:
            fix = "resize by a transform, or pass batch_size=1 for several sizes"
            raise ValueError(f"image {name!r} is {tuple(image.shape)}, unlike those before: {fix}")
        ids.append(str(name))
        images.append(image)
    return ids, torch.stack(images) if images else None, failed


def _batches(items: Any, size: int, workers: int, record: bool, done: set[str], pin: bool) -> Any:
    if isinstance(items, DataLoader):
        return (stacked(zip(*batch, strict=True), record) for batch in items)
    listed = hasattr(items, "__len__") and hasattr(items, "__getitem__")
    # A generator of its own: loading must not move the user's random numbers.
    options: Any = {"batch_size": None, "num_workers": workers, "generator": torch.Generator()}
    if listed and not isinstance(items, (IterableDataset, Mapping)):
        rows: Any = range(len(items))
        if done and hasattr(items, "ids"):
            rows = [row for row in rows if str(items.ids[row]) not in done]
        parts: Any = [rows[at : at + size] for at in range(0, len(rows), size)]
        return DataLoader(
            parts, pin_memory=pin, collate_fn=partial(_load, items, record), **options
        )
    each = iter(DataLoader(items, **options) if workers else items)
    return (stacked(some, record) for some in iter(lambda: list(islice(each, size)), []))


def _load(items: Any, record: bool, rows: Iterable[int]) -> Any:
    def one(row: int) -> Any:
        try:
            return items[row]
        except Exception as error:
            if not record:
                raise
            name = items.ids[row] if hasattr(items, "ids") else f"item {row}"
            return name, f"{type(error).__name__}: {error}"

    return stacked(map(one, rows), record)
