"""From a model and a score to finished maps: the one road that every explainer takes.

A pass is made (``MapPass(model, [layer], rule, transform)``), runs the model (``run``) and turns
scores of what it returned into maps (``maps``); ``explain`` is both steps in one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fam_plugins.core.frozen_tail import check_visible, flat
from fam_plugins.core.layer_pass import LayerPass, LayerTensors, fits_image
from fam_plugins.core.messages import unknown_name, warn_user
from fam_plugins.core.own_norm import hold_own_norm
from fam_plugins.core.rules import RULES, Rule, find_rule
from fam_plugins.core.scores import ACTIVE, Frozen, doubt, frozen_scores, full_precision
from fam_plugins.core.smooth import smoothed
from fam_plugins.core.tail_constants import TailConstants
from fam_plugins.core.transforms import Transform, prefix_of, transform_for

__all__ = ["TAILS", "MapPass", "batch_size", "check_finite", "check_tail", "maps_of"]

T = TypeVar("T")

TAILS: dict[str, dict[str, bool] | None] = {
    "frozen": {},
    "norms": {"attention": False, "gates": False},
    "true": None,
}
"""What is held constant behind a layer, as options of :func:`~fam_plugins.frozen_tail`."""


class MapPass:
    """One forward pass of a model under a rule, and the maps of any score of what it returns.

    ``transform`` rearranges what a layer gives (a tuple where it gives several tensors) into
    ``[B, C, ...]``; ``"auto"`` reads from the shapes of the pass whether that is needed. A map must
    have ``regions`` dimensions of regions or more; with any, there is one map per layer. ``smooth``
    averages every map with its neighbours. ``tail`` says what is held constant behind the layers:
    norms, attention weights and gates (``"frozen"``), ``"norms"``, or nothing (``"true"``); the
    rule's choice if left out.

    After :meth:`run`, ``activations`` holds the maps ``[B, C, ...]`` of each layer, detached; after
    :meth:`maps`, ``scores`` holds what was explained, ``sums`` of each layer what its regions carry
    before any mean is subtracted, ``[B, c]``, and behind a frozen tail ``constants`` what no region
    carries, by name, ``[B]`` each.

    Example:
        >>> net = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
        >>> one, images = MapPass(net, ["0"], "additive"), torch.rand(3, 1, 2, 2)
        >>> output = one.run(lambda: net(images), images)
        >>> ((maps,),) = one.maps(lambda: output[:, 1])
        >>> maps.shape
        torch.Size([3, 1, 2, 2])
    """

    scores: Tensor
    sums: list[Tensor]
    indices: Tensor
    constants: dict[str, Tensor]
    again = True  # whether a second pass with the same draws may be asked for

    def __init__(
        self,
        model: object,
        layers: Sequence[nn.Module | str | None],
        rule: str | Rule,
        transform: Transform | str | None = None,
        *,
        at_input: bool = False,
        regions: int = 0,
        smooth: bool = False,
        tail: str | None = None,
    ) -> None:
        self.rule = rule if isinstance(rule, Rule) else find_rule(rule)
        self.held = TAILS[self.rule.tail if tail is None else tail]
        self._constants: TailConstants | None = None
        self._cut = False
        self.activations: list[LayerTensors] = []
        self._model, self._regions, self._at_input = model, regions, at_input
        self.smooth = smooth
        self._pass = LayerPass(model, layers, at_input=at_input)
        for name in self._pass.names if self.held is not None else ():
            check_visible(model, name)
        self._given: Transform | str | None = transform
        self.transforms: list[Transform | None] = []
        self._noted = Frozen(freeze=self.rule.frozen, doubts=[])

    def run(self, forward: Callable[[], T], images: Any) -> T:
        """Run the model once on images, a tensor or a tuple of tensors that starts with one."""
        batch = batch_size(images)
        inputs = images if isinstance(images, tuple) else (images,)
        if self.again:
            in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
            cuda = torch.cuda.get_rng_state_all() if in_use else []
            self._draws = torch.get_rng_state(), cuda
        output = self._run(forward, batch)
        one = self._pass
        shape = next((tensor.shape for tensor in inputs if tensor.dim() == 4), None)
        for index, tracked in enumerate(one.tracked):
            given = [tensor.detach() for tensor in tracked]
            transform = None if isinstance(self._given, str) else self._given
            if isinstance(self._given, str) and [len(part) for part in given] == [batch]:
                transform = self._told(index, given[0].shape, shape)
            self.transforms.append(transform)
            arranged = self._arranged(index, given)
            self._check(one.names[index], transform, arranged, batch)
            self.activations.append(arranged)
        return output

    def _run(self, forward: Callable[[], T], batch: int) -> T:
        if self.held is None:
            with self.frozen():
                return self._pass.run(forward)
        self._constants = self._pass.behind = TailConstants(batch, **self.held)
        with self.frozen():
            output = self._pass.run(forward)
        if _is_differentiated(output):
            return output
        self.held, self._constants, self._cut = None, None, True
        self._pass = self._new_pass()
        return self._run(forward, batch)

    def _new_pass(self, **options: Any) -> LayerPass:
        return LayerPass(self._model, self._pass.layers, at_input=self._at_input, **options)

    def _told(self, index: int, given: torch.Size, images: torch.Size | None) -> Transform | None:
        """The transform that the shapes of the pass ask for."""
        layer = self._pass.layers[index]
        # Most layers by far are plain [B, C, h, w]; transforms.py is for the others.
        if images is None or (
            len(given) == 4
            and type(layer) is not nn.LayerNorm
            and fits_image(given[2:], images[2:])
        ):
            return None
        return transform_for(self._model, layer, self._pass.names[index], given, images)

    def frozen(self) -> AbstractContextManager[object]:
        """Within the block, scores are noted, and frozen if the rule asks for it."""
        return nullcontext() if ACTIVE.get() is self._noted else frozen_scores(self._noted)

    def explain(
        self, forward: Callable[[], T], images: Any, score: Callable[[T], Tensor], **options: Any
    ) -> list[LayerTensors]:
        """:meth:`run`, then :meth:`maps` of the scores ``[B]`` of what ``forward`` returns."""
        with self.frozen():
            return self.maps(partial(score, self.run(forward, images)), **options)

    def maps(
        self, score: Callable[[], Tensor], *, sum_channels: bool = True, **grad_kwargs: Any
    ) -> list[LayerTensors]:
        """Maps ``[B, 1 or C, ...]`` of each layer, finite and contiguous, of scores ``[B]``.

        ``score`` computes them from the output of :meth:`run`; every image may contribute to its
        own score only.
        """
        with self.frozen():
            with torch.inference_mode(False), torch.enable_grad():
                scores = score()
                gradients = self.gradients(scores, torch.ones_like(scores)[None], **grad_kwargs)
            self.scores = scores.detach()
            self.warn()
            maps = self.finish(gradients, sum_channels=sum_channels)
        return [tuple(part[:, 0] for part in parts) for parts in maps]

    def gradients(self, end: Tensor, cotangents: Tensor, **grad_kwargs: Any) -> list[list[Tensor]]:
        """Cotangents ``[c, *end.shape]`` -> for each layer's maps gradients ``[B, c, C, R]``."""
        leaves = {} if self._constants is None else self._constants.leaves
        *found, shares = self._pass.gradients(end, cotangents, [*leaves.values()], **grad_kwargs)
        self.constants = {name: share[0] for name, share in zip(leaves, shares, strict=True)}
        return [self._columns(index, tensors) for index, tensors in enumerate(found)]

    def finish(
        self, gradients: list[list[Tensor]], *, sum_channels: bool = True
    ) -> list[LayerTensors]:
        """Gradients ``[B, c, C, R or 1]`` -> for each layer its maps ``[B, c, 1 or C, ...]``."""
        self.sums, found = [], []
        for activations, of_layer in zip(self.activations, gradients, strict=True):
            pairs = zip(activations, of_layer, strict=True)
            maps, sums = zip(*(self._finished(*pair, sum_channels) for pair in pairs), strict=True)
            self.sums.append(torch.stack(sums).sum(dim=0))
            found.append(maps)
        return found

    def pooled(self) -> Tensor:
        """The mean of the one layer's map over its regions, ``[B, C]``, in the graph."""
        with torch.inference_mode(False), torch.enable_grad():
            (given,) = self._arranged(0, self._pass.tracked[0])
            wide = given.to(torch.promote_types(given.dtype, torch.float32))
            return wide.flatten(2).mean(dim=2).to(given.dtype)

    def constant(self, forward: Callable[[], Tensor]) -> Tensor:
        """The score at layers of zeros, frozen as before: the part that no region can be given.

        Costs a second forward pass: ``forward`` runs the model anew and selects the scores. Dropout
        draws what it drew in the first pass.
        """
        with self.replayed():
            return self._again(forward, torch.zeros_like)[0].detach()

    def is_affine(self, end: Tensor, length: Tensor, forward: Callable[[], Tensor]) -> bool:
        """Whether ``end``, which :meth:`run` returned, is affine in the one layer.

        A norm of the encoder's own is set aside: ``length`` ``[B, 1]`` is what it divided by.
        ``forward`` runs the model on the first image alone, whose layer then gives its values
        negated and unevenly stretched, a hundredfold so that no bias keeps a ReLU from turning.
        """

        def uneven(given: Tensor) -> Tensor:
            waves = torch.arange(given.numel(), device=given.device).to(given).sin()
            some = given if given.any() else torch.ones_like(given)
            return -100 * (1.5 + waves.reshape(given.shape)) * some

        probe = 1.5 + uneven(torch.ones_like(end.detach())) / 100
        gradients = self._pass.gradients(end, (probe * length)[None], retain_graph=True)[0]
        other, elsewhere = self._again(forward, uneven)
        with torch.no_grad():
            held = hold_own_norm(other)
            other = other if held is None else other * held.to(other)
            moves = [(probe[:1], (end * length)[:1] - other)]
            for before, after, gradient in zip(
                self._pass.tracked[0], elsewhere, gradients, strict=True
            ):
                moves.append((gradient[0, :1], after - before[:1]))
            gap = torch.stack([(one * move).sum() for one, move in moves]).sum().abs()
            allowed = torch.stack([one.norm() * move.norm() for one, move in moves]).sum()
        return bool(gap <= 16 * torch.finfo(end.dtype).eps * allowed < torch.inf)

    def _again(
        self, forward: Callable[[], Tensor], replace: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, LayerTensors]:
        """A second pass with the same draws, and what the one layer was made to give in it."""
        again = self._new_pass(replace=replace)
        cpu, cuda = self._draws
        with torch.random.fork_rng(range(len(cuda))):
            torch.set_rng_state(cpu)
            if cuda:
                torch.cuda.set_rng_state_all(cuda)
            return again.run(forward), again.tracked[0]

    def replayed(self) -> AbstractContextManager[object]:
        """Within the block, scores are the linear functions that :meth:`maps` explained."""
        return frozen_scores(self._noted, replay=True)

    def warn(self) -> None:
        """Warn of embeddings of zeros, and of the published rule with a contrast set."""
        if self._cut:
            warn_user(
                "what the model returns is held constant by a frozen tail (a softmax, a norm?): "
                'this map follows the true gradient, tail="true"; explain logits for exact shares'
            )
        if self._noted.zero:
            zero = torch.cat(self._noted.zero)[: len(self.activations[0][0])]
            doubt(zero.any(), partial(_warn_of_zeros, zero))
        if self.rule is RULES["fam"] and self._noted.contrasted:
            warn_user(
                'rule "fam" rescales every channel to [0, 1], which undoes the contrast: with '
                'contrast use rule="centred" (recommended), "additive" or "gradcam"'
            )

    def _arranged(self, index: int, given: Sequence[Tensor]) -> LayerTensors:
        """What a layer gave, or its gradient, as maps ``[B, C, ...]``."""
        transform = self.transforms[index]
        if transform is None:
            return tuple(given)
        return (transform(given[0] if len(given) == 1 else tuple(given)),)

    def _check(
        self, name: str, transform: Transform | None, maps: LayerTensors, batch: int
    ) -> None:
        """Refuse what is no map per image."""
        source = f"layer {name!r}" if transform is None else "reshape_transform"
        if len(maps) > 1 and self._regions:
            raise ValueError(
                f"{source} gives {len(maps)} tensors: pass a reshape_transform that picks one and "
                "lays it out as [B, C, h, w]"
            )
        for part in maps:
            shape = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            if isinstance(shape, str) or len(shape) < 2 + self._regions or shape[0] != batch:
                raise ValueError(
                    f"{source} gives {shape} for {batch} images, not [{batch}, C, h, w]: pass a "
                    "reshape_transform that keeps the batch first and puts the channels second"
                )

    def _columns(self, index: int, tensors: list[Tensor]) -> list[Tensor]:
        """Gradients ``[c, B, ...]`` of what a layer gave -> of its maps, ``[B, c, C, R]``."""
        if self.transforms[index] is not None:
            steps = zip(*tensors, strict=True)
            arranged = torch.stack([self._arranged(index, step)[0] for step in steps])
            if self._constants is not None and len(arranged) == 1 and len(tensors) == 1:
                self._count_dropped(index, tensors[0][0])
            if len(tensors) == 1 and arranged.numel() < tensors[0].numel():
                # A picture of nothing: after the last block a class token is the embedding, and
                # no patch of that layer has a share in it.
                error = ValueError(
                    f"the score reaches layer {self._pass.names[index]!r} only through what the "
                    "transform drops (the class token): explain an earlier layer, such as the last "
                    "block's first norm (timm: blocks[-1].norm1, torchvision: "
                    "encoder.layers[-1].ln_1), or embed by the mean of the patches (timm: "
                    'global_pool="avg")'
                )
                doubt(tensors[0].any() & ~arranged.any(), error)
            tensors = [arranged]
        return [(g.flatten(3) if g.dim() > 3 else g[..., None]).transpose(0, 1) for g in tensors]

    def _count_dropped(self, index: int, gradient: Tensor) -> None:
        """Name the shares of tokens that stand for no place, which the transform drops."""
        transform = self.transforms[index]
        skip, kinds = getattr(transform, "skip", 0), getattr(transform, "kinds", None)
        tokens = self._pass.tracked[index][0].detach()[:, :skip]
        shares = (tokens * gradient[:, :skip]).sum(dim=2)
        kinds = prefix_of(self._model, self._pass.layers[index]) if kinds is None else kinds
        if sum(kinds.values()) != skip:  # a layout of the user's, or a layer before some are added
            kinds = {"class token": min(skip, 1), "registers": max(skip - 1, 0)}
        for name, part in zip(kinds, torch.split(shares, [*kinds.values()], dim=1), strict=True):
            if part.numel():
                self.constants[name] = part.sum(dim=1) + self.constants.get(name, 0)

    def _finished(
        self, activation: Tensor, gradients: Tensor, sum_channels: bool
    ) -> tuple[Tensor, Tensor]:
        maps, sums = maps_of(
            self.rule, activation, gradients, self.smooth, sum_channels=sum_channels
        )
        return check_finite(maps), sums


