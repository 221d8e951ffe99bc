"""Running a user's module: in eval mode for a while, and at the place where its weights are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

__all__ = ["check_module", "eval_mode", "place_of"]


_lock = threading.Lock()
_held: dict[nn.Module, int] = {}
"""How many blocks hold a module in eval mode that is in training mode by itself."""


def check_module(module: object, what: str = "the model", others: str = "") -> None:
    """Refuse a function, a name or a class where a module is needed."""
    if not isinstance(module, nn.Module):
        kind = "a class" if isinstance(module, type) else type(module).__name__
        raise TypeError(
            f"{what} must be a torch.nn.Module{others}, not {kind}: build it first, and wrap a "
            "function in a module whose forward calls it"
        )


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for a while, then give every submodule its own mode back.

    Blocks may overlap, in one thread or in several: the last one to end gives the mode back.
    """
    check_module(module)
    with _lock:
        # What is in eval mode by itself stays there, whoever comes and goes.
        # Neither modules() nor eval(): in small networks either walk shows.
        everything = [module]
        for part in everything:
            everything += (inner for inner in part._modules.values() if inner is not None)
        parts = [p for p in dict.fromkeys(everything) if p.training or p in _held]
        for part in parts:
            _held[part] = _held.get(part, 0) + 1
            part.training = False
    try:
        yield
    finally:
        with _lock:
            for part in parts:
                _held[part] -= 1
                if not _held[part]:
                    del _held[part]
                    part.training = True


def place_of(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and floating dtype of a module's weights; ``None`` where it has none."""
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return None, None
