"""Progress of a post-fitting on disk: written whole or not at all, read without running code."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fam_plugins.cape.model import CapeModel

__all__ = ["Checkpoint"]

_FORMAT = "fam_plugins.cape.fit_cape_head/1"


class Checkpoint:
    """The file of one fit, which fits its head, its classifier and its settings only."""

    def __init__(self, path: Path, model: CapeModel, settings: dict[str, float]) -> None:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: pass a file, {path / 'cape_head.pt'}")
        if not path.parent.is_dir():
            raise ValueError(f"folder {path.parent} does not exist: create it first")
        self._path, self._head, self._settings = path, model.head, settings
        self._teacher = _fingerprint(model.classifier)

    def load(self) -> dict[str, Any] | None:
        """What :meth:`save` wrote, if there is a file; a damaged or foreign one is refused."""
        if not self._path.exists():
            return None
        try:
            saved = torch.load(self._path, map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and I/O errors differ between versions of torch
            raise self._foreign("cannot be read as a checkpoint (half-written?)") from error
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            raise self._foreign("was not written by fit_cape_head")
        for name, tensor in self._head.state_dict().items():
            there = tuple(saved["head"][name].shape) if name in saved["head"] else "missing"
            if there != tuple(tensor.shape):
                sizes = f"{name} is {there} there, {tuple(tensor.shape)} here"
                raise self._foreign(f"holds a head of another size: {sizes}")
        if saved["teacher"] != self._teacher:
            raise self._foreign("was fitted to another classifier's weights")
        was = saved["settings"].items() - self._settings.items()
        if was:
            changed = ", ".join(f"{name}={value}" for name, value in sorted(was))
            raise self._foreign(f"was written with {changed} (use the same settings)")
        return saved

    def save(self, **progress: Any) -> None:
        """Write progress in one step: a temporary file is renamed over the old one."""
        facts = {"format": _FORMAT, "teacher": self._teacher, "settings": self._settings}
        folder, name = self._path.parent, self._path.name
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                torch.save({**facts, **progress}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _foreign(self, reason: str) -> ValueError:
        return ValueError(f"{self._path} {reason}: pass another path, or delete it to start anew")


def _fingerprint(linear: nn.Linear) -> str:
    """Hash of the classifier's weights, so that progress is not taken for another's."""
    digest = hashlib.sha256()
    for tensor in linear.state_dict().values():
        # Through bytes: numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
