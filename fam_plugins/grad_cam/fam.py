"""FAM as a pytorch-grad-cam method: swap ``GradCAM`` for ``FAM``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from torch import Tensor, nn

from fam_plugins.core.choose_layer import choose_layer
from fam_plugins.core.decompose import warn_of_coverage
from fam_plugins.core.eval_mode import check_module, eval_mode
from fam_plugins.core.layer_pass import find_layer
from fam_plugins.core.many import as_indices, map_references
from fam_plugins.core.maps import MapPass, check_finite, check_tail
from fam_plugins.core.rules import Rule, choose_rule
from fam_plugins.core.similarity_model import ModelScores
from fam_plugins.core.transforms import check_transform
from fam_plugins.grad_cam.base import OnePassCAM, Target, check_images, to_numpy

__all__ = ["FAM"]


class FAM(OnePassCAM):
    """Feature Activation Map: swap ``GradCAM`` for ``FAM`` in pytorch-grad-cam code.

    Same call, same kind of result: ``cam(input_tensor, targets)`` is a float32 numpy array
    ``[B, H, W]`` in [0, 1] at the size of the input. With a :class:`~fam_plugins.SimilarityModel`
    the target ``ClassifierOutputTarget(j)`` explains reference ``j`` and ``targets=None`` the
    nearest one; an encoder takes :class:`SimilarityTarget`; a classifier, its class logits.

    It takes one forward pass in eval mode. Only what follows the layers is differentiated;
    activations stay on their device; the model's training mode, gradients and hooks are afterwards
    as they were. Sources: FAM (arXiv 2307.05017) for the rule ``"fam"``, Grad-CAM (arXiv
    1610.02391) for ``"gradcam"``.

    Args:
        model: The model to explain; one of transformers by its logits, or else its embeddings.
        target_layers: The layers whose maps are averaged; modules, their names, or ``"patches"``.
            Left out, one is found, as in :class:`~fam_plugins.LayerFam`.
        reshape_transform: Rearranges what a layer gives into ``[B, C, h, w]``. ``"auto"`` reads
            from the shapes of the pass, layer by layer, whether that is needed
            (:func:`~fam_plugins.infer_transform`); ``None`` takes layers as they are;
            :class:`~fam_plugins.tokens_to_map` is for tokens ``[B, T, C]``,
            :func:`~fam_plugins.channels_last_to_map` for Swin's ``[B, h, w, C]``.
        rule: ``"centred"`` (the best rule for finding what matches), ``"additive"``,
            ``"gradcam"``, ``"fam"`` (published), or a :class:`~fam_plugins.Rule`. Left out,
            ``"fam"`` with a warning, because it hardly depends on the target.
        smooth: Average each region with its neighbours, weights ``[1, 2, 1]ᵀ [1, 2, 1] / 16``:
            steadier maps whose sums stay. Recommended with ``rule="centred"`` and a contrast set.
        tail: What is held constant behind the layers: ``"frozen"``, ``"norms"`` or ``"true"``, as
            in :class:`~fam_plugins.LayerFam`.

    Attributes:
        attributions: After a call, the signed maps before ReLU and scaling: one tensor
            ``[B, 1, h, w]`` per target layer, on the layer's device; ``None`` after ``aug_smooth``,
            whose result is an average over six passes.
        outputs: After a call, what the model returned, detached.

    Raises:
        TypeError: If ``target_layers`` is not a list of layers, or ``rule`` or
            ``reshape_transform`` is of no such kind.
        ValueError: If the list is empty or names an unknown layer, there is no such rule, or
            ``reshape_transform`` is another string than ``"auto"``.

    Example:
        >>> from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
        >>> from fam_plugins import SimilarityModel
        >>> encoder = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> model = SimilarityModel(encoder, torch.eye(3))
        >>> with FAM(model, [encoder[0]], rule="centred") as cam:
        ...     cam(torch.rand(2, 3, 4, 4), [ClassifierOutputTarget(0)] * 2).shape
        (2, 4, 4)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[Any] | None = None,
        reshape_transform: Callable[[Any], Tensor] | str | None = "auto",
        *,
        rule: str | Rule | None = None,
        smooth: bool = False,
        tail: str | None = None,
    ) -> None:
        self.rule: str | Rule = choose_rule(rule)
        self.smooth, self.tail = smooth, check_tail(tail)
        check_transform(reshape_transform)
        check_module(model)
        left_out = target_layers is None
        target_layers = [None] if target_layers is None else target_layers
        if not isinstance(target_layers, (list, tuple)):
            raise TypeError(
                f"target_layers must be a list of layers, such as [model.layer4], not "
                f"{type(target_layers).__name__}"
            )
        if not target_layers:
            raise ValueError("target_layers is empty: pass at least one, such as [model.layer4]")
        layers = [
            one if left_out or one == "patches" else find_layer(model, one)[0]
            for one in target_layers
        ]
        super().__init__(model, layers, reshape_transform)

    def run_pass(self, input_tensor: Tensor) -> tuple[MapPass, Any]:
        """Run the model once; return the pass and the model's output."""
        one, scores = self._start(input_tensor), ModelScores(self.model)
        one.again = False
        end = one.run(lambda: scores.forward(input_tensor), input_tensor)
        # Scored behind the pass, where nothing looks at every operation.
        with one.frozen(), torch.inference_mode(False), torch.enable_grad():
            return one, end if scores.model is None else scores.model.score(end)

    def _start(self, images: Tensor) -> MapPass:
        run = ModelScores(self.model).forward
        found = [choose_layer(self.model, layer, run, images) for layer in self.target_layers]
        self.target_layers = found
        return MapPass(
            self.model,
            self.target_layers,
            self.rule,
            self.reshape_transform,
            regions=2,
            smooth=self.smooth,
            tail=self.tail,
        )

    def explain(
        self, one: MapPass, outputs: Any, targets: Sequence[Target], eigen_smooth: bool
    ) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Explain a pass: for each target layer its map ``[B, 1, h, w]``, and as float32 array."""
        with one.frozen():
            found = one.maps(lambda: _scores(outputs, targets), sum_channels=not eigen_smooth)
            if one.rule.adds_up or len(found) == 1:
                shares = [(carried[:, 0], one.scores) for carried in one.sums]
                warn_of_coverage(one.rule, one.constants, *shares)
        for (maps,) in found:
            if eigen_smooth:
                summed = check_finite(maps.sum(dim=1, keepdim=True))
                yield summed, get_2d_projection(to_numpy(maps))
            else:
                yield maps, to_numpy(maps[:, 0])

    def attribute_references(
        self, input_tensor: Tensor, indices: Any = None, *, references_per_chunk: int = 64
    ) -> np.ndarray:
        """Explain each image's score at many references from one forward pass.

        Equal to calling the object once for every column of ``indices``, at the price of one call.
        :attr:`attributions` then holds the signed maps ``[B, k, 1, h, w]``.

        Args:
            input_tensor: Images ``[B, C, H, W]``, or volumes ``[B, C, D, H, W]``.
            indices: Which references to explain: ``[B, k]``, a row per image, as a tensor, an
                array or a nested list; all of them by default.
            references_per_chunk: How many references per image are worked on at a time: bounds
                the memory, changes nothing else.

        Returns:
            float32 ``[B, k, H, W]`` (volumes: ``[B, k, D, H, W]``), each map in [0, 1].

        Raises:
            IndexError: If there is no reference of an index.
            TypeError: If indices are no integers.
            ValueError: If indices are not ``[B, k]``, the model does not return ``[B, N]``, and
                as for a call.

        Example:
            >>> from fam_plugins import SimilarityModel
            >>> encoder = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> cam = FAM(SimilarityModel(encoder, torch.eye(3)), ["0"], rule="centred")
            >>> cam.attribute_references(torch.rand(2, 3, 4, 4), [[0, 2], [1, 0]]).shape
            (2, 2, 4, 4)
        """
        check_images(input_tensor)
        scores = ModelScores(self.model)
        chosen = as_indices(indices, scores, len(input_tensor), references_per_chunk)
        input_tensor = input_tensor.to(self.device)
        with eval_mode(self.model), (one := self._start(input_tensor)).frozen():
            found = map_references(
                one,
                scores,
                lambda: scores.forward(input_tensor),
                input_tensor,
                indices=chosen,
                per_chunk=references_per_chunk,
            )
        self.attributions = [maps for (maps,) in found]
        flat = [to_numpy(maps.flatten(0, 2)) for maps in self.attributions]
        cams = self.aggregate_multi_layers([self.scaled(cam, input_tensor) for cam in flat])
        batched: np.ndarray = cams.reshape(len(input_tensor), -1, *input_tensor.shape[2:])
        return batched


def _scores(outputs: Any, targets: Sequence[Target]) -> Tensor:
    """The score that each target returns for its image, ``[B]``."""
    mapping = isinstance(outputs, Mapping)
    if mapping or not isinstance(outputs, Collection) or len(outputs) != len(targets):
        fields = f" of {', '.join(map(str, outputs))}" if mapping else ""
        raise TypeError(
            f"the model returns a {type(outputs).__name__}{fields}, not one output per image: wrap "
            "it in a module whose forward picks one tensor out of it"
        )
    scores = []
    for target, output in zip(targets, outputs, strict=True):
        try:
            value = target(output)
        except IndexError as error:
            shape, shown = tuple(getattr(output, "shape", ())), getattr(target, "category", target)
            raise IndexError(
                f"target {shown!r} does not fit the model's output of shape {shape} per image: "
                f"targets go from 0 to {[*shape, 1][0] - 1}"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"target {target!r} returns {shape}, not one number: pick an output, such as "
                "ClassifierOutputTarget(3)"
            )
        scores.append(value.reshape(()))
    return torch.stack(scores)
