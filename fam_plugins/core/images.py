"""Images as users have them: files, PIL images and arrays of any layout and range."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fam_plugins.core.encoders import pixels_of
from fam_plugins.core.references import as_tensor
from fam_plugins.core.scores import check_floats

__all__ = ["is_file_or_pil", "load_images", "names_of", "normalisation", "pictures"]


def load_images(images: Any, transform: Any = None, *, what: str = "images") -> Tensor:
    """One image or several, in any form -> what an encoder takes.

    Args:
        images: A path, a PIL image, ``[H, W]``, ``[H, W, 3]`` or ``[3, H, W]``, an array or a
            tensor, bytes or floats in [0, 1]; a batch or a list of them. Photographs are turned
            upright, as their camera noted.
        transform: What the encoder was trained with: a transform of torchvision or timm such as
            ``weights.transforms()``, an image processor of transformers, or a function of a PIL
            image. Left out, images must be ready for the encoder: floats ``[B, C, H, W]``, or one
            ``[C, H, W]``, and are taken as they are.
        what: What errors call them.

    Returns:
        ``[B, C, H, W]``.

    Raises:
        OSError: If there is no such file, or no picture in it.
        TypeError: If something is no image, or the transform returns no tensor.
        ValueError: If layout or range can be read in two ways, images differ in size behind the
            transform, or a transform is left out that is needed.

    Example:
        >>> from torchvision.transforms.functional import to_tensor
        >>> load_images(np.zeros((8, 6, 3), np.uint8), to_tensor).shape
        torch.Size([1, 3, 8, 6])
    """
    if transform is None:
        if isinstance(images, Mapping):
            return pixels_of(images, what)[0]
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(
                f"{what} ({kind}) cannot go into an encoder as they are: pass transform=, what it "
                "was trained with, such as weights.transforms(), or a normalised float tensor"
            )
        return images[None] if images.dim() == 3 and len(images) in (1, 3) else images
    if _normalised(images):
        raise ValueError(
            f"{what} have negative values and there is a transform: if they are normalised "
            "already, leave transform= out; if not, pass them in [0, 1]"
        )
    from torchvision.transforms.functional import to_pil_image  # of a second to import

    upright = [to_pil_image(picture) for picture in pictures(images, what)]
    if not upright:
        raise ValueError(f"there are no {what}: pass at least one")
    transform = getattr(transform, "image_processor", transform)
    if hasattr(transform, "model_input_names"):  # of transformers
        return pixels_of(transform(images=upright, return_tensors="pt"), what)[0]
    made = [transform(picture) for picture in upright]
    for each in made:
        check_floats(each, f"what the transform makes of {what}")
        if each.shape != made[0].shape or each.dim() != 3:
            raise ValueError(
                f"the transform makes {what} of {tuple(made[0].shape)} and {tuple(each.shape)}, "
                "and a batch takes one size [C, H, W]: put Resize((224, 224)) in front"
            )
    return torch.stack(made)


def names_of(images: Any) -> list[str] | None:
    """The file names of images, if all are files."""
    given = images if isinstance(images, (list, tuple)) else [images]
    if given and all(isinstance(one, (str, os.PathLike)) for one in given):
        return [os.path.basename(one) for one in given]
    return None


def pictures(
    images: Any, what: str = "images", *, mean: Any = None, std: Any = None, transform: Any = None
) -> list[Tensor]:
    """One image or several, in any form -> ``[3, H, W]`` in [0, 1] each, for people to look at.

    Floating-point tensors are taken to be normalised if ``mean`` and ``std`` say how (numbers, or
    one per channel), or a ``transform`` that holds them; what it has yet to see goes through it, so
    that a map lies on what the encoder saw.
    """
    if isinstance(images, Mapping):
        images = pixels_of(images, what)[0]
    one = is_file_or_pil(images) or isinstance(images, (Tensor, np.ndarray))
    if isinstance(images, Iterable) and not one and not _is_nested_numbers(images):
        told: Any = {"mean": mean, "std": std, "transform": transform}
        found = [pictures(each, f"{what}[{i}]", **told) for i, each in enumerate(images)]
        return [picture for some in found for picture in some]
    if transform is not None and not _normalised(images):
        images = load_images(images, transform, what=what)
    if is_file_or_pil(images):
        return [_opened(images, what)]
    pixels = as_tensor(images, what).detach().cpu()
    if pixels.is_complex():
        raise TypeError(f"{what} is complex: pass real values (.abs() or .real)")
    if pixels.dim() == 4 and len(pixels) == 0:
        return []
    if pixels.dim() not in (2, 3, 4) or 0 in pixels.shape:
        raise ValueError(f"{what} of shape {tuple(pixels.shape)}: pass [C, H, W] or [B, C, H, W]")
    batch = _channels_first(pixels, what)
    undo = normalisation(transform) if mean is None and std is None else (mean, std)
    if undo is not None and batch.is_floating_point():
        center, scale = (_per_channel(part, what) for part in undo)
        batch = batch.float() * scale + center
    return [*_unit_range(batch, what, slack=0.001 if undo is None else 0.25).expand(-1, 3, -1, -1)]


def _normalised(images: Any) -> bool:
    """Whether values can only be those behind a normalisation: no picture has less than black."""
    if not isinstance(images, (Tensor, np.ndarray)):
        return False
    values = as_tensor(images, "images")
    return values.is_floating_point() and bool((values < -1e-3).any())


def is_file_or_pil(given: Any) -> bool:
    """Whether it is a path or a PIL image, which a transform makes a tensor of."""
    return isinstance(given, (str, os.PathLike)) or hasattr(given, "getexif")


def _is_nested_numbers(given: Any) -> bool:
    while isinstance(given, (list, tuple)) and given:
        given = given[0]
    return isinstance(given, (int, float))


def _opened(image: Any, what: str) -> Tensor:
    """A file or a PIL image -> ``[3, H, W]`` in [0, 1]."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor

    opened = image
    if not isinstance(image, Image.Image):
        if not os.path.isfile(image):
            raise FileNotFoundError(f"{what}: there is no file {os.fspath(image)!r}")
        try:
            with Image.open(image) as file:
                file.load()
                opened = file
        except (OSError, SyntaxError, ValueError) as error:
            raise OSError(f"{what}: {os.fspath(image)!r} cannot be read: {error}") from error
    opened = ImageOps.exif_transpose(opened)
    if opened.mode.startswith("I") or opened.mode == "F":
        raise ValueError(f"{what} is a PIL image of mode {opened.mode}: scale it to bytes, mode L")
    pixels: Tensor = pil_to_tensor(opened.convert("RGB")) / 255
    return pixels


