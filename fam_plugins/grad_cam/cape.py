"""CAPE as a pytorch-grad-cam method: a map that is a probability, beside the one in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pytorch_grad_cam.utils.model_targets import BinaryClassifierOutputTarget
from torch import Tensor, nn

from fam_plugins.cape.model import find_head
from fam_plugins.core.layer_pass import LayerPass
from fam_plugins.grad_cam.base import OnePassCAM, Target, to_numpy

__all__ = ["CAPE"]


class CAPE(OnePassCAM):
    """CAPE: swap ``GradCAM`` for ``CAPE`` on a model with a CAPE head.

    Same call, same kind of result: ``cam(input_tensor, targets)`` is a float32 numpy array
    ``[B, H, W]``, each map stretched to [0, 1] as every BaseCAM does. The probability map itself,
    which sums to the head's probability of the class, is beside it in :attr:`probabilities`.

    It explains the CAPE head, whose top class can differ from the model's own. It takes one
    forward pass in eval mode and no gradient. Source: CAPE (CVPR 2024, arXiv 2404.02388).

    Args:
        model: A :class:`fam_plugins.cape.CapeModel`, or a module that contains a
            :class:`fam_plugins.cape.CapeHead`.
        target_layers: Not needed. The layer that feeds the head is accepted, so that Grad-CAM
            code need not change.
        reshape_transform: Must stay ``None``: the model already lays out its map.
        relative: Explain with mu-CAPE, ``relu(c + w)``: relative, not a probability.

    Attributes:
        attributions: After a call, the maps before scaling: a list of one tensor
            ``[B, 1, h, w]``; ``None`` after ``aug_smooth``.
        outputs: After a call, the model's log-probabilities, detached.

    Raises:
        TypeError: If ``target_layers`` is not a list.
        ValueError: If the model has no CAPE head, or a layer does not feed it.

    Example:
        >>> from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
        >>> from fam_plugins.cape import with_cape_head
        >>> net = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...     nn.Linear(8, 4),
        ... )
        >>> with CAPE(with_cape_head(net)) as cam:
        ...     cam(torch.rand(2, 3, 6, 6), [ClassifierOutputTarget(1)] * 2).shape
        (2, 6, 6)
        >>> cam.probabilities.shape
        torch.Size([2, 1, 4, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module | str] | None = None,
        reshape_transform: Callable[[Any], Tensor] | None = None,
        *,
        relative: bool = False,
    ) -> None:
        if target_layers is not None and not isinstance(target_layers, (list, tuple)):
            raise TypeError(
                f"target_layers must be a list of layers or None, not "
                f"{type(target_layers).__name__}"
            )
        if reshape_transform is not None:
            raise ValueError(
                "CAPE reads the map as its head does and needs no reshape_transform: leave it out"
            )
        found = [find_head(model, layer) for layer in target_layers or [None]]
        self._head, self._name = found[0]
        super().__init__(model, [self._head], None)
        self.relative = relative

    @property
    def probabilities(self) -> Tensor | None:
        """The probability maps ``[B, 1, h, w]`` of the last call; ``None`` where there are none."""
        return self.attributions[0] if self.attributions and not self.relative else None

    def run_pass(self, input_tensor: Tensor) -> tuple[LayerPass, Any]:
        """Run the model once; return the pass and the model's output."""
        one = LayerPass(self.model, self.target_layers, at_input=True, differentiate=False)
        return one, one.run(lambda: self.model(input_tensor))

    def explain(
        self,
        one: LayerPass,
        outputs: Any,  # noqa: ARG002  (the head says more than its output)
        targets: Sequence[Target],
        eigen_smooth: bool,
    ) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Explain a pass: its map ``[B, 1, h, w]``, and the same as a float32 array."""
        if eigen_smooth:
            raise ValueError(
                "eigen_smooth replaces the sum over channels, and a CAPE map has none: leave it out"
            )
        ((features,),) = one.tracked
        head = self._head
        classes = [_class_of(target, head.num_classes) for target in targets]
        with torch.no_grad():
            maps = head.relative(features) if self.relative else head.contributions(features)
        picked = maps[range(len(maps)), classes].unsqueeze(1)
        yield picked, to_numpy(picked[:, 0])


def _class_of(target: Any, count: int) -> int:
    """The class that a target of pytorch-grad-cam stands for."""
    chosen = getattr(target, "category", None)
    if chosen is None or isinstance(target, BinaryClassifierOutputTarget):
        raise ValueError(
            f"CAPE explains the probability of a class, and {target!r} names none: pass "
            "ClassifierOutputTarget(class_index)"
        )
    index = int(chosen)
    if not 0 <= index < count:
        raise ValueError(
            f"class {index} is out of range: the CAPE head has {count} classes, 0 to {count - 1}"
        )
    return index
