"""A folder of Parquet parts, each there as a whole or not at all: writing, resuming, reading."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from fam_plugins.dataset.rows import load_extra

__all__ = ["Store", "StoredMaps", "read_maps", "to_fiftyone"]


class Store:
    """Adds parts, on a thread of its own; ``done`` are the ids that were there before.

    Names carry the ``RANK`` that torchrun sets, so that its processes share a folder.
    """

    def __init__(self, out: str | Path, settings: str, rows_per_part: int) -> None:
        self.done = ids_in(out, settings)
        self._out, self._pq = Path(out), load_extra("pyarrow.parquet", "dataset")
        self._out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out).close()  # refuses a read-only folder before any work
        self._prefix = f"part-{int(os.environ.get('RANK', 0)):05d}-"
        numbers = [int(part.stem[11:]) for part in self._out.glob(f"{self._prefix}*")]
        self._next, self._rows_per_part = max(numbers, default=-1) + 1, rows_per_part
        self._tables: list[Any] = []
        self._thread, self._ahead = ThreadPoolExecutor(1), list[Future[None]]()

    def add(self, table: Any) -> None:
        """Take rows of whole images; waits while the disk is more than a part behind."""
        self._tables.append(table)
        if sum(len(table) for table in self._tables) >= self._rows_per_part:
            self._flush(ahead=1)

    def _flush(self, ahead: int) -> None:
        if self._tables:
            path = self._out / f"{self._prefix}{self._next:06d}.parquet"
            self._ahead.append(self._thread.submit(self._write, path, self._tables))
            self._tables, self._next = [], self._next + 1
        while len(self._ahead) > ahead:
            self._ahead.pop(0).result()

    def _write(self, path: Path, tables: list[Any]) -> None:
        hidden = path.with_name(f".{path.name}")
        try:
            if path.exists():
                raise FileExistsError("another run writes here under the same RANK")
            with open(hidden, "wb") as file:
                self._pq.write_table(load_extra("pyarrow", "dataset").concat_tables(tables), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(hidden, path)
        except OSError as error:
            hidden.unlink(missing_ok=True)
            fix = "make room or choose another folder, and run again: whole parts are kept"
            raise OSError(f"{path} cannot be written ({error}): {fix}") from error

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._flush(ahead=0)
        finally:
            self._thread.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class StoredMaps:
    """What a folder holds: ``dataset``, a :class:`pyarrow.dataset.Dataset`, and ``settings``.

    Columns, a row per image and reference: ``id``, ``reference`` and its ``label``, ``score``,
    ``coverage`` (the share of the score that the map sums to; null for a rule that does not add
    up), ``map`` (float16) and its ``shape``, ``error`` (why an image has no map; all else is null).
    """

    dataset: Any
    settings: dict[str, Any]

    def rows(self, filter: Any = None) -> Iterator[dict[str, Any]]:
        """Each row as a dict, its map as an array ``[h, w]``; ``filter`` as in pyarrow."""
        for batch in self.dataset.to_batches(filter=filter):
            values, at = batch.column("map").flatten().to_numpy(), 0
            for row in batch.drop_columns(["map"]).to_pylist():
                end = at + int(np.prod(shape)) if (shape := row.pop("shape")) is not None else at
                row["map"], at = None if shape is None else values[at:end].reshape(shape), end
                yield row


def read_maps(out: str | Path) -> StoredMaps:
    """Open what ``explain_dataset`` or ``explain_with_ray`` wrote, without loading the maps.

    Raises:
        FileNotFoundError: If there are no parts.
        ValueError: If a part is not theirs, or of other settings than the first.

    Example:
        >>> stored = read_maps("maps")  # doctest: +SKIP
        >>> [row["map"].shape for row in stored.rows()]  # doctest: +SKIP
        [(4, 4), (4, 4)]
    """
    parts, settings = parts_in(out)
    if not parts:
        raise FileNotFoundError(f"{out} holds no maps: explain_dataset(explainer, items, out)")
    dataset = load_extra("pyarrow.dataset", "dataset").dataset([*map(str, parts)])
    return StoredMaps(dataset, json.loads(settings))


def parts_in(out: str | Path, settings: str = "") -> tuple[list[Path], str]:
    """The parts by name, which a dot begins until one is whole, and the settings of all of them."""
    parts = sorted(Path(out).glob("[!.]*.parquet"))
    for path in parts:
        found = load_extra("pyarrow.parquet", "dataset").read_schema(path).metadata or {}
        there = found.get(b"fam_plugins", b"{}").decode()
        old, new = json.loads(there), json.loads(settings or there)
        if apart := [k for k in {**old, **new} if old.get(k) != new.get(k) or not old]:
            both = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in apart)
            raise ValueError(f"{path} has other settings ({both}): choose another folder for out")
        settings = settings or there
    return parts, settings


def ids_in(out: str | Path, settings: str) -> set[str]:
    """The ids in a folder, refused if an image is in two parts."""
    done: set[str] = set()
    for path in parts_in(out, settings)[0]:
        part = load_extra("pyarrow.parquet", "dataset").read_table(path, columns=["id"])
        if both := done & (ids := set(part.column("id").to_pylist())):
            raise ValueError(
                f"{path} repeats image {both.pop()!r}: start anew, and give each process images of "
                "its own (DistributedSampler repeats some)"
            )
        done |= ids
    return done


def to_fiftyone(
    samples: Any, out: str | Path, field: str = "fam", *, key: str = "filepath"
) -> None:
    """Give each sample of FiftyOne the map of its best-scored reference, as a ``Heatmap``.

    Args:
        samples: A ``fiftyone.Dataset`` or view.
        out: A folder for :func:`read_maps`.
        field: The field to write.
        key: The field that holds the image's id.
    """
    heatmap, best = load_extra("fiftyone", "fiftyone").Heatmap, dict[str, Any]()
    for row in read_maps(out).rows():
        if row["score"] is not None and row["score"] >= best.get(row["id"], row)["score"]:
            best[row["id"]] = row
    for sample in samples.iter_samples(autosave=True):
        if str(sample[key]) in best:
            values = best[str(sample[key])]["map"].astype(np.float32)
            most = float(abs(values).max())
            sample[field] = heatmap(map=values, range=[-most, most])
