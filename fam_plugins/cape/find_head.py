"""Find the CAPE head that an explainer is to read."""

from __future__ import annotations

from torch import nn

from fam_plugins.cape.convert import CapeModel
from fam_plugins.cape.head import CapeHead
from fam_plugins.layer_pass import find_layer

__all__ = ["find_head"]


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
