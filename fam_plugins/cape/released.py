"""Names of the authors' released checkpoints, and ours."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["head_state_from_release", "head_state_to_release", "resnet_state_from_release"]

_WEIGHT = "classifiers.{}.2.weight"
_BIAS = "classifiers.{}.2.bias"
_TEMPERATURES = {"t1": "t1.T", "t2": "t2.T", "t3": "t3.T"}

# The released model keeps torchvision's ResNet as nn.Sequential of its children but the last two.
_RESNET_CHILDREN = {
    "0": "conv1",
    "1": "bn1",
    "4": "layer1",
    "5": "layer2",
    "6": "layer3",
    "7": "layer4",
}


def head_state_from_release(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a released checkpoint to the names of :class:`~fam_plugins.cape.CapeHead`.

    Source: the released code of arXiv:2404.02388, which keeps the CAPE classifier as
    ``classifiers.cape.2.{weight,bias}`` and the temperatures as ``t1.T`` ``[1]``, ``t2.T`` ``[1]``
    and ``t3.T`` ``[1, 1, 1, 1]``.

    Args:
        state_dict: the checkpoint; other names are ignored, a ``module.`` prefix is dropped.

    Returns:
        ``weight`` ``[K, C]``, ``bias`` ``[K]`` (when there is one), ``t1``, ``t2``, ``t3``, each
        a scalar; ready for ``CapeHead.load_state_dict``.

    Raises:
        ValueError: a name is missing, or sizes contradict each other.

    Example:
        >>> import torch
        >>> from fam_plugins.cape import head_state_from_release
        >>> released = {"classifiers.cape.2.weight": torch.zeros(5, 16), "t1.T": torch.zeros(1),
        ...             "t2.T": torch.zeros(1), "t3.T": torch.zeros(1, 1, 1, 1)}
        >>> sorted(head_state_from_release(released))
        ['t1', 't2', 't3', 'weight']
    """
    return _head_state(_without_prefix(state_dict))


def head_state_to_release(head_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate ``CapeHead.state_dict()`` to the names and shapes of a released checkpoint.

    Args:
        head_state: ``weight`` ``[K, C]``, ``bias`` ``[K]`` (optional), ``t1``, ``t2``, ``t3``.

    Returns:
        The same tensors as ``classifiers.cape.2.*``, ``t1.T``, ``t2.T`` and ``t3.T``.

    Raises:
        KeyError: one of the names is missing.

    Example:
        >>> from fam_plugins.cape import CapeHead, head_state_to_release
        >>> sorted(head_state_to_release(CapeHead(16, 5).state_dict()))[0]
        'classifiers.cape.2.bias'
    """
    released = {_WEIGHT.format("cape"): head_state["weight"]}
    if "bias" in head_state:
        released[_BIAS.format("cape")] = head_state["bias"]
    for ours, theirs in _TEMPERATURES.items():
        shape = (1, 1, 1, 1) if ours == "t3" else (1,)
        released[theirs] = head_state[ours].reshape(shape)
    return released


def resnet_state_from_release(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a whole released ResNet checkpoint for ``with_cape_head(torchvision ResNet)``.

    Backbone, vanilla classifier and CAPE head come along.

    Args:
        state_dict: the checkpoint; a ``module.`` prefix is dropped.

    Returns:
        Names and tensors for ``CapeModel.load_state_dict``.

    Raises:
        ValueError: a name is missing or is not one of a released ResNet's.

    Example:
        .. code-block:: python

            state = torch.load("cub_resnet50_PF.pth", map_location="cpu", weights_only=True)
            model = with_cape_head(torchvision.models.resnet50(num_classes=200))
            model.load_state_dict(resnet_state_from_release(state))
    """
    state = _without_prefix(state_dict)
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith("net."):
            continue
        _, child, rest = name.split(".", 2)
        if child not in _RESNET_CHILDREN:
            raise ValueError(
                f"{name} is not a name of a released ResNet checkpoint: for other backbones take "
                "the head alone, with CapeHead.from_released_state_dict"
            )
        ours[f"model.{_RESNET_CHILDREN[child]}.{rest}"] = tensor
    for part in ("weight", "bias"):
        name = f"classifiers.orig.2.{part}"
        if name not in state:
            raise ValueError(f"{name} is missing: not a released CAPE checkpoint with both heads")
        ours[f"model.fc.{part}"] = state[name]
    ours.update({f"head.{name}": tensor for name, tensor in _head_state(state).items()})
    return ours


def _head_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weight_name, bias_name = _WEIGHT.format("cape"), _BIAS.format("cape")
    missing = [name for name in (weight_name, *_TEMPERATURES.values()) if name not in state]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} missing: not a checkpoint of the released CAPE code; for one "
            "written by CapeHead.state_dict() use load_state_dict"
        )
    weight = state[weight_name]
    if weight.ndim != 2:
        raise ValueError(f"{weight_name} is {tuple(weight.shape)}, expected [classes, channels]")
    ours = {"weight": weight}
    if bias_name in state:
        bias = state[bias_name]
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{bias_name} is {tuple(bias.shape)}, expected [{weight.shape[0]}] as {weight_name}"
            )
        ours["bias"] = bias
    for name, theirs in _TEMPERATURES.items():
        if state[theirs].numel() != 1:
            raise ValueError(f"{theirs} has {state[theirs].numel()} values, expected one")
        ours[name] = state[theirs].reshape(())
    return ours


def _without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the prefix that ``nn.DataParallel`` writes."""
    return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
