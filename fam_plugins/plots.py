"""Pictures of pairs, episodes and ranked lists, drawn with matplotlib in Captum's colours.

Every function returns a :class:`matplotlib.figure.Figure` made without pyplot: nothing is shown, no
global state changes, and the figure is freed with its last reference. Save it with
``figure.savefig("maps.png")``; a notebook shows it as the last line of a cell after
``%matplotlib inline``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fam_plugins.core.references import as_tensor, listed
from fam_plugins.core.rules import Rule, find_rule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_episode", "plot_matches", "plot_pair", "plot_retrieval"]


def plot_pair(
    image_a: Tensor,
    image_b: Tensor,
    map_a: Tensor,
    map_b: Tensor,
    *,
    score: float | Tensor | None = None,
    titles: tuple[str, str] = ("a", "b"),
    rule: str | Rule | None = None,
    label: str | None = None,
) -> Figure:
    """Show two images and what each contributes to their similarity, on one colour scale.

    Args:
        image_a: ``[C, H, W]`` or ``[H, W]`` in [0, 1], grey or RGB.
        image_b: The other image; its size may differ.
        map_a: Map of the first image, ``[1, h, w]`` or ``[1, 1, h, w]``.
        map_b: Map of the second.
        score: The score, for the title of the figure.
        titles: The names of the two images.
        rule: What made the maps: its unit stands at the colour bar, and ``"attribution"`` without.
        label: The unit at the colour bar, instead of that of a rule.

    Returns:
        The figure: images in the upper row, maps over them in the lower.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: On bad shapes, values outside [0, 1] in an image, NaN, or other than two titles.

    Example:
        >>> import torch
        >>> images, maps = torch.rand(2, 3, 32, 32), torch.randn(2, 1, 4, 4)
        >>> figure = plot_pair(images[0], images[1], maps[0], maps[1], score=0.8)
        >>> len(figure.axes)  # two images, two maps, the colour bar
        5
    """
    images = [_as_image(image_a, "image_a"), _as_image(image_b, "image_b")]
    maps = [_as_maps(map_a, (), "map_a"), _as_maps(map_b, (), "map_b")]
    _check_titles(titles)
    number = None if score is None else float(_as_scores(score, ()))
    figure, axes = _new_figure(2, 2, images)
    overlay = _Overlay(maps)
    for column in range(2):
        _show_image(axes[0, column], images[column], titles[column])
        overlay.draw(axes[1, column], images[column], maps[column])
    overlay.colour_bar(figure, axes[1, :], label, rule)
    if number is not None:
        figure.suptitle(f"score {number:.3f}", fontsize=11)
    return figure


def plot_episode(
    queries: Any,
    references: Any,
    maps: Tensor,
    *,
    scores: Any = None,
    labels: Sequence[object] | None = None,
    rule: str | Rule | None = None,
    label: str | None = None,
) -> Figure:
    """Show what in every query raises its score with every reference: queries x references.

    Args:
        queries: ``[Q, C, H, W]`` in [0, 1], or a list of images.
        references: ``[N, C, H, W]``: for a prototype, one of its supports.
        maps: Maps of the queries, ``[Q, N, 1, h, w]``.
        scores: ``[Q, N]``; written over each map, the highest per query framed.
        labels: The names of the references; their numbers by default.
        rule: As in :func:`plot_pair`.
        label: As in :func:`plot_pair`.

    Returns:
        The figure: references in the top row, queries in the left column, a map where they meet.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: On bad shapes, values outside [0, 1] in an image, NaN, or another number of
            labels than references.

    Example:
        >>> import torch
        >>> queries, references = torch.rand(2, 1, 16, 16), torch.rand(3, 1, 16, 16)
        >>> figure = plot_episode(queries, references, torch.randn(2, 3, 1, 4, 4))
        >>> len(figure.axes)  # a grid of 3 x 4 and the colour bar
        13
    """
    rows, tops = _as_images(queries, "queries"), _as_images(references, "references")
    shape = (len(rows), len(tops))
    drawn = _as_maps(maps, shape, "maps")
    numbers = None if scores is None else _as_scores(scores, shape)
    names = list(range(len(tops))) if labels is None else listed(labels)
    if len(names) != len(tops):
        raise ValueError(
            f"there are {len(names)} labels for {len(tops)} references: give one label each"
        )
    figure, axes = _new_figure(len(rows) + 1, len(tops) + 1, [*rows, *tops])
    overlay = _Overlay([drawn])
    axes[0, 0].axis("off")
    for j, top in enumerate(tops):
        _show_image(axes[0, j + 1], top, f"reference {names[j]}")
    for i, row in enumerate(rows):
        _show_image(axes[i + 1, 0], row, f"query {i}")
        for j in range(len(tops)):
            title = "" if numbers is None else f"{numbers[i, j]:.3f}"
            overlay.draw(axes[i + 1, j + 1], row, drawn[i, j], title)
        if numbers is not None:
            for spine in axes[i + 1, 1 + int(numbers[i].argmax())].spines.values():
                spine.set(edgecolor="black", linewidth=2.5)
    overlay.colour_bar(figure, axes[1:, :], label, rule)
    return figure


def plot_retrieval(
    query: Tensor,
    hits: Any,
    query_maps: Tensor,
    hit_maps: Tensor,
    scores: Any,
    *,
    rule: str | Rule | None = None,
    label: str | None = None,
) -> Figure:
    """Show a query, its ranked hits, and per hit what raises the score on both sides.

    Args:
        query: ``[C, H, W]`` or ``[H, W]`` in [0, 1].
        hits: The hits in their order, ``[k, C, H, W]`` or a list of images.
        query_maps: Maps of the query, one per hit, ``[k, 1, h, w]``.
        hit_maps: Maps of the hits, ``[k, 1, h, w]``.
        scores: ``[k]``.
        rule: As in :func:`plot_pair`.
        label: As in :func:`plot_pair`.

    Returns:
        The figure: the query at the left, then one column per hit with the hit, the query's map
        and its own map.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: On bad shapes, values outside [0, 1] in an image, or NaN.

    Example:
        >>> import torch
        >>> images, maps = torch.rand(4, 3, 32, 32), torch.randn(3, 1, 4, 4)
        >>> figure = plot_retrieval(images[0], images[1:], maps, maps, [0.9, 0.8, 0.7])
        >>> len(figure.axes)  # a grid of 3 x 4 and the colour bar
        13
    """
    asked, found = _as_image(query, "query"), _as_images(hits, "hits")
    ours = _as_maps(query_maps, (len(found),), "query_maps")
    theirs = _as_maps(hit_maps, (len(found),), "hit_maps")
    numbers = _as_scores(scores, (len(found),))
    figure, axes = _new_figure(3, len(found) + 1, [asked, *found])
    overlay = _Overlay([ours, theirs])
    _show_image(axes[0, 0], asked, "query")
    for row, name in ((1, "in the query"), (2, "in the hit")):
        axes[row, 0].axis("off")
        axes[row, 0].text(0.95, 0.5, name, ha="right", va="center", fontsize=10)
    for j, hit in enumerate(found):
        _show_image(axes[0, j + 1], hit, f"hit {j + 1}: {numbers[j]:.3f}")
        overlay.draw(axes[1, j + 1], asked, ours[j])
        overlay.draw(axes[2, j + 1], hit, theirs[j])
    overlay.colour_bar(figure, axes[1:, :], label, rule)
    return figure


def plot_matches(
    image_a: Tensor,
    image_b: Tensor,
    joint: Tensor,
    *,
    grid_a: Sequence[int] | None = None,
    grid_b: Sequence[int] | None = None,
    top: int = 8,
    titles: tuple[str, str] = ("a", "b"),
    label: str = "share of the score",
) -> Figure:
    """Join the pairs of regions that raise the score of two images most.

    Args:
        image_a: As in :func:`plot_pair`.
        image_b: As in :func:`plot_pair`.
        joint: Of ``explain_pair(..., joint=True)``: ``[Ra + 1, Rb + 1]``, also in a batch of one.
        grid_a: Rows and columns of ``a``, ``pair.map_a.shape[2:]``; a square if left out.
        grid_b: The same for ``b``.
        top: How many pairs of regions to show; fewer if fewer raise the score.
        titles: The names of the two images.
        label: The unit at the colour bar.

    Returns:
        The figure: both images, and the score with the part of it that the lines carry.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: As :func:`plot_pair`, and on grids of another size or ``top`` below 1.

    Example:
        >>> import torch
        >>> figure = plot_matches(*torch.rand(2, 3, 32, 32), torch.rand(17, 17))
        >>> len(figure.axes)  # two images and the colour bar
        3
    """
    images = [_as_image(image_a, "image_a"), _as_image(image_b, "image_b")]
    shares = _as_floats(joint, "joint")
    shares = shares[0] if shares.dim() == 3 and len(shares) == 1 else shares
    if shares.dim() != 2 or min(shares.shape) < 2 or not torch.isfinite(shares).all():
        raise ValueError(
            f"joint has shape {tuple(shares.shape)}, not [Ra + 1, Rb + 1], or holds NaN: pass "
            "explain_pair(..., joint=True).joint, of a batch joint[i]"
        )
    if not isinstance(top, int) or top < 1:
        raise ValueError(f"top must be an int of at least 1, not {top!r}")
    _check_titles(titles)
    rows, columns = (size - 1 for size in shares.shape)
    grids = [_as_grid(grid_a, rows, "a"), _as_grid(grid_b, columns, "b")]
    figure, axes = _new_figure(1, 2, images)
    from matplotlib import cm, colors, patches, patheffects

    figure.set_size_inches(*(1.7 * figure.get_size_inches()))
    values, places = shares[:-1, :-1].flatten().sort(descending=True)
    count = int((values[:top] > 0).sum())
    limits = (float(values[count - 1]), float(values[0])) if count else (0, 1)
    scale = cm.ScalarMappable(colors.Normalize(*limits), "plasma")
    for axis, image, title in zip(axes[0], images, titles, strict=True):
        _show_image(axis, image, title)
    for value, place in reversed([*zip(values[:count].tolist(), places.tolist(), strict=False)]):
        width = 4 - 2.5 * (limits[1] - value) / (limits[1] - limits[0] or 1)
        halo = [patheffects.withStroke(linewidth=width + 1.5, foreground="white")]
        style: Any = {"color": scale.to_rgba(value), "linewidth": width, "path_effects": halo}
        ends = []
        for axis, image, grid, region in zip(
            axes[0], images, grids, divmod(place, columns), strict=True
        ):
            y, x = (size / parts for size, parts in zip(image.shape, grid, strict=False))
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


def _check_titles(titles: Any) -> None:
    if not isinstance(titles, (tuple, list)) or len(titles) != 2:
        raise ValueError(f"titles are {titles!r}: pass two, one per image")


def _new_figure(rows: int, columns: int, images: Sequence[np.ndarray]) -> tuple[Figure, np.ndarray]:
    """Make a figure and its axes ``[rows, columns]``, as high as the tallest image needs."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    aspect = max(image.shape[0] / image.shape[1] for image in images)
    size = (2.0 * columns + 1.2, (2.0 * aspect + 0.3) * rows + 0.6)
    # pyplot would keep the figure alive.
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


