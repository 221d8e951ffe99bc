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

    def load(self, parts: dict[str, Any]) -> dict[str, Any] | None:
        """Resume from what :meth:`save` wrote, if there is a file; a bad one touches no head."""
        if not self._path.exists():
            return None
        try:
            saved: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True)
            reason = self._mismatch(saved, parts["optimizer"], parts["scheduler"])
        except Exception as error:  # they differ between versions of torch and kinds of damage
            raise self._foreign("cannot be read (half-written or edited?)") from error
        if reason:
            raise self._foreign(reason)
        self._head.load_state_dict(saved["head"])
        return saved

    def _mismatch(self, saved: Any, optimizer: Any, scheduler: Any) -> str | None:
        """Why the fit cannot go on from there, if so; fails on what has another structure."""
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            return "was not written by fit_cape_head"
        head, history, own = saved["head"], saved["history"], self._head.state_dict()
        there, here = ({(name, *t.shape) for name, t in state.items()} for state in (head, own))
        if there != here:
            return f"holds another head: {sorted(there - here)}, not {sorted(here - there)}"
        if saved["teacher"] != self._teacher:
            return "was fitted to another classifier's weights"
        if was := sorted(saved["settings"].items() - self._settings.items()):
            changed = ", ".join(f"{name}={value}" for name, value in was)
            return f"was written with {changed} (use the same settings)"
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        parts = self._head.parameters() if self._settings["momentum"] else ()
        momenta = [optimizer.state[part]["momentum_buffer"].view_as(part) for part in parts]
        curves = [history[name] for name in ("loss", "agreement", "confidence")]
        rates = [optimizer.param_groups[0]["lr"]] * scheduler.last_epoch
        numbers = torch.tensor([*zip(*curves, rates, strict=True)], device="cpu")
        finite = all(bool(t.isfinite().all()) for t in (*head.values(), *momenta, numbers))
        whole = len(saved) == 7 and len(history) == 4 and len(saved["settings"]) == 6
        return None if finite and whole else "is damaged (NaN, or more or less than was written)"

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
