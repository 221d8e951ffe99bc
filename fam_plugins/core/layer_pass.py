"""The one forward pass: activations of chosen layers, and the gradient of what follows them.

The only place of the package with hooks. Up to the first of the layers nothing is recorded, so no
activation before it is kept; from there on autograd follows, so that one backward step through
the tail (usually a pooling and a matrix product) gives the gradient. Parameters never receive any.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fam_plugins.core.messages import unknown_name

__all__ = ["LayerPass", "LayerTensors", "find_layer", "fits_image", "products"]

T = TypeVar("T")
LayerTensors = tuple[Tensor, ...]


class LayerPass:
    """One forward pass that keeps what chosen layers gave, and differentiates only their tail.

    ``behind``, if set, is entered at the first of the layers and left after the pass: what acts on
    the tail costs nothing in front of it. ``replace`` says what the layers give instead of what
    they gave: with ``torch.zeros_like`` the pass yields the constant term of a score that is linear
    in them. Without ``differentiate`` nothing is recorded. After :meth:`run`, ``tracked`` holds
    what each of ``layers`` gave, in the graph of the tail.

    Example:
        >>> pooled = nn.Sequential(nn.ReLU(), nn.Flatten())
        >>> one = LayerPass(pooled, ["0"])
        >>> out = one.run(lambda: pooled(torch.tensor([[-1.0, 2.0]])))
        >>> one.gradients(out, torch.tensor([[[3.0, 4.0]]]))
        [[tensor([[[3., 4.]]])]]
    """

    def __init__(
        self,
        model: object,
        layers: Sequence[nn.Module | str | None],
        *,
        at_input: bool = False,
        replace: Callable[[Tensor], Tensor] | None = None,
        differentiate: bool = True,
    ) -> None:
        found = [find_layer(model, layer) for layer in layers]
        self.layers = [layer for layer, _ in found]
        self.names = [name for _, name in found]
        self.tracked: list[LayerTensors] = []
        self._names = dict(found)
        self._kept: dict[nn.Module, LayerTensors] = {}
        self._thread = threading.get_ident()
        self._at_input = at_input
        self._replace = replace
        self._differentiate = differentiate
        self._tracking = False
        self.behind: AbstractContextManager[object] | None = None
        self._entered = ExitStack()

    def run(self, forward: Callable[[], T]) -> T:
        """Run ``forward`` once with the layers watched; no hook survives it, even on an error."""
        handles: list[RemovableHandle] = []
        try:
            for layer in self._names:
                handles.append(self._watch(layer))
            # Leaving the block restores the caller's gradient mode, whatever the hooks set.
            with torch.inference_mode(False), torch.no_grad(), self._entered:
                output = forward()
        finally:
            for handle in handles:
                handle.remove()
        for layer, name in self._names.items():
            if layer not in self._kept:
                raise AssertionError(
                    f"layer {name!r} did not run in the forward pass: choose a layer that the "
                    "model calls for these inputs, and explain the model itself, not a compiled "
                    "copy or DataParallel (model.module)"
                )
        self.tracked = [self._kept[layer] for layer in self.layers]
        return output

    def gradients(
        self,
        output: Tensor,
        cotangents: Tensor,
        also: Sequence[Tensor] | None = None,
        **grad_kwargs: Any,
    ) -> list[list[Tensor]]:
        """Differentiate sums of an output weighed by cotangents ``[c, *output.shape]``.

        Returns one list per layer, of tensors ``[c, ...]`` shaped behind ``c`` as in ``tracked``,
        and one more for the tensors of ``also``, if given.
        """
        if not output.requires_grad:
            raise RuntimeError(_cut_off(self.names[0]))
        asked = self.tracked if also is None else [*self.tracked, tuple(also)]
        flat = [tensor for tensors in asked for tensor in tensors]
        with torch.inference_mode(False), torch.enable_grad():
            products_of = iter(products(output, flat, cotangents, **grad_kwargs))
        found = []
        for index, tensors in enumerate(asked):
            grads = [next(products_of) for _ in tensors]
            if index < len(self.names) and all(grad is None for grad in grads):
                raise RuntimeError(_cut_off(self.names[index]))
            # A layer may give several tensors of which the score uses only some.
            found.append(
                [
                    t.detach().new_zeros(len(cotangents), *t.shape) if g is None else g.detach()
                    for t, g in zip(tensors, grads, strict=True)
                ]
            )
        return found

    def _watch(self, layer: nn.Module) -> RemovableHandle:
        if self._at_input:
            return layer.register_forward_pre_hook(lambda _, args: self._keep(layer, args))
        return layer.register_forward_hook(lambda _, __, output: self._keep(layer, output))

    def _keep(self, layer: nn.Module, given: Any) -> Any:
        """Keep what the layer gives, and hand the model a copy of it to go on from."""
        if threading.get_ident() != self._thread:
            return None  # somebody else's call of the same model
        name = self._names[layer]
        if layer in self._kept:
            raise RuntimeError(
                f"layer {name!r} ran twice in one forward pass, so its map would be that of one of "
                "the runs: embed references once beforehand (as SimilarityModel), or give a reused "
                "ReLU its own module"
            )
        parts = list(given) if isinstance(given, (tuple, list)) else [given]
        where = [i for i, part in enumerate(parts) if isinstance(part, Tensor)]
        if not where or not all(parts[i].is_floating_point() for i in where):
            kinds = [str(p.dtype) if isinstance(p, Tensor) else type(p).__name__ for p in parts]
            raise TypeError(
                f"layer {name!r} gives {', '.join(kinds)}, not floating-point tensors: choose the "
                "layer inside it whose output is a feature map"
            )
        self._kept[layer] = tuple(self._start(parts[i]) for i in where)
        for i, tensor in zip(where, self._kept[layer], strict=True):
            # A copy goes on, so that in-place operations behind the layer cannot change the map.
            parts[i] = tensor.clone()
        if self.behind is not None and not self._tracking:
            self._entered.enter_context(self.behind)
        self._tracking = True
        if not isinstance(given, (tuple, list)):
            return parts[0]
        if hasattr(given, "_fields"):  # a namedtuple
            return type(given)(*parts)
        return parts if isinstance(given, list) else tuple(parts)

    def _start(self, tensor: Tensor) -> Tensor:
        """Turn on autograd from this tensor on, or stay in the graph of an earlier layer."""
        if self._replace is not None:
            tensor = self._replace(tensor)
        if not self._differentiate:
            return tensor
        torch.set_grad_enabled(True)
        if self._tracking and tensor.requires_grad:
            return tensor
        return tensor.detach().requires_grad_()


def products(
    output: Tensor, inputs: Sequence[Any], cotangents: Tensor, **grad_kwargs: Any
) -> list[Tensor | None]:
    """Vector-Jacobian products for cotangents ``[c, *output.shape]``: per input ``[c, ...]``.

    Inputs may be edges of the graph; ``None`` for one that the output does not depend on. Several
    cotangents keep the graph and go side by side where the operations allow it.
    """
    cotangents = cotangents.to(output)
    grad_kwargs.setdefault("allow_unused", True)
    if len(cotangents) == 1:
        found = torch.autograd.grad(output, inputs, cotangents[0], **grad_kwargs)
        return [None if grad is None else grad[None] for grad in found]
    grad_kwargs["retain_graph"] = True
    try:
        return list(
            torch.autograd.grad(output, inputs, cotangents, is_grads_batched=True, **grad_kwargs)
        )
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        # Somebody's own autograd function cannot be vectorised: one step at a time.
        steps = [torch.autograd.grad(output, inputs, one, **grad_kwargs) for one in cotangents]
    return [
        None if any(part is None for part in parts) else torch.stack(parts)
        for parts in zip(*steps, strict=True)
    ]


def fits_image(grid: Sequence[int], size: Sequence[int]) -> bool:
    """Whether a grid of regions has the shape of the image, up to one row or column."""
    (h, w), (height, width) = grid, size
    return abs(h * width - w * height) <= max(height, width)


def find_layer(model: object, layer: nn.Module | str | None) -> tuple[nn.Module, str]:
    """Resolve a layer of a model, or of a bound method's module, to the module and its name.

    Inside a model with an ``encoder``, names may start at the encoder. A layer given as a module
    need not be part of the model.
    """
    if not callable(model):
        raise TypeError(f"the model is a {type(model).__name__}, no module or function: build it")
    root = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    if isinstance(layer, torch.jit.ScriptModule):
        raise TypeError("layer is scripted or traced: explain the model as it was before")
    if isinstance(layer, nn.Module):
        modules = root.named_modules() if isinstance(root, nn.Module) else iter(())
        return layer, next((n for n, m in modules if m is layer), type(layer).__name__)
    if not isinstance(layer, str):
        raise TypeError(
            "layer must be a module such as model.layer4, or its name 'layer4', not a "
            f"{type(layer).__name__}: explain several layers one after the other"
        )
    if not isinstance(root, nn.Module):
        raise ValueError(
            f"layer {layer!r} cannot be looked up by name in a plain function: pass the module"
        )
    named = dict(root.named_modules())
    for name in (layer, f"encoder.{layer}"):
        if name and name in named:
            return find_layer(model, named[name])
    raise ValueError(unknown_name("layer", layer, [name for name in named if name]))


def _cut_off(name: str) -> str:
    return (
        f"the score does not depend on layer {name!r} in a way that can be differentiated: choose "
        "a layer on the path to the score, and remove torch.no_grad() or .detach() between them"
    )