class _Overlay:
    """Draws maps ``[..., h, w]`` over grey images, all on one colour scale in their own units."""

    def __init__(self, maps: Sequence[Tensor]) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        # Captum scales every map by itself, so that two of them cannot be compared. A scale needs
        # some width, even for maps of zeros.
        most = max(float(part.abs().max()) for part in maps) or 1.0
        signed = any(float(part.min()) < 0 for part in maps)
        self._limits = (-most if signed else 0.0, most)
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
        _show_image(axis, image.mean(axis=2), title)
        low, high = self._limits
        self._drawn = axis.imshow(
            upsampled.numpy(), cmap=self._cmap, vmin=low, vmax=high, alpha=0.5
        )

    def colour_bar(
        self, figure: Figure, axes: Any, label: str | None, rule: str | Rule | None
    ) -> None:
        """Add the colour bar of the last map beside the given axes."""
        if label is None:
            label = "attribution" if rule is None else fill(find_rule(rule).unit, 18)
        figure.colorbar(self._drawn, ax=axes, label=label, shrink=0.8)


def _show_image(axis: Axes, image: np.ndarray, title: str) -> None:
    """Draw an image ``[H, W, 3]``, or ``[H, W]`` in grey, without ticks."""
    axis.imshow(image, cmap="gray", vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=9, parse_math=False)


