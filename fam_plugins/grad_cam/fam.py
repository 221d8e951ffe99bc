"""FAM as a pytorch-grad-cam method: swap ``GradCAM`` for ``FAM``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from torch import Tensor, nn

from fam_plugins.core.layer_pass import LayerTensors, find_layer
from fam_plugins.core.maps import RulePass
from fam_plugins.core.rules import find_rule
from fam_plugins.core.transforms import check_transform, refuse_unreached, transform_for
from fam_plugins.grad_cam.base import OnePassCAM, Target, to_numpy

__all__ = ["FAM"]


class FAM(OnePassCAM):
    """Feature Activation Map: swap ``GradCAM`` for ``FAM`` in pytorch-grad-cam code.

    Same call, same kind of result: ``cam(input_tensor, targets)`` is a float32 numpy array
    ``[B, H, W]`` in [0, 1] at the size of the input. With a :class:`~fam_plugins.SimilarityModel`
    the target ``ClassifierOutputTarget(j)`` explains reference ``j`` and ``targets=None`` the
    nearest one; an encoder takes :class:`SimilarityTarget`; a classifier, its class logits.

    It takes one forward pass in eval mode. Only what follows the layers is differentiated;
    activations stay on their device; the model's training mode, gradients and hooks are afterwards
    as they were. Sources: FAM (arXiv 2307.05017) for the rule ``"fam"``, Grad-CAM (arXiv
    1610.02391) for ``"gradcam"``.

    Args:
        model: The model to explain.
        target_layers: The layers whose maps are averaged; modules, or their names.
        reshape_transform: Rearranges what a layer gives into ``[B, C, h, w]``:
            :class:`~fam_plugins.tokens_to_map` for tokens ``[B, T, C]``,
            :func:`~fam_plugins.channels_last_to_map` for Swin's ``[B, h, w, C]``, or ``"auto"`` to
            have it told by the shapes of the pass, layer by layer
            (:func:`~fam_plugins.infer_transform`).
        rule: ``"fam"`` (published), ``"additive"``, ``"centred"`` (the best rule for finding what
            matches), ``"gradcam"``.

    Attributes:
        attributions: After a call, the signed maps before ReLU and scaling: one tensor
            ``[B, 1, h, w]`` a target layer, on the layer's device; ``None`` after ``aug_smooth``,
            whose result is an average over six passes.
        outputs: After a call, what the model returned, detached.

    Raises:
        TypeError: If ``target_layers`` is not a list of layers, or ``reshape_transform`` cannot be
            called.
        ValueError: If the list is empty or names an unknown layer, there is no such rule, or
            ``reshape_transform`` is another string than ``"auto"``.

    Example:
        >>> from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
        >>> from fam_plugins import SimilarityModel
        >>> encoder = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> model = SimilarityModel(encoder, torch.eye(3))
        >>> with FAM(model, [encoder[0]]) as cam:
        ...     cam(torch.rand(2, 3, 4, 4), [ClassifierOutputTarget(0)] * 2).shape
        (2, 4, 4)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module | str],
        reshape_transform: Callable[[Any], Tensor] | str | None = None,
        *,
        rule: str = "fam",
    ) -> None:
        find_rule(rule)
        check_transform(reshape_transform, "reshape_transform")
        if not isinstance(target_layers, (list, tuple)):
            raise TypeError(
                f"target_layers must be a list of layers, such as [model.layer4], not "
                f"{type(target_layers).__name__}"
            )
        if not target_layers:
            raise ValueError("target_layers is empty: pass at least one, such as [model.layer4]")
        found = [find_layer(model, layer) for layer in target_layers]
        given = None if isinstance(reshape_transform, str) else reshape_transform
        super().__init__(model, [layer for layer, _ in found], given)
        # BaseCAM only stores it; it is called here alone.
        self.reshape_transform = reshape_transform
        self.rule = rule
        self._names = [name for _, name in found]
        self._images: tuple[int, ...] | None = None

    def start_pass(self) -> RulePass:
        """Prepare the next forward pass."""
        return RulePass(self.target_layers, self._names, find_rule(self.rule))

    def compute_cam_per_layer(
        self, input_tensor: Tensor, targets: Sequence[Target], eigen_smooth: bool
    ) -> list[np.ndarray]:
        """Turn the pass that was made into one map a layer."""
        self._images = tuple(input_tensor.shape)
        return super().compute_cam_per_layer(input_tensor, targets, eigen_smooth)

    def explain(
        self, one: RulePass, outputs: Any, targets: Sequence[Target], eigen_smooth: bool
    ) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Explain a pass: for each target layer its map ``[B, 1, h, w]``, and as float32 array."""
        gradients = one.gradients(lambda: _total_score(outputs, targets))
        for activation, gradient, layer, name in zip(
            one.activations, gradients, self.target_layers, self._names, strict=True
        ):
            transform = self.reshape_transform
            if isinstance(transform, str):
                transform = transform_for(
                    self.model, layer, name, _only(activation, name).shape, self._images
                )
            a, g = _as_map(activation, transform), _as_map(gradient, transform)
            if transform is not None and len(gradient) == 1:
                refuse_unreached(gradient[0], g, name)
            attribution = find_rule(self.rule).map(a, g)
            if eigen_smooth:
                parts = find_rule(self.rule).map(a, g, sum_channels=False)
                yield attribution, get_2d_projection(to_numpy(parts))
            else:
                yield attribution, to_numpy(attribution[:, 0])


def _only(tensors: LayerTensors, name: str) -> Tensor:
    if len(tensors) != 1:
        raise ValueError(
            f"layer {name!r} gives {len(tensors)} tensors: pass a reshape_transform that picks one "
            "and lays it out as [B, C, h, w]"
        )
    return tensors[0]


def _as_map(tensors: LayerTensors, transform: Callable[[Any], Tensor] | None) -> Tensor:
    batch = len(tensors[0])
    given = tensors[0] if len(tensors) == 1 else tensors
    result = given if transform is None else transform(given)
    if not isinstance(result, Tensor) or result.dim() not in (4, 5) or len(result) != batch:
        what = "the layer" if transform is None else "reshape_transform"
        shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"{what} gives {shape}, not [{batch}, C, h, w]: pass a reshape_transform that "
            "keeps the batch first and puts the channels second"
        )
    return result


def _total_score(outputs: Any, targets: Sequence[Target]) -> Tensor:
    scores = []
    for target, output in zip(targets, outputs, strict=True):
        value = target(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"target {target!r} returns {shape}, not one number: pick an output, such as "
                "ClassifierOutputTarget(3)"
            )
        scores.append(value.reshape(()))
    return torch.stack(scores)
