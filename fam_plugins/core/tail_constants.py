"""What the constants behind a layer add to a score, from the backward pass of the map itself.

Behind a frozen tail ``score = sum_j G_j . A_j + sum_b (ds/db) . b``: biases, tokens, what bypasses
the layer. Each constant is tied to a leaf of ones ``[B]``, whose gradient is the second sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_plugins.core.frozen_tail import NORMS, FrozenTail, flat, tracked

__all__ = ["TailConstants"]

BIASED = {"linear": ("input", "weight", "bias"), **NORMS}
BIASED |= {f"conv{kind}{n}d": BIASED["linear"] for kind in ("", "_transpose") for n in (1, 2, 3)}
SUMS = {"add", "__add__", "__radd__", "__iadd__", "sub", "subtract", "__sub__", "__isub__", "rsub"}
SUMS |= {"__rsub__", "where", "masked_fill", "addcmul", "lerp"}
MOVES = {"clone", "transpose", "permute", "swapaxes", "swapdims"}  # a layer is cloned first
JOINS = {"cat", "concat", "concatenate", "stack", "hstack"}


class TailConstants(FrozenTail):
    """A frozen tail that ties the constants it comes by to ``leaves``, one for each kind.

    Kinds are ``"bias"`` (and numbers), ``"class token"``, ``"registers"``, ``"position"`` (other
    parameters) and ``"residual"`` (what bypasses the layer). Make the leaves further inputs of the
    map's backward pass. Parameters receive no gradient meanwhile. Images are the first dimension,
    or the second where tokens are in front of them (which cannot be told from as many tokens as
    images).

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 1))
        >>> layer = torch.randn(3, 4, requires_grad=True)
        >>> with TailConstants(batch=3) as tail:
        ...     score = net(layer)[:, 0]
        >>> inputs = [layer, tail.leaves["bias"]]
        >>> gradient, biases = torch.autograd.grad(score.sum(), inputs)
        >>> torch.allclose((gradient * layer).sum(1) + biases, score, atol=1e-5)
        True
    """

    def __init__(self, batch: int, **options: bool) -> None:
        super().__init__(**options)
        self.leaves: dict[str, Tensor] = {}
        self._batch = batch
        self._second = False  # whether tensors are [L, B, C], as inside multi-head attention
        self._learnt: dict[int, Any] = {}  # what was computed from parameters alone

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._learnt.clear()

    def _constant(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [part for part in flat((*args, *kwargs.values())) if isinstance(part, Tensor)]
        if not tensors:
            return func(*args, **kwargs)
        with torch.no_grad():
            output = func(*args, **kwargs)
        if all(self._is_learnt(part) for part in tensors):
            self._learnt |= {id(part): part for part in flat((output,))}
        return output

    def _is_learnt(self, part: Tensor) -> bool:
        learnt = isinstance(part, nn.Parameter) or id(part) in self._learnt
        return learnt or not part.is_floating_point()

    def _run(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if name in JOINS:
            parts = [self._joined(part, first=not place) for place, part in enumerate(args[0])]
            return func(parts, *args[1:], **kwargs)
        kind, constant = self._added(name, func, args, kwargs)
        before = self._second
        self._second = before or func is F.multi_head_attention_forward
        try:
            output = super()._run(name, func, args, kwargs)
        finally:
            self._second = before
        if name in MOVES and output.dim() == 3:
            tokens, images = output.shape[:2]
            if (tokens == self._batch) != (images == self._batch):
                self._second = images == self._batch
        return self._tied(kind, output, constant, output is args[0]) if kind else output

    def _joined(self, part: Tensor, *, first: bool) -> Any:
        """One of several tensors that are joined; counted if it is constant."""
        if tracked(part) or not part.is_floating_point():
            return part
        tokens = part.dim() == 3
        kind = "registers" if tokens and self._is_learnt(part) else "residual"
        kind = "class token" if tokens and first and part.shape[1] == 1 else kind
        return self._tied(kind, part.detach(), part, in_place=False)

    def _added(self, name: str, func: Any, args: Any, kwargs: Any) -> tuple[str, Any]:
        """The kind and the value of the constant that an operation adds; no kind for none."""
        x, shape = args[0], (-1, *[1] * (args[0].dim() - 2)) if isinstance(args[0], Tensor) else ()
        if name in BIASED:
            bias = {**dict(zip(BIASED[name], args, strict=False)), **kwargs}.get("bias")
            if bias is None or name in ("linear", "layer_norm"):
                return "" if bias is None else "bias", bias
            return "bias", bias.reshape(shape)
        if name == "batch_norm":  # x, mean, variance, weight, bias, training
            if (args[5] if len(args) > 5 else kwargs.get("training")) or x.dim() < 2:
                return "", None
            return "bias", func(x.new_zeros(1, x.shape[1], *shape[1:]), *args[1:], **kwargs)
        constants = [a for a in args if isinstance(a, (Tensor, int, float)) and not tracked(a)]
        if not constants or name not in SUMS:
            return "", None
        with torch.no_grad():  # a zero stands for what is tracked, also where the sum is in place
            zeros = [a.detach().new_zeros(()) if tracked(a) else a for a in args]
            if name.startswith("__i") or func.__name__ != name:
                func = getattr(Tensor, name.replace("__i", "__"))
            constant = func(*zeros, **kwargs)
        if sum(size > 1 for size in constant.shape) <= 1:
            return "bias", constant
        learnt = all(self._is_learnt(a) for a in constants if isinstance(a, Tensor))
        return "position" if learnt else "residual", constant

    def _tied(self, kind: str, output: Any, constant: Tensor, in_place: bool) -> Any:
        """The output of an operation, tied to the leaf of the constant in it."""
        if kind not in self.leaves:
            wide = torch.promote_types(constant.dtype, torch.float32)
            ones = torch.ones(self._batch, dtype=wide, device=constant.device)
            self.leaves[kind] = ones.requires_grad_()
        return _Tied.apply(output, constant.detach(), self.leaves[kind], self._second, in_place)


class _Tied(torch.autograd.Function):
    """An output as it is, whose gradient also tells what a constant in it adds to each image."""

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, *rest: Any) -> Any:
        return out if rest[-1] else out.detach()  # a view would refuse operations in place

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        out, constant, ones, ctx.second, _ = inputs
        if output is out:
            ctx.mark_dirty(out)
        ctx.batch = len(ones)
        ctx.save_for_backward(constant)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (constant,), batch, size = ctx.saved_tensors, ctx.batch, gradient.shape
        wide = torch.promote_types(gradient.dtype, torch.float32)
        second = ctx.second and len(size) < 4
        if not size or (size[0] % batch and not second):
            raise RuntimeError(f"no dimension of {tuple(size)} is that of the {batch} images")
        if constant.dim() == 1:  # a bias: one product, without a copy
            shares = gradient.to(wide) @ constant.to(wide)
        else:
            shares = gradient.to(wide) * constant.to(wide)
            shares = shares.flatten(2).sum(2) if second and len(size) > 2 else shares
        shares = shares.reshape(-1, batch).sum(0) if second else shares.reshape(batch, -1).sum(1)
        return gradient, None, shares, None, None
