"""An encoder that ends in a norm of its own, such as ``F.normalize``: found, and held constant.

The true gradient of a division by the length gives nothing to the direction of the embedding
itself, so that shares behind it sum to zero however good the match is. A cosine's own division is
held constant for that reason, and so must the encoder's be. It is looked for in the graph of the
pass, whatever function or operators it was written with: nothing in front of a pass is patched.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

__all__ = ["hold_own_norm"]

# Steps that only move values.
_MOVES = re.compile(
    "(Unsafe)?(Alias|Clone|Reshape|Select|Slice|Split|Squeeze|ToCopy|Unbind|Unsqueeze|View)"
)
_LONGEST = 8


def hold_own_norm(embeddings: Tensor) -> Tensor | None:
    """Hold the last norm in the graph of embeddings ``[B, D]`` constant in its backward pass.

    Returns the lengths ``[B, 1]`` that it divided by, ones where it divides by something else, or
    ``None``: it does not end in a quotient, or these are some of what did. No value is read.

    Example:
        >>> x = torch.tensor([[3.0, 4.0]], requires_grad=True)
        >>> z = torch.nn.functional.normalize(x)
        >>> hold_own_norm(z)
        tensor([[5.]])
        >>> torch.autograd.grad(z[0, 1], x)[0]  # 1 / 5, and no change of the length
        tensor([[0.0000, 0.2000]])
    """
    node: Any = embeddings.grad_fn
    while node is not None and _MOVES.match(node.name()):
        node = node.next_functions[0][0]
    if node is None or node.name() not in ("DivBackward0", "MulBackward0"):
        return None
    vector, length = (parent for parent, _ in node.next_functions)
    place = 1
    if _leads_to(vector, length):  # the factor stands first: 1 / |x| * x
        place = 0
    elif length is not None and not _leads_to(length, vector):
        return None
    # What divides by anything else than its length, such as a gate, is no norm.
    rows = embeddings.detach().to(torch.promote_types(embeddings.dtype, torch.float32))
    is_unit = (torch.linalg.vector_norm(rows, dim=1) - 1).abs() < 1e-2
    is_norm = (is_unit | (rows == 0).all(dim=1)).all()

    def hold(gradients: tuple[Any, ...], _: Any) -> tuple[Any, ...]:
        of_length = gradients[place]
        kept = None if of_length is None else of_length.masked_fill(is_norm, 0)
        return tuple(kept if i == place else found for i, found in enumerate(gradients))

    if length is None:  # held already, by a frozen tail
        factor = node._saved_other.detach().to(rows)
        lengths = factor.reshape(*factor.shape[:1], -1)[..., :1]
        lengths = lengths if node.name() == "DivBackward0" else 1 / lengths
    else:
        node.register_hook(hold)
        divided = (node._saved_self if place else node._saved_other).detach().to(rows)
        divided = divided.reshape(*divided.shape[:1], -1)
        lengths = torch.linalg.vector_norm(divided, dim=-1, keepdim=True)
    # len() would fix a traced batch.
    return lengths.where(is_norm, 1) if lengths.shape[0] == rows.shape[0] else None


def _leads_to(start: Any, end: Any) -> bool:
    """Whether a chain of single steps in the graph leads from one node to another."""
    for _ in range(_LONGEST):
        parents = {parent for parent, _ in getattr(start, "next_functions", ()) if parent}
        if end is not None and parents == {end}:
            return True
        if len(parents) != 1:
            return False
        (start,) = parents
    return False
