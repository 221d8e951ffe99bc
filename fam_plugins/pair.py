"""Two images and why they are alike: a map for each, and what separates them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fam_plugins.core.choose_layer import choose_layer
from fam_plugins.core.contrast import Contrast, GalleryMean, reduced
from fam_plugins.core.decompose import region_sum, warn_of_coverage
from fam_plugins.core.eval_mode import eval_mode
from fam_plugins.core.joint import LinearTail, joint_shares
from fam_plugins.core.maps import MapPass, check_tail
from fam_plugins.core.messages import warn_once
from fam_plugins.core.references import embed_contrast
from fam_plugins.core.rules import RULES, Rule, find_rule
from fam_plugins.core.scores import check_embeddings, check_floats, embed, score
from fam_plugins.core.similarity import Similarity, as_similarity
from fam_plugins.core.transforms import Transform, check_transform

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
    """

    map_a: Tensor
    map_b: Tensor
    score: Tensor
    difference_a: Tensor | None = None
    difference_b: Tensor | None = None
    delta_a: Tensor | None = None
    delta_b: Tensor | None = None
    joint: Tensor | None = None


def explain_pair(
    encoder: nn.Module,
    layer: nn.Module | str | None,
    a: Tensor,
    b: Tensor,
    *,
    similarity: str | Similarity | Callable[..., Tensor] = "cosine",
    rule: str | Rule = "additive",
    contrast: Tensor | GalleryMean | None = None,
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
        encoder: Images ``[B, ...]`` -> embeddings ``[B, D]``, run in eval mode; its training mode
            is then restored.
        layer: The layer whose output ``[B, C, h, w]`` is explained, or its name; ``"patches"``, or
            ``None`` to have it found, as in :class:`~fam_plugins.LayerFam`.
        a: Images ``[B, C, H, W]``.
        b: As many images, of any size that the encoder takes.
        similarity: ``"cosine"`` (score in -1 to 1), ``"dot"``, ``"sqeuclidean"`` (minus the
            squared distance), ``"euclidean"`` (minus the distance), or anything else that
            :class:`~fam_plugins.SimilarityModel` takes.
        rule: ``"additive"``, ``"centred"``, ``"fam"``, ``"gradcam"`` or a
            :class:`~fam_plugins.Rule`.
        contrast: Embeddings ``[M, D]``, images or :func:`~fam_plugins.gallery_mean`: the mean
            similarity to them is subtracted from the score of each image. Images are a further
            forward pass. Pass ``gallery_mean(encoder, loader)``: without a contrast, maps on pooled
            ReLU features are near chance (a warning says so once per process).
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
    check_transform(reshape_transform)
    check_tail(tail)
    _check_batches(a, b)
    if contrast is None and chosen is not RULES["fam"]:  # which a contrast would not help
        warn_once(
            "contrast= is left out: on pooled ReLU features the maps of a pair are then near "
            "chance. Pass contrast=gallery_mean(encoder, loader) of a few hundred of your images."
        )

    layer = choose_layer(encoder, layer, partial(embed, encoder), a)

    def side(images: Tensor) -> _Side:
        one = MapPass(
            encoder, [layer], chosen, reshape_transform, regions=1, smooth=smooth, tail=tail
        )
        return _Side(encoder, one, images, pooled=embedding == "pooled")

    with eval_mode(encoder):
        against = contrast
        if isinstance(contrast, Tensor) and contrast.dim() > 2 and embedding == "pooled":
            against = reduced(how, side(contrast).point)
        elif contrast is not None:
            against = embed_contrast(encoder, contrast, how)
        one, two = side(a), side(b)
        check_embeddings(one.point, width=two.point.shape[1], what="embedding of a")
        if against is not None:
            row = against.row if isinstance(against, GalleryMean) else against
            check_embeddings(row, width=two.point.shape[1], what="contrast")
        with torch.no_grad():
            value = _pairwise(how, two.point)(one.point).clone()
        maps, differences, deltas, shares = [], [], [], []
        for this, other in ((one, two), (two, one)):
            alike = _pairwise(how, other.point, against)
            maps.append(this.explain(alike))
            shares.append(this.explained)
            if return_convergence_delta:
                deltas.append(this.delta(alike, maps[-1]))
            if difference:
                differences.append(this.explain(_apart(how, this.point, other.point)))
        pairs = None
        if joint:
            alike_a, alike_b = _pairwise(how, two.point), _pairwise(how, one.point)
            pairs = joint_shares(one.tail(), two.tail(), alike_a, alike_b)
    warn_of_coverage(chosen, two._one.constants, *shares)
    difference_a, difference_b = differences or (None, None)
    delta_a, delta_b = deltas or (None, None)
    return PairExplanation(
        maps[0], maps[1], value, difference_a, difference_b, delta_a, delta_b, pairs
    )


class _Side:
    """One image of each pair, run through the encoder once."""

    def __init__(self, encoder: nn.Module, one: MapPass, images: Tensor, *, pooled: bool) -> None:
        self._encoder, self._one, self._images, self._pooled = encoder, one, images, pooled
        # The head may return anything if only the layer in front of it is looked at.
        run = (lambda: encoder(images)) if pooled else (lambda: embed(encoder, images))
        output = one.run(run, images)
        self._embedding = one.pooled() if pooled else output
        self.point = self._embedding.detach()

    def explain(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """The map ``[B, 1, ...]`` of a score ``[B]`` of the embedding."""
        ((found,),) = self._one.maps(lambda: of(self._embedding), retain_graph=True)
        self.explained = self._one.sums[0][:, 0], self._one.scores
        return found

    def tail(self) -> LinearTail:
        """What follows the layer, refused unless it is linear."""
        first = None if self._pooled else lambda: embed(self._encoder, self._images[:1])
        return LinearTail(self._one, self._embedding, first)

    def delta(self, of: Callable[[Tensor], Tensor], found: Tensor) -> Tensor:
        """How far the map of the score that was explained last is from adding up, ``[B]``."""
        if self._pooled or self._one.held is not None:
            with self._one.replayed(), torch.no_grad():
                constant = of(torch.zeros_like(self.point))
            constant = sum(self._one.constants.values(), constant)
        else:
            constant = self._one.constant(lambda: of(embed(self._encoder, self._images)))
        return region_sum(found) + constant - self._one.scores


def _pairwise(
    how: Similarity, others: Tensor, contrast: Contrast = None
) -> Callable[[Tensor], Tensor]:
    """The score of each embedding and the other of its own pair."""
    if how.by_reference:
        return lambda embeddings: score(how, embeddings, others, contrast).diagonal()
    # A user's function may couple its references, and pairs have nothing to do with each other.
    return lambda embeddings: torch.cat(
        [
            score(how, mine[None], other[None], contrast)[0]
            for mine, other in zip(embeddings, others, strict=True)
        ]
    )


def _apart(how: Similarity, own: Tensor, others: Tensor) -> Callable[[Tensor], Tensor]:
    """The score of each embedding and itself, held fixed, minus that of its pair."""
    like, unlike = _pairwise(how, own), _pairwise(how, others)
    return lambda embeddings: like(embeddings) - unlike(embeddings)


def _check_batches(a: Tensor, b: Tensor) -> None:
    for name, images in (("a", a), ("b", b)):
        check_floats(images, name)
        if images.dim() < 2 or len(images) == 0:
            raise ValueError(
                f"{name} has shape {tuple(images.shape)}: pass at least one image, [B, C, H, W]; a "
                "single one needs a batch dimension (image[None])"
            )
    if len(a) != len(b):
        raise ValueError(
            f"there are {len(a)} images a and {len(b)} images b: pass one b for each a; for one "
            "image against many, SimilarityModel and LayerFam.attribute_references"
        )
