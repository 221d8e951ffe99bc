"""Maps over images: one image, a pair, an episode, a ranked list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fam_plugins.core.images import pictures
from fam_plugins.core.references import listed
from fam_plugins.core.rules import Rule
from fam_plugins.plots.figure import (
    Overlay,
    Picture,
    new_figure,
    one_picture,
    show_image,
    show_text,
)
from fam_plugins.plots.given import as_maps, as_scores, check_titles

__all__ = ["plot_episode", "plot_map", "plot_pair", "plot_retrieval"]


def plot_map(
    image: Any,
    map: Any,
    *,
    score: Any = None,
    title: str = "",
    rule: str | Rule | None = None,
    label: str | None = None,
    **undo: Any,
) -> Picture:
    """Show one image and a map over it.

    Args:
        image: In any form: a path, a PIL image, ``[H, W]``, ``[3, H, W]`` or ``[H, W, 3]``, bytes
            or floats in [0, 1], or normalised, with what undoes it.
        map: ``[h, w]``, ``[1, h, w]`` or ``[1, 1, h, w]``, of any explainer.
        score: What is explained, over the map.
        title: The name of the image.
        rule: What made the map: its unit stands at the colour bar, and ``"attribution"`` without.
        label: The unit at the colour bar, instead of that of a rule.
        **undo: Of a floating-point image that was normalised: ``mean=`` and ``std=``, or
            ``transform=``, that of torchvision, timm or transformers that did it.

    Returns:
        The figure: the image, and the map over it.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If a file cannot be read.
        ValueError: On bad shapes, NaN, or images that can be read in two ways.

    Example:
        >>> import torch
        >>> figure = plot_map(torch.rand(3, 32, 32), torch.randn(1, 1, 4, 4))
        >>> len(figure.axes)  # the image, the map, the colour bar
        3
    """
    shown = one_picture(image, "image", **undo)
    drawn = as_maps(map, (), "map")
    name = "" if score is None else f"score {float(as_scores(score, ())):.3f}"
    figure, axes = new_figure(1, 2, [shown])
    overlay = Overlay([drawn])
    show_image(axes[0, 0], shown, title)
    overlay.draw(axes[0, 1], shown, drawn, name)
    overlay.colour_bar(figure, axes, label, rule)
    return figure


def plot_pair(
    image_a: Any,
    image_b: Any,
    map_a: Any,
    map_b: Any,
    *,
    score: Any = None,
    titles: Sequence[str] = ("a", "b"),
    rule: str | Rule | None = None,
    label: str | None = None,
    **undo: Any,
) -> Picture:
    """Show two images and what each contributes to their similarity, on one colour scale.

    Args:
        image_a: As in :func:`plot_map`.
        image_b: The other image; its size may differ.
        map_a: Map of the first image.
        map_b: Map of the second.
        score: The score, for the title of the figure.
        titles: The names of the two images.
        rule: As in :func:`plot_map`.
        label: As in :func:`plot_map`.
        **undo: ``mean=`` and ``std=``, or ``transform=``, as in :func:`plot_map`.

    Returns:
        The figure: images in the upper row, maps over them in the lower.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If a file cannot be read.
        ValueError: On bad shapes, NaN, images that can be read in two ways, or other than two
            titles.

    Example:
        >>> import torch
        >>> images, maps = torch.rand(2, 3, 32, 32), torch.randn(2, 1, 4, 4)
        >>> figure = plot_pair(images[0], images[1], maps[0], maps[1], score=0.8)
        >>> len(figure.axes)  # two images, two maps, the colour bar
        5
    """
    images = [one_picture(image_a, "image_a", **undo), one_picture(image_b, "image_b", **undo)]
    maps = [as_maps(map_a, (), "map_a"), as_maps(map_b, (), "map_b")]
    check_titles(titles)
    number = None if score is None else float(as_scores(score, ()))
    figure, axes = new_figure(2, 2, images)
    overlay = Overlay(maps)
    for column in range(2):
        show_image(axes[0, column], images[column], titles[column])
        overlay.draw(axes[1, column], images[column], maps[column])
    overlay.colour_bar(figure, axes[1, :], label, rule)
    if number is not None:
        figure.suptitle(f"score {number:.3f}", fontsize=11)
    return figure


def plot_episode(
    queries: Any,
    references: Any,
    maps: Any,
    *,
    scores: Any = None,
    labels: Sequence[object] | None = None,
    rule: str | Rule | None = None,
    label: str | None = None,
    **undo: Any,
) -> Picture:
    """Show what in every query raises its score with every reference: queries x references.

    Args:
        queries: ``[Q, C, H, W]`` or a list of images in any form, as in :func:`plot_map`.
        references: ``N`` images, for a prototype one of its supports; ``None`` for captions and
            other references without images, whose ``labels`` stand in their place.
        maps: Maps of the queries, ``[Q, N, 1, h, w]``.
        scores: ``[Q, N]``; written over each map, the highest per query framed.
        labels: The names of the references; their numbers by default.
        rule: As in :func:`plot_map`.
        label: As in :func:`plot_map`.
        **undo: ``mean=`` and ``std=``, or ``transform=``, as in :func:`plot_map`.

    Returns:
        The figure: references in the top row, queries in the left column, a map where they meet.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If a file cannot be read.
        ValueError: On bad shapes, NaN, images that can be read in two ways, or another number of
            labels than references.

    Example:
        >>> import torch
        >>> queries, references = torch.rand(2, 1, 16, 16), torch.rand(3, 1, 16, 16)
        >>> figure = plot_episode(queries, references, torch.randn(2, 3, 1, 4, 4))
        >>> len(figure.axes)  # a grid of 3 x 4 and the colour bar
        13
    """
    rows = _shown(queries, "queries", **undo)
    if references is None and labels is None:
        raise ValueError("references without images need names: labels=[...]")
    names = [] if labels is None else listed(labels)
    tops: Sequence[Tensor | None] = [None] * len(names)
    if references is not None:
        tops = _shown(references, "references", **undo)
        names = [f"reference {j}" for j in range(len(tops))] if labels is None else names
    shape = (len(rows), len(tops))
    drawn = as_maps(maps, shape, "maps")
    numbers = None if scores is None else as_scores(scores, shape)
    if len(names) != len(tops):
        raise ValueError(
            f"there are {len(names)} labels for {len(tops)} references: give one label each"
        )
    heading = 0.2 if references is None else 1.0
    shown = [image for image in (*rows, *tops) if image is not None]
    figure, axes = new_figure(len(rows) + 1, len(tops) + 1, shown, heading)
    overlay = Overlay([drawn])
    axes[0, 0].axis("off")
    for axis, top, name in zip(axes[0, 1:], tops, names, strict=True):
        if top is None:
            show_text(axis, str(name), va="bottom")
        else:
            show_image(axis, top, name)
    for i, row in enumerate(rows):
        show_image(axes[i + 1, 0], row, f"query {i}" if len(rows) > 1 else "query")
        for j in range(len(tops)):
            title = "" if numbers is None else f"{numbers[i, j]:.3f}"
            overlay.draw(axes[i + 1, j + 1], row, drawn[i, j], title)
        if numbers is not None:
            best = axes[i + 1, 1 + int(numbers[i].argmax())]
            for spine in best.spines.values():
                spine.set(linewidth=3)
            best.set_title(best.get_title(), fontsize=9, fontweight="bold")
    overlay.colour_bar(figure, axes[1:, :], label, rule)
    return figure


def plot_retrieval(
    query: Any,
    hits: Any,
    query_maps: Any = None,
    hit_maps: Any = None,
    scores: Any = None,
    *,
    captions: Sequence[str] | None = None,
    rule: str | Rule | None = None,
    label: str | None = None,
    **undo: Any,
) -> Picture:
    """Show a query, its ranked hits, and per hit what raises the score on both sides.

    Args:
        query: One image in any form, as in :func:`plot_map`, or the text that was searched for.
        hits: The hits in their order, ``[k, C, H, W]`` or a list of images in any form.
        query_maps: Maps of the query, one per hit, ``[k, 1, h, w]``. Left out, no such row.
        hit_maps: Maps of the hits, ``[k, 1, h, w]``. Left out, no such row.
        scores: ``k`` numbers.
        captions: Names of the hits; their ranks by default.
        rule: As in :func:`plot_map`.
        label: As in :func:`plot_map`.
        **undo: ``mean=`` and ``std=``, or ``transform=``, as in :func:`plot_map`.

    Returns:
        The figure: the query at the left, then one column per hit with the hit, the query's map
        and its own map.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If a file cannot be read.
        ValueError: On bad shapes, NaN, images that can be read in two ways, maps of a text, or
            another number of captions than hits.

    Example:
        >>> import torch
        >>> images, maps = torch.rand(4, 3, 32, 32), torch.randn(3, 1, 4, 4)
        >>> figure = plot_retrieval(images[0], images[1:], maps, maps, [0.9, 0.8, 0.7])
        >>> len(figure.axes)  # a grid of 3 x 4 and the colour bar
        13
    """
    # A text has no maps of its own, and does not end as the name of a file does.
    text = isinstance(query, str) and query_maps is None and not re.search(r"\.\w+$", query)
    asked = None if text else one_picture(query, "query", **undo)
    found = _shown(hits, "hits", **undo)
    count = (len(found),)
    kinds = (("in the query", query_maps, "query_maps"), ("in the hit", hit_maps, "hit_maps"))
    drawn = [(name, as_maps(m, count, what)) for name, m, what in kinds if m is not None]
    below: dict[str, Any] = {"in the query": [asked] * len(found), "in the hit": found}
    names = [f"hit {j + 1}" for j in range(*count)] if captions is None else listed(captions)
    if len(names) != len(found):
        raise ValueError(f"there are {len(names)} captions for {len(found)} hits: give one each")
    if scores is not None:
        numbers = as_scores(scores, count)
        names = [f"{name}: {score:.3f}" for name, score in zip(names, numbers, strict=True)]
    figure, axes = new_figure(1 + len(drawn), len(found) + 1, found)
    if asked is None:
        show_text(axes[0, 0], query)
    else:
        show_image(axes[0, 0], asked, "query")
    for axis, hit, name in zip(axes[0, 1:], found, names, strict=True):
        show_image(axis, hit, name)
    if not drawn:
        return figure
    overlay = Overlay([maps for _, maps in drawn])
    for row, (heading, maps) in zip(axes[1:], drawn, strict=True):
        show_text(row[0], heading, ha="right")
        for axis, image, one in zip(row[1:], below[heading], maps, strict=True):
            overlay.draw(axis, image, one)
    overlay.colour_bar(figure, axes[1:, :], label, rule)
    return figure


def _shown(images: Any, what: str, **undo: Any) -> list[Tensor]:
    """A batch or list of images in any form, of which there must be any."""
    found = pictures(images, what, **undo)
    if not found:
        raise ValueError(f"there are no {what}: pass at least one image")
    return found
