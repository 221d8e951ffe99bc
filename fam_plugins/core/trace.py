"""A computation as a graph of plain operations: what it does to tensors, and nothing else.

Hooks, modes and gradients act while it is recorded; the graph holds what they came to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fam_plugins.core.frozen_tail import FrozenTail

__all__ = ["differentiable", "traced"]


def traced(compute: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor) -> fx.GraphModule:
    """The graph of a computation on images, of any batch size, with weights and all as buffers.

    Raises:
        ValueError: If what is computed depends on values, or only on a batch of this size.

    Example:
        >>> graph = traced(lambda x: (x.mean(dim=1),), torch.rand(2, 4))
        >>> graph(torch.ones(3, 4))[0]
        tensor([1., 1., 1.])
    """
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    sizes = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (images.dim() - 1)]
    like = fake.from_tensor(images, symbolic_context=StatelessSymbolicContext(sizes))
    try:
        with torch.no_grad(), _PlainPooling():
            graph = make_fx(compute, tracing_mode="symbolic")(like)
    except RuntimeError as error:  # of torch's, for every kind of what it cannot record
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            "the model cannot be recorded as a graph of operations (does it branch on values, or "
            f"use a compiled module?): {reason}"
        ) from error
    batch = like.shape[0]
    if isinstance(batch, int) or batch.node.maybe_as_int() is not None:
        raise ValueError(
            f"the model's code fixes the batch at {len(images)} images (len(x) or int(x.shape[0]) "
            "do): use x.shape[0] there, as torch.export asks for too"
        )
    graph.graph.eliminate_dead_code()
    # As parameters they would ask for gradients; as plain attributes no state would hold them.
    for name in {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}:
        constant = getattr(graph, name)
        delattr(graph, name)
        graph.register_buffer(name, constant.detach())
    graph.recompile()
    return graph


class _PlainPooling(TorchFunctionMode):
    """Global average pooling as the mean it is.

    Of channels-last maps, torch's own changes strides in place, which ONNX has no words for.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        if func is F.adaptive_avg_pool2d and not kwargs and args[1] in (1, (1, 1), [1, 1]):
            return args[0].mean((-2, -1), keepdim=True)
        return func(*args, **(kwargs or {}))


@contextmanager
def differentiable(held: dict[str, bool] | None) -> Iterator[None]:
    """What follows a layer, in operations that have gradients as operations of a graph.

    ``held`` are the options of a frozen tail; ``None`` for the true gradient.
    """
    with sdpa_kernel(SDPBackend.MATH), nullcontext() if held is None else FrozenTail(**held):
        yield
