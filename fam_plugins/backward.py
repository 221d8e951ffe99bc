"""Many backward steps through one graph, side by side where its operations allow it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["backward_many"]


def backward_many(
    output: Tensor, inputs: Sequence[Tensor], cotangents: Tensor
) -> list[Tensor | None]:
    """Vector-Jacobian products of one output for many vectors; the graph is kept.

    Args:
        output: A tensor of any shape.
        inputs: What to differentiate it with respect to.
        cotangents: ``[c, *output.shape]``.

    Returns:
        For every input ``[c, *input.shape]``, or ``None`` if the output does not depend on it.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> backward_many(3 * x, [x], torch.eye(2))[0]
        tensor([[3., 0.],
                [0., 3.]])
    """
    cotangents = cotangents.to(output)
    try:
        found = torch.autograd.grad(
            output, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        return list(found)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # Somebody's own autograd function cannot be vectorised: one step at a time.
        steps = [
            torch.autograd.grad(output, inputs, one, retain_graph=True, allow_unused=True)
            for one in cotangents
        ]
    return [
        None if any(part is None for part in parts) else torch.stack(parts)
        for parts in zip(*steps, strict=True)
    ]
