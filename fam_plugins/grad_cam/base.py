"""A BaseCAM that runs the model once and leaves it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from pytorch_grad_cam.base_cam import BaseCAM
from pytorch_grad_cam.utils.image import scale_cam_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from fam_plugins.core.eval_mode import eval_mode, place_of
from fam_plugins.core.scores import check_floats

__all__ = ["OnePassCAM", "Target", "to_numpy"]

Target = Callable[[Any], Tensor]


class OnePassCAM(BaseCAM):
    """What FAM and CAPE share: BaseCAM's contract without its traps.

    BaseCAM keeps hooks between calls, leaves the model in eval mode, clears the user's gradients,
    and copies every activation to the host. Here hooks live only while the model runs, modes and
    gradients stay as they were, and only the finished map leaves the device.

    After a call, ``attributions`` holds the maps before ReLU and scaling, one tensor
    ``[B, 1, h, w]`` per target layer (``None`` after ``aug_smooth``, whose result is an average
    over six passes), and ``outputs`` what the model returned, detached.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: list[nn.Module],
        reshape_transform: Callable[[Any], Tensor] | str | None,
    ) -> None:
        # BaseCAM's constructor leaves its model in eval mode for good, hooks it for good, and asks
        # for a first parameter. A stand-in takes all three; the attributes are set below.
        stand_in = nn.ParameterList([nn.Parameter(torch.empty(0))])
        super().__init__(
            model=stand_in, target_layers=[], reshape_transform=None, uses_gradients=False
        )
        self.model = model
        self.target_layers = target_layers
        self.reshape_transform = reshape_transform
        self.attributions: list[Tensor] | None = None
        self.outputs: Any = None
        self.activations_and_grads = OnePass(self)

    def run_pass(self, input_tensor: Tensor) -> tuple[Any, Any]:
        """Run the model once; return what watched its layers, and its output."""
        raise NotImplementedError

    def explain(
        self, one: Any, outputs: Any, targets: Sequence[Target], eigen_smooth: bool
    ) -> Iterable[tuple[Tensor, np.ndarray]]:
        """Explain a pass: for each target layer its map ``[B, 1, h, w]``, and as float32 array."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device | None:
        """Where the model is now; ``None`` if it has no parameters."""
        return place_of(self.model)[0]

    @device.setter
    def device(self, _device: torch.device) -> None:
        # BaseCAM notes the device at construction; following the model lets it move later.
        pass

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Target] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> np.ndarray:
        """Explain a batch.

        Args:
            input_tensor: Images ``[B, C, H, W]``, or volumes ``[B, C, D, H, W]``.
            targets: One callable per image; it gets that image's output and returns a number.
                ``None`` explains the highest output.
            aug_smooth: Average over flips and scalings of the input; six forward passes.
            eigen_smooth: Use the first principal component instead of the sum over channels.

        Returns:
            float32 ``[B, H, W]`` or ``[B, D, H, W]`` in [0, 1].

        Raises:
            AssertionError: If a layer does not run.
            RuntimeError: If a layer runs twice, or the score does not depend on it.
            TypeError: If a target is not callable, or a layer gives no tensor.
            ValueError: On an empty batch, another number of targets than images, a target that
                returns more than a number, a map that holds NaN, or a ``reshape_transform`` that
                gives another shape than ``[B, C, h, w]``.

        Warns:
            UserWarning: If rule ``"fam"`` meets a contrast set.
        """
        check_images(input_tensor)
        _check_targets(targets, len(input_tensor))
        if aug_smooth and input_tensor.dim() != 4:
            raise ValueError("aug_smooth flips images [B, C, H, W]; for volumes leave it out")
        cams: np.ndarray = super().__call__(input_tensor, targets, aug_smooth, eigen_smooth)
        if aug_smooth:
            self.attributions = None
        return cams

    def forward(
        self,
        input_tensor: Tensor,
        targets: Sequence[Target] | None,
        eigen_smooth: bool = False,
    ) -> np.ndarray:
        """Explain a batch without augmentation; see :meth:`__call__`."""
        input_tensor = input_tensor.to(self.device)
        outputs = self.activations_and_grads(input_tensor)
        try:
            chosen = _highest(outputs) if targets is None else targets
            cams = self.compute_cam_per_layer(input_tensor, chosen, eigen_smooth)
        finally:
            self.activations_and_grads.release()
        merged: np.ndarray = self.aggregate_multi_layers(cams)
        return merged

    def compute_cam_per_layer(
        self, input_tensor: Tensor, targets: Sequence[Target], eigen_smooth: bool
    ) -> list[np.ndarray]:
        """Turn the pass that :attr:`activations_and_grads` made into one map per layer."""
        one = self.activations_and_grads
        found = list(self.explain(one.current, one.outputs, targets, eigen_smooth))
        self.attributions = [attribution for attribution, _ in found]
        return [self.scaled(cam, input_tensor) for _, cam in found]

    def scaled(self, cams: np.ndarray, input_tensor: Tensor) -> np.ndarray:
        """Signed maps ``[n, h, w]`` -> ``[n, 1, H, W]`` in [0, 1], as BaseCAM scales them."""
        size = tuple(input_tensor.shape[2:])
        resized = scale_cam_image(np.maximum(cams, 0), self.get_target_width_height(input_tensor))
        if resized.shape[1:] != size:
            raise ValueError(
                f"the map has shape {resized.shape[1:]} for an input of {size}: upgrade grad-cam "
                "for volumes (pip install -U grad-cam)"
            )
        cam: np.ndarray = resized[:, None]
        return cam

    def __exit__(self, *_exception: object) -> None:
        """Leave the ``with`` block; an exception raised inside it is the user's to see."""
        self.activations_and_grads.release()

    def __del__(self) -> None:
        """Nothing to release: no hook outlives a call."""


