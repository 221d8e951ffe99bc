"""Pictures of pairs, episodes and ranked lists, drawn with matplotlib in Captum's colours.

Every function returns a :class:`matplotlib.figure.Figure` made without pyplot: nothing is shown, no
global state is touched, and the figure goes when its last name does. Save it with
``figure.savefig("maps.png")``; a notebook shows it as the last line of a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fam_plugins.drawing import (
    Overlay,
    as_image,
    as_images,
    as_maps,
    as_scores,
    new_figure,
    show_image,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_episode", "plot_pair", "plot_retrieval"]


def plot_pair(
    image_a: Tensor,
    image_b: Tensor,
    map_a: Tensor,
    map_b: Tensor,
    *,
    score: float | Tensor | None = None,
    titles: tuple[str, str] = ("a", "b"),
    label: str = "share of the score",
) -> Figure:
    """Show two images and what each contributes to their similarity, on one colour scale.

    Args:
        image_a: ``[C, H, W]`` or ``[H, W]`` in [0, 1], grey or RGB.
        image_b: The other image; its size may differ.
        map_a: Map of the first image, ``[1, h, w]`` or ``[1, 1, h, w]``.
        map_b: Map of the second.
        score: The score, for the title of the figure.
        titles: What to call the two images.
        label: What the numbers at the colour bar are; for the rule ``"fam"``, whose maps are in
            units of the activation, ``"FAM"``.

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
    images = [as_image(image_a, "image_a"), as_image(image_b, "image_b")]
    maps = [_single(map_a, "map_a"), _single(map_b, "map_b")]
    if len(titles) != 2:
        raise ValueError(f"titles are {titles!r}: pass two, one an image")
    number = None if score is None else float(as_scores(score, ()))
    figure, axes = new_figure(2, 2, images)
    overlay = Overlay(maps)
    for column in range(2):
        show_image(axes[0, column], images[column], titles[column])
        overlay.draw(axes[1, column], images[column], maps[column])
    overlay.colour_bar(figure, axes[1, :], label)
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
    label: str = "share of the score",
) -> Figure:
    """Show what in every query speaks for every reference: queries x references.

    Args:
        queries: ``[Q, C, H, W]`` in [0, 1], or a list of images.
        references: ``[N, C, H, W]``: for a prototype, one of its supports.
        maps: Maps of the queries, ``[Q, N, 1, h, w]``.
        scores: ``[Q, N]``; written over each map, the highest of a query framed.
        labels: What to call the references; their numbers if not given.
        label: What the numbers at the colour bar are.

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
    rows, tops = as_images(queries, "queries"), as_images(references, "references")
    shape = (len(rows), len(tops))
    drawn = as_maps(maps, shape, "maps")
    numbers = None if scores is None else as_scores(scores, shape)
    names = [str(name) for name in (range(len(tops)) if labels is None else labels)]
    if len(names) != len(tops):
        raise ValueError(
            f"there are {len(names)} labels for {len(tops)} references: give one label each"
        )
    figure, axes = new_figure(len(rows) + 1, len(tops) + 1, [*rows, *tops])
    overlay = Overlay([drawn])
    show_image(axes[0, 0], None)
    for j, top in enumerate(tops):
        show_image(axes[0, j + 1], top, f"reference {names[j]}")
    for i, row in enumerate(rows):
        show_image(axes[i + 1, 0], row, f"query {i}")
        for j in range(len(tops)):
            title = "" if numbers is None else f"{numbers[i, j]:.3f}"
            overlay.draw(axes[i + 1, j + 1], row, drawn[i, j], title)
        if numbers is not None:
            _frame(axes[i + 1, 1 + int(numbers[i].argmax())])
    overlay.colour_bar(figure, axes[1:, :], label)
    return figure


def plot_retrieval(
    query: Tensor,
    hits: Any,
    query_maps: Tensor,
    hit_maps: Tensor,
    scores: Any,
    *,
    label: str = "share of the score",
) -> Figure:
    """Show a query, its ranked hits, and for each hit what speaks for it on both sides.

    Args:
        query: ``[C, H, W]`` or ``[H, W]`` in [0, 1].
        hits: The hits in their order, ``[k, C, H, W]`` or a list of images.
        query_maps: Maps of the query, one a hit, ``[k, 1, h, w]``.
        hit_maps: Maps of the hits, ``[k, 1, h, w]``.
        scores: ``[k]``.
        label: What the numbers at the colour bar are.

    Returns:
        The figure, one column a hit: the hit, its query's map, its own map; the query at the left.

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
    asked = as_image(query, "query")
    found = as_images(hits, "hits")
    ours = as_maps(query_maps, (len(found),), "query_maps")
    theirs = as_maps(hit_maps, (len(found),), "hit_maps")
    numbers = as_scores(scores, (len(found),))
    figure, axes = new_figure(3, len(found) + 1, [asked, *found])
    overlay = Overlay([ours, theirs])
    show_image(axes[0, 0], asked, "query")
    for row, name in ((1, "in the query"), (2, "in the hit")):
        show_image(axes[row, 0], None)
        axes[row, 0].text(0.95, 0.5, name, ha="right", va="center", fontsize=10)
    for j, hit in enumerate(found):
        show_image(axes[0, j + 1], hit, f"hit {j + 1}: {numbers[j]:.3f}")
        overlay.draw(axes[1, j + 1], asked, ours[j])
        overlay.draw(axes[2, j + 1], hit, theirs[j])
    overlay.colour_bar(figure, axes[1:, :], label)
    return figure


def _single(attribution: Tensor, what: str) -> Tensor:
    """One map ``[1, h, w]``, or a batch of one as the adapters return it."""
    if getattr(attribution, "ndim", 0) == 4 and len(attribution) == 1:
        attribution = attribution[0]
    return as_maps(attribution, (), what)


def _frame(axis: Any) -> None:
    """Mark an axis: the reference that a query is nearest to."""
    for spine in axis.spines.values():
        spine.set(edgecolor="black", linewidth=2.5)
