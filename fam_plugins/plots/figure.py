"""What all pictures share: a figure that shows itself, images, and maps laid over them."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from textwrap import fill
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fam_plugins.core.images import pictures
from fam_plugins.core.rules import Rule, find_rule

try:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, to_rgb
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("plots need matplotlib: pip install matplotlib") from error

__all__ = ["Overlay", "Picture", "new_figure", "one_picture", "show_image", "show_text"]

FOR, AGAINST = "#00a030", "#f02020"
"""Green raises the score and red lowers it, as in captum.attr.visualization."""


class Picture(Figure):
    """A figure that a notebook shows as the last line of a cell, whatever its backend."""

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.savefig(file, format="png", dpi=self.dpi)
        return file.getvalue()


def new_figure(
    rows: int, columns: int, images: Sequence[Tensor], heading: float = 1.0
) -> tuple[Picture, np.ndarray]:
    """A figure and its axes ``[rows, columns]``, as high as the tallest image needs.

    ``heading`` is the height of the first row, beside the others' 1.
    """
    aspect = max(image.shape[1] / image.shape[2] for image in images)
    # Never so low that the colour bar's label does not fit.
    height = max((2.0 * aspect + 0.2) * (rows - 1 + heading) + 0.4, 2.6)
    # pyplot would keep the figure alive.
    figure = Picture(figsize=(2.0 * columns + 1.3, height), layout="constrained")
    ratios = {"height_ratios": [heading, *[1.0] * (rows - 1)]}
    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw=ratios)


def one_picture(image: Any, what: str, **undo: Any) -> Tensor:
    """One image in any form -> ``[3, H, W]`` in [0, 1]."""
    found = pictures(image, what, **undo)
    if len(found) != 1:
        raise ValueError(f"{what} holds {len(found)} images: pass one, images[i]")
    return found[0]


def show_image(axis: Axes, image: Tensor, title: object = "") -> None:
    """Draw an image ``[3, H, W]`` without ticks."""
    axis.imshow(image.permute(1, 2, 0).numpy())
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(fill(str(title), 24), fontsize=9, parse_math=False)


def show_text(axis: Axes, text: str, **options: Any) -> None:
    """Write a caption in place of an image."""
    axis.axis("off")
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 10} | options
    place = {"center": 0.5, "right": 0.95}[style["ha"]]
    axis.text(place, 0.5, fill(text, 20), parse_math=False, transform=axis.transAxes, **style)


class Overlay:
    """Draws maps ``[..., h, w]`` over grey images, all on one colour scale in their own units.

    The larger a value, the less of the image shines through, and where a map is zero the image is
    as it is. The bar shows every value over every grey, so that a colour on a map is on the bar.
    """

    def __init__(self, maps: Sequence[Tensor]) -> None:
        # Captum scales every map by itself, so that two of them cannot be compared. A scale needs
        # some width, even for maps of zeros.
        self.most = max(float(part.abs().max()) for part in maps) or 1.0
        self.least = -self.most if any(float(part.min()) < 0 for part in maps) else 0.0

    def blend(self, values: Tensor, grey: Tensor) -> Tensor:
        """Values and greys in [0, 1] -> colours ``[..., 3]``; both of one shape."""
        share = (values / self.most).clamp(-1, 1)[..., None]
        ends = torch.tensor([to_rgb(AGAINST), to_rgb(FOR)], dtype=torch.float32, device="cpu")
        colour = torch.where(share < 0, ends[0], ends[1])
        # Colours of the pure image end where they could be mistaken for those of the map.
        return torch.lerp(
            (0.3 + 0.65 * grey)[..., None].expand(colour.shape), colour, 0.75 * share.abs()
        )

    def draw(self, axis: Axes, image: Tensor, attribution: Tensor, title: str = "") -> None:
        """Draw a map ``[h, w]``, upsampled bilinearly, over an image ``[3, H, W]``."""
        values = F.interpolate(attribution[None, None], image.shape[1:], mode="bilinear")[0, 0]
        show_image(axis, self.blend(values, image.mean(dim=0)).permute(2, 0, 1), title)

    def colour_bar(
        self, figure: Figure, axes: Any, label: str | None, rule: str | Rule | None
    ) -> None:
        """Add the colour bar beside the given axes: values upwards, greys from left to right."""
        if label is None:
            label = "attribution" if rule is None else fill(find_rule(rule).unit, 18)
        scale = ScalarMappable(Normalize(self.least, self.most))
        bar = figure.colorbar(scale, ax=axes, label=label, shrink=0.8, pad=0.02, aspect=25)
        steps: Any = {"dtype": torch.float32, "device": "cpu"}
        values = torch.linspace(self.least, self.most, 256, **steps)[:, None].expand(-1, 32)
        colours = self.blend(values, torch.linspace(0, 1, 32, **steps).expand_as(values))
        extent = (*bar.ax.get_xlim(), self.least, self.most)
        bar.ax.imshow(colours.numpy(), origin="lower", aspect="auto", extent=extent, zorder=2)
