"""FAM as a pytorch-grad-cam method, and a similarity target for every method there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

try:
    from pytorch_grad_cam.base_cam import BaseCAM
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
except ImportError as error:
    raise ImportError(
        "fam_plugins.grad_cam needs pytorch-grad-cam: pip install grad-cam"
    ) from error

from fam_plugins.layer_pass import find_layer
from fam_plugins.references import eval_mode, place_of
from fam_plugins.rule_pass import RulePass
from fam_plugins.rules import find_rule
from fam_plugins.similarity import check_embeddings, find_similarity, score

__all__ = ["FAM", "SimilarityTarget"]


class SimilarityTarget:
    """How alike an embedding is to a reference, as a target for any pytorch-grad-cam method.

    For an encoder that returns embeddings. (A :class:`~fam_plugins.SimilarityModel` returns scores
    instead: there, reference ``j`` is ``ClassifierOutputTarget(j)``.)

    Args:
        reference: The embedding to compare with, ``[D]`` or ``[1, D]``; copied and detached.
        similarity: ``"cosine"``, ``"dot"`` or ``"euclidean"`` (negative squared distance).
        contrast: Embeddings ``[M, D]`` or ``[D]``; the mean similarity to them is subtracted.

    Raises:
        ValueError: On an unknown similarity, or embeddings that are not finite, zero (cosine), or
            of another shape.

    Example:
        >>> target = SimilarityTarget(torch.tensor([1.0, 0.0]))
        >>> target(torch.tensor([3.0, 4.0]))
        tensor(0.6000)
        >>> target(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([0.6000, 0.0000])
    """

    def __init__(
        self, reference: Tensor, similarity: str = "cosine", contrast: Tensor | None = None
    ) -> None:
        allow_zero = not find_similarity(similarity).scale_free
        self.similarity = similarity
        self.reference = _rows(reference, "reference", allow_zero)
        if len(self.reference) != 1:
            raise ValueError(
                f"reference has shape {tuple(reference.shape)}: pass one embedding [D]; average "
                "several shots with fam_plugins.prototypes first"
            )
        self.contrast = None if contrast is None else _rows(contrast, "contrast", allow_zero)
        if self.contrast is not None:
            check_embeddings(self.contrast, width=self.reference.shape[1], what="contrast")

    def __call__(self, model_output: Tensor) -> Tensor:
        """Score one embedding ``[D]`` -> scalar, or a batch ``[B, D]`` -> ``[B]``.

        Raises:
            TypeError: If the model returns no tensor.
            ValueError: If it has another shape or width.
        """
        if not isinstance(model_output, Tensor):
            raise TypeError(
                f"the model returns a {type(model_output).__name__}, not embeddings: wrap it in a "
                "module whose forward picks the embeddings [B, D] out of it"
            )
        if model_output.dim() not in (1, 2):
            raise ValueError(
                f"the model gives shape {tuple(model_output.shape)} where an embedding [D] is "
                "expected: append pooling and nn.Flatten() to it"
            )
        reference, contrast = (
            None if rows is None else rows.to(model_output.device, model_output.dtype)
            for rows in (self.reference, self.contrast)
        )
        assert reference is not None
        embeddings = model_output.reshape(-1, model_output.shape[-1])
        scores = score(self.similarity, embeddings, reference, contrast)[:, 0]
        return scores[0] if model_output.dim() == 1 else scores


class FAM(BaseCAM):
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
        reshape_transform: Rearranges what a layer gives into ``[B, C, h, w]``, for tokens.
        rule: ``"fam"`` (published), ``"additive"``, ``"centred"`` (the best rule for finding what
            matches), ``"gradcam"``.

    Attributes:
        attributions: After a call, the signed maps before ReLU and scaling: one tensor
            ``[B, 1, h, w]`` a target layer, on the layer's device; ``None`` after ``aug_smooth``,
            whose result is an average over six passes.
        outputs: After a call, what the model returned, detached.

    Raises:
        TypeError: If ``target_layers`` is not a list of layers.
        ValueError: If it is empty, names an unknown layer, or there is no such rule.

    Example:
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
        reshape_transform: Callable[[Any], Tensor] | None = None,
        *,
        rule: str = "fam",
    ) -> None:
        find_rule(rule)
        if not isinstance(target_layers, (list, tuple)):
            raise TypeError(
                f"target_layers must be a list of layers, such as [model.layer4], not "
                f"{type(target_layers).__name__}"
            )
        if not target_layers:
            raise ValueError("target_layers is empty: pass at least one, such as [model.layer4]")
        found = [find_layer(model, layer) for layer in target_layers]
        # BaseCAM's constructor leaves its model in eval mode for good, hooks it for good, and asks
        # for a first parameter. A stand-in takes all three; the attributes are set below.
        super().__init__(
            model=nn.Linear(1, 1),
            target_layers=[],
            reshape_transform=reshape_transform,
            uses_gradients=False,
        )
        self.model = model
        self.target_layers = [layer for layer, _ in found]
        self.rule = rule
        self.attributions: list[Tensor] | None = None
        self.outputs: Any = None
        self.activations_and_grads = _OnePass(self, [name for _, name in found])

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
        targets: Sequence[Callable[[Any], Tensor]] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> np.ndarray:
        """Explain a batch.

        Args:
            input_tensor: Images ``[B, C, H, W]``, or volumes ``[B, C, D, H, W]``.
            targets: One callable an image; it gets that image's output and returns a number.
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
        if aug_smooth and input_tensor.dim() != 4:
            raise ValueError("aug_smooth flips images [B, C, H, W]; for volumes leave it out")
        cams: np.ndarray = super().__call__(input_tensor, targets, aug_smooth, eigen_smooth)
        if aug_smooth:
            self.attributions = None
        return cams

    def forward(
        self,
        input_tensor: Tensor,
        targets: Sequence[Callable[[Any], Tensor]] | None,
        eigen_smooth: bool = False,
    ) -> np.ndarray:
        """Explain a batch without augmentation; see :meth:`__call__`."""
        _check_call(input_tensor, targets)
        if self.device is not None:
            input_tensor = input_tensor.to(self.device)
        outputs = self.activations_and_grads(input_tensor)
        try:
            if targets is None:
                targets = _highest(outputs)
            cam_per_layer = self.compute_cam_per_layer(input_tensor, targets, eigen_smooth)
        finally:
            self.activations_and_grads.release()
        cams: np.ndarray = self.aggregate_multi_layers(cam_per_layer)
        return cams

    def compute_cam_per_layer(
        self,
        input_tensor: Tensor,
        targets: Sequence[Callable[[Any], Tensor]],
        eigen_smooth: bool,
    ) -> list[np.ndarray]:
        """Turn the pass that :attr:`activations_and_grads` made into one map a layer."""
        activations, gradients = self.activations_and_grads.explain(targets)
        size = tuple(input_tensor.shape[2:])
        self.attributions, scaled = [], []
        for layer, activation, gradient in zip(
            self.target_layers, activations, gradients, strict=True
        ):
            attribution = find_rule(self.rule).map(activation, gradient)
            if not torch.isfinite(attribution).all():
                raise ValueError(
                    "the map holds NaN or infinite values: check the input and the weights, and "
                    "for float16 the range (bfloat16 or float32 have more)"
                )
            self.attributions.append(attribution)
            cam = self.get_cam_image(
                input_tensor, layer, targets, activation, gradient, eigen_smooth
            )
            cam = scale_cam_image(np.maximum(cam, 0), self.get_target_width_height(input_tensor))
            if cam.shape[1:] != size:
                raise ValueError(
                    f"the map has shape {cam.shape[1:]} for an input of {size}: upgrade grad-cam "
                    "for volumes (pip install -U grad-cam)"
                )
            scaled.append(cam[:, None])
        return scaled

    def get_cam_image(
        self,
        input_tensor: Tensor,  # noqa: ARG002  (BaseCAM's signature, called by position)
        target_layer: nn.Module,  # noqa: ARG002
        targets: Sequence[Callable[[Any], Tensor]],  # noqa: ARG002
        activations: Tensor,
        grads: Tensor,
        eigen_smooth: bool = False,
    ) -> np.ndarray:
        """Apply the rule to one layer: ``[B, C, h, w]`` twice -> float32 ``[B, h, w]``, signed."""
        rule = find_rule(self.rule)
        if eigen_smooth:
            parts = rule.map(activations, grads, sum_channels=False)
            projected: np.ndarray = get_2d_projection(_to_numpy(parts))
            return projected
        return _to_numpy(rule.map(activations, grads)[:, 0])

    def __exit__(self, *_exception: object) -> None:
        """Leave the ``with`` block; an exception raised inside it is the user's to see."""
        self.activations_and_grads.release()

    def __del__(self) -> None:
        """Nothing to release: no hook outlives a call."""


class _OnePass:
    """Stands where BaseCAM keeps its hooks; here they live only while the model runs."""

    def __init__(self, cam: FAM, names: list[str]) -> None:
        self._cam = cam
        self._names = names
        self._pass: RulePass | None = None
        self._outputs: Any = None

    def __call__(self, input_tensor: Tensor) -> Any:
        cam = self._cam
        self._pass = RulePass(cam.target_layers, self._names, find_rule(cam.rule))
        with eval_mode(cam.model):
            self._outputs = self._pass.run(lambda: cam.model(input_tensor))
        outputs = self._outputs
        cam.outputs = outputs.detach() if isinstance(outputs, Tensor) else outputs
        return outputs

    def explain(
        self, targets: Sequence[Callable[[Any], Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Activations and gradients ``[B, C, h, w]`` of each layer for these targets."""
        assert self._pass is not None, "explain follows a call"
        gradients = self._pass.gradients(lambda: _total_score(self._outputs, targets))
        return (
            [self._as_map(tensors) for tensors in self._pass.activations],
            [self._as_map(tensors) for tensors in gradients],
        )

    def release(self) -> None:
        """Forget the pass and its graph."""
        self._pass = None
        self._outputs = None

    def _as_map(self, tensors: tuple[Tensor, ...]) -> Tensor:
        transform = self._cam.reshape_transform
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


def _check_call(input_tensor: Tensor, targets: Sequence[object] | None) -> None:
    if input_tensor.dim() not in (4, 5):
        raise ValueError(
            f"input_tensor has shape {tuple(input_tensor.shape)}: pass images [B, C, H, W] or "
            "volumes [B, C, D, H, W]; a single image needs a batch dimension (image[None])"
        )
    if len(input_tensor) == 0:
        raise ValueError("the batch is empty: pass at least one image")
    if targets is None:
        return
    if len(targets) != len(input_tensor):
        raise ValueError(
            f"there are {len(targets)} targets for {len(input_tensor)} images: pass one target an "
            "image, such as [target] * len(input_tensor)"
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
            "an image"
        )
    return [ClassifierOutputTarget(index) for index in outputs.argmax(dim=1).tolist()]


def _total_score(outputs: Any, targets: Sequence[Callable[[Any], Tensor]]) -> Tensor:
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


def _rows(embeddings: Any, what: Literal["reference", "contrast"], allow_zero: bool) -> Tensor:
    with torch.inference_mode(False):
        rows = torch.as_tensor(embeddings).detach().clone()
    if rows.dim() == 1:
        rows = rows[None]
    if rows.dim() != 2 or rows.numel() == 0:
        raise ValueError(
            f"{what} has shape {tuple(rows.shape)}: pass embeddings [D] or [M, D]; embed images "
            "with the encoder first"
        )
    check_embeddings(rows, allow_zero=allow_zero, what=what)
    return rows


def _to_numpy(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().cpu().numpy()
    return array