def maps_of(
    rule: Rule, activation: Tensor, gradients: Tensor, smooth: bool, *, sum_channels: bool = True
) -> tuple[Tensor, Tensor]:
    """Activation ``[B, C, ...]``, gradients ``[B, k, C, R or 1]`` -> maps ``[B, k, 1 or C, ...]``.

    In at least float32: a sum over hundreds of channels in half precision loses what the map
    is about, the differences between regions. Then in the dtype of the layer. With them their sums
    ``[B, k]`` before any mean is subtracted.
    """
    wide = torch.promote_types(activation.dtype, torch.float32)
    regions = activation.flatten(2) if activation.dim() > 2 else activation[..., None]
    with torch.no_grad(), full_precision(activation.device):
        maps = rule.apply(regions.to(wide), gradients.to(wide), sum_channels=sum_channels)
        sums = maps.sum(dim=(2, 3))
        maps = maps - maps.mean(dim=-1, keepdim=True) if rule.centred else maps
        maps = maps.reshape(*maps.shape[:3], *activation.shape[2:])
        if smooth:
            maps = smoothed(maps, activation.dim() - 2)
    return maps.to(activation.dtype).contiguous(), sums


def _warn_of_zeros(zero: Tensor) -> None:
    rows = ", ".join(str(int(row)) for row in zero.nonzero())
    warn_user(
        f"embedding row {rows} is all zero (a black or masked image?): it has no direction, so its "
        "score is 0 and its map is zero"
    )


