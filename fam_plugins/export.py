"""Maps where gradients cannot go: scores and maps as one graph of plain operations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fam_plugins.cape.model import CapeModel
from fam_plugins.core.choose_layer import choose_layer
from fam_plugins.core.eval_mode import check_module, eval_mode, place_of
from fam_plugins.core.gallery import Gallery
from fam_plugins.core.layer_pass import LayerPass
from fam_plugins.core.many import behind_pooling
from fam_plugins.core.maps import MapPass, maps_of
from fam_plugins.core.own_norm import hold_own_norm
from fam_plugins.core.rules import Rule, choose_rule
from fam_plugins.core.scores import Frozen, frozen_scores, full_precision
from fam_plugins.core.similarity_model import ModelScores
from fam_plugins.core.smooth import smoothed
from fam_plugins.core.trace import differentiable, traced
from fam_plugins.core.transforms import Transform

__all__ = ["MapModel"]

MOST = 64
"""References that are worth a step of their own through a tail that does not pool."""


class MapModel(nn.Module):
    """A model whose outputs are scores and maps, from one forward pass without hooks or autograd.

    For ``torch.export``, ``torch.compile(fullgraph=True)``, ONNX and C++, where no gradient can go:
    hooks, frozen norms and gradients are worked out once, when it is made, and what they come to is
    recorded as operations on tensors. Behind pooling, with or without a linear head, that is one
    matrix product for all references; behind any other tail a step through it per reference.

    It is of the model as it is now, in eval mode, with its references and its contrast: make it
    anew when these change, and on the device it is to run on. Its maps are those of
    :class:`~fam_plugins.LayerFam` under the same rule (checked on the example), unchecked for NaN
    and without warnings: a graph reads no values. ONNX files are of opset 18 or newer.

    Args:
        model: A :class:`~fam_plugins.SimilarityModel`, a classifier ``[B, N]``, or a model with a
            CAPE head, whose scores are probabilities and whose maps sum to them (it takes neither
            layer nor rule).
        layer: As for :class:`~fam_plugins.LayerFam`; found if left out.
        example: Images ``[B, C, H, W]`` as the model takes them; the graph is of their size and any
            batch. Random ones of the size the model states, or 224 x 224, if left out.
        rule: As for :class:`~fam_plugins.LayerFam`, and so on.
        reshape_transform: Rearranges what the layer gives.
        smooth: Average each region with its neighbours.
        tail: What is held constant behind the layer.

    Raises:
        TypeError: If the model is no module, or the layer gives no tensor.
        ValueError: If the model cannot be recorded (it branches on values, fixes its batch, keeps
            its references on disk), has more than 64 references behind a tail that does not pool,
            and as for :class:`~fam_plugins.LayerFam`.

    Example:
        >>> from fam_plugins import SimilarityModel
        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> model = SimilarityModel(encoder, torch.randn(5, 8))
        >>> maps_of = MapModel(model, "0", rule="additive", example=torch.rand(1, 3, 16, 16))
        >>> scores, maps = maps_of(torch.rand(4, 3, 16, 16))  # [4, 5], [4, 5, 14, 14]
        >>> torch.allclose(maps.sum(dim=(2, 3)), scores, atol=1e-6)
        True
        >>> program = torch.export.export(maps_of, (torch.rand(2, 3, 16, 16),))
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | str | None = None,
        *,
        example: Tensor | None = None,
        rule: str | Rule | None = None,
        reshape_transform: Transform | str | None = "auto",
        smooth: bool = False,
        tail: str | None = None,
    ) -> None:
        super().__init__()
        check_module(model)
        images = _example(model) if example is None else example
        # Two, since a graph of one is of one only; unlike, so that the check below sees more.
        images = torch.cat([images[:1], images[:1].roll(1, -1) / 2]).detach()
        with eval_mode(model):
            if isinstance(model, CapeModel):
                graph = traced(partial(_probabilities, model, smooth), images)
            else:
                options = {"transform": reshape_transform, "smooth": smooth, "tail": tail}
                found = _Recorded(model, layer, images, rule=choose_rule(rule), **options)
                graph = traced(found, images)
                gap = (graph(images)[1][:, :1] - found.first).abs().amax()
                allowed = max(1e-3, 8 * torch.finfo(gap.dtype).eps)
                if not gap <= allowed * found.first.abs().amax():
                    raise ValueError(
                        f"the recorded maps are {gap:.2g} off those of the model: does it draw "
                        "random numbers, or keep a state between calls?"
                    )
        self.recorded = graph.eval()
        self.image_shape = tuple(images.shape[1:])
        self.training = False

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``[B, C, H, W]`` -> scores ``[B, N]`` and maps ``[B, N, h, w]``.

        Raises:
            RuntimeError: In ``torch.jit.trace``, and so in the ONNX exporter that uses it.
            ValueError: If images have another size than the example.
        """
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise RuntimeError(
                "torch.jit.trace knows too few operations: torch.export.export, or for ONNX "
                "torch.onnx.export(..., dynamo=True)"
            )
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images of {tuple(images.shape[1:])}, and this graph is of {self.image_shape}: "
                "resize them, or build MapModel(..., example=images)"
            )
        scores, maps = self.recorded(images)
        return scores, maps

    def train(self, mode: bool = True) -> MapModel:  # noqa: ARG002  (a recording has one mode)
        """Stay in eval mode."""
        return self


class _Recorded:
    """Scores and maps by steps that can be recorded, as one pass of a model found them."""

    def __init__(self, model: nn.Module, layer: Any, images: Tensor, **options: Any) -> None:
        self.scores = ModelScores(model)
        references = getattr(self.scores.model, "references", None)
        if isinstance(references, Gallery):
            raise ValueError("the references stay on disk: pass those of interest as a tensor")
        self.layer = choose_layer(model, layer, self.scores.forward, images)
        run = self.scores.forward
        one = MapPass(model, [self.layer], regions=1, **options)
        end = one.run(partial(run, images), images)
        if not isinstance(end, Tensor) or end.dim() != 2:
            shape = tuple(end.shape) if isinstance(end, Tensor) else type(end).__name__
            raise ValueError(
                f"the model returns {shape}, not scores [B, N]: wrap it in a module that picks them"
            )
        self.count = end.shape[1] if references is None else len(references)
        frozen = self.scores.model is not None and one.rule.frozen
        lengths = hold_own_norm(end) if frozen else None
        self.own_norm, self.matrix = lengths is not None, torch.empty(0)  # of a pooled tail
        lengths = torch.ones_like(end[:, :1]).detach() if lengths is None else lengths
        pooled = behind_pooling(one, end)
        if pooled is not None and one.is_affine(end, lengths, partial(run, images[:1])):
            basis = torch.eye(end.shape[1]).to(end)
            matrix = pooled((basis * lengths[:, None]).detach())[0, ..., 0]
            plain = matrix.shape == basis.shape and torch.equal(matrix, matrix[0, 0] * basis)
            self.matrix = matrix[0, :1] if plain else matrix
        self.model, self.rule, self.held, self.smooth = model, one.rule, one.held, one.smooth
        self.transform: Transform = one.transforms[0] or nn.Identity()
        ((self.first,),) = one.maps(
            lambda: (end if self.scores.model is None else self.scores.model.score(end))[:, 0]
        )
        if not len(self.matrix) and self.count > MOST:
            raise ValueError(
                f"the tail behind the layer does not pool, so that each of {self.count} references "
                f"takes a step through it: export at most {MOST}, or a later layer"
            )

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        one = LayerPass(self.model, [self.layer])
        one.behind = differentiable(self.held)
        end = one.run(partial(self.scores.forward, images))
        lengths = hold_own_norm(end) if self.own_norm else None
        with torch.enable_grad():
            scores, slopes = self._slopes(end.detach())
        ((given,),) = one.tracked
        if len(self.matrix):
            slopes = slopes if lengths is None else slopes / lengths[:, None]
            with full_precision(slopes.device):
                slopes = slopes @ self.matrix if self.matrix.dim() > 1 else slopes * self.matrix
            return scores, self._maps(given, slopes[..., None])
        maps = []
        for slope in slopes.unbind(dim=1):
            ((gradient,),) = one.gradients(end, slope[None], retain_graph=True)
            arranged = self.transform(gradient[0])
            maps.append(self._maps(given, arranged.flatten(2)[:, None]))
        return scores, torch.cat(maps, dim=1)

    def _maps(self, given: Tensor, gradients: Tensor) -> Tensor:
        activation = self.transform(given.detach())
        return maps_of(self.rule, activation, gradients, self.smooth)[0][:, :, 0]

    def _slopes(self, end: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``[B, N]`` of what the model ends in ``[B, M]``, their gradients ``[B, N, M]``."""
        model = self.scores.model
        if model is None:
            return end, torch.eye(self.count).to(end).expand(end.shape[0], -1, -1)
        scores, slopes = [], []
        # A copy of the embedding for each reference: one gradient of all of them tells each.
        for rows in torch.split(torch.arange(self.count, device=end.device), MOST):
            copies = end[:, None].expand(-1, len(rows), -1).flatten(0, 1).clone().requires_grad_()
            with frozen_scores(Frozen(freeze=self.rule.frozen, traced=True)):
                each = torch.unflatten(model.score(copies, rows), 0, (-1, len(rows)))
            own = (each * torch.eye(len(rows)).to(each)).sum(dim=2)
            (slope,) = torch.autograd.grad(own.sum(), copies)
            scores.append(own.detach())
            slopes.append(torch.unflatten(slope, 0, (-1, len(rows))))
        return torch.cat(scores, dim=1), torch.cat(slopes, dim=1)


def _probabilities(model: CapeModel, smooth: bool, images: Tensor) -> tuple[Tensor, Tensor]:
    """The probabilities of a CAPE head, and the maps that sum to them."""
    maps = model.head.probability_maps(model.features(images))
    probabilities = maps.flatten(2).sum(dim=2)
    return probabilities, smoothed(maps, maps.dim() - 2) if smooth else maps


def _example(model: nn.Module) -> Tensor:
    """Random images of the size that a model states somewhere, or of 224 x 224."""
    device, dtype = place_of(model)
    size: Any = None
    for part in model.modules():
        config = getattr(part, "config", None)
        stated = [
            (getattr(part, "pretrained_cfg", None) or {}).get("input_size", (None,))[-1],  # timm
            getattr(part, "image_size", None),  # torchvision, open_clip
            getattr(getattr(config, "vision_config", config), "image_size", None),  # transformers
        ]
        size = size or next((found for found in stated if found), None)
    first = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else 3
    height, width = size if isinstance(size, (tuple, list)) else (size or 224, size or 224)
    return torch.rand(1, channels, height, width, device=device, dtype=dtype)
