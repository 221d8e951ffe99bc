"""A query and its ranked hits, both sides explained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fam_plugins.core.rules import Rule, find_rule
from fam_plugins.core.side import Source, comparison
from fam_plugins.core.similarity import Similarity, as_similarity
from fam_plugins.core.transforms import Transform

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["HitsExplanation", "explain_hits"]


@dataclass(frozen=True)
class HitsExplanation:
    """Why each of ``k`` hits was found.

    Attributes:
        query_maps: ``[k, 1, h, w]``: which regions of the query make it like each hit; signed.
        hit_maps: ``[k, 1, h, w]``: which regions of each hit make it like the query.
        scores: ``[k]``: the similarities, without contrast.
        source: The images, their names and how they were normalised, for :meth:`plot`.
    """

    query_maps: Tensor
    hit_maps: Tensor
    scores: Tensor
    source: Source = field(kw_only=True, repr=False, compare=False)

    def plot(self, **options: Any) -> Figure:
        """Show the query, its hits in their order, and both maps of each.

        Args:
            options: Of :func:`~fam_plugins.plots.plot_retrieval`, such as ``captions=``.

        Returns:
            The figure, which shows itself at the end of a notebook's cell; or
            ``.savefig("hits.png")``.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: As for the function.
        """
        from fam_plugins.plots import plot_retrieval

        maps = self.query_maps, self.hit_maps, self.scores
        options = {"captions": self.source.names[1], "rule": self.source.rule} | options
        options = self.source.undo | options
        return plot_retrieval(self.source.a[0], self.source.b, *maps, **options)


def explain_hits(
    encoder: nn.Module,
    layer: nn.Module | str | None,
    query: Any,
    hits: Any,
    *,
    transform: Any = None,
    similarity: str | Similarity | Callable[..., Tensor] = "cosine",
    rule: str | Rule = "additive",
    contrast: Any = None,
    reshape_transform: Transform | str | None = "auto",
    smooth: bool = False,
    tail: str | None = None,
) -> HitsExplanation:
    """Explain a ranked list in the query and in every hit, from one forward pass of each image.

    As :func:`~fam_plugins.explain_pair` of the query with each hit, which runs the query ``k``
    times. A gallery is searched with any tool; its embeddings make the best ``contrast``.

    Args:
        encoder: As for :func:`~fam_plugins.explain_pair`.
        layer: As there.
        query: One image, ``[1, C, H, W]`` or ``[C, H, W]``; with a ``transform``, in any form.
        hits: Images ``[k, C, H, W]``; with a ``transform``, a list of paths or images.
        transform: As there.
        similarity: As there.
        rule: As there.
        contrast: As there: :func:`~fam_plugins.gallery_mean` of what was searched.
        reshape_transform: As there.
        smooth: As there.
        tail: As there.

    Returns:
        Maps and scores, in the order of the hits.

    Raises:
        AssertionError: If the layer does not run.
        RuntimeError: If it runs twice, or the embedding does not depend on it.
        TypeError: If the encoder, the layer or the images are not what they should be.
        ValueError: If there are several queries or no hits, and as for
            :func:`~fam_plugins.explain_pair`.

    Example:
        >>> encoder = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> found = explain_hits(encoder, "0", torch.rand(3, 4, 4), torch.rand(5, 3, 6, 6))
        >>> found.query_maps.shape, found.hit_maps.shape
        (torch.Size([5, 1, 4, 4]), torch.Size([5, 1, 6, 6]))
        >>> bool((found.query_maps.sum((1, 2, 3)) - found.scores).abs().max() < 1e-6)
        True
    """
    with comparison(
        encoder, layer, query, hits, as_similarity(similarity), find_rule(rule),
        contrast=contrast, transform=transform, reshape_transform=reshape_transform, tail=tail,
        smooth=smooth, one_to_many=True,
    ) as both:  # fmt: skip
        hit_maps = both.b.explain(both.alike(both.a.point.expand_as(both.b.point)))
        explained, query_maps = [both.b.explained], []
        for hit in torch.split(both.b.point, 1):
            query_maps.append(both.a.explain(both.alike(hit)))
            explained.append(both.a.explained)
    both.warn(*explained)
    return HitsExplanation(torch.cat(query_maps), hit_maps, both.score, source=both.source)
