"""A progress bar for long work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

__all__ = ["with_progress"]

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
