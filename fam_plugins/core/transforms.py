"""From what transformers give, tokens or channels last, to a map ``[B, C, h, w]``.

Every transform only moves and selects values, so that it serves activations and gradients alike:
as ``reshape_transform`` of every explainer here and of every method of pytorch-grad-cam. Which one
a layer needs is read from its shape and from what the model's own modules state.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from fam_plugins.core.encoders import image_call
from fam_plugins.core.eval_mode import eval_mode
from fam_plugins.core.layer_pass import LayerPass, find_layer, fits_image

__all__ = [
    "Transform",
    "channels_last_to_map",
    "check_transform",
    "infer_transform",
    "prefix_of",
    "tokens_to_map",
    "transform_for",
]

Transform = Callable[[Any], Tensor]


# The constructor is the public function, so its name is a function's.
@dataclass(frozen=True)
class tokens_to_map:  # noqa: N801
    """Lay out patch tokens as a map: ``[B, skip + h * w, C]`` -> ``[B, C, h, w]``.

    Tokens in front that stand for no place, the class token and register tokens, are left out;
    what they contribute to the score is then in no region, and ``LayerFam.decompose`` names it.

    Args:
        h: Rows of patches.
        w: Columns of patches.
        skip: How many tokens stand in front: 1 for a class token, 0 for none, 5 for a class token
            and four registers.

    Raises:
        ValueError: If ``h`` or ``w`` is not positive or ``skip`` negative; when called, if the
            tensor is not ``[B, skip + h * w, C]``.

    Example:
        >>> import torch
        >>> to_map = tokens_to_map(2, 3, skip=1)
        >>> to_map(torch.rand(4, 7, 192)).shape
        torch.Size([4, 192, 2, 3])
    """

    h: int
    w: int
    skip: int = 1
    kinds: Any = field(default=None, compare=False, repr=False, kw_only=True)  # of prefix_of

    def __post_init__(self) -> None:
        whole = all(isinstance(size, Integral) for size in (self.h, self.w, self.skip))
        if not whole or self.h < 1 or self.w < 1 or self.skip < 0:
            raise ValueError(
                f"{self} is no grid of patches: h and w are ints of at least 1 and skip of 0, "
                "such as tokens_to_map(14, 14, skip=1) for 224 pixels and patches of 16"
            )

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, skip + h * w, C]`` -> map ``[B, C, h, w]``."""
        if not isinstance(tokens, Tensor) or tokens.dim() != 3:
            raise ValueError(
                f"{self} takes tokens [B, T, C] and the layer gives {_described(tokens)}: "
                "channels_last_to_map is for [B, h, w, C], and [B, C, h, w] needs no transform"
            )
        if tokens.shape[1] != self.skip + self.h * self.w:
            raise ValueError(
                f"{self} takes {self.skip + self.h * self.w} tokens and the layer gives "
                f"{tokens.shape[1]}: {_suggest_grid(tokens.shape[1], self.skip)}"
            )
        batch, _, channels = tokens.shape
        grid = tokens[:, self.skip :].reshape(batch, self.h, self.w, channels)
        return grid.permute(0, 3, 1, 2)


def channels_last_to_map(activation: Tensor) -> Tensor:
    """Put the channels second: ``[B, h, w, C]`` -> ``[B, C, h, w]``, a view (Swin).

    Raises:
        ValueError: If the tensor has not 4 dimensions.

    Example:
        >>> import torch
        >>> channels_last_to_map(torch.rand(2, 7, 7, 768)).shape
        torch.Size([2, 768, 7, 7])
    """
    if not isinstance(activation, Tensor) or activation.dim() != 4:
        raise ValueError(
            f"channels_last_to_map takes [B, h, w, C] and the layer gives "
            f"{_described(activation)}: tokens [B, T, C] need tokens_to_map(h, w, skip=1)"
        )
    return activation.permute(0, 3, 1, 2)