def _channels_first(pixels: Tensor, what: str) -> Tensor:
    """``[B, C, H, W]`` with 1 or 3 channels, if the shape can be read in one way only."""
    shape = tuple(pixels.shape)
    if pixels.dim() == 2:
        return pixels[None, None]
    first, last = shape[-3] in (1, 3), shape[-1] in (1, 3)
    if first and last:
        raise ValueError(
            f"{what} of shape {shape} can be read as channels first, {shape[-2]} x {shape[-1]} "
            f"pixels, and as channels last, {shape[-3]} x {shape[-2]}: make a PIL image of it "
            "(PIL.Image.fromarray of [H, W, 3] bytes)"
        )
    if not first and not last:
        raise ValueError(
            f"{what} of shape {shape}: neither the first nor the last dimension is 1 or 3 channels "
            "(a batch of grey images is [B, 1, H, W]; of four channels, image[:3])"
        )
    batch = pixels if pixels.dim() == 4 else pixels[None]
    return batch if first else batch.movedim(-1, 1)


def _unit_range(batch: Tensor, what: str, slack: float) -> Tensor:
    """The same in [0, 1], from bytes or floats, if the values can be read in one way only."""
    if batch.dtype == torch.uint8:
        return batch.float() / 255
    batch = batch.float()
    low, high = float(batch.min()), float(batch.max())
    if not np.isfinite(low + high):
        raise ValueError(f"{what} holds NaN or infinite values: check the image")
    if low >= -slack and high <= 1 + slack:
        return batch.clamp(0, 1)
    if low >= 0 and 16 <= high <= 255:
        return batch / 255
    values = f"{what} has values from {low:.3g} to {high:.3g}"
    if low < 0:
        raise ValueError(
            f"{values}, as behind a model's normalisation: to undo it, pass mean= and std=, or the "
            "transform= that holds them; or pass the image in [0, 1]"
        )
    raise ValueError(
        f"{values}, which can be read as a dark image of bytes and as one in [0, 1] that overshot: "
        "pass image / 255, or image.clamp(0, 1)"
    )


def normalisation(transform: Any) -> tuple[Any, Any] | None:
    """The mean and standard deviation in a transform of any library, the last one applied."""
    transform = getattr(transform, "image_processor", transform)
    for mean, std in (("mean", "std"), ("image_mean", "image_std")):
        found = getattr(transform, mean, None), getattr(transform, std, None)
        if None not in found and getattr(transform, "do_normalize", True):
            return found
    inner = getattr(transform, "transforms", None)
    parts = transform if isinstance(transform, torch.nn.Sequential) else inner
    found_inside = [normalisation(part) for part in parts] if isinstance(parts, Iterable) else []
    return next((one for one in reversed(found_inside) if one is not None), None)


def _per_channel(values: Any, what: str) -> Tensor:
    """A number, or one per channel -> ``[C, 1, 1]``."""
    given = as_tensor(torch.nan if values is None else values, what).float().reshape(-1, 1, 1)
    if len(given) not in (1, 3) or not given.isfinite().all():
        raise ValueError(f"undoing the normalisation of {what} takes mean= and std=, 1 or 3 values")
    return given
