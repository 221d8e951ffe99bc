"""A folder of Parquet parts, each there as a whole or not at all: writing, resuming, reading."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from fam_plugins.dataset.rows import load_extra

__all__ = ["Store", "ids_in", "read_maps", "to_fiftyone"]


class Store:
    """Adds parts, on another thread; ``done`` are the ids that were there before."""

    def __init__(self, out: str | Path, settings: str, rows_per_part: int, thread: Any) -> None:
        self.done, self._out = ids_in(out, settings), Path(out)
        self._out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out).close()  # refuses a read-only folder before any work
        # torchrun sets RANK: its processes share a folder.
        self._prefix = f"part-{int(os.environ.get('RANK', 0)):05d}-"
        numbers = [int(part.stem[11:]) for part in self._out.glob(f"{self._prefix}*")]
        self._next, self._per_part = max(numbers, default=-1) + 1, rows_per_part
        self._tables, self._ahead, self._thread = list[Any](), list[Any](), thread

    def add(self, table: Any) -> None:
        """Take rows of whole images; waits while the disk is more than a part behind."""
        self._tables.append(table)
        if sum(map(len, self._tables)) >= self._per_part:
            self.flush(ahead=1)

    def flush(self, ahead: int = 0) -> None:
        """Write what there is; waits until no more than so many parts are ``ahead``."""
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
                table = load_extra("pyarrow").concat_tables(tables)
                load_extra("pyarrow.parquet").write_table(table, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(hidden, path)
        except OSError as error:
            hidden.unlink(missing_ok=True)
            fix = "make room or choose another folder, and run again: whole parts are kept"
            raise OSError(f"{path} cannot be written ({error}): {fix}") from error


def parts_in(out: str | Path, settings: str | None = None) -> list[Path]:
    """The parts by name, refused unless all are of these settings, or else of the first's."""
    parts = sorted(Path(out).glob("[!.]*.parquet"))
    for path in parts:
        written = load_extra("pyarrow.parquet").read_schema(path).metadata or {}
        old = json.loads(written.get(b"fam_plugins", b'{"rows": "not of this package"}'))
        new = json.loads(settings) if settings else old | {"rows": None}
        differ = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if differ:
            both = "; ".join(f"{key} {old.get(key)!r}, now {new.get(key)!r}" for key in differ)
            raise ValueError(f"{path} has other settings: {both}; choose another folder")
        settings = json.dumps(new)
    return parts


def ids_in(out: str | Path, settings: str) -> set[str]:
    """The ids in a folder, refused if an image is in two parts."""
    done = set[str]()
    for part in parts_in(out, settings):
        table = load_extra("pyarrow.parquet").read_table(part, columns=["id"])
        if twice := done & (ids := set(table.column("id").to_pylist())):
            fix = "start anew, each process with images of its own (no DistributedSampler)"
            raise ValueError(f"{part} repeats image {twice.pop()!r} of another part: {fix}")
        done |= ids
    return done


def read_maps(out: str | Path, filter: Any = None) -> tuple[Any, Iterator[dict[str, Any]]]:
    """Open what ``explain_dataset`` or ``explain_with_ray`` wrote.

    Columns, a row per image and reference: ``id``, ``reference`` and its ``label``, ``score``,
    ``coverage`` (the sum of the map in parts of the score; null for a rule that does not add up),
    ``map`` and its ``shape``, ``error`` (why an image has no map: all else is null).

    Args:
        out: The folder.
        filter: Rows to take, an expression of pyarrow; all by default.

    Returns:
        A :class:`pyarrow.dataset.Dataset`, whose schema's metadata tells the settings, and an
        iterator over its rows, dicts whose ``map`` is a float16 array ``[h, w]``.

    Raises:
        FileNotFoundError: If there are no parts.
        ValueError: If a part is not theirs, or of other settings than the first.

    Example:
        >>> dataset, rows = read_maps("maps")  # doctest: +SKIP
        >>> [row["map"].shape for row in rows]  # doctest: +SKIP
        [(4, 4), (4, 4)]
    """
    if not (parts := parts_in(out)):
        raise FileNotFoundError(f"{out} holds no maps: explain_dataset(explainer, items, out)")
    dataset = load_extra("pyarrow.dataset").dataset([*map(str, parts)])
    return dataset, (row for part in dataset.to_batches(filter=filter) for row in _rows(part))


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    values = batch.column("map").flatten().to_numpy()
    for row in batch.drop_columns(["map"]).to_pylist():
        if row["shape"] is not None:
            one, values = np.split(values, [int(np.prod(row["shape"]))])
            row["map"] = one.reshape(row["shape"])
        yield {"map": None} | row


def to_fiftyone(samples: Any, out: str | Path, field: str = "fam", key: str = "filepath") -> None:
    """Write a ``Heatmap`` of its best-scored reference to each of FiftyOne's samples.

    ``key`` is the sample's field that holds the image's id, ``field`` the one that is written.
    """
    heatmap, best = load_extra("fiftyone", "fiftyone").Heatmap, dict[str, Any]()
    for row in read_maps(out)[1]:
        if row["map"] is not None and row["score"] >= best.get(row["id"], row)["score"]:
            best[row["id"]] = row
    for sample in samples.iter_samples(autosave=True):
        if str(sample[key]) in best:
            values = best[str(sample[key])]["map"].astype(np.float32)
            sample[field] = heatmap(map=values, range=[-abs(values).max(), abs(values).max()])
