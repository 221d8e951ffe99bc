"""One line of glue for evaluation harnesses: Captum, pytorch-grad-cam, Quantus, torchcam.

Each harness wants an explanation in its own form. The functions here bring LayerFam, LayerCape and
Captum's own layer methods into it, and refuse what would be scored without meaning anything: a
bare encoder whose "classes" would be embedding dimensions, a map that is constant, NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_plugins.cape.head import CapeHead
from fam_plugins.core.eval_mode import place_of
from fam_plugins.core.layer_pass import find_layer
from fam_plugins.core.maps import check_finite
from fam_plugins.core.similarity_model import SimilarityModel

__all__ = [
    "TorchcamExtractor",
    "as_cams",
    "as_explanation",
    "check_scores",
    "explain_func",
    "quantus_problems",
]


def explain_func(
    method: Callable[..., Any],
    layer: str,
    *,
    classifier: bool = False,
    **options: Any,
) -> Callable[..., np.ndarray]:
    """Make a Quantus ``explain_func`` of a layer method.

    The layer is looked up by name in whatever model Quantus passes, so the deep copies that MPRT
    randomises are explained themselves.

    Args:
        method: A class constructed as ``method(model, layer)``: ``LayerFam``, ``LayerCape``, any
            of Captum's layer methods, or a pytorch-grad-cam class (``method(model, [layer])``).
        layer: Dotted name of the layer, such as ``"layer4"``.
        classifier: Say that the model's outputs are class scores. Not needed for a
            :class:`~fam_plugins.SimilarityModel` or a model with a CAPE head.
        **options: Passed to the constructor, such as ``rule="centred"``.

    Returns:
        A function ``(model, inputs [B, C, H, W], targets [B], **ignored) -> [B, 1, H, W]``, numpy
        in, numpy float32 out, at the size of the input, signed. It raises ValueError for a model
        whose outputs are not scores, and for maps that are constant or hold NaN.

    Example:
        >>> from captum.attr import LayerGradCam
        >>> encoder = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> model = SimilarityModel(encoder, torch.eye(3))
        >>> explain = explain_func(LayerGradCam, "0")
        >>> explain(model, np.random.rand(2, 3, 4, 4), np.array([0, 1])).shape
        (2, 1, 4, 4)
    """

    def explain(model: nn.Module, inputs: Any, targets: Any, **_ignored: Any) -> np.ndarray:
        check_scores(model, classifier=classifier)
        device, dtype = place_of(model)
        images = torch.as_tensor(inputs).to(device=device, dtype=dtype or torch.float32)
        classes = torch.as_tensor(targets).to(device=device).long().reshape(-1)
        module, _ = find_layer(model, layer)
        if hasattr(method, "get_cam_image"):  # pytorch-grad-cam
            from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

            with method(model, [module], **options) as cam:
                maps = torch.from_numpy(
                    cam(images, [ClassifierOutputTarget(c) for c in classes.tolist()])
                )[:, None]
        else:
            maps = method(model, module, **options).attribute(images, target=classes).detach()
            maps = _at_size(maps, images)
        _refuse_constant(check_finite(maps))
        array: np.ndarray = maps.float().cpu().numpy()
        return array

    return explain


def as_explanation(
    attribution: Any, *, interpolate_mode: str = "bilinear"
) -> Callable[..., tuple[Tensor]]:
    """Make an explanation function for ``captum.metrics`` of a layer attribution.

    ``sensitivity_max`` wants a tuple and iterates a bare tensor's batch, which is silently wrong;
    ``infidelity`` wants the exact shape of the input.

    Args:
        attribution: An object with ``attribute``, such as ``LayerFam(model, layer)``.
        interpolate_mode: How maps are enlarged, as for :func:`torch.nn.functional.interpolate`.

    Returns:
        A function ``(inputs [B, C, H, W], **arguments of attribute) -> (maps [B, C, H, W],)``:
        each map at the size of the input, the same in every channel.

    Example:
        >>> from fam_plugins import LayerFam
        >>> encoder = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> explain = as_explanation(LayerFam(SimilarityModel(encoder, torch.eye(3)), "0"))
        >>> explain(torch.rand(2, 3, 4, 4), target=1)[0].shape
        torch.Size([2, 3, 4, 4])
    """

    def explain(inputs: Any, **arguments: Any) -> tuple[Tensor]:
        images = inputs[0] if isinstance(inputs, tuple) else inputs
        maps = attribution.attribute(images, **arguments).detach()
        maps = check_finite(_at_size(maps, images, interpolate_mode))
        return (maps.expand_as(images).contiguous(),)

    return explain


def as_cams(maps: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Turn signed maps into what ``pytorch_grad_cam.metrics`` take.

    The positive part, stretched to [0, 1] and resized as pytorch-grad-cam does it itself. (Its
    metrics accept a smaller map silently and score it wrong.)

    Args:
        maps: ``[B, 1, h, w]``, such as ``LayerFam.attribute`` returns.
        size: Height and width of the input.

    Returns:
        float32 ``[B, H, W]`` in [0, 1].

    Raises:
        ValueError: If the maps have another shape, hold NaN, or one of them is constant.

    Example:
        >>> as_cams(torch.tensor([[[[0.0, 1.0], [-1.0, 0.5]]]]), (4, 4)).shape
        (1, 4, 4)
    """
    from pytorch_grad_cam.utils.image import scale_cam_image

    if maps.dim() != 4 or maps.shape[1] != 1:
        raise ValueError(f"maps have shape {tuple(maps.shape)}, not [B, 1, h, w]: sum the channels")
    positive = check_finite(maps)[:, 0].clamp_min(0)
    _refuse_constant(positive)
    height, width = size
    scaled = scale_cam_image(positive.float().cpu().numpy(), (width, height))
    cams: np.ndarray = scale_cam_image(scaled)
    return cams


