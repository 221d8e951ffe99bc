"""Two images and why they are alike: a map for each, and what separates them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fam_plugins.core import references
from fam_plugins.core.eval_mode import eval_mode
from fam_plugins.core.layer_pass import LayerPass, find_layer
from fam_plugins.core.maps import RulePass
from fam_plugins.core.rules import Rule, find_rule
from fam_plugins.core.similarity import Similarity, as_similarity, check_embeddings, score
from fam_plugins.core.transforms import (
    Transform,
    check_transform,
    lay_out,
    refuse_unreached,
    transform_for,
)

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
        delta_a: ``[B]``, under the rule ``additive``: how far ``map_a`` is from summing to the
            score (minus the mean score of the contrast, if any; for Euclidean similarity, to
            ``2 a.b``, its part linear in ``a``). Zero to rounding behind pooling or a linear head;
            otherwise the share of a bias and the first-order error. ``None`` under other rules.
        delta_b: The same for ``map_b``.
    """

    map_a: Tensor
    map_b: Tensor
    score: Tensor
    difference_a: Tensor | None = None
    difference_b: Tensor | None = None
    delta_a: Tensor | None = None
    delta_b: Tensor | None = None


def explain_pair(
    encoder: nn.Module,
    layer: nn.Module | str,
    a: Tensor,
    b: Tensor,
    *,
    similarity: str | Similarity | Callable[..., Tensor] = "cosine",
    rule: str = "additive",
    contrast: Tensor | None = None,
    difference: bool = False,
    embed: Literal["model", "pooled"] = "model",
    activation_transform: Transform | str | None = None,
) -> PairExplanation:
    """Explain the similarity of two images in both of them, from one forward pass of each.

    The map of either image holds the other's embedding fixed, so that it says what *this* image
    brings to the match. Under ``additive`` each map sums to the score, exactly so behind pooling
    or a linear head; the gap behind anything else is returned. Sources: FAM (arXiv 2307.05017) for
    the shares of a cosine; the Euclidean form and the difference are this package's own.

    The difference map of ``a`` explains its similarity to itself minus its similarity to ``b``:
    large where a region speaks for ``a`` and not for ``b``. Under cosine it sums to 1 - cosine.

    Args:
        encoder: Images ``[B, ...]`` -> embeddings ``[B, D]``, run in its current mode.
        layer: The layer whose output ``[B, C, h, w]`` is explained, or its name.
        a: Images ``[B, C, H, W]``.
        b: As many images, of any size that the encoder takes.
        similarity: ``"cosine"`` (score in -1 to 1), ``"dot"``, ``"euclidean"`` (negative squared
            distance), or anything else that :class:`~fam_plugins.SimilarityModel` takes.
        rule: ``"additive"``, ``"centred"``, ``"fam"`` or ``"gradcam"``.
        contrast: Embeddings ``[M, D]`` or images, such as a gallery mean: the mean similarity to
            them is subtracted from the score of each image. Images are a further forward pass.
        difference: Also explain what separates the two.
        embed: ``"model"``: the embedding is what the encoder returns. ``"pooled"``: it is the mean
            of the layer's map over its regions, whatever head follows: what contrastive models
            are evaluated on.
        activation_transform: Rearranges what the layer gives into ``[B, C, h, w]``, for tokens and
            channels-last layers; ``"auto"`` infers it, as in :class:`~fam_plugins.LayerFam`.

    Returns:
        The maps and scores, in the dtype of the encoder.

    Raises:
        AssertionError: If the layer does not run.
        RuntimeError: If it runs twice, or the embedding does not depend on it.
        TypeError: If the encoder, the layer or the images are not what they should be.
        ValueError: On an unknown rule, similarity, layer or ``embed``; batches that are empty or
            differ in length; embeddings that cannot be compared.

    Example:
        >>> encoder = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> pair = explain_pair(encoder, "0", torch.rand(1, 3, 4, 4), torch.rand(1, 3, 6, 5))
        >>> pair.map_a.shape, pair.map_b.shape
        (torch.Size([1, 1, 4, 4]), torch.Size([1, 1, 6, 5]))
        >>> bool((pair.map_a.sum() - pair.score).abs() < 1e-6)
        True
    """
    chosen = find_rule(rule)
    how = as_similarity(similarity)
    if embed not in ("model", "pooled"):
        raise ValueError(f'embed must be "model" or "pooled", not {embed!r}')
    check_transform(activation_transform, "activation_transform")
    _check_batches(a, b)
    module, name = find_layer(encoder, layer)
    against = None
    if contrast is not None:
        against = _embed_contrast(
            encoder, module, name, contrast, embed == "pooled", activation_transform
        )
    one, two = (
        _Side(encoder, module, name, images, chosen, activation_transform, pooled=embed == "pooled")
        for images in (a, b)
    )
    check_embeddings(one.embedding.detach(), width=two.point.shape[1], what="embedding of a")
    with torch.no_grad():
        value = _pairwise(how, two.point)(one.point).clone()
    (map_a, delta_a), (map_b, delta_b) = (
        this.explain(_pairwise(how, other.point, against))
        for this, other in ((one, two), (two, one))
    )
    apart: list[Tensor] = []
    if difference:
        apart = [
            this.explain(_apart(how, this.point, other.point))[0]
            for this, other in ((one, two), (two, one))
        ]
    return PairExplanation(
        map_a=map_a,
        map_b=map_b,
        score=value,
        difference_a=apart[0] if difference else None,
        difference_b=apart[1] if difference else None,
        delta_a=delta_a,
        delta_b=delta_b,
    )


