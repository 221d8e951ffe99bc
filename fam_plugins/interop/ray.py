"""Ray Data: the rows of ``explain_dataset`` from many workers, one model each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fam_plugins.dataset.explain import stacked
from fam_plugins.dataset.rows import Explain, load_extra
from fam_plugins.dataset.store import ids_in

__all__ = ["explain_with_ray"]


def explain_with_ray(
    explainer: Any, read: Callable[[], Any], out: str | Path, *, workers: int = 1, **options: Any
) -> None:
    """Write what :func:`fam_plugins.dataset.explain_dataset` writes; run again to resume.

    Ray retries what a lost worker did; what is written is noted in ``out`` + ``.checkpoint``.

    Args:
        explainer: As for ``explain_dataset``; each worker gets a copy.
        read: Makes the ``ray.data.Dataset``; what it reads has ``id``, strings, in the end also
            ``image``, arrays ``[C, H, W]``. A function, as Ray asks what is done when a data set
            is made. Workers share its blocks: a list of names needs ``repartition``.
        out: A folder that all machines see.
        workers: Actors. Four CPUs are left, or Ray would hang: it lists, reads, filters and writes.
        **options: ``top_k``, ``targets``, ``batch_size``, as there; others are for ``map_batches``:
            ``num_gpus=1`` moves each worker's model to a GPU.

    Raises:
        ImportError: If Ray, the extra ``ray``, is missing.
        TypeError: If ``read`` is no function.
        ValueError: If there are too few CPUs; and as for ``explain_dataset``.

    Example:
        >>> read = lambda: ray.data.read_parquet("names.parquet").map(load)  # doctest: +SKIP
        >>> explain_with_ray(explainer, read, "maps", workers=8, num_gpus=1)  # doctest: +SKIP
    """
    ray, data = load_extra("ray", "ray"), load_extra("ray.data", "ray")
    if not callable(read):
        raise TypeError("read must be a function: lambda: ray.data.read_parquet(...).map(load)")
    top_k, targets = options.pop("top_k", None), options.pop("targets", None)
    explain, path = Explain(explainer, top_k, targets), Path(out).resolve()
    beside = path.with_name(f"{path.name}.checkpoint")
    for pending in beside.glob("*.pending.parquet"):  # of a stop: Ray clears it only if it reads
        for part in path.glob(pending.name.replace(".pending.parquet", "*")):
            part.unlink()
        pending.unlink()
    done = ids_in(path, explain.settings)
    if not ray.is_initialized():
        ray.init()
    if (cpus := ray.cluster_resources().get("CPU", 0)) < workers + 4:
        raise ValueError(f"{workers} workers need {workers + 4} CPUs, there are {cpus:g}: add some")
    context = data.DataContext.get_current()
    before, kept = context.checkpoint_config, {"id_column": "id", "checkpoint_path": str(beside)}
    try:
        context.checkpoint_config = kept | {"delete_checkpoint_on_success": False}
        options = {"batch_size": 32, "compute": data.ActorPoolStrategy(size=workers)} | options
        made = read().map_batches(_Worker, fn_constructor_args=[explain, done], **options)
        made.write_parquet(str(path), schema=explain.schema)
    finally:
        context.checkpoint_config = before


class _Worker:
    def __init__(self, explain: Explain, done: set[str]) -> None:
        self._explain, self._done = explain, done
        explain.module.eval().to("cuda" if load_extra("ray", "ray").get_gpu_ids() else None)

    def __call__(self, batch: dict[str, Any]) -> Any:
        pairs = zip(batch["id"], map(torch.tensor, batch["image"]), strict=True)
        table = self._explain(*stacked(pair for pair in pairs if str(pair[0]) not in self._done))
        if table.nbytes > 2**26:  # half of a block: Ray would cut an image's rows apart
            raise ValueError("a batch has over 64 MiB of maps: lower batch_size, or ask for top_k")
        return table