class TorchcamExtractor:
    """A layer attribution as an extractor for ``torchcam.metrics``.

    torchcam runs ``extractor.model(images)`` and then asks the extractor for the maps of those
    images, so this one notes each input on the way. Use it in a ``with`` block: leaving it takes
    the hook off the model again.

    Args:
        attribution: An object with ``attribute`` and ``forward_func``, such as ``LayerFam(model,
            layer)`` or any of Captum's layer methods.
        classifier: As for :func:`explain_func`.

    Raises:
        TypeError: If the attribution explains a function instead of a module.
        ValueError: If the model's outputs are not scores.

    Example:
        >>> from fam_plugins import LayerFam
        >>> encoder = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> explainer = LayerFam(SimilarityModel(encoder, torch.eye(3)), "0")
        >>> with TorchcamExtractor(explainer) as extractor:
        ...     scores = extractor.model(torch.rand(2, 3, 4, 4))
        ...     extractor([0, 1], scores)[0].shape
        torch.Size([2, 4, 4])
    """

    def __init__(self, attribution: Any, *, classifier: bool = False) -> None:
        if not isinstance(attribution.forward_func, nn.Module):
            raise TypeError("torchcam's metrics run the model themselves: explain a module")
        check_scores(attribution.forward_func, classifier=classifier)
        self.model: nn.Module = attribution.forward_func
        self._attribution = attribution
        self._images: Tensor | None = None
        self._listening = True
        self._handle = self.model.register_forward_pre_hook(self._note)

    def __call__(
        self,
        class_idx: int | list[int] | None = None,
        scores: Any = None,
        normalized: bool = True,
        *,
        targets: Any = None,
        **_ignored: Any,
    ) -> list[Tensor]:
        """Maps ``[B, h, w]`` of the images that the model saw last; positive part.

        Raises:
            RuntimeError: If the model has not seen any images yet.
            ValueError: If output targets are asked for, or a map is constant or holds NaN.
        """
        if targets is not None:
            raise ValueError("pass class_idx: a layer attribution explains classes, not targets")
        if self._images is None:
            raise RuntimeError("run extractor.model(images) before asking for their maps")
        chosen = scores.argmax(dim=-1).tolist() if class_idx is None else class_idx
        with self._hooks_off():
            maps = self._attribution.attribute(self._images, target=chosen).detach()[:, 0]
        positive = check_finite(maps).clamp_min(0)
        _refuse_constant(positive)
        if normalized:
            flat = positive.flatten(1)
            low, high = flat.amin(dim=1), flat.amax(dim=1)
            shape = (-1, *(1,) * (positive.dim() - 1))
            positive = (positive - low.reshape(shape)) / (high - low).reshape(shape)
        return [positive]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        """There is one layer, hence one map an image."""
        (cam,) = cams
        return cam

    @contextmanager
    def _hooks_off(self) -> Iterator[None]:
        listening, self._listening = self._listening, False
        try:
            yield
        finally:
            self._listening = listening

    def _note(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._listening:
            self._images = args[0].detach()

    def __enter__(self) -> TorchcamExtractor:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._handle.remove()
        self._images = None


def check_scores(model: nn.Module, *, classifier: bool = False) -> None:
    """Make sure that the columns of a model's output mean something to a harness.

    Args:
        model: The model that a harness is to evaluate.
        classifier: The user's word that the outputs are class scores.

    Raises:
        ValueError: If the model may be a bare encoder, whose "classes" are embedding dimensions.

    Warns:
        UserWarning: If there is a single reference: its softmax is constantly 1.

    Example:
        >>> check_scores(SimilarityModel(nn.Flatten(), torch.eye(2)))
    """
    parts = list(model.modules())
    if not classifier and not any(isinstance(p, (SimilarityModel, CapeHead)) for p in parts):
        raise ValueError(
            f"a harness would take the outputs of this {type(model).__name__} for class scores; if "
            "they are embeddings, wrap it, SimilarityModel(encoder, references); if they are "
            "class scores, say so with classifier=True"
        )
    for part in parts:
        if isinstance(part, SimilarityModel) and len(part.references) == 1:
            warnings.warn(
                "the model has one reference, so its softmax is constantly 1: metrics that take "
                "a softmax say nothing; add references, or use the scores themselves",
                UserWarning,
                stacklevel=3,
            )


def quantus_problems() -> dict[str, str]:
    """What is broken in Quantus 0.6 itself, whatever the explanation: metric -> reason.

    Example:
        >>> "SmoothMPRT" in quantus_problems()
        True
    """
    problems = {
        "SmoothMPRT": "ignores explain_func and explains by its own gradients",
        "ROAD": "crashes on images with more than one channel",
        "IROF": "crashes on images with more than one channel",
    }
    if not hasattr(np, "trapz"):
        for metric in ("PixelFlipping", "RegionPerturbation", "Selectivity", "IROF"):
            problems[metric] = "its area under the curve needs numpy.trapz, gone since NumPy 2.4"
    return problems


def _at_size(maps: Tensor, images: Tensor, mode: str = "bilinear") -> Tensor:
    """Enlarge maps ``[B, 1, h, w]`` to the size of the images."""
    if maps.dim() != 4 or images.dim() != 4:
        raise ValueError(
            f"maps {tuple(maps.shape)} of inputs {tuple(images.shape)}: harnesses take images "
            "[B, C, H, W] and maps [B, 1, h, w]; explain a convolutional layer"
        )
    aligned = {"align_corners": False} if mode in ("bilinear", "bicubic") else {}
    return F.interpolate(maps.float(), images.shape[2:], mode=mode, **aligned)


def _refuse_constant(maps: Tensor) -> None:
    flat = maps.flatten(1)
    constant = (flat.amax(dim=1) == flat.amin(dim=1)).nonzero().flatten().tolist()
    if constant:
        raise ValueError(
            f"the map of image {constant[0]} is constant, so a harness would rank its pixels at "
            "random: use another rule (Grad-CAM of an image with itself is zero under cosine), or "
            "leave the image out"
        )
