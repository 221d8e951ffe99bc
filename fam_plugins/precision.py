"""Keeping small sums exact when the model around them runs in mixed precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["full_precision"]


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off, so that float32 operands are really multiplied in float32.

    Args:
        device: Where the operands are. Devices without autocast need nothing.

    Returns:
        A context manager.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(torch.device("cpu")):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    if device.type in ("cpu", "cuda", "xpu"):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
