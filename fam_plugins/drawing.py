"""What every plot needs: images and maps checked, maps over images on one colour scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Overlay", "as_image", "as_images", "as_maps", "as_scores", "new_figure", "show_image"]


class Overlay:
    """Draws maps over images, all on one colour scale.

    Captum's colours: red, white, green for maps with two signs, greens for maps without negative
    values; the image below in grey. Captum's own function scales every map by itself, so that two
    of them cannot be compared; here the scale is one, in the units of the maps.

    Args:
        maps: Every map that will be drawn, to find the scale.

    Attributes:
        limits: The values at the two ends of the scale.

    Example:
        >>> Overlay([torch.tensor([[-1.0, 3.0]])]).limits
        (-3.0, 3.0)
    """

    def __init__(self, maps: Sequence[Tensor]) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        most = max(float(part.abs().max()) for part in maps)
        signed = any(float(part.min()) < 0 for part in maps)
        # A scale needs some width, even for maps of zeros.
        most = most or 1.0
        self.limits = (-most if signed else 0.0, most)
        # As captum.attr.visualization colours "all" and "positive".
        self._cmap: Any = (
            LinearSegmentedColormap.from_list("RdWhGn", ["red", "white", "green"])
            if signed
            else "Greens"
        )
        self._drawn: Any = None

    def draw(self, axis: Axes, image: np.ndarray, attribution: Tensor, title: str = "") -> None:
        """Draw a map ``[h, w]``, upsampled bilinearly, over an image ``[H, W, 3]``."""
        upsampled = F.interpolate(attribution[None, None], image.shape[:2], mode="bilinear")[0, 0]
        axis.imshow(image.mean(axis=2), cmap="gray", vmin=0, vmax=1)
        low, high = self.limits
        self._drawn = axis.imshow(
            upsampled.numpy(), cmap=self._cmap, vmin=low, vmax=high, alpha=0.5
        )
        _bare(axis, title)

    def colour_bar(self, figure: Figure, axes: Any, label: str) -> None:
        """Say what the colours stand for, beside the given axes."""
        figure.colorbar(self._drawn, ax=axes, label=label, shrink=0.8)


def new_figure(rows: int, columns: int, images: Sequence[np.ndarray]) -> tuple[Figure, np.ndarray]:
    """Make a figure and its grid of axes, without pyplot, which would keep it alive.

    Args:
        rows: Rows of axes.
        columns: Columns of axes.
        images: What will be drawn, ``[H, W, 3]``: rows are as high as the tallest needs.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    aspect = max(image.shape[0] / image.shape[1] for image in images)
    size = (2.0 * columns + 1.2, (2.0 * aspect + 0.3) * rows + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def show_image(axis: Axes, image: np.ndarray | None, title: str = "") -> None:
    """Draw an image ``[H, W, 3]``, or leave its place empty."""
    if image is None:
        axis.axis("off")
        return
    axis.imshow(image, vmin=0, vmax=1)
    _bare(axis, title)


def as_image(image: Any, what: str) -> np.ndarray:
    """Turn ``[C, H, W]`` or ``[H, W]`` in [0, 1], grey or RGB, into ``[H, W, 3]``.

    Raises:
        ValueError: On another shape, or values that are not finite or outside [0, 1].

    Example:
        >>> as_image(torch.zeros(1, 4, 6), "query").shape
        (4, 6, 3)
    """
    pixels = torch.as_tensor(image).detach().float().cpu()
    if pixels.dim() == 2:
        pixels = pixels[None]
    if pixels.dim() != 3 or pixels.shape[0] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(
            f"{what} has shape {tuple(pixels.shape)}: pass an image [C, H, W] with 1 or 3 channels "
            "first, or [H, W]; one image of a batch is images[i]"
        )
    if not torch.isfinite(pixels).all():
        raise ValueError(f"{what} holds NaN or infinite values: check the image")
    # Resizing and undoing a normalisation leave values off by rounding.
    if pixels.min() < -1e-3 or pixels.max() > 1 + 1e-3:
        raise ValueError(
            f"{what} has values from {pixels.min():.3g} to {pixels.max():.3g}: pass it in [0, 1], "
            "before the model's normalisation (bytes: image / 255)"
        )
    shown: np.ndarray = pixels.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
    return shown


def as_images(images: Any, what: str) -> list[np.ndarray]:
    """The same for a batch ``[N, C, H, W]`` or a list of images, of one size or several.

    Raises:
        ValueError: If there are none, and as for :func:`as_image`.
    """
    if len(images) == 0:
        raise ValueError(f"there are no {what}: pass at least one image")
    return [as_image(image, f"{what}[{index}]") for index, image in enumerate(images)]


def as_maps(maps: Any, leading: tuple[int, ...], what: str) -> Tensor:
    """Turn maps ``[*leading, 1, h, w]`` into ``[*leading, h, w]`` on the host.

    Raises:
        ValueError: On another shape, or values that are not finite.

    Example:
        >>> as_maps(torch.zeros(2, 3, 1, 4, 4), (2, 3), "maps").shape
        torch.Size([2, 3, 4, 4])
    """
    given = torch.as_tensor(maps).detach().float().cpu()
    wanted = ", ".join([*map(str, leading), "1", "h", "w"])
    fits = given.dim() == len(leading) + 3 and tuple(given.shape[:-3]) == leading
    if not fits or given.shape[-3] != 1 or 0 in given.shape:
        raise ValueError(
            f"{what} has shape {tuple(given.shape)}, not [{wanted}]: pass the maps as LayerFam "
            "returns them, one for every image that is shown"
        )
    if not torch.isfinite(given).all():
        raise ValueError(f"{what} holds NaN or infinite values: check the images and the weights")
    return given.squeeze(-3)


def as_scores(scores: Any, shape: tuple[int, ...]) -> Tensor:
    """Check that there is one score for every map.

    Raises:
        ValueError: On another shape.

    Example:
        >>> as_scores([[1, 2]], (1, 2))
        tensor([[1., 2.]])
    """
    given = torch.as_tensor(scores).detach().float().cpu()
    if tuple(given.shape) != shape:
        raise ValueError(
            f"scores has shape {tuple(given.shape)}, not {list(shape)}: pass one for every map"
        )
    return given


def _bare(axis: Axes, title: str) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=9)
