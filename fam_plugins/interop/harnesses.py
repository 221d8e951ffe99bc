"""One line of glue per evaluation harness: Captum, pytorch-grad-cam, Quantus, torchcam.

The functions bring LayerFam, LayerCape and Captum's own layer methods into each harness's form, and
refuse with a ValueError what would be scored without meaning anything: a bare encoder whose
"classes" would be embedding dimensions, a map that holds NaN or, where pixels are ranked, is flat.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fam_plugins.cape.head import CapeHead
from fam_plugins.core.eval_mode import check_module
from fam_plugins.core.layer_pass import find_layer
from fam_plugins.core.maps import check_finite
from fam_plugins.core.references import as_tensor, at_home
from fam_plugins.core.similarity_model import SimilarityModel

__all__ = ["for_captum", "for_grad_cam", "for_quantus", "for_torchcam", "quantus_problems"]


def for_captum(attribution: Any, *, interpolate_mode: str = "bilinear") -> Callable[..., Any]:
    """Make the explanation function that ``captum.metrics`` take.

    Args:
        attribution: An object with ``attribute``, such as ``LayerFam(model, layer, rule=...)``.
        interpolate_mode: How maps are enlarged, as for :func:`torch.nn.functional.interpolate`.

    Returns:
        A function ``(inputs [B, C, H, W], **arguments of attribute) -> (maps [B, C, H, W],)``, each
        map the same in every channel. ``sensitivity_max`` needs the tuple (it iterates the batch of
        a bare tensor, silently), ``infidelity`` the shape of the input.

    Example:
        >>> from fam_plugins import LayerFam
        >>> model = SimilarityModel(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.rand(3, 48))
        >>> explain = for_captum(LayerFam(model, "encoder.0", rule="centred"))
        >>> explain(torch.rand(2, 3, 4, 4), target=1)[0].shape
        torch.Size([2, 3, 4, 4])
    """
    _check_attribution(attribution)

    def explain(inputs: Any, **arguments: Any) -> tuple[Tensor]:
        if isinstance(inputs, tuple) and len(inputs) != 1:
            raise ValueError(f"inputs has {len(inputs)} tensors: pass one tensor of images")
        images = inputs[0] if isinstance(inputs, tuple) else inputs
        maps = _at_size(attribution.attribute(images, **arguments), images, interpolate_mode)
        return (maps.expand_as(images).contiguous(),)

    return explain


def for_grad_cam(maps: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Turn signed maps into what ``pytorch_grad_cam.metrics`` take.

    Args:
        maps: ``[B, 1, h, w]``, such as ``LayerFam.attribute`` returns.
        size: Height and width of the input.

    Returns:
        float32 ``[B, H, W]``: the positive part, stretched to [0, 1] and resized as
        pytorch-grad-cam does it. (Its metrics accept a smaller map silently and score it wrong.)

    Raises:
        ValueError: If the maps have another shape, hold NaN, or one of them is constant.

    Example:
        >>> for_grad_cam(torch.tensor([[[[0.0, 1.0], [-1.0, 0.5]]]]), (4, 4)).shape
        (1, 4, 4)
    """
    from pytorch_grad_cam.utils.image import scale_cam_image

    sides = size if isinstance(size, (tuple, list)) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError("size must be (height, width), ints such as images.shape[2:]")
    positive = _check_varied(_check_map(maps).clamp_min(0))[:, 0].float().cpu().numpy()
    return np.asarray(scale_cam_image(scale_cam_image(positive, tuple(size)[::-1])))


