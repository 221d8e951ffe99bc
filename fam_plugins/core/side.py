"""The two sides of a comparison: images run once, explained for their mutual scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fam_plugins.core.choose_layer import choose_layer
from fam_plugins.core.contrast import Contrast, GalleryMean, reduced
from fam_plugins.core.decompose import region_sum, warn_of_coverage
from fam_plugins.core.encoders import as_encoder
from fam_plugins.core.eval_mode import eval_mode
from fam_plugins.core.images import is_file_or_pil, load_images, names_of, normalisation
from fam_plugins.core.joint import LinearTail
from fam_plugins.core.maps import MapPass, check_tail
from fam_plugins.core.messages import warn_once
from fam_plugins.core.references import at_home, embed_contrast
from fam_plugins.core.rules import RULES, Rule
from fam_plugins.core.scores import check_embeddings, check_floats, embed, score
from fam_plugins.core.similarity import Similarity
from fam_plugins.core.transforms import check_transform

__all__ = ["Comparison", "Source", "apart", "comparison", "pairwise"]


@dataclass(frozen=True)
class Source:
    """What an explanation is of, for its pictures.

    Attributes:
        a: Images ``[B, C, H, W]`` as the encoder took them.
        b: The other side.
        names: File names of both sides, or ``None`` of what was no file.
        undo: Mean and standard deviation of their normalisation by name, if a transform told.
        rule: What made the maps.
        value: What they explain.
    """

    a: Tensor
    b: Tensor
    names: tuple[list[str] | None, list[str] | None]
    undo: dict[str, Any]
    rule: Rule
    value: str = "score"


@dataclass(frozen=True)
class Comparison:
    """Both sides, run through the encoder.

    Attributes:
        a: One side.
        b: The other.
        score: ``[B]``, without contrast: of each ``a`` with its ``b``, or of one with all.
        alike: Embeddings ``[B, D]`` of one side -> the score ``[B]``, contrast subtracted, of the
            other side's.
        source: What was compared.
    """

    a: Side
    b: Side
    score: Tensor
    alike: Callable[[Tensor], Callable[[Tensor], Tensor]]
    source: Source

    def warn(self, *explained: tuple[Tensor, Tensor]) -> None:
        """Warn of maps that carry little of their scores."""
        warn_of_coverage(self.source.rule, self.b.constants, *explained)


@contextmanager
def comparison(
    encoder: nn.Module,
    layer: nn.Module | str | None,
    a: Any,
    b: Any,
    how: Similarity,
    rule: Rule,
    *,
    contrast: Any,
    transform: Any,
    reshape_transform: Any,
    tail: str | None,
    smooth: bool,
    pooled: bool = False,
    one_to_many: bool = False,
) -> Iterator[Comparison]:
    """Check everything, load the images, and run both sides once, the encoder in eval mode.

    With ``one_to_many`` a query ``a`` is compared with every hit ``b``.
    """
    encoder = as_encoder(encoder)
    check_transform(reshape_transform)
    check_tail(tail)
    names = names_of(a), names_of(b)
    loaded, what = [], ("query", "hits") if one_to_many else ("a", "b")
    for name, given in zip(what, (a, b), strict=True):
        images = load_images(given, transform, what=name)
        check_floats(images, name)
        if images.dim() < 2 or len(images) == 0:
            raise ValueError(
                f"{name} has shape {tuple(images.shape)}: pass at least one image, [B, C, H, W]"
            )
        loaded.append(images if transform is None else at_home(images, encoder, name))
    a, b = loaded
    if one_to_many and len(a) > 1:
        raise ValueError(f"there are {len(a)} queries: explain_hits takes one, queries[i]")
    if len(a) != len(b) and not one_to_many:
        raise ValueError(
            f"there are {len(a)} images a and {len(b)} images b: pass one b for each a; for one "
            "image and many, explain_hits"
        )
    if isinstance(contrast, (list, tuple)) and contrast and is_file_or_pil(contrast[0]):
        contrast = at_home(load_images(contrast, transform, what="contrast"), encoder, "contrast")
    if contrast is None and rule is not RULES["fam"]:  # which a contrast would not help
        warn_once(
            "contrast= is left out: on pooled ReLU features the maps of a pair are then near "
            "chance. Pass contrast=gallery_mean(encoder, loader) of a few hundred of your images."
        )
    layer = choose_layer(encoder, layer, partial(embed, encoder), a)

    def side(images: Tensor) -> Side:
        options: Any = {"regions": 1, "smooth": smooth, "tail": tail}
        one = MapPass(encoder, [layer], rule, reshape_transform, **options)
        return Side(encoder, one, images, pooled=pooled)

    with eval_mode(encoder):
        against = contrast
        if isinstance(contrast, Tensor) and contrast.dim() > 2 and pooled:
            against = reduced(how, side(contrast).point)
        elif contrast is not None:
            against = embed_contrast(encoder, contrast, how)
        one, two = side(a), side(b)
        check_embeddings(one.point, width=two.point.shape[1], what=f"embedding of {what[0]}")
        if against is not None:
            row = against.row if isinstance(against, GalleryMean) else against
            check_embeddings(row, width=two.point.shape[1], what="contrast")
        with torch.no_grad():
            value = pairwise(how, two.point)(one.point.expand_as(two.point)).clone()
        undo = dict(zip(("mean", "std"), normalisation(transform) or (), strict=False))
        source = Source(a.detach(), b.detach(), names, undo, rule)
        yield Comparison(one, two, value, partial(pairwise, how, contrast=against), source)


class Side:
    """Images run through the encoder once, to be explained as often as need be."""

    def __init__(self, encoder: nn.Module, one: MapPass, images: Tensor, *, pooled: bool) -> None:
        self._encoder, self._one, self._images, self._pooled = encoder, one, images, pooled
        # The head may return anything if only the layer in front of it is looked at.
        run = (lambda: encoder(images)) if pooled else (lambda: embed(encoder, images))
        output = one.run(run, images)
        self._embedding = one.pooled() if pooled else output
        self.point = self._embedding.detach()

    def explain(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """The map ``[B, 1, ...]`` of a score ``[B]`` of the embedding.

        Leaves what was ``explained``: the sums of the map, the scores.
        """
        ((found,),) = self._one.maps(lambda: of(self._embedding), retain_graph=True)
        self.explained = self._one.sums[0][:, 0], self._one.scores
        return found

    @property
    def constants(self) -> dict[str, Tensor]:
        """What no region carried of the score explained last."""
        return self._one.constants

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


def pairwise(
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


def apart(how: Similarity, own: Tensor, others: Tensor) -> Callable[[Tensor], Tensor]:
    """The score of each embedding and itself, held fixed, minus that of its pair."""
    like, unlike = pairwise(how, own), pairwise(how, others)
    return lambda embeddings: like(embeddings) - unlike(embeddings)