class OnePass:
    """In the place of BaseCAM's hooks, which here live only while the model runs."""

    def __init__(self, cam: OnePassCAM) -> None:
        self._cam = cam
        self.current: Any = None
        self.outputs: Any = None

    def __call__(self, input_tensor: Tensor) -> Any:
        """Run the model once, in eval mode."""
        with eval_mode(self._cam.model):
            self.current, outputs = self._cam.run_pass(input_tensor)
        self.outputs = outputs
        self._cam.outputs = outputs.detach() if isinstance(outputs, Tensor) else outputs
        return outputs

    def release(self) -> None:
        """Forget the pass and its graph."""
        self.current = None
        self.outputs = None


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Copy a tensor of any floating dtype to the host, as the float32 that BaseCAM works in."""
    array: np.ndarray = tensor.detach().float().cpu().numpy()
    return array


def check_images(images: Tensor) -> None:
    """Refuse what is no batch of images or volumes."""
    check_floats(images, "input_tensor")
    if images.dim() not in (4, 5):
        raise ValueError(
            f"input_tensor has shape {tuple(images.shape)}: pass images [B, C, H, W] or "
            "volumes [B, C, D, H, W]; a single image needs a batch dimension (image[None])"
        )


def _check_targets(targets: Sequence[object] | None, count: int) -> None:
    if targets is None:
        return
    if not isinstance(targets, (Sequence, np.ndarray, Tensor)):
        kind = type(targets).__name__
        raise TypeError(f"targets is a {kind}: pass a list, [target] * len(input_tensor)")
    if len(targets) != count:
        raise ValueError(
            f"there are {len(targets)} targets for {count} images: pass one target per image, such "
            "as [target] * len(input_tensor)"
        )
    for target in targets:
        if not callable(target):
            raise TypeError(
                f"target {target!r} cannot be called: wrap it, ClassifierOutputTarget({target!r})"
            )


def _highest(outputs: Any) -> list[ClassifierOutputTarget]:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"the model returns {shape}, which has no highest class: pass targets, one callable "
            "per image"
        )
    return [ClassifierOutputTarget(index) for index in outputs.argmax(dim=1).tolist()]