def for_quantus(
    method: Callable[..., Any], layer: str, *, classifier: bool = False, **options: Any
) -> Callable[..., np.ndarray]:
    """Make the ``explain_func`` that Quantus takes.

    Args:
        method: A class constructed as ``method(model, layer)``, such as ``LayerFam``, ``LayerCape``
            or Captum's ``LayerGradCam``, or a pytorch-grad-cam class (``method(model, [layer])``).
        layer: Its name, such as ``"layer4"``, looked up anew in the copies that MPRT randomises.
        classifier: Whether the model's outputs are class scores. Not needed for a
            :class:`~fam_plugins.SimilarityModel` or a model with a CAPE head.
        **options: Passed to the constructor, such as ``rule="centred"``.

    Returns:
        A function ``(model, inputs [B, C, H, W], targets [B], **ignored) -> [B, 1, H, W]``, numpy
        in, numpy float32 out, signed. It raises ValueError for a model whose outputs may not be
        scores, and for maps that are constant or hold NaN.

    Example:
        >>> from fam_plugins import LayerFam
        >>> model = SimilarityModel(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.rand(3, 48))
        >>> explain = for_quantus(LayerFam, "encoder.0", rule="centred")
        >>> explain(model, np.random.rand(2, 3, 4, 4), np.array([0, 1])).shape
        (2, 1, 4, 4)
    """
    if not isinstance(method, type) and not (callable(method) and not hasattr(method, "model")):
        raise TypeError(f"method must be a class such as LayerFam, not {type(method).__name__}")

    def explain(model: nn.Module, inputs: Any, targets: Any, **_ignored: Any) -> np.ndarray:
        _check_scores(model, classifier)
        images = at_home(as_tensor(inputs, "inputs"), model, "inputs")
        classes = as_tensor(targets, "targets").to(images.device).reshape(-1)
        if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
            raise TypeError(f"targets have dtype {classes.dtype}: pass integers [B]")
        classes = classes.long()
        module, _ = find_layer(model, layer)
        if hasattr(method, "get_cam_image"):  # pytorch-grad-cam
            from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

            with method(model, [module], **options) as cam:
                cams = cam(images, [ClassifierOutputTarget(c) for c in classes.tolist()])
            maps = torch.from_numpy(cams)[:, None]
        else:
            maps = method(model, module, **options).attribute(images, target=classes)
        return np.asarray(_check_varied(_at_size(maps, images)).cpu())

    return explain


def for_torchcam(attribution: Any, *, classifier: bool = False) -> _Extractor:
    """Make the extractor that ``torchcam.metrics`` take, for a ``with`` block.

    Args:
        attribution: An object with ``attribute`` and ``forward_func``, such as a LayerFam.
        classifier: As for :func:`for_quantus`.

    Returns:
        An extractor that notes the images of ``extractor.model(images)`` until the block ends.
        ``extractor(class_idx, scores, normalized=True)`` returns ``[maps]``, their positive part
        ``[B, h, w]``, scaled to [0, 1] if normalized; ``class_idx=None`` is the highest score. It
        raises RuntimeError before any images, ValueError for ``targets=``, NaN and constant maps.

    Raises:
        TypeError: If the attribution explains a function instead of a module.
        ValueError: If the model's outputs may not be scores.

    Example:
        >>> from fam_plugins import LayerFam
        >>> model = SimilarityModel(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.rand(3, 48))
        >>> with for_torchcam(LayerFam(model, "encoder.0", rule="centred")) as extractor:
        ...     scores = extractor.model(torch.rand(2, 3, 4, 4))
        ...     extractor([0, 1], scores)[0].shape
        torch.Size([2, 4, 4])
    """
    _check_attribution(attribution)
    if not isinstance(getattr(attribution, "forward_func", None), nn.Module):
        raise TypeError("torchcam's metrics run the model themselves: explain a module")
    _check_scores(attribution.forward_func, classifier)
    return _Extractor(attribution)


def quantus_problems() -> dict[str, str]:
    """What is broken in Quantus 0.6 itself, whatever the explanation: metric -> reason.

    Example:
        >>> "SmoothMPRT" in quantus_problems()
        True
    """
    problems = dict.fromkeys(("ROAD", "IROF"), "crashes on images with more than one channel")
    problems["SmoothMPRT"] = "ignores explain_func and explains by its own gradients"
    if not hasattr(np, "trapz"):
        for metric in ("PixelFlipping", "RegionPerturbation", "Selectivity", "IROF"):
            problems[metric] = "its area under the curve needs numpy.trapz, gone since NumPy 2.4"
    return problems


