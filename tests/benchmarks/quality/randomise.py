"""Model randomisation from the top down (Adebayo et al., arXiv 1810.03292, "cascading")."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import nn


def stages(encoder: nn.Module, most: int = 5) -> list[list[str]]:
    """Names of the layers with parameters, from the output down, in at most ``most`` parts.

    A convolution and what normalises it are randomised together.
    """
    parts: list[list[str]] = []
    for name, module in encoder.named_modules():
        if not hasattr(module, "reset_parameters") or not any(True for _ in module.parameters()):
            continue
        if "Norm" in type(module).__name__ and parts:
            parts[-1].append(name)
        else:
            parts.append([name])
    parts.reverse()
    size = -(-len(parts) // most)
    return [list(chain(*parts[i : i + size])) for i in range(0, len(parts), size)]


def randomised(encoder: nn.Module, names: list[str], seed: int) -> nn.Module:
    """A copy whose named layers are initialised anew; everything else as trained."""
    copied = copy.deepcopy(encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            copied.get_submodule(name).reset_parameters()  # type: ignore[operator]
    return copied.eval()
