"""Progress of a post-fitting on disk: written whole or not at all, read without running code."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fam_plugins.cape.head import CapeHead

__all__ = ["fingerprint", "load_progress", "prepare_path", "save_progress"]

_FORMAT = "fam_plugins.cape.fit_cape_head/1"


def fingerprint(linear: nn.Linear) -> str:
    """Identify the classifier a head learns from, so that progress is not taken for another's."""
    digest = hashlib.sha256()
    for tensor in linear.state_dict().values():
        # Through bytes: numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def prepare_path(path: str | os.PathLike[str]) -> Path:
    """Refuse a path that could not be written after the first epoch.

    Raises:
        ValueError: the path is a folder, or its folder does not exist.
    """
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"{target} is a folder: give a file name, {target / 'cape_head.pt'}")
    if not target.parent.is_dir():
        raise ValueError(f"folder {target.parent} does not exist: create it first")
    return target


def save_progress(path: Path, progress: dict[str, Any]) -> None:
    """Write ``progress`` to ``path`` in one step.

    A temporary file in the same folder is renamed over the old one, so an interruption leaves the
    previous checkpoint whole and no fragment behind.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save({"format": _FORMAT, **progress}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_progress(
    path: Path, head: CapeHead, *, teacher: str, settings: dict[str, float]
) -> dict[str, Any]:
    """Read what :func:`save_progress` wrote, and make sure it continues *this* fit.

    Args:
        path: the file.
        head: the head to continue; its sizes must be the file's.
        teacher: :func:`fingerprint` of the classifier it learns from.
        settings: the hyper-parameters of this run.

    Returns:
        The saved progress; nothing has been applied yet.

    Raises:
        ValueError: the file is damaged, not ours, or from another head, classifier or settings.
    """
    other = "pass another path, or delete the file to start anew"
    try:
        progress = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and I/O errors differ between versions of torch
        raise ValueError(
            f"{path} cannot be read as a checkpoint (half-written, or not one): {other}"
        ) from error
    if not isinstance(progress, dict) or progress.get("format") != _FORMAT:
        raise ValueError(f"{path} was not written by fit_cape_head: {other}")
    for name, tensor in head.state_dict().items():
        saved = progress["head"].get(name)
        if saved is None or saved.shape != tensor.shape:
            shape = "nothing" if saved is None else str(tuple(saved.shape))
            raise ValueError(
                f"{path} holds a head of another size: {name} is {shape} there, "
                f"{tuple(tensor.shape)} here; {other}"
            )
    if progress["teacher"] != teacher:
        raise ValueError(f"{path} was fitted to another classifier's weights: {other}")
    changed = [name for name, value in settings.items() if progress["settings"].get(name) != value]
    if changed:
        was = ", ".join(f"{name}={progress['settings'].get(name)}" for name in changed)
        raise ValueError(f"{path} was written with {was}: use the same settings, or {other}")
    return dict(progress)