class _Extractor(AbstractContextManager["_Extractor"]):
    """Notes the images ``[B, ...]`` that the model sees, and explains them for torchcam."""

    def __init__(self, attribution: Any) -> None:
        self.model: nn.Module = attribution.forward_func
        self._attribute = attribution.attribute
        self._images: Tensor | None = None
        self._handle = self.model.register_forward_pre_hook(self._note)

    def __call__(
        self, class_idx: Any = None, scores: Any = None, normalized: bool = True, **others: Any
    ) -> list[Tensor]:
        """Return the positive maps ``[B, h, w]`` of the images that the model saw last."""
        if others.get("targets") is not None:
            raise ValueError("pass class_idx: a layer attribution explains classes, not targets")
        if self._images is None:
            raise RuntimeError("run extractor.model(images) before asking for their maps")
        if class_idx is None and not isinstance(scores, Tensor):
            raise TypeError("pass class_idx, or scores [B, N] whose highest is explained")
        chosen = scores.argmax(dim=-1).tolist() if class_idx is None else class_idx
        with self._hooks_off():
            maps = self._attribute(self._images, target=chosen)
        positive = _check_varied(_check_map(maps, maps.dim()).clamp_min(0))[:, 0]
        if normalized:
            positive = torch.stack([(m - m.min()) / (m.max() - m.min()) for m in positive])
        return [positive]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        """Return the maps ``[B, h, w]`` of the one layer."""
        return cams[0]

    def _hooks_off(self) -> ExitStack:
        """Return a block after which the images noted are those before it; torchcam's name."""
        block = ExitStack()
        block.callback(setattr, self, "_images", self._images)
        return block

    def _note(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._images = args[0].detach()

    def __exit__(self, *_exception: object) -> None:
        self._handle.remove()
        self._images = None


def _check_scores(model: nn.Module, classifier: bool) -> None:
    """Refuse what may be a bare encoder, whose "classes" are embedding dimensions."""
    check_module(model)
    known = [part for part in model.modules() if isinstance(part, (SimilarityModel, CapeHead))]
    if not known and not classifier:
        raise ValueError(
            f"the outputs of this {type(model).__name__} may be embeddings, not class scores: wrap "
            "it, SimilarityModel(encoder, references), or pass classifier=True if they are scores"
        )
    if any(isinstance(part, SimilarityModel) and len(part.references) == 1 for part in known):
        reason = "the model has one reference, so its softmax is constantly 1: add references"
        warnings.warn(reason, stacklevel=3)


def _check_attribution(given: Any) -> None:
    """Refuse a model, a class or a function where an attribution is needed."""
    if isinstance(given, type) or not hasattr(given, "attribute"):
        raise TypeError("attribution must be an object, such as LayerFam(model, layer)")


def _check_map(maps: Tensor, dim: int = 4) -> Tensor:
    """Return maps ``[B, 1, h, w]`` detached, and refuse NaN and one map per channel."""
    if not isinstance(maps, Tensor) or maps.dim() != dim or maps.shape[1] != 1 or not len(maps):
        shape = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(
            f"maps have shape {shape}, not [B, 1, h, w]: explain a convolutional layer "
            "and sum the channels"
        )
    return check_finite(maps.detach())


def _at_size(maps: Tensor, images: Tensor, mode: str = "bilinear") -> Tensor:
    """Enlarge maps ``[B, 1, h, w]`` to the size of images ``[B, C, H, W]``, in float32."""
    return nn.functional.interpolate(_check_map(maps).float(), images.shape[2:], mode=mode)


def _check_varied(maps: Tensor) -> Tensor:
    """Return maps ``[B, ...]``, and refuse a constant one, whose pixels have no ranks."""
    constant = [index for index, one in enumerate(maps) if one.min() == one.max()]
    if constant:
        raise ValueError(
            f"the map of image {constant[0]} is constant, so its pixels have no ranks: use another "
            "rule (under cosine, Grad-CAM of an image with itself is zero) or leave the image out"
        )
    return maps
