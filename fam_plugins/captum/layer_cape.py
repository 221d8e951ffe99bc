"""CAPE as a Captum layer attribution: a map that is a probability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn

from fam_plugins.cape.head import cape_maps, log_probabilities
from fam_plugins.cape.model import find_head
from fam_plugins.captum.targets import TensorOrTensors, batch_size, run_forward, select_scores
from fam_plugins.core.layer_pass import LayerPass
from fam_plugins.core.maps import check_finite

__all__ = ["LayerCape"]


class LayerCape(LayerAttribution):
    """CAPE map of a class: the probability that each region contributes to it.

    A drop-in for :class:`captum.attr.LayerGradCam` on a model with a CAPE head, whose top class can
    differ from the model's own. The map of a class sums to the head's probability of it, and the
    maps of all classes to 1. Takes one pass, no gradient. Source: CAPE (arXiv 2404.02388).

    Args:
        forward_func: A model that contains a :class:`fam_plugins.cape.CapeHead`, or a function.
        layer: For a plain function the head; else not needed, Grad-CAM code may keep its layer.
        device_ids: Accepted as in Captum; maps are computed on one device.
        relative: Return mu-CAPE, ``relu(c + w)``, in units of logits, not probabilities.

    Example:
        >>> from fam_plugins.cape import with_cape_head
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> model, images = with_cape_head(net.append(nn.Linear(8, 4))), torch.rand(2, 3, 6, 6)
        >>> maps = LayerCape(model).attribute(images, target=1)  # [2, 1, 4, 4]
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
            target: The class: an int for all images, or a list or tensor of one per image.
            additional_forward_args: Further arguments of the model.
            attribute_to_layer_input: Must stay ``False``: CAPE reads one map.
            relu_attributions: Changes nothing: no value is negative.
            attr_dim_summation: Must stay ``True``: a softmax does not split over channels.
            grad_kwargs: Changes nothing: no gradient is taken.
            return_convergence_delta: Also return sum minus probability of each map, ``[B]``.

        Returns:
            Maps ``[B, 1, h, w]``, float32 or wider, that sum to the probability of ``target``.

        Raises:
            AssertionError: On a bad target, or a head that does not run.
            RuntimeError: If the head runs twice.
            ValueError: On an empty batch, NaN, a model without a CAPE head, or bad arguments.
        """
        if attribute_to_layer_input or not attr_dim_summation:
            raise ValueError("a CAPE map has no parts by channel or layer input: leave both out")
        if return_convergence_delta and self.relative:
            raise ValueError("mu-CAPE does not add up to a probability: use relative=False")
        batch_size(inputs)
        head, _ = find_head(self.forward_func, self.layer)
        one = LayerPass(self.forward_func, [head.region_logits], differentiate=False)
        output = one.run(
            lambda: run_forward(self.forward_func, inputs, None, additional_forward_args)
        )
        scores = select_scores(output, target)  # refuses what the model's own output lacks
        ((logits,),) = one.tracked
        classes = torch.arange(head.num_classes, device=logits.device)
        chosen = select_scores(classes.expand(len(logits), -1), target)
        with torch.no_grad():
            maps = check_finite(cape_maps(head, logits, chosen, relative=self.relative))
            of_all = log_probabilities(logits, head.t1, head.t2)
            own = of_all.gather(1, chosen[:, None])[:, 0]
            # A function of the model may pick or reorder classes, and then means another one.
            near = 1e-2 if scores.dtype.itemsize < 4 else 1e-5
            if not isinstance(self.forward_func, nn.Module) and not torch.allclose(
                scores.to(own), own, rtol=near, atol=near
            ):
                raise ValueError(
                    "the function's output at target is not the head's log-probability of that "
                    "class: explain the model itself, with the class of its head as target"
                )
            if not return_convergence_delta:
                return maps
            return maps, maps.flatten(1).sum(dim=1) - own.exp()

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
        """The sum of each map minus the probability, ``[B]``; arguments as in :meth:`attribute`."""
        others = additional_forward_args
        maps, delta = self.attribute(inputs, target, others, return_convergence_delta=True)
        return delta + (attributions - maps).flatten(1).sum(dim=1)  # type: ignore[no-any-return]

    def attribute_future(self, *_args: Any, **_kwargs: Any) -> None:
        """Not offered; raises ``NotImplementedError``."""
        raise NotImplementedError("LayerCape has no asynchronous form: call attribute")
