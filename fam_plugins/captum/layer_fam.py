"""FAM as a Captum layer attribution: swap ``LayerGradCam`` for ``LayerFam``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn

from fam_plugins.captum.targets import TensorOrTensors, batch_size, run_forward, select_scores
from fam_plugins.core.choose_layer import choose_layer
from fam_plugins.core.decompose import Decomposition, region_sum, warn_of_coverage
from fam_plugins.core.layer_pass import LayerTensors
from fam_plugins.core.many import as_indices, map_references
from fam_plugins.core.maps import MapPass, check_tail
from fam_plugins.core.rules import Rule, choose_rule, find_rule
from fam_plugins.core.similarity_model import ModelScores
from fam_plugins.core.transforms import Transform, check_transform

__all__ = ["LayerFam"]


class LayerFam(LayerAttribution):
    """Feature Activation Map of a layer: which regions make an image score as it does.

    A drop-in for :class:`captum.attr.LayerGradCam`: same arguments, same shapes, same targets.
    With a :class:`~fam_plugins.SimilarityModel`, ``target=j`` explains the similarity to reference
    ``j``. With any other model it explains that model's own output at ``target``.

    It takes one forward pass. Only what follows the layer is differentiated, nothing before the
    layer is kept, and no parameter receives a gradient. Sources: FAM (arXiv 2307.05017) for the
    rule ``"fam"``, Grad-CAM (arXiv 1610.02391) for ``"gradcam"``; the Euclidean form is ours.

    Args:
        forward_func: The model, or any function of it, as for every Captum method.
        layer: The layer whose output is the feature map ``[B, C, h, w]`` (2 to 5 dimensions
            work), or its name; ``"patches"`` for the patch embedding of a transformer. Left out,
            it is found at the first images, by one more forward pass: the last map in front of
            pooling or attention pooling, for a class token the input of a middle block.
        device_ids: Accepted as in Captum; maps are computed on one device. One process per GPU.
        rule: ``"centred"`` (``additive`` minus its mean, by a ``tail`` of its own; the best rule
            for finding what matches), ``"additive"`` (signed; sums to the score), ``"gradcam"`` (as
            ``LayerGradCam``), ``"fam"`` (published; channel weights in [0, 1], no ReLU), or a
            :class:`~fam_plugins.Rule`. Left out, ``"fam"`` with a warning, because it hardly
            depends on the target.
        reshape_transform: Rearranges what the layer gives into ``[B, C, ...]``. ``"auto"`` reads
            from the shapes of the pass whether that is needed
            (:func:`~fam_plugins.infer_transform`); ``None`` takes the layer as it is;
            :class:`~fam_plugins.tokens_to_map` is for tokens ``[B, T, C]``,
            :func:`~fam_plugins.channels_last_to_map` for Swin's ``[B, h, w, C]``. A
            function of your own must only move, select or reshape values, because the gradient
            goes through it too; it gets a tuple if the layer gives several tensors.
        smooth: Average each region with its neighbours, weights ``[1, 2, 1]ᵀ [1, 2, 1] / 16``:
            steadier maps whose sums stay. Recommended with ``rule="centred"`` and a contrast set.
        tail: What is held constant behind the layer, so that shares add up there too: ``"frozen"``
            (norms, attention weights and gates, :func:`~fam_plugins.frozen_tail`; the default of
            ``additive``, because only this adds up), ``"norms"`` (the default of ``centred``,
            because on transformers it finds the match best in the package's benchmark), or
            ``"true"`` (no more than a ``frozen_tail()`` around the call; the default of the
            others). Behind pooling and linear layers all three are the same.

    Raises:
        TypeError: If ``rule`` or ``reshape_transform`` is of no such kind.
        ValueError: If there is no such rule, or ``reshape_transform`` is another string than
            ``"auto"``.

    Example:
        >>> import torch
        >>> from fam_plugins import SimilarityModel
        >>> encoder = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> explainer = LayerFam(SimilarityModel(encoder, torch.eye(3)), "0", rule="additive")
        >>> maps, delta = explainer.attribute(
        ...     torch.rand(2, 3, 4, 4), target=1, return_convergence_delta=True
        ... )
        >>> maps.shape, delta.shape
        (torch.Size([2, 1, 4, 4]), torch.Size([2]))
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | str | None = None,
        device_ids: list[int] | None = None,
        *,
        rule: str | Rule | None = None,
        reshape_transform: Transform | str | None = "auto",
        smooth: bool = False,
        tail: str | None = None,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        self.layer: Any = layer
        self.rule: str | Rule = choose_rule(rule)
        if not isinstance(reshape_transform, str) or reshape_transform != "auto":
            check_transform(reshape_transform)
        self.reshape_transform = reshape_transform
        self.smooth = smooth
        self.tail = check_tail(tail)

    @log_usage()
    def attribute(
        self,
        inputs: TensorOrTensors,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: dict[str, Any] | None = None,
        *,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Explain each image's score at ``target``.

        Args:
            inputs: Images ``[B, ...]``, or a tuple of tensors for models that take several.
            target: Which output to explain: an int for all images, or a list or tensor of one
                index per image; tuples for outputs of more dimensions; labels, one or one per
                image, where the model has them. ``None`` if it returns one number per image.
            additional_forward_args: Further arguments of the model.
            attribute_to_layer_input: Explain the input of the layer instead of its output.
            relu_attributions: Set negative values to zero.
            attr_dim_summation: Sum over the channels; ``False`` keeps the full layer shape.
            grad_kwargs: Passed on to :func:`torch.autograd.grad`.
            return_convergence_delta: With a rule that adds up, such as ``"additive"``: also return
                how far each map is from adding up; with ``tail="true"``, at the price of a second
                forward pass.

        Returns:
            Maps ``[B, 1, h, w]`` (``[B, 1]`` for a ``[B, F]`` layer), signed and not normalised,
            on the layer's device and in its dtype; a tuple if the layer gives several tensors.
            With ``return_convergence_delta`` a pair of that and ``[B]``: the map's sum plus every
            constant (:meth:`decompose`), minus the score; zero to rounding behind a frozen tail,
            with ``tail="true"`` the size of the first-order error.

        Raises:
            AssertionError: On a bad target, or a layer that does not run.
            RuntimeError: If the layer runs twice, or the score does not depend on it.
            TypeError: If the layer or the model gives something other than tensors.
            ValueError: On an empty batch, a map that holds NaN, an unknown layer name, a layer that
                is left out and not found, a layer or transform that gives another shape than
                ``[B, C, ...]`` or drops all that bears the score (the class token of the last
                layer), a shape that leaves ``"auto"`` in doubt, or a delta asked of a rule that
                does not add up.

        Warns:
            UserWarning: If rule ``"fam"`` meets a contrast set, or the regions carry less than
                half of a score that a map promises to share out (under a centred rule less than
                a tenth, the rest being in tokens); once for each layer found for a class token.
        """
        rule = find_rule(self.rule)
        if return_convergence_delta and not rule.adds_up:
            raise ValueError(
                f'rule "{rule.name}" does not add up to the score, so it has no convergence '
                'delta: use LayerFam(..., rule="additive")'
            )
        pick = partial(select_scores, target=target)
        scores = ModelScores(self.forward_func, pick, batch_size(inputs))
        one, forward = self._start(
            scores, inputs, additional_forward_args, attribute_to_layer_input
        )
        one.again = return_convergence_delta
        options = {"sum_channels": attr_dim_summation, **(grad_kwargs or {})}
        with one.frozen():
            (maps,) = one.explain(forward, inputs, scores.select, **options)
            warn_of_coverage(one.rule, one.constants, (one.sums[0][:, 0], one.scores))
        result = _shown(maps, relu_attributions)
        if not return_convergence_delta:
            return result
        return result, Decomposition.of(maps, _parts(one, maps, scores, forward), one.scores).gap

    @log_usage()
    def decompose(
        self,
        inputs: TensorOrTensors,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Decomposition:
        """Split each image's score into its regions and every constant, by name.

        Arguments and errors are those of :meth:`attribute`. Under a rule that does not add up,
        ``"additive"`` takes its place. A second forward pass with ``tail="true"`` only.

        Returns:
            A :class:`~fam_plugins.core.decompose.Decomposition`: maps, parts, score, gap, coverage.

        Example:
            >>> import torch
            >>> from fam_plugins import SimilarityModel
            >>> encoder = nn.Sequential(
            ...     nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)
            ... )
            >>> explainer = LayerFam(SimilarityModel(encoder, torch.eye(3)), "0", rule="centred")
            >>> found = explainer.decompose(torch.rand(2, 3, 4, 4), target=1)
            >>> list(found.parts), bool((found.gap.abs() < 1e-6).all())
            (['regions', 'bias'], True)
        """
        rule = find_rule(self.rule)
        rule = rule if rule.adds_up else find_rule("additive")
        pick = partial(select_scores, target=target)
        scores = ModelScores(self.forward_func, pick, batch_size(inputs))
        one, forward = self._start(
            scores, inputs, additional_forward_args, attribute_to_layer_input, rule
        )
        (maps,) = one.explain(forward, inputs, scores.select)
        parts = _parts(one, maps, scores, forward)
        return Decomposition.of(_shown(maps, False), parts, one.scores)

    @log_usage()
    def attribute_references(
        self,
        inputs: TensorOrTensors,
        indices: Any = None,
        *,
        additional_forward_args: Any = None,
        relu_attributions: bool = False,
        references_per_chunk: int = 64,
    ) -> Any:
        """Explain each image's score at many references from one forward pass.

        Equal to calling :meth:`attribute` once for every column of ``indices``. Behind pooling a
        further reference costs one step through what follows it, such as a projection; behind any
        other tail, one through the tail. On a GPU indices and the proof of pooling are read once.

        Args:
            inputs: As for :meth:`attribute`.
            indices: Which references to explain: ``[B, k]``, a row per image, as a tensor, an
                array (the ``I`` of faiss and of scikit-learn's ``kneighbors``) or a nested list;
                all of them by default.
            additional_forward_args: As for :meth:`attribute`.
            relu_attributions: Set negative values to zero.
            references_per_chunk: How many references per image are worked on at a time: bounds
                the memory, changes nothing else.

        Returns:
            Maps ``[B, k, 1, h, w]`` in the order of ``indices`` (``[B, N, 1, h, w]`` for all ``N``
            references), signed and not normalised, on the layer's device and in its dtype; a
            tuple if the layer gives several tensors.

        Raises:
            AssertionError: If the layer does not run.
            IndexError: If there is no reference of an index.
            RuntimeError: If the layer runs twice, or the score does not depend on it.
            TypeError: If indices are no integers.
            ValueError: If indices are not ``[B, k]``, the model does not return ``[B, N]``, and
                as for :meth:`attribute`.

        Warns:
            UserWarning: As for :meth:`attribute`.
        """
        scores = ModelScores(self.forward_func)
        chosen = as_indices(indices, scores, batch_size(inputs), references_per_chunk)
        one, forward = self._start(scores, inputs, additional_forward_args)
        with one.frozen():
            (maps,) = map_references(
                one, scores, forward, inputs, indices=chosen, per_chunk=references_per_chunk
            )
        return _shown(maps, relu_attributions)

    def has_convergence_delta(self) -> bool:
        """Whether maps add up to the score: under the rule ``"additive"``."""
        return find_rule(self.rule).adds_up

    def compute_convergence_delta(
        self,
        attributions: TensorOrTensors,
        inputs: TensorOrTensors,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Tensor:
        """How far maps of :meth:`attribute` are from adding up; two forward passes.

        Args:
            attributions: Maps under the rule ``"additive"``.
            inputs: The images they explain, and so on as for :meth:`attribute`.
            target: As for :meth:`attribute`.
            additional_forward_args: As for :meth:`attribute`.
            attribute_to_layer_input: As for :meth:`attribute`.

        Returns:
            ``[B]``, in the units of the score.

        Raises:
            ValueError: If the rule does not add up; and as for :meth:`attribute`.
        """
        parts = attributions if isinstance(attributions, tuple) else (attributions,)
        fit = all(isinstance(p, Tensor) and len(p) == batch_size(inputs) for p in parts)
        if self.has_convergence_delta() and not fit:
            raise ValueError("attributions must be one map per image, as attribute returns them")
        maps, delta = self.attribute(
            inputs,
            target,
            additional_forward_args,
            attribute_to_layer_input,
            return_convergence_delta=True,
        )
        difference: Tensor = delta + region_sum(attributions) - region_sum(maps)
        return difference

    def attribute_future(self, *_args: Any, **_kwargs: Any) -> None:
        """Not offered.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("LayerFam has no asynchronous form: call attribute")

    def _start(
        self,
        scores: ModelScores,
        inputs: Any,
        further: Any,
        at_input: bool = False,
        rule: Any = None,
    ) -> tuple[MapPass, Callable[[], Any]]:
        """A pass of the layer, which is found first if need be, and the call that it runs."""
        images = inputs if further is None else None  # further arguments may be per image
        self.layer = choose_layer(self.forward_func, self.layer, scores.forward, images)
        one = MapPass(
            self.forward_func,
            [self.layer],
            rule or self.rule,
            self.reshape_transform,
            at_input=at_input,
            smooth=self.smooth,
            tail=self.tail,
        )
        return one, partial(run_forward, scores.forward, inputs, None, further)


def _parts(
    one: MapPass, maps: LayerTensors, scores: ModelScores, forward: Callable[[], Any]
) -> dict[str, Tensor]:
    """The scores of a pass by name: regions, and every constant."""
    offset = torch.zeros_like(one.scores)
    if scores.model is not None:
        nothing = one.scores.new_zeros(len(one.scores), scores.model.references.shape[1])
        with one.replayed():
            offset = scores.select(nothing)
    parts = {"regions": region_sum(maps)}
    if one.held is None:
        parts["bias"] = one.constant(lambda: scores.select(forward())) - offset
    else:
        parts |= one.constants
    if (offset.abs() > 1e-6 * one.scores.abs()).any():  # more than rounding
        parts["offset"] = offset
    return parts


def _shown(maps: LayerTensors, relu: bool) -> TensorOrTensors:
    """One tensor, or as many as the layer gives; positive parts if asked for."""
    shown = tuple(F.relu(part) for part in maps) if relu else maps
    return shown if len(shown) > 1 else shown[0]
