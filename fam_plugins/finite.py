"""A map that holds NaN is no map."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_finite"]


def check_finite(attribution: Tensor) -> Tensor:
    """Return a map as it is, or refuse it: pictures and metrics would show NaN as evidence.

    Args:
        attribution: A map of any shape.

    Raises:
        ValueError: If a value is NaN or infinite.

    Example:
        >>> check_finite(torch.ones(1))
        tensor([1.])
    """
    if not torch.isfinite(attribution).all():
        raise ValueError(
            "the map holds NaN or infinite values: check the input and the weights, and for "
            "float16 the range (bfloat16 or float32 have more)"
        )
    return attribution
