"""Ray Data: the rows of ``explain_dataset`` from many workers, one model each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fam_plugins.dataset.explain import stacked
from fam_plugins.dataset.rows import Explain, load_extra
from fam_plugins.dataset.store import parts_in

__all__ = ["explain_with_ray"]


def explain_with_ray(
    explainer: Any,
    read: Callable[[], Any],
    out: str | Path,
    *,
    workers: int = 1,
    top_k: int | None = None,
    targets: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    **remote_args: Any,
) -> None:
    """Write what :func:`fam_plugins.dataset.explain_dataset` writes; run again to resume.

    Ray retries what a lost worker did, and keeps what is done in a folder beside ``out``, named
    ``.checkpoint`` behind it: keep both.

    Args:
        explainer: As for ``explain_dataset``; each worker gets a copy.
        read: Makes the ``ray.data.Dataset``; what it reads has ``id``, strings, in the end also
            ``image``, arrays ``[C, H, W]``. A function, as Ray asks what is done when a data set
            is made: one made before would be written twice.
        out: A folder that all machines see.
        workers: Actors. Two CPUs are left for reading and writing, or Ray would hang.
        top_k: As for ``explain_dataset``.
        targets: As for ``explain_dataset``.
        batch_size: Images per pass.
        **remote_args: Of ``map_batches``; ``num_gpus=1`` moves each model to a GPU.

    Raises:
        ImportError: If Ray, the extra ``ray``, is missing.
        TypeError: If ``read`` is no function.
        ValueError: If CPUs are too few, or rows in ``out`` unknown to Ray; as ``explain_dataset``.

    Example:
        >>> read = lambda: ray.data.read_parquet("paths.parquet").map(load)  # doctest: +SKIP
        >>> explain_with_ray(explainer, read, "maps", workers=8, num_gpus=1)  # doctest: +SKIP
    """
    ray, data = load_extra("ray", "ray"), load_extra("ray.data", "ray")
    if not callable(read):
        raise TypeError("read must be a function: lambda: ray.data.read_parquet(...).map(load)")
    explain, path = Explain(explainer, top_k, targets), Path(out).resolve()
    beside, parts = path.with_name(f"{path.name}.checkpoint"), parts_in(path, explain.settings)
    if (parts and not beside.exists()) or any(part.name.startswith("part-") for part in parts):
        raise ValueError(f"{out} has rows that {beside} lacks: go on with explain_dataset")
    if not ray.is_initialized():
        ray.init()
    if (cpus := ray.cluster_resources().get("CPU", 0)) < workers + 2:
        raise ValueError(f"{workers} workers need {workers + 2} CPUs, there are {cpus:g}: add some")
    context = data.DataContext.get_current()
    before, kept = context.checkpoint_config, {"id_column": "id", "checkpoint_path": str(beside)}
    try:
        context.checkpoint_config = kept | {"delete_checkpoint_on_success": False}
        actors = data.ActorPoolStrategy(size=workers)
        arguments = {"fn_constructor_args": [explain], "compute": actors, "batch_size": batch_size}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "You've enabled checkpointing")
            made = read().map_batches(_Worker, **arguments, **remote_args)
            made.write_parquet(str(path), schema=explain.schema)
    finally:
        context.checkpoint_config = before


class _Worker:
    def __init__(self, explain: Explain) -> None:
        self._explain = explain
        explain.module.eval().to("cuda" if load_extra("ray", "ray").get_gpu_ids() else None)

    def __call__(self, batch: dict[str, Any]) -> Any:
        images = map(torch.tensor, batch["image"])
        table = self._explain(*stacked(zip(batch["id"], images, strict=True)))
        if table.nbytes > 2**26:  # half of a block: Ray would cut an image's rows apart
            raise ValueError("a batch has over 64 MiB of maps: lower batch_size, or ask for top_k")
        return table