def infer_transform(
    model: nn.Module, layer: nn.Module | str, example_input: Tensor
) -> Transform | None:
    """Find the transform that a layer needs, for ViT, Swin and others.

    One forward pass in eval mode shows the layer's shape. Tokens need a model around the layer
    that states its patch grid (timm's ``patch_embed`` and ``num_prefix_tokens``, torchvision's and
    open_clip's ``patch_size`` and ``image_size``, transformers' ``config`` of both); four
    dimensions are told apart by the shape of the image, and taken as ``[B, C, h, w]`` where both
    ends fit it. What fits nothing is refused.

    The explainers of this package do the same without that pass: ``reshape_transform="auto"``,
    their default. This function serves the partners' own methods.

    Args:
        model: The model.
        layer: The layer, or its name.
        example_input: Images ``[B, C, H, W]`` that the model accepts.

    Returns:
        A transform, or ``None`` where the layer gives ``[B, C, h, w]`` already.

    Raises:
        AssertionError: If the layer does not run.
        RuntimeError: If the layer runs twice.
        TypeError: If it gives something other than one floating-point tensor.
        ValueError: If there is no such layer, or the shape leaves a doubt; the message names what
            to pass instead.

    Example:
        >>> import torch
        >>> from torchvision.models import VisionTransformer
        >>> vit = VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16)
        >>> infer_transform(vit, "encoder", torch.rand(1, 3, 32, 32))
        tokens_to_map(h=4, w=4, skip=1)
    """
    seen = example_input.shape if isinstance(example_input, Tensor) else ()
    if len(seen) == 3 or 0 in (len(seen), *seen):
        given = _described(example_input)
        raise TypeError(f"example_input is {given}, not a tensor of images: of one, image[None]")
    one = LayerPass(model, [layer], differentiate=False)
    with eval_mode(model):
        one.run(lambda: image_call(model)(example_input))
    (module,), (name,), (given,) = one.layers, one.names, one.tracked
    if len(given) != 1:
        raise TypeError(
            f"layer {name!r} gives {len(given)} tensors: choose a layer inside it that gives one"
        )
    return transform_for(model, module, name, given[0].shape, example_input.shape)


def check_transform(transform: object) -> None:
    """Refuse a ``reshape_transform`` that is neither callable, nor ``"auto"``, nor ``None``."""
    called = callable(transform) and not isinstance(transform, type)
    if transform is None or called or (isinstance(transform, str) and transform == "auto"):
        return
    kind = ValueError if isinstance(transform, str) else TypeError
    raise kind(
        f'reshape_transform must be "auto", a callable or None, not {transform!r}: for tokens pass '
        "tokens_to_map(h, w, skip=1)"
    )


def transform_for(
    model: object,
    layer: nn.Module,
    name: str,
    given: Sequence[int],
    images: Sequence[int] | None,
) -> Transform | None:
    """The transform for a layer's shape and the images' shape, both as seen in a pass.

    ``None`` where none is needed: ``[B, C, h, w]``, ``[B, F]``, volumes, and models of something
    else than images ``[B, C, H, W]``.
    """
    if images is None or len(images) != 4 or len(given) not in (3, 4):
        return None
    size = tuple(images[2:])
    if len(given) == 3:
        return _for_tokens(model, layer, name, given, images)
    first, last = fits_image(given[2:], size), fits_image(given[1:3], size)
    if first and not (last and type(layer) is nn.LayerNorm):
        return None
    if _puts_channels_second(layer, given):
        return None
    if last:
        return channels_last_to_map
    raise ValueError(
        f"layer {name!r} gives {tuple(given)} for images of {size[0]} x {size[1]} pixels, and no "
        "end of it looks like their grid: pass reshape_transform=channels_last_to_map for "
        "[B, h, w, C], or None for [B, C, h, w]"
    )


def _puts_channels_second(layer: nn.Module, given: Sequence[int]) -> bool:
    """Whether convolutions or batch norms in a layer have as many channels as its 2nd dimension."""
    convolutions = (nn.Conv2d, nn.ConvTranspose2d)
    widths = {m.out_channels for m in layer.modules() if isinstance(m, convolutions)}
    widths |= {m.num_features for m in layer.modules() if isinstance(m, nn.BatchNorm2d)}
    return given[1] in widths and given[3] not in widths


def _for_tokens(
    model: object, layer: nn.Module, name: str, given: Sequence[int], images: Sequence[int]
) -> tokens_to_map:
    around, tokens, size = _around(model, layer), given[1], tuple(images[2:])
    # open_clip before 2.26 runs its blocks on [T, B, C]; B may happen to be T.
    flags = (getattr(part, "batch_first", True) for part in (*around, *layer.modules()))
    if tokens == images[0] and (given[0] != images[0] or not all(flags)):
        raise ValueError(
            f"layer {name!r} gives tokens first, {tuple(given)}: {_suggest_grid(given[0], 1)} "
            "behind a transpose, lambda x: tokens_to_map(...)(x.transpose(0, 1))"
        )
    kinds = prefix_of(model, layer)
    # Those that take images of another size only when told to.
    strict = any("interpolate_pos_encoding" in _arguments(part) for part in around)
    # Models of transformers take images of any size, those of torchvision and open_clip of one.
    sizes = [size] if any(hasattr(part, "config") for part in around) else []
    for owner in around:
        fits = [
            tokens_to_map(h, w, skip=skip, kinds=kinds)
            for (h, w), prefix in _grids(owner, size, sizes, sum(kinds.values()))
            for skip in dict.fromkeys((prefix, 0))
            if tokens == skip + h * w
        ]
        fits = [fit for fit in fits if fit.skip == fits[0].skip]
        if strict and len(set(fits)) > 1:
            raise ValueError(
                f"layer {name!r} gives as many tokens as for the images the model is made for: "
                f"pass {fits[0]} if it interpolates its positions, {fits[-1]} if images are resized"
            )
        if fits:
            return fits[0]
    raise ValueError(
        f"layer {name!r} gives {tokens} tokens, and no module around it states their grid: "
        f"{_suggest_grid(tokens, 1)}; reshape_transform=None takes [B, C, regions] as it is"
    )


