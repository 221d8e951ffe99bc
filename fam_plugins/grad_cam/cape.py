"""CAPE as a pytorch-grad-cam method: a map that is a probability, beside the one in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pytorch_grad_cam.utils.model_targets import BinaryClassifierOutputTarget
from torch import Tensor, nn

from fam_plugins.cape.head import cape_maps
from fam_plugins.cape.model import find_head
from fam_plugins.core.layer_pass import LayerPass
from fam_plugins.core.maps import check_finite
from fam_plugins.grad_cam.base import OnePassCAM, Target, to_numpy

__all__ = ["CAPE"]


class CAPE(OnePassCAM):
    """CAPE: swap ``GradCAM`` for ``CAPE`` on a model with a CAPE head.

    ``cam(input_tensor, targets)`` is a float32 numpy array ``[B, H, W]``, each map stretched to
    [0, 1] as every BaseCAM does; :attr:`probability_maps` are the maps themselves, which sum to the
    head's probability of the class. The CAPE head's top class can differ from the model's own.
    Takes one pass in eval mode, no gradient. Source: CAPE (CVPR 2024, arXiv 2404.02388).

    Args:
        model: A :class:`fam_plugins.cape.CapeModel`, or a module that contains a CapeHead.
        target_layers: Not needed; Grad-CAM code may keep the layer that feeds the head.
        reshape_transform: Must stay ``None``: the model already lays out its map.
        relative: Explain with mu-CAPE, ``relu(c + w)``: relative, not a probability.

    Raises:
        TypeError: If ``target_layers`` is not a list.
        ValueError: If the model has no CAPE head, or a layer does not feed it.

    Example:
        >>> from fam_plugins.cape import with_cape_head
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> with CAPE(with_cape_head(net.append(nn.Linear(8, 4)))) as cam:
        ...     cam(torch.rand(2, 3, 6, 6)).shape, cam.probability_maps.shape
        ((2, 6, 6), torch.Size([2, 1, 4, 4]))
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module | str] | None = None,
        reshape_transform: Callable[[Any], Tensor] | None = None,
        *,
        relative: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not a {type(model).__name__}")
        if not isinstance(target_layers, (list, tuple, type(None))):
            raise TypeError(f"target_layers must be a list or None, not {target_layers!r}")
        if reshape_transform is not None:
            raise ValueError("CAPE takes no reshape_transform, it reads the map as its head does")
        for layer in target_layers or [None]:
            self._head, _ = find_head(model, layer)
        super().__init__(model, [self._head.region_logits], None)
        self.relative = relative

    @property
    def probability_maps(self) -> Tensor | None:
        """The probability maps ``[B, 1, h, w]`` of the last call; ``None`` where there are none."""
        return self.attributions[0] if self.attributions and not self.relative else None

    def run_pass(self, input_tensor: Tensor) -> tuple[LayerPass, Any]:
        """Run the model once; return the pass and the model's output."""
        one = LayerPass(self.model, self.target_layers, differentiate=False)
        return one, one.run(lambda: self.model(input_tensor))

    @torch.no_grad()
    def explain(
        self, one: Any, _outputs: Any, targets: Sequence[Target], eigen_smooth: bool
    ) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Explain a pass: its map ``[B, 1, h, w]``, and the same as a float32 array."""
        if eigen_smooth:
            raise ValueError("eigen_smooth needs channels, and a CAPE map has none: leave it out")
        ((logits,),) = one.tracked
        classes = [_class_of(target, logits.shape[-1]) for target in targets]
        chosen = torch.tensor(classes, device=logits.device)
        maps = check_finite(cape_maps(self._head, logits, chosen, relative=self.relative))
        yield maps, to_numpy(maps[:, 0])


def _class_of(target: Any, count: int) -> int:
    """The class that a target of pytorch-grad-cam names."""
    chosen = getattr(target, "category", None)
    if chosen is None or isinstance(target, BinaryClassifierOutputTarget):
        fix = "names none: pass ClassifierOutputTarget(class_index)"
        raise ValueError(f"CAPE explains the probability of a class, and {target!r} {fix}")
    if chosen not in range(count):
        raise ValueError(f"class {chosen}: the CAPE head has {count} classes, 0 to {count - 1}")
    return int(chosen)
