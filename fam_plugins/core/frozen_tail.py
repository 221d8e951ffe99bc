"""Gradients with norm statistics, attention weights and gates held constant; values as they are.

What follows a layer is then affine in it. A mode of torch that sees every operation does it: no
module is patched, and nothing happens where nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

__all__ = ["FrozenTail", "check_visible", "flat", "frozen_tail", "tracked"]

# Operations by name: torch.softmax, F.softmax, Tensor.softmax and Tensor.softmax_ are one.
WEIGHTS = {  # what they return only ever weighs something else
    "softmax": "attention",
    **dict.fromkeys(("sigmoid", "hardsigmoid", "erf"), "gates"),
    **dict.fromkeys(("sqrt", "rsqrt", "std", "norm"), "norms"),
    **dict.fromkeys(("linalg_norm", "linalg_vector_norm"), "norms"),
}
ACTIVATIONS = {  # with act(u) / u as u goes to 0
    **dict.fromkeys(("gelu", "silu", "hardswish", "mish"), 0.5),
    **dict.fromkeys(("tanh", "elu", "celu", "selu", "relu6", "hardtanh"), 1.0),
}
GATES = {"_GateBackward", *(f"{act}Backward0" for act in ("Relu", "Softmax", "Sigmoid", "Erf"))}
GATES |= {"HardsigmoidBackward0"}
QUOTIENTS = {"div", "divide", "true_divide", "__truediv__", "__itruediv__"}
PRODUCTS = dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__", "__imul__"), "gates")
PRODUCTS |= dict.fromkeys(("matmul", "bmm", "__matmul__"), "attention")
NORMS = {  # with their arguments
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
}
HIDING = {"CompiledFunctionBackward", "CheckpointFunctionBackward", "GatherBackward"}
HIDDEN = (
    "frozen_tail cannot see what a compiled or scripted module computes, nor DataParallel or "
    "reentrant checkpointing: explain the model as it was before, with use_reentrant=False"
)
INNERMOST: ContextVar[FrozenTail | None] = ContextVar("fam_plugins_frozen_tail", default=None)


def frozen_tail(norms: bool = True, attention: bool = True, gates: bool = True) -> FrozenTail:
    """Within the block, norm statistics, attention weights and gates have no gradient.

    Values stay what they are, and what follows any layer becomes affine in it: gradient times
    activation adds up to the score less the share of the constants behind the layer (Ali et al.,
    ICML 2022; AttnLRP, ICML 2024; LibraGrad, CVPR 2025). "Exact" is bookkeeping: what the image
    does to a weight is not shown. Explain logits: a ``sigmoid`` or ``softmax`` at the end curves.

    Forward and backward pass belong into the block. It acts in its own thread, and only where
    gradients are recorded; of nested blocks the innermost decides. Not frozen: products of two
    branches without an activation among them, batch norm in training, other libraries' kernels.

    Args:
        norms: Hold the statistics of LayerNorm, RMSNorm, GroupNorm, GRN, ``F.normalize``,
            ``F.cosine_similarity`` and ``x / x.norm()``, also where these are spelt out.
        attention: Hold attention weights: scaled dot product, multi-head, softmax, linear.
        gates: Hold ``act(u) / u`` of GELU, SiLU, Hardswish, Mish, ELU, tanh and ReLU6, and the
            sigmoids and activations that multiply a branch (squeeze-and-excite, SwiGLU, GLU).

    Raises:
        TypeError: Inside, on a compiled, scripted, DataParallel or reentrantly checkpointed module.

    Example:
        >>> norm, x = nn.LayerNorm(4, bias=False), torch.randn(2, 4, requires_grad=True)
        >>> with frozen_tail():
        ...     end = norm(x)[:, 0]
        >>> shares = torch.autograd.grad(end.sum(), x)[0] * x  # outside, they sum to 0
        >>> torch.allclose(shares.sum(1), end, atol=1e-5)
        True
    """
    return FrozenTail(norms, attention, gates)


class FrozenTail(TorchFunctionMode):
    """The mode behind :func:`frozen_tail`."""

    def __init__(self, norms: bool = True, attention: bool = True, gates: bool = True) -> None:
        super().__init__()
        self._frozen = {"norms": norms, "attention": attention, "gates": gates, "": False}
        self._leave: list[Callable[[], None]] = []

    def __enter__(self) -> FrozenTail:
        token, watch = INNERMOST.set(self), register_module_forward_pre_hook(self._check)
        self._leave += [lambda: INNERMOST.reset(token), watch.remove]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._leave.pop()()
        self._leave.pop()()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation: by its rule, if it has one and acts on what is differentiated."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if torch.compiler.is_compiling():
            raise TypeError(HIDDEN)
        # In the threads of autograd, which checkpoints run in, none is known as the innermost.
        if INNERMOST.get() not in (self, None):
            return func(*args, **kwargs)
        tensors = [part for part in flat((*args, *kwargs.values())) if isinstance(part, Tensor)]
        if any(type(part.grad_fn).__name__ in HIDING for part in tensors):
            raise TypeError(HIDDEN)
        if not any(tracked(part) for part in tensors):
            return self._constant(func, args, kwargs)
        if not args:
            key = next((key for key in ("input", "query", "tensors") if key in kwargs), "")
            if not key:
                return func(**kwargs)
            args, kwargs = (kwargs[key],), {k: v for k, v in kwargs.items() if k != key}
        name = getattr(func, "__name__", "")
        return self._run(name if name.endswith("__") else name.rstrip("_"), func, args, kwargs)

    def _constant(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation on what is not differentiated, or on parameters."""
        return func(*args, **kwargs)

    def _run(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operation called ``name``, with what is frozen in it held constant."""
        x, other = args[0], args[1] if len(args) > 1 else None  # type: Any, Any
        norms, attention, gates, _ = self._frozen.values()
        root = name in ("pow", "__pow__") and isinstance(other, float) and abs(other) == 0.5
        family = "norms" if root else WEIGHTS.get(name, "")
        # Softmax and sigmoid of [B, N] may be the output: held where they multiply, see _is_gate.
        if self._frozen[family] and (family == "norms" or x.dim() > 2):
            with torch.no_grad():
                output = func(*args, **kwargs)
            return output.detach_() if output is x else output
        if func in INSIDE:
            with self._inside():
                return INSIDE[func](*args, **kwargs)
        if name == "scaled_dot_product_attention" and attention:
            kwargs = {k: v.detach() if k in ("query", "key") else v for k, v in kwargs.items()}
            args = (*(part.detach() for part in args[:2]), *args[2:])
        elif norms and name in QUOTIENTS and tracked(other):
            args = (x, other.detach(), *args[2:])
        elif norms and name in NORMS and tracked(x):
            return _norm(name, func, args, kwargs)
        elif gates and name in ACTIVATIONS:
            return _gate(name, func, args, kwargs)
        elif self._frozen[PRODUCTS.get(name, "")] and tracked(x) and tracked(other):
            if _is_gate(other) and x is not other:
                return func(x, other.detach())
            if _is_gate(x) and x is not other:
                held = x.detach().clone()
                return x.copy_(held * other) if func.__name__ == "mul_" else func(held, other)
        return func(*args, **kwargs)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Stay in charge of the operations inside one."""
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _check(self, module: nn.Module, args: Any) -> None:
        """Refuse to differentiate a module whose operations a mode cannot see."""
        # Not by _hides: torch 2.3 compiles what is called from here, and then calls this for ever.
        compiled = "_orig_mod" in module._modules or vars(module).get("_compiled_call_impl")
        if compiled or isinstance(module, torch.jit.ScriptModule):
            tensors = [part for part in flat(args) if isinstance(part, Tensor)]
            used = not tensors or any(tracked(part) for part in tensors)
            if used and torch.is_grad_enabled() and INNERMOST.get() is self:
                raise TypeError(HIDDEN)


def check_visible(model: object, layer: str) -> None:
    """Refuse a layer, by its name in the model, that is inside of a compiled module."""
    part: Any = getattr(model, "__self__", model)
    for step in layer.split("."):
        if _hides(part):
            raise TypeError(HIDDEN)
        part = getattr(part, step, None)


def _hides(module: Any) -> bool:
    """Whether it is a compiled module."""
    inside = getattr(module, "_modules", {})
    return "_orig_mod" in inside or getattr(module, "_compiled_call_impl", None) is not None


def tracked(given: Any) -> bool:
    """Whether it is a tensor that is differentiated; parameters and their views are constants."""
    if not isinstance(given, Tensor) or not given.requires_grad:
        return False
    return not isinstance(given, nn.Parameter) and not isinstance(given._base, nn.Parameter)


def flat(given: Any) -> Iterator[Any]:
    """Arguments, with those of lists and tuples among them."""
    for part in given:
        yield from part if isinstance(part, (list, tuple)) else (part,)


class _Held(torch.autograd.Function):
    """A function of x whose gradient is a linear ``pull`` of what was ``kept``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, run: Any, *_: Any) -> Any:
        return run(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, _, ctx.pull, *kept = inputs
        if output is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(*kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        kept = ctx.saved_tensors
        return ctx.pull(gradient, *kept), None, None, *[None] * len(kept)


class _Gate(_Held):
    """An activation; autograd's name for it tells that it is one."""


def _gate(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """An activation whose gradient is ``act(u) / u``."""
    # The closures below must not hold x: in place, its graph would hold itself.
    x, rest, at_zero = args[0], args[1:], ACTIVATIONS[name]
    in_place = any(option is True for option in (*rest, *kwargs.values()))
    in_place = in_place or func.__name__ == f"{name}_"

    def act(u: Tensor) -> Any:
        return func(u, *rest, **kwargs)

    def pull(gradient: Tensor, kept: Tensor) -> Any:
        gate = act(kept.clone() if in_place else kept).div_(kept)
        return gradient * gate.nan_to_num_(at_zero, posinf=at_zero, neginf=at_zero)

    return _Gate.apply(x, act, pull, x.detach().clone() if in_place else x.detach())


def _norm(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """A norm whose gradient holds its standard deviation, or its root mean square."""
    x, rest = args[0], args[1:]
    given = {**dict(zip(NORMS[name][1:], rest, strict=False)), **kwargs}
    eps, weight = given.get("eps", None if name == "rms_norm" else 1e-5), given.get("weight")
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if name == "group_norm":
        rows: tuple[int, ...] = (len(x), given["num_groups"], -1)
        weight = None if weight is None else weight.reshape(-1, *[1] * (x.dim() - 2))
    else:
        rows = (*x.shape[: x.dim() - len(given["normalized_shape"])], -1)

    def pull(gradient: Tensor, kept: Tensor, weight: Tensor | None) -> Tensor:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        gradient = gradient.to(wide) if weight is None else gradient.to(wide) * weight.to(wide)
        gradient, x = gradient.reshape(rows), kept.to(wide).reshape(rows)
        if name == "rms_norm":
            spread = x.square().mean(-1, keepdim=True)
        else:
            gradient = gradient - gradient.mean(-1, keepdim=True)
            spread = x.var(-1, correction=0, keepdim=True)
        return (gradient * (spread + eps).rsqrt()).reshape(kept.shape).to(kept.dtype)

    def run(x: Tensor) -> Any:
        return func(x, *rest, **kwargs).detach()  # a view would refuse operations in place

    return _Held.apply(x, run, pull, x.detach(), None if weight is None else weight.detach())


def _is_gate(tensor: Tensor) -> bool:
    """Whether it is an activation, up to steps that keep it one (views, ``1 + tanh``, dropout)."""
    node = tensor.grad_fn
    for _ in range(8):
        kind = type(node).__name__
        if kind in GATES:
            return True
        if node is None or any(part in kind for part in ("mm", "Mm", "Linear", "Convolution")):
            return False
        before = [n for n, _ in node.next_functions if n and type(n).__name__ != "AccumulateGrad"]
        if len(before) != 1:
            return False
        node = before[0]
    return False


def _visible(function: Any) -> Any:
    """A function of torch that never hands itself over whole, so that its operations are seen."""
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = {**function.__globals__, **{name: lambda *_: False for name in names}}
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _cosine(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    return (F.normalize(x1, dim=dim, eps=eps) * F.normalize(x2, dim=dim, eps=eps)).sum(dim)


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    value, weight = x.chunk(2, dim)
    return value * weight.sigmoid()


INSIDE: dict[Any, Any] = {F.cosine_similarity: _cosine, F.glu: _glu}
for _composite in (F.multi_head_attention_forward, F.normalize):
    INSIDE[_composite] = _visible(_composite)
# So that a checkpoint, computed anew in the backward pass, is frozen there too.
for _backward in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
    INSIDE[_backward] = _visible(_backward)
