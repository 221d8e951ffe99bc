"""Names in error messages: what a wrong name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

__all__ = ["unknown_name", "with_progress"]


def unknown_name(kind: str, name: object, known: Iterable[str], *, most: int = 12) -> str:
    """Say that ``name`` is no known ``kind``, what it may have meant, and what there is.

    Args:
        kind: What the name stands for, such as ``"rule"``.
        name: What the user gave.
        known: The valid names, in the order to show them.
        most: How many valid names to list at the most.

    Returns:
        One sentence for an error message.

    Example:
        >>> unknown_name("rule", "aditive", ["fam", "additive"])
        "unknown rule 'aditive': did you mean 'additive'? There are 'fam', 'additive'"
    """
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    listed = ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")
    return f"unknown {kind} {name!r}: {meant}There are {listed}"


T = TypeVar("T")


def with_progress(items: Iterable[T], description: str) -> Iterable[T]:
    """A bar for work of more than two seconds. Both partners bring tqdm; without it, no bar.

    Args:
        items: What is worked on, one after the other.
        description: What to call the work.

    Returns:
        The same items.

    Example:
        >>> list(with_progress([1, 2], "counting"))
        [1, 2]
    """
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    bar: Iterable[T] = tqdm(items, desc=description, delay=2, leave=False)
    return bar
