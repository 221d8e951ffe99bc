"""Give a trained classifier a CAPE head."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from fam_plugins.cape.head import CapeHead
from fam_plugins.cape.locate import Site, locate
from fam_plugins.core.layer_pass import find_layer

__all__ = ["CapeModel", "find_head", "with_cape_head"]


class CapeModel(nn.Module):
    """A classifier with a CAPE head beside its own; made by :func:`with_cape_head`.

    Calling it gives CAPE's log-probabilities ``[B, K]``. One forward pass of the wrapped model
    serves both heads. The wrapped model is held, not copied: training this module trains it.

    CAPE's maps explain the CAPE head. Its top class can differ from the model's own.

    Attributes:
        model: the wrapped classifier.
        head: the :class:`CapeHead`.
        feature_map: an identity whose output is the map ``[B, C, h, w]`` that both heads read;
            give it to a hook-based explainer as the layer, ``LayerGradCam(model,
            model.feature_map)``.
        site: names of the layer and the classifier inside ``model``, and how its map is laid out.

    Args:
        model: the classifier to wrap.
        head: the head to attach.
        site: where ``model`` keeps its last feature map.
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
        linear = self.model.get_submodule(self.site.classifier)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{self.site.classifier!r} is no nn.Linear any more: convert anew")
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """CAPE's log-probabilities ``[B, K]`` of the images ``x``."""
        return self.both(x)[0]

    def vanilla(self, x: Tensor) -> Tensor:
        """The wrapped model's own logits ``[B, K]``."""
        return self.features_and_logits(x)[1]

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """CAPE's log-probabilities and the model's own logits, features computed once.

        Args:
            x: a batch as the wrapped model takes it.

        Returns:
            ``log p`` ``[B, K]`` and logits ``[B, K]``.

        Raises:
            RuntimeError: the wrapped model did not call its feature layer exactly once.
        """
        features, logits = self.features_and_logits(x)
        return self.head(features), logits

    def features(self, x: Tensor) -> Tensor:
        """The feature map ``[B, C, h, w]`` that enters the head, attached to the graph."""
        return self.features_and_logits(x)[0]

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The feature map and the model's own logits, in one forward pass.

        Args:
            x: a batch as the wrapped model takes it.

        Returns:
            The map ``[B, C, h, w]`` (5-D for volumes) and the logits ``[B, K]``.

        Raises:
            RuntimeError: the wrapped model did not call its feature layer exactly once.
        """
        caught: list[Tensor] = []
        # DataParallel replicas share their hook tables, so each thread minds its own call.
        # (A compiled graph has no threads to tell apart, and no way to ask.)
        thread = None if torch.compiler.is_compiling() else threading.get_ident()

        def route(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if thread is not None and threading.get_ident() != thread:
                return None
            features: Tensor = output.movedim(-1, 1) if self.site.channels_last else output
            if self.site.relu:
                features = features.relu()
            features = self.feature_map(features)
            caught.append(features)
            # The model goes on from the feature map's output, so that map explains both heads.
            if self.site.relu:
                # DenseNet applies its ReLU in place: hand it a tensor of its own.
                features = features.clone()
            return features.movedim(1, -1) if self.site.channels_last else features

        handle = self.model.get_submodule(self.site.layer).register_forward_hook(route)
        try:
            logits = self.model(x)
        finally:
            handle.remove()
        if len(caught) != 1:
            raise RuntimeError(
                f"layer {self.site.layer!r} ran {len(caught)} times in one forward pass; CAPE "
                "needs the one map that enters pooling"
            )
        return caught[0], logits

    def extra_repr(self) -> str:
        """The layer and classifier in use."""
        return f"layer={self.site.layer!r}, classifier={self.site.classifier!r}"


def with_cape_head(
    model: nn.Module,
    layer: nn.Module | str | None = None,
    classifier: nn.Module | str | None = None,
    *,
    head: CapeHead | None = None,
    example_input: Tensor | None = None,
) -> CapeModel:
    """Put a CAPE head beside a trained classifier, starting from the classifier's own weights.

    Fits any model that averages a feature map over regions and hands the mean to one
    ``nn.Linear``: torchvision's ResNet, ResNeXt, RegNet, DenseNet, MobileNetV2, EfficientNet,
    Swin and more, timm models with a pooled linear head, 3-D networks. The model is run once (in
    eval mode, without gradients) and the identity "mean of the map = input of the classifier" is
    checked in numbers; hidden layers, a norm after pooling or a class token are refused.

    The head's probabilities mean little before :func:`fit_cape_head`: CAPE weighs regions, the
    classifier averages them.

    Args:
        model: a classifier ``[B, ...] -> [B, K]``; kept by reference, not changed.
        layer: the module with the last feature map, or its dotted name; found when None.
        classifier: the ``nn.Linear``, or its dotted name; found when None.
        head: attach this head (one fitted before) instead of a copy of the classifier.
        example_input: a batch of images for the check; noise of the model's size when None.

    Returns:
        A module whose output is CAPE's log-probabilities ``[B, K]``.

    Raises:
        TypeError: ``model`` is no module or already has a CAPE head, ``classifier`` is no
            ``nn.Linear``, ``head`` no CapeHead.
        ValueError: the architecture does not fit (the message names the reason), a name is
            unknown, ``head`` has other channels or classes.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fam_plugins.cape import with_cape_head
        >>> net = nn.Sequential(
        ...     nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        ...     nn.Flatten(), nn.Linear(8, 3),
        ... )
        >>> model = with_cape_head(net)
        >>> model(torch.randn(2, 1, 16, 16)).exp().sum(dim=1).allclose(torch.ones(2))
        True
    """
    if isinstance(model, CapeModel):
        raise TypeError("the model already has a CAPE head: use model.head, or pass model.model")
    if head is not None and not isinstance(head, CapeHead):
        raise TypeError(f"head must be a CapeHead, got {type(head).__name__}")
    site = locate(model, layer, classifier, example_input)
    linear = model.get_submodule(site.classifier)
    assert isinstance(linear, nn.Linear)  # for the type checker: locate has made sure
    if head is None:
        head = CapeHead.from_linear(linear)
    elif (head.in_channels, head.num_classes) != (linear.in_features, linear.out_features):
        raise ValueError(
            f"head has {head.in_channels} channels and {head.num_classes} classes, the model's "
            f"classifier {linear.in_features} and {linear.out_features}: leave head out, or "
            "attach it to the model it was fitted for"
        )
    converted = CapeModel(model, head, site)
    converted.training = model.training
    head.train(model.training)
    converted.feature_map.train(model.training)
    return converted


def find_head(model: object, layer: nn.Module | str | None = None) -> tuple[CapeHead, str]:
    """Find the head whose input is the map that CAPE explains.

    Args:
        model: A :class:`CapeModel`, a module that contains a :class:`CapeHead`, or a bound method
            of either.
        layer: ``None``; the head; or, in a :class:`CapeModel`, the layer that feeds it. Existing
            Grad-CAM code names that layer, so it may go on doing so.

    Returns:
        The head and its name for messages.

    Raises:
        TypeError: If ``layer`` is neither a module nor a name.
        ValueError: If there is no head, more than one, or ``layer`` does not feed it.

    Example:
        >>> find_head(nn.Sequential(nn.ReLU(), CapeHead(4, 3)))
        (CapeHead(in_channels=4, num_classes=3, bias=True), '1')
    """
    if isinstance(layer, CapeHead):
        return layer, find_layer(model, layer)[1]
    root = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    modules = dict(root.named_modules()) if isinstance(root, nn.Module) else {}
    heads = [(name, part) for name, part in modules.items() if isinstance(part, CapeHead)]
    if len(heads) != 1:
        raise ValueError(
            f"the model has {len(heads)} CAPE heads: give it one with fam_plugins.cape."
            "with_cape_head(model), or pass the CapeHead to read as the layer"
        )
    name, head = heads[0]
    if layer is None:
        return head, name
    chosen, called = find_layer(root, layer)
    feeds = [
        part
        for owner in modules.values()
        if isinstance(owner, CapeModel) and owner.head is head
        for part in (owner.feature_map, owner.model.get_submodule(owner.site.layer))
    ]
    if chosen is not head and not any(chosen is part for part in feeds):
        raise ValueError(
            f"layer {called!r} does not feed the CAPE head, and CAPE explains only the map that "
            "does: leave the layer out"
        )
    return head, name
