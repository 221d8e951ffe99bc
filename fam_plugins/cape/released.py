"""Names of the authors' released checkpoints, and ours."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

__all__ = ["head_state_from_release", "head_state_to_release", "resnet_state_from_release"]

_HEAD = {"weight": "classifiers.cape.2.weight", "bias": "classifiers.cape.2.bias"}
_HEAD |= {"t1": "t1.T", "t2": "t2.T", "t3": "t3.T"}
_CLASSIFIER = {"fc.weight": "classifiers.orig.2.weight", "fc.bias": "classifiers.orig.2.bias"}
_PARALLEL = "module."  # what nn.DataParallel writes before each name
# The released model keeps torchvision's ResNet as nn.Sequential of its children but the last two.
_RESNET = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def head_state_from_release(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a released checkpoint to the names of :class:`~fam_plugins.cape.CapeHead`.

    Source: the released code of CAPE (CVPR 2024, arXiv 2404.02388): its names are
    ``classifiers.cape.2.{weight,bias}``, ``t1.T``, ``t2.T`` ``[1]``, and ``t3.T`` ``[1, 1, 1, 1]``.

    Args:
        state_dict: The checkpoint; other names are ignored, a ``module.`` prefix is dropped.

    Returns:
        ``weight`` ``[K, C]``, ``bias`` ``[K]`` (optional) and the scalars ``t1``, ``t2``, ``t3``.

    Raises:
        ValueError: If a name is missing, or sizes contradict each other.

    Example:
        >>> import torch
        >>> released = {"classifiers.cape.2.weight": torch.zeros(5, 16), "t1.T": torch.zeros(1),
        ...             "t2.T": torch.zeros(1), "t3.T": torch.zeros(1, 1, 1, 1)}
        >>> sorted(head_state_from_release(released))
        ['t1', 't2', 't3', 'weight']
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"pass what torch.load(path) returned, not a {type(state_dict).__name__}")
    state = {name.removeprefix(_PARALLEL): tensor for name, tensor in state_dict.items()}
    missing = [theirs for ours, theirs in _HEAD.items() if theirs not in state and ours != "bias"]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} missing: not a checkpoint of the released CAPE code (our own "
            "are read by load_state_dict)"
        )
    head = {ours: state[theirs] for ours, theirs in _HEAD.items() if theirs in state}
    weight = head["weight"]
    if weight.dim() != 2:
        shape = tuple(weight.shape)
        raise ValueError(f"{_HEAD['weight']} must be [classes, channels], not {shape}")
    shapes = {"weight": weight.shape, "bias": weight.shape[:1]}
    for name, tensor in head.items():
        shape = shapes.get(name, ())
        if tensor.numel() != math.prod(shape):
            raise ValueError(f"{_HEAD[name]} must be {list(shape)}, not {tensor.numel()} values")
        head[name] = tensor.reshape(shape)
    return head


def head_state_to_release(head_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate ``CapeHead.state_dict()`` to the names and shapes of a released checkpoint.

    Args:
        head_state: ``weight`` ``[K, C]``, ``bias`` ``[K]`` (optional), ``t1``, ``t2``, ``t3``.

    Returns:
        The same tensors as ``classifiers.cape.2.*``, ``t1.T``, ``t2.T`` and ``t3.T``.

    Raises:
        KeyError: If one of the names is missing.

    Example:
        >>> from fam_plugins.cape import CapeHead
        >>> sorted(head_state_to_release(CapeHead(16, 5).state_dict()))[0]
        'classifiers.cape.2.bias'
    """
    shapes = {"t1": (1,), "t2": (1,), "t3": (1, 1, 1, 1)}
    names = [name for name in _HEAD if name != "bias" or name in head_state]
    head = {name: head_state[name] for name in names}
    return {_HEAD[name]: t.reshape(shapes.get(name, t.shape)) for name, t in head.items()}


def resnet_state_from_release(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a whole released ResNet checkpoint for ``with_cape_head(torchvision ResNet)``.

    Args:
        state_dict: The checkpoint; a ``module.`` prefix is dropped.

    Returns:
        Backbone, classifier and CAPE head, named for ``CapeModel.load_state_dict``.

    Raises:
        ValueError: If a name is missing or is not one of a released ResNet's.

    Example:
        .. code-block:: python

            state = torch.load("cub_resnet50_PF.pth", map_location="cpu", weights_only=True)
            model = with_cape_head(torchvision.models.resnet50(num_classes=200))
            model.load_state_dict(resnet_state_from_release(state))
    """
    state = {name.removeprefix(_PARALLEL): tensor for name, tensor in state_dict.items()}
    names = {f"model.{ours}": theirs for ours, theirs in _CLASSIFIER.items()}
    for theirs in state:
        if theirs.startswith("net."):
            _, child, rest = theirs.split(".", 2)
            if child not in _RESNET:
                raise ValueError(
                    f"{theirs} is not a ResNet's: for other backbones take the head alone, with "
                    "CapeHead.from_released_state_dict"
                )
            names[f"model.{_RESNET[child]}.{rest}"] = theirs
    missing = [theirs for theirs in names.values() if theirs not in state]
    if missing:
        raise ValueError(f"{missing[0]} missing: not a released CAPE checkpoint with both heads")
    ours = {name: state[theirs] for name, theirs in names.items()}
    return ours | {f"head.{name}": t for name, t in head_state_from_release(state).items()}