_PREFIX = {
    "class token": ("cls_token", "class_token", "class_embedding"),
    "distillation token": ("dist_token", "distillation_token"),
    "registers": ("reg_token", "register_tokens"),
}


def prefix_of(model: object, layer: nn.Module | str) -> dict[str, int]:
    """How many tokens of each kind stand in front of the patches, in their order.

    Read from the parameters of the modules around the layer. A layer may run before they are added;
    then its transform leaves out fewer (``tokens_to_map.skip``).

    Example:
        >>> from torchvision.models import VisionTransformer
        >>> vit = VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16)
        >>> prefix_of(vit, "encoder")
        {'class token': 1}
    """
    kinds = {name: kind for kind, names in _PREFIX.items() for name in names}
    for owner in _around(model, find_layer(model, layer)[0]):
        own = {name.rpartition(".")[2]: p for name, p in owner.named_parameters()}
        # Of [D], [1, n, D] or [n, D].
        counts = {kinds[name]: own[name][..., 0].numel() for name in kinds if name in own}
        if any(counts.values()):
            return {kind: count for kind, count in counts.items() if count}
    return {}


def _around(model: object, layer: nn.Module) -> list[nn.Module]:
    """The modules that contain a layer, innermost first."""
    root = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    if not isinstance(root, nn.Module):
        return []
    # A shared layer has several names; named_modules() comes from the outside in.
    named = dict(root.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." for name, module in named.items() if module is layer)
    outer = [m for n, m in named.items() if any(path.startswith(n and f"{n}.") for path in inside)]
    return list(dict.fromkeys(outer))[::-1]


def _grids(
    owner: nn.Module, size: tuple[int, ...], sizes: list[tuple[int, ...]], front: int
) -> Iterator[tuple[tuple[int, int], int]]:
    """The patch grids that a module states, the surest first, and its tokens in front of them."""
    embed = getattr(owner, "patch_embed", None)
    if embed is not None:  # timm
        fixed = _pair(getattr(embed, "grid_size", None))
        patch = _pair(getattr(embed, "patch_size", None))
        seen = None
        if patch is not None:
            up = [p - 1 if getattr(embed, "dynamic_img_pad", False) else 0 for p in patch]
            seen = (size[0] + up[0]) // patch[0], (size[1] + up[1]) // patch[1]
        # A model of fixed size knows its grid even behind a wrapper that resizes; one that takes
        # every size has the grid of what it was given.
        prefix = getattr(owner, "num_prefix_tokens", 0)
        for grid in (seen, fixed) if getattr(owner, "dynamic_img_size", False) else (fixed, seen):
            if grid is not None:
                yield grid, prefix if isinstance(prefix, int) else 0
        return
    config = getattr(owner, "config", None)
    for stated in (owner, config):
        patch, image = (_pair(getattr(stated, n, None)) for n in ("patch_size", "image_size"))
        for given in (*sizes, image):
            if patch is None or image is None or given is None:
                continue
            yield (given[0] // patch[0], given[1] // patch[1]), front
            for stage in range(len(getattr(config, "depths", ()))):  # Swin: halved, and padded
                h, w = (-(-side // (by << stage)) for side, by in zip(given, patch, strict=True))
                yield (h, w), 0


def _arguments(module: nn.Module) -> Sequence[str]:
    try:
        return list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # of a compiled function
        return ()


def _described(given: Any) -> Any:
    """The shape of a tensor; what anything else is."""
    return tuple(given.shape) if isinstance(given, Tensor) else f"a {type(given).__name__}"


def _pair(value: object) -> tuple[int, int] | None:
    """Two sizes as a module states them; ``None`` for what is none, such as a patch of 0."""
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        return None
    return tuple(pair) if all(isinstance(n, int) and n > 0 for n in pair) else None


def _suggest_grid(tokens: int, skip: int) -> str:
    """Which ``tokens_to_map`` would fit a number of tokens, for an error message."""
    for front in dict.fromkeys((skip, 1, 0, 5, 2)):
        side = math.isqrt(max(tokens - front, 0))
        if side > 0 and side * side == tokens - front:
            return (
                f"{tokens} = {front} + {side} x {side}, so for a square grid behind {front} tokens "
                f"pass tokens_to_map({side}, {side}, skip={front})"
            )
    return (
        "pass tokens_to_map(h, w, skip=...) with h * w patches and skip tokens in front of them "
        "that add up to it"
    )