def _as_image(image: Any, what: str) -> np.ndarray:
    """Check an image ``[C, H, W]`` or ``[H, W]`` and return it as ``[H, W, 3]`` in [0, 1]."""
    pixels = _as_floats(image, what)
    if pixels.dim() == 2:
        pixels = pixels[None]
    if pixels.dim() != 3 or pixels.shape[0] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(
            f"{what} has shape {tuple(pixels.shape)}, not [H, W] or [C, H, W] with 1 or 3 channels "
            "first: pass one image; of a batch, images[i]; of channels last, image.permute(2, 0, 1)"
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


def _as_images(images: Any, what: str) -> list[np.ndarray]:
    """Check a batch ``[N, C, H, W]`` or a list of images of several sizes, and that it has any."""
    if getattr(images, "ndim", 4) != 4 or not isinstance(images, Iterable):
        raise ValueError(f"{what} are no [N, C, H, W] or list of images: of one image, [image]")
    found = [_as_image(image, f"{what}[{index}]") for index, image in enumerate(images)]
    if not found:
        raise ValueError(f"there are no {what}: pass at least one image")
    return found


def _as_maps(maps: Any, leading: tuple[int, ...], what: str) -> Tensor:
    """Check maps ``[*leading, 1, h, w]`` and return them as ``[*leading, h, w]`` on the host."""
    given = _as_floats(maps, what)
    if not leading and given.dim() == 4 and len(given) == 1:  # of a batch of one
        given = given[0]
    fits = given.dim() == len(leading) + 3 and tuple(given.shape[:-2]) == (*leading, 1)
    if not fits or 0 in given.shape:
        wanted = ", ".join(map(str, (*leading, 1, "h", "w")))
        raise ValueError(
            f"{what} has shape {tuple(given.shape)}, not [{wanted}]: pass the maps as LayerFam "
            "returns them, one per image that is shown"
        )
    if not torch.isfinite(given).all():
        raise ValueError(f"{what} holds NaN or infinite values: check the images and the weights")
    return given.squeeze(-3)


def _as_scores(scores: Any, shape: tuple[int, ...]) -> Tensor:
    """Check that there is one score per map and return them as ``shape`` on the host."""
    given = _as_floats(scores, "scores")
    if not shape and given.numel() == 1:  # of a batch of one
        given = given.reshape(())
    if tuple(given.shape) != shape or given.isnan().any():
        raise ValueError(
            f"scores has shape {tuple(given.shape)}, not {list(shape) or 'one number'}, or holds "
            "NaN: pass one per map (of a batch, score[i])"
        )
    return given


def _as_floats(values: Any, what: str) -> Tensor:
    """What a user gave as float32 on the host."""
    given = as_tensor(values, what)
    if given.is_complex():
        raise TypeError(f"{what} is complex: pass real values (.abs() or .real)")
    return given.detach().float().cpu()
