"""Where a module lives: the device and dtype that its inputs must have."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["place_of"]


def place_of(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and floating dtype of a module's weights; ``None`` where it has none.

    Example:
        >>> place_of(nn.Linear(1, 1))
        (device(type='cpu'), torch.float32)
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return None, None
