"""The one forward pass: activations of chosen layers, and the gradient of what follows them.

The only place of the package with hooks. Up to the first of the layers nothing is recorded, so no
activation before it is kept; from there on autograd follows, so that one backward step through
the tail (usually a pooling and a matrix product) gives the gradient. Parameters never receive any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fam_plugins.core.messages import unknown_name

__all__ = ["LayerPass", "LayerTensors", "backward_many", "find_layer"]


T = TypeVar("T")
LayerTensors = tuple[Tensor, ...]


@dataclass
class _Slot:
    """What one layer gave in a pass; ``None`` until it has run."""

    name: str
    tensors: LayerTensors | None = None


class LayerPass:
    """One forward pass that keeps what chosen layers gave, and differentiates only their tail.

    Args:
        layers: The layers, in any order; a layer may stand there more than once.
        names: What to call them in messages.
        at_input: Take each layer's input instead of its output.
        zeros: Replace what the layers give by zeros: the pass then yields the constant term of
            a score that is linear in them.
        differentiate: Whether :meth:`gradients` will be asked for; otherwise nothing is recorded.

    Example:
        >>> pooled = nn.Sequential(nn.ReLU(), nn.Flatten())
        >>> one = LayerPass([pooled[0]], ["relu"])
        >>> out = one.run(lambda: pooled(torch.tensor([[-1.0, 2.0]])))
        >>> one.gradients(lambda: (out * torch.tensor([3.0, 4.0])).sum(dim=1))
        [(tensor([[3., 4.]]),)]
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        names: Sequence[str],
        *,
        at_input: bool = False,
        zeros: bool = False,
        differentiate: bool = True,
    ) -> None:
        self._layers = list(layers)
        self._slots = {layer: _Slot(name) for layer, name in zip(layers, names, strict=True)}
        self._at_input = at_input
        self._zeros = zeros
        self._differentiate = differentiate
        self._tracking = False

    def run(self, forward: Callable[[], T]) -> T:
        """Run ``forward`` once with the layers watched; no hook survives it, even on an error.

        Raises:
            AssertionError: If a layer did not run.
            RuntimeError: If a layer ran twice.
            TypeError: If a layer gives something other than floating-point tensors.
        """
        handles: list[RemovableHandle] = []
        try:
            for layer, slot in self._slots.items():
                handles.append(self._watch(layer, slot))
            # Leaving the block restores the caller's gradient mode, whatever the hooks set.
            with torch.inference_mode(False), torch.no_grad():
                output = forward()
        finally:
            for handle in handles:
                handle.remove()
        silent = [slot.name for slot in self._slots.values() if slot.tensors is None]
        if silent:
            raise AssertionError(
                f"layer {silent[0]!r} did not run in the forward pass: choose a layer that the "
                "model calls for these inputs (and explain the model itself, not a compiled copy)"
            )
        return output

    @property
    def activations(self) -> list[LayerTensors]:
        """What each layer gave, detached, in the order in which the layers were named."""
        return [
            tuple(tensor.detach() for tensor in self._slots[layer].tensors or ())
            for layer in self._layers
        ]

    def gradients(self, score: Callable[[], Tensor], **grad_kwargs: Any) -> list[LayerTensors]:
        """Differentiate a score with respect to what each layer gave.

        Args:
            score: Computes scores of any shape from the output of :meth:`run`; their sum is
                differentiated, so every image must only contribute to its own.
            **grad_kwargs: Passed on to :func:`torch.autograd.grad`.

        Returns:
            One tuple a layer, shaped like its entry in :attr:`activations`.

        Raises:
            RuntimeError: If the score does not depend on a layer.
        """
        slots = [self._slots[layer] for layer in self._layers]
        tracked = [tensor for slot in slots for tensor in slot.tensors or ()]
        with torch.inference_mode(False), torch.enable_grad():
            total = score().sum()
            if not total.requires_grad:
                raise RuntimeError(_cut_off(slots[0].name))
            grad_kwargs.setdefault("allow_unused", True)
            flat = iter(torch.autograd.grad(total, tracked, **grad_kwargs))
        found = []
        for slot in slots:
            grads = [(tensor, next(flat)) for tensor in slot.tensors or ()]
            if all(grad is None for _, grad in grads):
                raise RuntimeError(_cut_off(slot.name))
            # A layer may give several tensors of which the score uses only some.
            found.append(tuple(torch.zeros_like(t) if g is None else g.detach() for t, g in grads))
        return found

    def many_gradients(self, output: Tensor, cotangents: Tensor) -> list[list[Tensor]]:
        """Differentiate many weighted sums of an output at once; may be called repeatedly.

        Args:
            output: A tensor of the pass of :meth:`run`, of any shape.
            cotangents: ``[c, *output.shape]``: the weights of each sum.

        Returns:
            One list a layer, of tensors ``[c, ...]`` shaped behind ``c`` like its entry in
            :attr:`activations`.

        Raises:
            RuntimeError: If the output does not depend on a layer.
        """
        slots = [self._slots[layer] for layer in self._layers]
        tracked = [tensor for slot in slots for tensor in slot.tensors or ()]
        with torch.inference_mode(False), torch.enable_grad():
            if not output.requires_grad:
                raise RuntimeError(_cut_off(slots[0].name))
            flat = iter(backward_many(output, tracked, cotangents))
        found = []
        for slot in slots:
            grads = [(tensor, next(flat)) for tensor in slot.tensors or ()]
            if all(grad is None for _, grad in grads):
                raise RuntimeError(_cut_off(slot.name))
            found.append(
                [
                    t.detach().new_zeros(len(cotangents), *t.shape) if g is None else g.detach()
                    for t, g in grads
                ]
            )
        return found

    def _watch(self, layer: nn.Module, slot: _Slot) -> RemovableHandle:
        if self._at_input:

            def before(_module: nn.Module, args: Any) -> Any:
                return self._keep(slot, args)

            return layer.register_forward_pre_hook(before)

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            return self._keep(slot, output)

        return layer.register_forward_hook(after)

    def _keep(self, slot: _Slot, given: Any) -> Any:
        if slot.tensors is not None:
            raise RuntimeError(
                f"layer {slot.name!r} ran twice in one forward pass, so its map would be that of "
                "only one of the runs: embed references once beforehand (SimilarityModel does), "
                "give a reused ReLU its own module, and unwrap DataParallel (model.module)"
            )
        parts = list(given) if isinstance(given, (tuple, list)) else [given]
        where = [i for i, part in enumerate(parts) if isinstance(part, Tensor)]
        if not where or not all(parts[i].is_floating_point() for i in where):
            raise TypeError(
                f"layer {slot.name!r} gives {_kinds(parts)}, not floating-point tensors: choose "
                "the layer inside it whose output is a feature map"
            )
        kept = []
        for i in where:
            tensor = self._start(parts[i])
            kept.append(tensor)
            # A copy goes on, so that in-place operations behind the layer cannot change the map.
            parts[i] = tensor.clone()
        slot.tensors = tuple(kept)
        self._tracking = True
        if not isinstance(given, (tuple, list)):
            return parts[0]
        return parts if isinstance(given, list) else tuple(parts)

    def _start(self, tensor: Tensor) -> Tensor:
        """Turn on autograd from this tensor on, or stay in the graph of an earlier layer."""
        if self._zeros:
            return torch.zeros_like(tensor)
        if not self._differentiate:
            return tensor
        torch.set_grad_enabled(True)
        if self._tracking and tensor.requires_grad:
            return tensor
        return tensor.detach().requires_grad_()


