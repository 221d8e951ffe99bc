"""Give a trained classifier a CAPE head."""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
from torch import Tensor, nn

from fam_plugins.cape.head import CapeHead
from fam_plugins.cape.locate import Site, locate
from fam_plugins.core.layer_pass import find_layer

__all__ = ["CapeModel", "find_head", "is_finite", "require_cape_model", "with_cape_head"]


def with_cape_head(
    model: nn.Module,
    layer: nn.Module | str | None = None,
    classifier: nn.Module | str | None = None,
    *,
    head: CapeHead | None = None,
    example_input: Tensor | None = None,
) -> CapeModel:
    """Put a CAPE head beside a trained classifier, starting from the classifier's own weights.

    Fits any model that averages a feature map over regions and hands the mean to one ``nn.Linear``:
    torchvision's ResNet, ResNeXt, RegNet, DenseNet, MobileNetV2, EfficientNet, Swin and more, timm
    models with a pooled linear head, 3-D networks. The model runs once (in eval mode, without
    gradients) and the identity "mean of the map = input of the classifier" is checked in numbers;
    hidden layers, a norm after pooling or a class token are refused.

    The head's probabilities mean little before :func:`fit_cape_head`: CAPE weighs regions, the
    classifier averages them. They share 1 among the classes (softmax), so CAPE is not for sigmoid
    (multi-label) outputs. Source: CAPE's setting "PF" (CVPR 2024, arXiv 2404.02388).

    Args:
        model: A classifier ``[B, ...] -> [B, K]``; kept by reference, not changed.
        layer: The module with the last feature map, or its dotted name; found if ``None``.
        classifier: The ``nn.Linear``, or its dotted name; found if ``None``.
        head: Attach this head (one fitted before) instead of a copy of the classifier.
        example_input: A batch of images for the check; noise of the model's size if ``None``.

    Returns:
        A module whose output is CAPE's log-probabilities ``[B, K]``.

    Raises:
        TypeError: If an argument is of another kind, or ``model`` already has a CAPE head.
        ValueError: If the architecture does not fit (the message names the reason), a layer is
            not the model's, or ``head`` has other channels or classes.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> model = with_cape_head(net.append(nn.Linear(8, 3)))
        >>> model(torch.randn(2, 1, 16, 16)).exp().sum(dim=1).allclose(torch.ones(2))
        True
    """
    if isinstance(model, nn.Module) and any(isinstance(m, CapeHead) for m in model.modules()):
        raise TypeError("the model already has a CAPE head: use model.head, or pass model.model")
    if head is not None and not isinstance(head, CapeHead):
        raise TypeError(f"head must be a CapeHead, not {type(head).__name__}")
    site = locate(model, layer, classifier, example_input)
    linear = cast(nn.Linear, model.get_submodule(site.classifier))
    if head is None:
        head = CapeHead.from_linear(linear)
    elif head.weight.shape != linear.weight.shape:
        raise ValueError(
            f"head has weights {tuple(head.weight.shape)}, not {tuple(linear.weight.shape)} as the "
            "model's classifier: leave head out, or attach it to the model it was fitted for"
        )
    converted = CapeModel(model, head.train(model.training), site)
    converted.training = converted.feature_map.training = model.training
    return converted