def _is_differentiated(output: Any) -> bool:
    ends = output.values() if isinstance(output, Mapping) else (output,)
    return any(isinstance(end, Tensor) and end.requires_grad for end in flat(ends))


def check_tail(tail: str | None) -> str | None:
    """Refuse what is no name of a tail; ``None`` is the rule's choice."""
    if tail is not None and tail not in TAILS:
        raise ValueError(unknown_name("tail", tail, TAILS))
    return tail


def batch_size(inputs: Any) -> int:
    """The number of images: of a tensor, or of a tuple of tensors that starts with one."""
    first = inputs[0] if isinstance(inputs, tuple) and inputs else inputs
    if not isinstance(first, Tensor):
        fix = "torch.stack(images) of a list, torch.as_tensor(images) of an array"
        raise TypeError(f"inputs must be a tensor or a tuple of tensors: {fix}")
    if first.dim() == 0 or len(first) == 0:
        raise ValueError("the batch is empty: pass at least one image")
    return len(first)


def check_finite(attribution: Tensor) -> Tensor:
    """Return a map of any shape as it is, or refuse NaN: pictures would show it as evidence."""
    error = ValueError(
        "the map holds NaN or infinite values: check the input and the weights, and for float16 "
        "the range (bfloat16 or float32 have more)"
    )
    doubt(~torch.isfinite(attribution).all(), error)
    return attribution