class _Side:
    """One image of each pair, run through the encoder once."""

    def __init__(
        self,
        encoder: nn.Module,
        layer: nn.Module,
        name: str,
        images: Tensor,
        rule: Rule,
        transform: Transform | str | None,
        *,
        pooled: bool,
    ) -> None:
        self._rule = rule
        self._pass = RulePass([layer], [name], rule)
        self.embedding = self._pass.run(lambda: _run(encoder, images, pooled))
        given = self._pass.activations[0]
        if len(given) != 1 or given[0].dim() < 2 or len(given[0]) != len(images):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in given)
            raise ValueError(
                f"layer {name!r} gives {shapes} for {len(images)} images: choose a layer whose "
                "output is one map [B, C, h, w]"
            )
        self._given, self._name = given[0], name
        self._transform = _resolve(transform, encoder, layer, name, given[0], images)
        self._leaf: Tensor | None = None
        if pooled:
            with torch.inference_mode(False), torch.enable_grad():
                self._leaf = self._given.clone().requires_grad_()
                self.embedding = _pool(self._as_map(self._leaf))
        self.point = self.embedding.detach()

    def explain(self, of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
        """The map of a score ``[B]`` of the embedding, and how far it is from adding up."""
        if self._leaf is None:
            ((gradient,),) = self._pass.gradients(lambda: of(self.embedding), retain_graph=True)
        else:
            gradient = self._differentiate(of, self.embedding, self._leaf)
        shares = self._as_map(gradient)
        if self._transform is not None:
            refuse_unreached(gradient, shares, self._name)
        found = self._rule.map(self._as_map(self._given), shares).contiguous()
        if not self._rule.adds_up:
            return found, None
        with torch.inference_mode(False):
            point = self.point.clone().requires_grad_()
            linear = (self._differentiate(of, point, point) * self.point).sum(dim=1)
        return found, found.flatten(1).sum(dim=1) - linear

    def _as_map(self, given: Tensor) -> Tensor:
        return lay_out(given, self._transform, len(given), least=3)

    def _differentiate(
        self, of: Callable[[Tensor], Tensor], embedding: Tensor, at: Tensor
    ) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad(), self._pass.frozen():
            (gradient,) = torch.autograd.grad(of(embedding).sum(), at, retain_graph=True)
        return gradient.detach()


def _run(encoder: nn.Module, images: Tensor, pooled: bool) -> Tensor:
    # The head may return anything if only the layer in front of it is looked at.
    return encoder(images) if pooled else references.embed(encoder, images)


def _pool(activation: Tensor) -> Tensor:
    wide = activation.to(torch.promote_types(activation.dtype, torch.float32))
    return wide.reshape(*wide.shape[:2], -1).mean(dim=2).to(activation.dtype)


def _pairwise(
    how: Similarity, others: Tensor, contrast: Tensor | None = None
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


def _embed_contrast(
    encoder: nn.Module,
    layer: nn.Module,
    name: str,
    contrast: Tensor,
    pooled: bool,
    transform: Transform | str | None,
) -> Tensor:
    if not pooled or (isinstance(contrast, Tensor) and contrast.dim() < 3):
        return references.embed_once(encoder, contrast, "contrast", 32)
    one = LayerPass([layer], [name], differentiate=False)
    with eval_mode(encoder):
        one.run(lambda: encoder(contrast))
    given = one.activations[0][0]
    found = _resolve(transform, encoder, layer, name, given, contrast)
    return _pool(lay_out(given, found, len(given), least=3))


def _resolve(
    transform: Transform | str | None,
    encoder: nn.Module,
    layer: nn.Module,
    name: str,
    given: Tensor,
    images: Tensor,
) -> Transform | None:
    """The transform itself, where ``"auto"`` leaves it to the shapes of the pass."""
    if isinstance(transform, str):
        return transform_for(encoder, layer, name, given.shape, images.shape)
    return transform


def _check_batches(a: Tensor, b: Tensor) -> None:
    for name, images in (("a", a), ("b", b)):
        if not isinstance(images, Tensor):
            raise TypeError(f"{name} must be a tensor of images, not {type(images).__name__}")
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
