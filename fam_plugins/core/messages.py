"""What users read while the package works: suggestions for wrong names, warnings, progress bars."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import TypeVar

__all__ = ["unknown_name", "warn_once", "warn_user", "with_progress"]

T = TypeVar("T")

_NOT_THE_USER = ("fam_plugins", "captum", "pytorch_grad_cam", "torch", "contextlib")


def unknown_name(
    kind: str, name: object, known: Iterable[str], *, aliases: Mapping[str, str] | None = None
) -> str:
    """One sentence for an error message: the closest known names, and the first twelve of all."""
    names = list(known)
    also = dict(aliases or {})
    close = [known for known in names if known.endswith(f".{name}")][:3]  # a layer further inside
    close = close or difflib.get_close_matches(str(name).lower(), [*names, *also], n=3, cutoff=0.5)
    close = list(dict.fromkeys(also.get(found, repr(found)) for found in close))
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    listed = ", ".join(map(repr, names[:12])) + (", ..." if len(names) > 12 else "")
    return f"unknown {kind} {name!r}: {meant}There are {listed}"


def warn_user(message: str) -> None:
    """Warn at the user's own line, however many frames of ours and the partners' lie between."""
    level, frame = 1, sys._getframe()
    while frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USER and frame.f_back:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


_said: set[str] = set()


def warn_once(message: str) -> None:
    """As :func:`warn_user`, once per process."""
    if message not in _said:
        _said.add(message)
        warn_user(message)


def with_progress(items: Iterable[T], description: str) -> Iterable[T]:
    """The same items, with a bar for work of more than two seconds; without tqdm, no bar."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[T] = tqdm(items, desc=description, delay=2, leave=False)
    return bar