class CapeModel(nn.Module):
    """A classifier with a CAPE head beside its own; made by :func:`with_cape_head`.

    Calling it returns CAPE's log-probabilities ``[B, K]``. One forward pass of the wrapped model
    serves both heads. The wrapped model is held, not copied: training this module trains it.

    CAPE's maps explain the CAPE head, whose top class can differ from the model's own. Source:
    CAPE (CVPR 2024, arXiv 2404.02388).

    Args:
        model: The classifier to wrap.
        head: The :class:`CapeHead` to attach.
        site: Names of the layer and the classifier inside ``model``, and the layout of its map.

    Attributes:
        model, head, site: The arguments.
        feature_map: An identity whose output is the map ``[B, C, h, w]`` that both heads read;
            a layer for hook-based explainers, ``LayerGradCam(model, model.feature_map)``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> model = with_cape_head(net.append(nn.Linear(4, 3)))
        >>> model.features(torch.randn(2, 1, 9, 9)).shape
        torch.Size([2, 4, 7, 7])
    """

    def __init__(self, model: nn.Module, head: CapeHead, site: Site) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.feature_map = nn.Identity()
        self.site = site

    @property
    def classifier(self) -> nn.Linear:
        """The wrapped model's own linear classifier."""
        return cast(nn.Linear, self.model.get_submodule(self.site.classifier))

    def forward(self, x: Tensor) -> Tensor:
        """CAPE's log-probabilities ``[B, K]`` of the images ``x``."""
        return self.both(x)[0]

    def vanilla(self, x: Tensor) -> Tensor:
        """The wrapped model's own logits ``[B, K]``."""
        return self.features_and_logits(x)[1]

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """CAPE's log-probabilities ``[B, K]`` and the model's own logits ``[B, K]`` in one pass."""
        features, logits = self.features_and_logits(x)
        return self.head(features), logits

    def features(self, x: Tensor) -> Tensor:
        """The feature map ``[B, C, h, w]`` that enters the head, attached to the graph."""
        return self.features_and_logits(x)[0]

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The feature map ``[B, C, h, w]`` and the model's own logits ``[B, K]``, in one pass.

        Raises:
            RuntimeError: If the wrapped model does not call its feature layer exactly once.
        """
        caught: list[Tensor] = []
        # DataParallel replicas share their hook tables, so each thread minds its own call.
        # (A compiled graph has no threads to tell apart, and no way to ask.)
        thread = None if torch.compiler.is_compiling() else threading.get_ident()

        def route(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if thread is not None and threading.get_ident() != thread:
                return None
            features: Tensor = output.movedim(-1, 1) if self.site.channels_last else output
            features = self.feature_map(features.relu() if self.site.relu else features)
            caught.append(features)
            # The model goes on from the feature map's output, so that map explains both heads.
            if self.site.relu:
                features = features.clone()  # DenseNet applies its ReLU in place
            return features.movedim(1, -1) if self.site.channels_last else features

        handle = self.model.get_submodule(self.site.layer).register_forward_hook(route)
        try:
            logits = self.model(x)
        finally:
            handle.remove()
        if len(caught) != 1:
            times = f"layer {self.site.layer!r} ran {len(caught)} times in one forward pass"
            raise RuntimeError(f"{times}; CAPE needs the one map that enters pooling")
        return caught[0], logits

    def extra_repr(self) -> str:
        """The layer and classifier in use."""
        return f"layer={self.site.layer!r}, classifier={self.site.classifier!r}"


def find_head(model: object, layer: nn.Module | str | None = None) -> tuple[CapeHead, str]:
    """The CAPE head of a module or bound method, and its name; ``layer`` may be what feeds it."""
    if isinstance(layer, CapeHead):
        return layer, find_layer(model, layer)[1]
    root = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    parts = dict(root.named_modules()) if isinstance(root, nn.Module) else {}
    heads = [(part, name) for name, part in parts.items() if isinstance(part, CapeHead)]
    if len(heads) != 1:
        raise ValueError(
            f"the model has {len(heads)} CAPE heads: give it one with fam_plugins.cape."
            "with_cape_head(model), or pass the CapeHead to read as the layer"
        )
    if layer is not None:
        chosen, called = find_layer(root, layer)
        owners = [part for part in parts.values() if isinstance(part, CapeModel)]
        feeds = [m for o in owners for m in (o.feature_map, o.model.get_submodule(o.site.layer))]
        if chosen not in (heads[0][0], *feeds):
            raise ValueError(f"layer {called!r} does not feed the CAPE head: leave the layer out")
    return heads[0]


def require_cape_model(model: object, loader: object) -> None:
    """Refuse what :func:`with_cape_head` did not return, a spoilt head, and what is no loader."""
    if not isinstance(model, CapeModel):
        raise TypeError(f"pass what with_cape_head(model) returned, not a {type(model).__name__}")
    if not is_finite(model.head):
        raise ValueError("the head holds NaN or inf: re-create it with with_cape_head(model.model)")
    if not {"__iter__", "__getitem__"} & set(dir(loader)):
        raise TypeError(f"loader must be a DataLoader or a list, not a {type(loader).__name__}")


def is_finite(head: CapeHead) -> bool:
    """Whether every parameter has values, and finite ones."""
    return all(not p.is_meta and bool(p.isfinite().all()) for p in head.parameters())
