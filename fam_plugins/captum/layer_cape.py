"""CAPE as a Captum layer attribution: a map that is a probability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn

from fam_plugins.cape.model import find_head
from fam_plugins.captum.targets import TensorOrTensors, batch_size, run_forward, select_scores
from fam_plugins.core.layer_pass import LayerPass
from fam_plugins.core.maps import check_finite

__all__ = ["LayerCape"]


class LayerCape(LayerAttribution):
    """CAPE map of a class: the probability that each region contributes to it.

    A drop-in for :class:`captum.attr.LayerGradCam` on a model with a CAPE head
    (:func:`fam_plugins.cape.with_cape_head`). The map of a class sums to the head's probability of
    that class, and the maps of all classes sum to 1, so regions are comparable across classes.

    It explains the CAPE head, whose top class can differ from the model's own. It takes one
    forward pass and no gradient. Source: CAPE (CVPR 2024, arXiv 2404.02388).

    Args:
        forward_func: A :class:`fam_plugins.cape.CapeModel`, any model that contains a
            :class:`fam_plugins.cape.CapeHead`, or a function of either.
        layer: Not needed for a module; for a plain function, the :class:`CapeHead`. The layer
            that feeds the head is accepted too, so that Grad-CAM code need not change.
        device_ids: Accepted as in Captum; maps are computed on one device.
        relative: Return mu-CAPE, ``relu(c + w)``: a relative map in units of logits that shows
            faint evidence, not a probability.

    Example:
        >>> from fam_plugins.cape import with_cape_head
        >>> net = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...     nn.Linear(8, 4),
        ... )
        >>> model = with_cape_head(net)  # then fam_plugins.cape.fit_cape_head(model, loader)
        >>> images = torch.rand(2, 3, 6, 6)
        >>> maps = LayerCape(model).attribute(images, target=1)
        >>> maps.shape
        torch.Size([2, 1, 4, 4])
        >>> torch.allclose(maps.sum(dim=(1, 2, 3)), model(images)[:, 1].exp())
        True
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | str | None = None,
        device_ids: list[int] | None = None,
        *,
        relative: bool = False,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        self.relative = relative

    @log_usage()
    def attribute(
        self,
        inputs: TensorOrTensors,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,  # noqa: ARG002  (a CAPE map is never negative)
        attr_dim_summation: bool = True,
        grad_kwargs: dict[str, Any] | None = None,  # noqa: ARG002  (there is no gradient)
        *,
        return_convergence_delta: bool = False,
    ) -> Any:
        """Explain each image's probability of the class ``target``.

        Args:
            inputs: Images ``[B, ...]``, or a tuple of tensors for models that take several.
            target: The class: an int for all images, or a list or tensor of one an image.
            additional_forward_args: Further arguments of the model.
            attribute_to_layer_input: Must stay ``False``: CAPE reads one map.
            relu_attributions: Changes nothing, for no value is negative.
            attr_dim_summation: Must stay ``True``: a softmax does not split over channels.
            grad_kwargs: Changes nothing, for no gradient is taken.
            return_convergence_delta: Also return the sum of each map minus the probability.

        Returns:
            Maps ``[B, 1, h, w]`` in [0, 1] whose sum is the probability of ``target`` (mu-CAPE:
            at least 0, in units of logits); float32 for half-precision models. With
            ``return_convergence_delta`` a pair of that and ``[B]``.

        Raises:
            AssertionError: On a bad target, or a head that does not run.
            RuntimeError: If the head runs twice.
            ValueError: On an empty batch, a map that holds NaN, a model without a CAPE head,
                another layer than the one that feeds it, or a split that CAPE does not have.
        """
        if attribute_to_layer_input or not attr_dim_summation:
            raise ValueError(
                "a CAPE map is a softmax over classes and regions; it has no parts by channel or "
                "layer input: leave attribute_to_layer_input and attr_dim_summation as they are"
            )
        if return_convergence_delta and self.relative:
            raise ValueError(
                "mu-CAPE does not add up to a probability, so it has no convergence delta: use "
                "LayerCape(..., relative=False)"
            )
        batch_size(inputs)
        head, _ = find_head(self.forward_func, self.layer)
        one = LayerPass(self.forward_func, [head], at_input=True, differentiate=False)
        output = one.run(lambda: run_forward(self.forward_func, inputs, additional_forward_args))
        ((features,),) = one.tracked
        classes = torch.arange(head.num_classes, device=features.device)
        select_scores(output, target)
        chosen = select_scores(classes.expand(len(features), -1), target)
        rows = torch.arange(len(features), device=features.device)
        with torch.no_grad():
            maps = head.relative(features) if self.relative else head.contributions(features)
            picked = check_finite(maps[rows, chosen].unsqueeze(1))
            if not return_convergence_delta:
                return picked
            return picked, picked.flatten(1).sum(dim=1) - head(features)[rows, chosen].exp()

    def has_convergence_delta(self) -> bool:
        """Whether maps add up to a probability: all but mu-CAPE do."""
        return not self.relative

    def compute_convergence_delta(
        self,
        attributions: Tensor,
        inputs: TensorOrTensors,
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> Tensor:
        """How far maps are from adding up to the probability of ``target``; one forward pass.

        Args:
            attributions: Maps ``[B, 1, h, w]``.
            inputs: The images they explain.
            target: As for :meth:`attribute`.
            additional_forward_args: As for :meth:`attribute`.

        Returns:
            ``[B]``, differences of probabilities.

        Raises:
            ValueError: For mu-CAPE; and as for :meth:`attribute`.
        """
        maps, delta = self.attribute(
            inputs, target, additional_forward_args, return_convergence_delta=True
        )
        difference: Tensor = delta + (attributions - maps).flatten(1).sum(dim=1)
        return difference

    def attribute_future(self, *_args: Any, **_kwargs: Any) -> None:
        """Not offered.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("LayerCape has no asynchronous form: call attribute")
