"""Which regions of two images match, joined by lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import cm, colors, patches, patheffects

from fam_plugins.plots.figure import Picture, new_figure, one_picture, show_image
from fam_plugins.plots.given import as_floats, check_titles

__all__ = ["plot_matches"]


def plot_matches(
    image_a: Any,
    image_b: Any,
    joint: Any,
    *,
    grid_a: Sequence[int] | None = None,
    grid_b: Sequence[int] | None = None,
    top: int = 8,
    titles: Sequence[str] = ("a", "b"),
    label: str = "share of the score",
    **undo: Any,
) -> Picture:
    """Join the pairs of regions that raise the score of two images most.

    Args:
        image_a: As in :func:`~fam_plugins.plots.plot_pair`.
        image_b: As in :func:`~fam_plugins.plots.plot_pair`.
        joint: Of ``explain_pair(..., joint=True)``: ``[Ra + 1, Rb + 1]``, also in a batch of one.
        grid_a: Rows and columns of ``a``, ``pair.map_a.shape[2:]``; a square if left out.
        grid_b: The same for ``b``.
        top: How many pairs of regions to show; fewer if fewer raise the score.
        titles: The names of the two images.
        label: The unit at the colour bar.
        **undo: As in :func:`~fam_plugins.plots.plot_map`.

    Returns:
        The figure: both images, and the score with the part of it that the lines carry.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: As :func:`~fam_plugins.plots.plot_pair`, and on grids of another size or
            ``top`` below 1.

    Example:
        >>> import torch
        >>> figure = plot_matches(*torch.rand(2, 3, 32, 32), torch.rand(17, 17))
        >>> len(figure.axes)  # two images and the colour bar
        3
    """
    images = [one_picture(image_a, "image_a", **undo), one_picture(image_b, "image_b", **undo)]
    shares = as_floats(joint, "joint")
    shares = shares[0] if shares.dim() == 3 and len(shares) == 1 else shares
    if shares.dim() != 2 or min(shares.shape) < 2 or not torch.isfinite(shares).all():
        raise ValueError(
            f"joint has shape {tuple(shares.shape)}, not [Ra + 1, Rb + 1], or holds NaN: pass "
            "explain_pair(..., joint=True).joint, of a batch joint[i]"
        )
    if not isinstance(top, int) or top < 1:
        raise ValueError(f"top must be an int of at least 1, not {top!r}")
    check_titles(titles)
    rows, columns = (size - 1 for size in shares.shape)
    grids = [_as_grid(grid_a, rows, "a"), _as_grid(grid_b, columns, "b")]
    figure, axes = new_figure(1, 2, images)
    figure.set_size_inches(*(1.7 * figure.get_size_inches()))
    values, places = shares[:-1, :-1].flatten().sort(descending=True)
    count = int((values[:top] > 0).sum())
    limits = (float(values[count - 1]), float(values[0])) if count else (0, 1)
    scale = cm.ScalarMappable(colors.Normalize(*limits), "plasma")
    for axis, image, title in zip(axes[0], images, titles, strict=True):
        show_image(axis, image, title)
    for value, place in reversed([*zip(values[:count].tolist(), places.tolist(), strict=False)]):
        width = 4 - 2.5 * (limits[1] - value) / (limits[1] - limits[0] or 1)
        halo = [patheffects.withStroke(linewidth=width + 1.5, foreground="white")]
        style: Any = {"color": scale.to_rgba(value), "linewidth": width, "path_effects": halo}
        ends = []
        for axis, image, grid, region in zip(
            axes[0], images, grids, divmod(place, columns), strict=True
        ):
            y, x = (size / parts for size, parts in zip(image.shape[1:], grid, strict=True))
            left, upper = region % grid[1] * x - 0.5, region // grid[1] * y - 0.5
            axis.add_patch(patches.Rectangle((left, upper), x, y, fill=False, **style))
            ends.append((left + x / 2, upper + y / 2))
        a, b = axes[0]
        line = patches.ConnectionPatch(ends[0], ends[1], "data", axesA=a, axesB=b, **style)
        figure.add_artist(line)
    figure.colorbar(scale, ax=axes, label=label, shrink=0.8)
    figure.suptitle(
        f"score {shares.sum():.3f}, of which the lines {values[:count].sum():.3f}", fontsize=11
    )
    return figure


def _as_grid(grid: Any, regions: int, name: str) -> tuple[int, int]:
    """Rows and columns of that many regions."""
    sides = [math.isqrt(regions)] * 2 if grid is None else np.ravel(grid).tolist()
    whole = len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides)
    if not whole or math.prod(sides) != regions:
        raise ValueError(
            f"joint has {regions} regions of {name}, which are no grid {tuple(sides)}: pass "
            f"grid_{name}=pair.map_{name}.shape[2:]"
        )
    return sides[0], sides[1]
