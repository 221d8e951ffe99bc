"""Two images and why they are alike: a map for each, and what separates them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from fam_plugins.core.joint import joint_shares
from fam_plugins.core.rules import Rule, find_rule
from fam_plugins.core.side import Source, apart, comparison, pairwise
from fam_plugins.core.similarity import Similarity, as_similarity
from fam_plugins.core.transforms import Transform

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PairExplanation", "explain_pair"]


@dataclass(frozen=True)
class PairExplanation:
    """Why two images are as alike as they are; ``B`` pairs at a time.

    Attributes:
        map_a: ``[B, 1, h, w]``: which regions of ``a`` make it like ``b``; signed.
        map_b: The same for ``b``, whose map may have another size.
        score: ``[B]``: the similarity of ``a`` and ``b``, without contrast.
        difference_a: ``[B, 1, h, w]``: which regions of ``a`` make it unlike ``b``. ``None``
            unless asked for.
        difference_b: The same for ``b``.
        delta_a: ``[B]``: the sum of ``map_a`` plus every constant, minus the score it explains
            (with its contrast), as in :class:`~fam_plugins.LayerFam`. ``None`` unless asked for.
        delta_b: The same for ``map_b``.
        joint: ``[B, Ra + 1, Rb + 1]``: the score by regions of ``a`` times regions of ``b``, both
            row by row. The last row and column hold the constants (biases of a head), zero where
            there are none. ``None`` unless asked for.
        source: The images, their names and how they were normalised, for :meth:`plot`.
    """

    map_a: Tensor
    map_b: Tensor
    score: Tensor
    difference_a: Tensor | None = None
    difference_b: Tensor | None = None
    delta_a: Tensor | None = None
    delta_b: Tensor | None = None
    joint: Tensor | None = None
    source: Source = field(kw_only=True, repr=False, compare=False)

    def plot(self, index: int | None = None, **options: Any) -> Figure:
        """Show both images of a pair, and what in each of them makes it like the other.

        Args:
            index: Which pair, where there are several.
            options: Of :func:`~fam_plugins.plots.plot_pair`, such as ``titles=``, or ``mean=`` and
                ``std=`` of tensors that were normalised without a ``transform=``.

        Returns:
            The figure, which shows itself at the end of a notebook's cell; or
            ``.savefig("pair.png")``.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If there are several pairs and no index, and as for the function.
        """
        from fam_plugins.plots import plot_pair

        i = self._row(index)
        options = {"rule": self.source.rule} | self._shown(i) | options
        maps = self.map_a[i], self.map_b[i]
        figure = plot_pair(self.source.a[i], self.source.b[i], *maps, **options)
        figure.suptitle(f"{self.source.value} {float(self.score[i]):.3f}", fontsize=11)
        return figure

    def plot_matches(self, index: int | None = None, **options: Any) -> Figure:
        """Join the pairs of regions that raise the score most; needs ``joint=True``.

        Args:
            index: Which pair, where there are several.
            options: Of :func:`~fam_plugins.plots.plot_matches`, such as ``top=``.

        Returns:
            The figure.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: Without ``joint``, if there are several pairs and no index, and as for the
                function.
        """
        from fam_plugins.plots import plot_matches

        if self.joint is None:
            raise ValueError("matches are read off the joint matrix: explain_pair(..., joint=True)")
        i = self._row(index)
        grids = {"grid_a": self.map_a.shape[2:], "grid_b": self.map_b.shape[2:]}
        options = grids | self._shown(i) | options
        return plot_matches(self.source.a[i], self.source.b[i], self.joint[i], **options)

    def same(self, threshold: float) -> Tensor:
        """Whether the images of each pair are taken to show the same, ``[B]``: score >= threshold.

        :func:`~fam_plugins.calibrate_threshold` finds a threshold from pairs that are known.
        """
        return self.score >= threshold

    def margin(self, threshold: float) -> PairExplanation:
        """The same for the margin, score minus threshold: its maps sum to it, in either image.

        What belongs to no region (the threshold, constants, a contrast) is shared out evenly, so
        that positive regions speak for "the same" and negative ones against it.

        Args:
            threshold: In the unit of the score.

        Returns:
            The margins as ``score``, and their maps; :meth:`plot` draws them.

        Raises:
            ValueError: If the maps are no shares of the score, as those of ``"fam"``.
        """
        rule = self.source.rule
        if not (rule.adds_up or rule.centred):
            raise ValueError(
                f'maps of rule "{rule.name}" are no shares of the score, so none of its margin: '
                'use rule="additive"'
            )
        margins = self.score - threshold

        def shifted(maps: Tensor) -> Tensor:
            missing = margins - maps.sum(dim=(1, 2, 3))
            return maps + missing[:, None, None, None] / maps[0].numel()

        shares = replace(rule, unit="share of the margin", adds_up=True)
        source = replace(self.source, rule=shares, value="margin")
        return PairExplanation(shifted(self.map_a), shifted(self.map_b), margins, source=source)

    def _row(self, index: int | None) -> int:
        if index is None and len(self.score) > 1:
            raise ValueError(f"there are {len(self.score)} pairs: say which, plot(0)")
        return index or 0

    def _shown(self, index: int) -> dict[str, Any]:
        """Options of plots: names, and the normalisation to undo."""
        sides = zip(("a", "b"), self.source.names, strict=True)
        titles = tuple(name if names is None else names[index] for name, names in sides)
        return {"titles": titles} | self.source.undo


def explain_pair(
    encoder: nn.Module,
    layer: nn.Module | str | None,
    a: Any,
    b: Any,
    *,
    transform: Any = None,
    similarity: str | Similarity | Callable[..., Tensor] = "cosine",
    rule: str | Rule = "additive",
    contrast: Any = None,
    difference: bool = False,
    embedding: Literal["model", "pooled"] = "model",
    reshape_transform: Transform | str | None = "auto",
    smooth: bool = False,
    tail: str | None = None,
    return_convergence_delta: bool = False,
    joint: bool = False,
) -> PairExplanation:
    """Explain the similarity of two images in both of them, from one forward pass of each.

    The map of either image holds the other's embedding fixed, so that it shows what *this* image
    brings to the match. Under ``additive`` each map sums to the score, a constant term (biases of
    the head) aside, exactly so behind pooling or a linear head. Sources: FAM (arXiv 2307.05017)
    for the shares of a cosine; the Euclidean form and the difference are this package's own.

    The difference map of ``a`` explains its similarity to itself minus its similarity to ``b``:
    large where a region speaks for ``a`` and not for ``b``. Under cosine it sums to 1 - cosine.

    Args:
        encoder: As for :class:`~fam_plugins.SimilarityModel`, run in eval mode; its training mode
            is then restored.
        layer: The layer whose output ``[B, C, h, w]`` is explained, or its name; ``"patches"``, or
            ``None`` to have it found, as in :class:`~fam_plugins.LayerFam`.
        a: Images ``[B, C, H, W]``; with a ``transform``, one or several in any form that
            :func:`~fam_plugins.load_images` takes, such as a path.
        b: As many images, of any size that the encoder takes.
        transform: What the encoder was trained with, such as ``weights.transforms()`` or an image
            processor of transformers: makes its input of files and pictures.
        similarity: ``"cosine"`` (score in -1 to 1), ``"dot"``, ``"sqeuclidean"`` (minus the
            squared distance), ``"euclidean"`` (minus the distance), or anything else that
            :class:`~fam_plugins.SimilarityModel` takes.
        rule: ``"additive"``, ``"centred"``, ``"fam"``, ``"gradcam"`` or a
            :class:`~fam_plugins.Rule`.
        contrast: Embeddings ``[M, D]``, images, a list of files or PIL images, or
            :func:`~fam_plugins.gallery_mean`: the mean similarity to them is subtracted from the
            score of each image. Images are a further forward pass. Pass
            ``gallery_mean(encoder, loader)``: without a contrast, maps on pooled ReLU features are
            near chance (a warning says so once per process).
        difference: Also explain what separates the two.
        embedding: ``"model"``: what the encoder returns. ``"pooled"``: the mean of the layer's map
            over its regions, whatever head follows: what contrastive models are evaluated on.
        reshape_transform: Rearranges what the layer gives into ``[B, C, h, w]``, as in
            :class:`~fam_plugins.LayerFam`.
        smooth: Average each region with its neighbours, as in :class:`~fam_plugins.LayerFam`.
        tail: What is held constant behind the layer, as in :class:`~fam_plugins.LayerFam`.
        return_convergence_delta: Also return how far each map is from adding up, at the price of
            a second forward pass of each image with ``tail="true"``. For rules that add up.
        joint: Also split the plain similarity, whatever rule, contrast or smoothing say, over pairs
            of regions: rows and columns sum to the additive maps, everything to the score. Exact
            behind pooling or any linear tail, and refused elsewhere. One matrix product for the
            mean of the layer's map, otherwise a step through the tail per dimension and a forward
            pass of one image that proves it linear. This package's own.

    Returns:
        The maps and scores, in the dtype of the encoder.

    Raises:
        AssertionError: If the layer does not run.
        RuntimeError: If it runs twice, or the embedding does not depend on it.
        TypeError: If the encoder, the layer or the images are not what they should be.
        ValueError: On an unknown rule, similarity, layer or ``embedding``; batches that are empty
            or differ in length; embeddings that cannot be compared; a delta asked of a rule that
            does not add up; ``joint`` of a tail or a similarity that is not linear.

    Example:
        >>> import torch
        >>> encoder = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> pair = explain_pair(encoder, "0", torch.rand(1, 3, 4, 4), torch.rand(1, 3, 6, 5))
        >>> pair.map_a.shape, pair.map_b.shape
        (torch.Size([1, 1, 4, 4]), torch.Size([1, 1, 6, 5]))
        >>> bool((pair.map_a.sum() - pair.score).abs() < 1e-6)
        True
    """
    chosen, how = find_rule(rule), as_similarity(similarity)
    if embedding not in ("model", "pooled"):
        raise ValueError(f'embedding must be "model" or "pooled", not {embedding!r}')
    if return_convergence_delta and not chosen.adds_up:
        raise ValueError(
            f'rule "{chosen.name}" does not add up to the score, so it has no convergence delta: '
            'use rule="additive"'
        )
    if joint and how.linear is None:
        raise ValueError(
            f"joint= splits the linear form of a similarity, and {how.name!r} has none: use "
            '"cosine", "dot", "sqeuclidean" or "euclidean"'
        )
    with comparison(
        encoder, layer, a, b, how, chosen,
        contrast=contrast, transform=transform, reshape_transform=reshape_transform, tail=tail,
        smooth=smooth, pooled=embedding == "pooled",
    ) as both:  # fmt: skip
        one, two = both.a, both.b
        maps, differences, deltas, shares = [], [], [], []
        for this, other in ((one, two), (two, one)):
            alike = both.alike(other.point)
            maps.append(this.explain(alike))
            shares.append(this.explained)
            if return_convergence_delta:
                deltas.append(this.delta(alike, maps[-1]))
            if difference:
                differences.append(this.explain(apart(how, this.point, other.point)))
        pairs = None
        if joint:
            alike_a, alike_b = pairwise(how, two.point), pairwise(how, one.point)
            pairs = joint_shares(one.tail(), two.tail(), alike_a, alike_b)
    both.warn(*shares)
    difference_a, difference_b = differences or (None, None)
    delta_a, delta_b = deltas or (None, None)
    return PairExplanation(
        maps[0], maps[1], both.score, difference_a, difference_b, delta_a, delta_b, pairs,
        source=both.source,
    )  # fmt: skip