def find_layer(model: object, layer: nn.Module | str | None) -> tuple[nn.Module, str]:
    """Resolve a layer given as a module or by name.

    Args:
        model: The module, or the bound method of one, whose layers are meant. Inside a model
            with an ``encoder``, names may start at the encoder.
        layer: The module itself, or its dotted name as in ``named_modules()``.

    Returns:
        The module and the name to call it in messages.

    Raises:
        TypeError: If ``layer`` is neither a module nor a name.
        ValueError: If there is no layer of that name; the closest names are suggested.

    Example:
        >>> find_layer(nn.Sequential(nn.ReLU()), "0")
        (ReLU(), '0')
    """
    root = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    if isinstance(layer, nn.Module):
        modules = root.named_modules() if isinstance(root, nn.Module) else iter(())
        return layer, next((n for n, m in modules if m is layer), type(layer).__name__)
    if not isinstance(layer, str):
        raise TypeError(
            f"layer must be a module such as model.layer4, or its name 'layer4', not {layer!r}"
        )
    if not isinstance(root, nn.Module):
        raise ValueError(
            f"layer {layer!r} cannot be looked up by name in a plain function: pass the module"
        )
    named = dict(root.named_modules())
    for name in (layer, f"encoder.{layer}"):
        if name and name in named:
            return named[name], name
    raise ValueError(unknown_name("layer", layer, [name for name in named if name]))


def _cut_off(name: str) -> str:
    return (
        f"the score does not depend on layer {name!r} in a way that can be differentiated: "
        "choose a layer on the path to the score, and remove torch.no_grad() or .detach() "
        "between them (to freeze weights, requires_grad_(False) is enough)"
    )


def _kinds(parts: list[Any]) -> str:
    return ", ".join(
        str(part.dtype) if isinstance(part, Tensor) else type(part).__name__ for part in parts
    )


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
    except torch.cuda.OutOfMemoryError:
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
