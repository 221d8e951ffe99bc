"""The CAPE head: a linear classifier whose heatmap is a probability."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_plugins.cape.released import head_state_from_release

__all__ = ["CapeHead", "cape_maps", "classify_regions", "log_probabilities", "require_floats"]


class CapeHead(nn.Module):
    """Classify a feature map as a mixture of its regions, so that the map itself is a probability.

    The same linear layer classifies every region ``i`` of the feature map ``f``,
    ``M_k(i) = W_k · f(i) + b_k``, and a softmax over regions weighs them::

        c_k(i) = M_k(i) / exp(t1)              class logits of region i
        w(i)   = mean_k M_k(i) / exp(t2)       weight logit of region i
        P_k(i) = softmax_k(c(i)) · softmax_i(w)
        p_k    = sum_i P_k(i)

    ``P`` is the CAPE map: "this region carries 12 % of the 45 % for class k". It sums to ``p_k``
    over regions and to 1 over regions and classes.

    The published formula divides by a sum over every pair of regions, a ``[B, K, N, N]`` tensor.
    That tensor is an outer sum, so the product of two softmaxes above is the same number; nothing
    here is larger than ``[B, K, N]`` (or than a copy of the features).

    Calling the head returns log-probabilities ``[B, K]``: their softmax is ``p`` itself, so every
    tool for classifiers works as it is.

    Float16 and bfloat16 heads run their matrix product in that type, everything after it in
    float32, and return float32: one region's share of one class in a thousand is below what
    float16 can hold. A float32 or float64 head takes half-precision features too. Source: CAPE
    (CVPR 2024, arXiv 2404.02388), the map ``P`` and mu-CAPE.

    Args:
        in_channels: Channels C of the feature map, at least 1.
        num_classes: Number of classes K, at least 2 (with one class every probability is 1).
        bias: Learn an additive bias per class.
        device: Where the parameters are created.
        dtype: Floating type of the parameters.

    Attributes:
        weight: ``[K, C]``, the classifier's weight.
        bias: ``[K]`` or ``None``.
        t1, t2: Logarithms of the temperatures of class logits and region weights, 0 at first.
        t3: Logarithm of a further temperature of both, which only the training loss uses.
        region_logits: An identity for hooks; each call passes ``M`` ``[B, h, w, K]`` through it.

    Raises:
        ValueError: If ``in_channels`` is no int from 1, or ``num_classes`` none from 2.

    Example:
        >>> head = CapeHead(in_channels=16, num_classes=5)
        >>> features = torch.randn(2, 16, 7, 7)
        >>> maps = head.probability_maps(features)
        >>> maps.shape
        torch.Size([2, 5, 7, 7])
        >>> torch.allclose(maps.sum(dim=(2, 3)), head(features).exp())
        True
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size, least in (("in_channels", in_channels, 1), ("num_classes", num_classes, 2)):
            if not isinstance(size, Integral) or size < least:
                fix = "try from_linear(model.fc); a binary classifier needs two outputs"
                raise ValueError(f"{name} must be an int from {least}, not {size!r}: {fix}")
        self.in_channels = in_channels
        self.num_classes = num_classes
        empty = partial(torch.empty, device=device, dtype=dtype)
        self.weight = nn.Parameter(empty((num_classes, in_channels)))
        self.bias = nn.Parameter(empty(num_classes)) if bias else None
        self.t1, self.t2, self.t3 = (nn.Parameter(empty(())) for _ in range(3))
        self.region_logits = nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew, as ``nn.Linear`` does, and set the temperatures to 1."""
        bound = 1 / math.sqrt(self.in_channels)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        for log_temperature in (self.t1, self.t2, self.t3):
            nn.init.zeros_(log_temperature)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> CapeHead:
        """Start from a trained classifier: its weight and bias are copied, not shared.

        Args:
            linear: The classifier after global average pooling, with or without bias.

        Returns:
            A head of the same type, on the same device, with temperatures of 1.

        Raises:
            TypeError: If ``linear`` is not an ``nn.Linear``.
        """
        if not isinstance(linear, nn.Linear):
            kind = type(linear).__name__
            raise TypeError(f"from_linear takes an nn.Linear, such as model.fc, not {kind}")
        weight, bias = linear.weight.detach(), linear.bias
        state = dict.fromkeys(("t1", "t2", "t3"), weight.new_zeros(())) | {"weight": weight}
        return cls._holding(state if bias is None else {**state, "bias": bias})

    @classmethod
    def from_released_state_dict(cls, state_dict: Mapping[str, Tensor]) -> CapeHead:
        """Build the head of a checkpoint written by the authors' released code.

        Args:
            state_dict: As for :func:`head_state_from_release`.

        Returns:
            A head of the checkpoint's size and type, on its device.

        Raises:
            ValueError: If names of the CAPE head are missing or sizes contradict each other.
        """
        return cls._holding(head_state_from_release(state_dict))

    @classmethod
    def _holding(cls, state: Mapping[str, Tensor]) -> CapeHead:
        """A head of these values. Nothing is drawn: the caller's random state stays as it is."""
        weight = state["weight"]
        classes, channels = weight.shape
        head = cls(channels, classes, bias="bias" in state, device="meta", dtype=weight.dtype)
        head.to_empty(device=weight.device).load_state_dict(state)
        return head

    def forward(self, features: Tensor) -> Tensor:
        """Log-probabilities of the classes.

        Args:
            features: Feature map ``[B, C, h, w]`` or ``[B, C, d, h, w]``.

        Returns:
            ``log p``, ``[B, K]``, each in (-inf, 0]; finite wherever the logits are.

        Raises:
            TypeError: If features are not floating point, or wider than the head.
            ValueError: If features are not 4-D or 5-D, are empty, or have other channels.
        """
        logits = self.region_logits(classify_regions(self, features))
        return log_probabilities(logits, self.t1, self.t2)

    def soft_log_probs(self, features: Tensor) -> Tensor:
        """Log-probabilities ``[B, K]`` with both logits divided by ``exp(t3)`` too, for training.

        Features and errors are those of :meth:`forward`.
        """
        return log_probabilities(classify_regions(self, features), self.t1, self.t2, self.t3)

    def class_maps(self, features: Tensor) -> Tensor:
        """Class logits of every region, the maps that CAM shows (with the bias).

        Their mean over regions is the output of the same classifier after global average pooling.
        Features and errors are those of :meth:`forward`.

        Returns:
            ``M``, ``[B, K, h, w]`` (or ``[B, K, d, h, w]``), signed.
        """
        return classify_regions(self, features).movedim(-1, 1).contiguous()

    def probability_maps(self, features: Tensor) -> Tensor:
        """The CAPE maps: the probability that each region contributes to each class.

        Features and errors are those of :meth:`forward`.

        Returns:
            ``P``, ``[B, K, h, w]`` (or ``[B, K, d, h, w]``), in [0, 1]; sums to the class
            probability over regions, and to 1 over regions and classes.
        """
        return cape_maps(self, classify_regions(self, features))

    def relative_maps(self, features: Tensor) -> Tensor:
        """The mu-CAPE maps ``relu(c_k(i) + w(i))``: relative, not probabilities.

        They show faint contributions that the exponential of the CAPE map hides. Adding one
        constant to all logits changes them, while it leaves :meth:`probability_maps` as they are.
        Features and errors are those of :meth:`forward`.

        Returns:
            ``[B, K, h, w]`` (or ``[B, K, d, h, w]``), at least 0, in units of logits.
        """
        return cape_maps(self, classify_regions(self, features), relative=True)

    def extra_repr(self) -> str:
        """Sizes, as ``nn.Linear`` prints them."""
        bias = self.bias is not None
        return f"in_channels={self.in_channels}, num_classes={self.num_classes}, bias={bias}"


def classify_regions(head: CapeHead, features: Tensor) -> Tensor:
    """Region logits M ``[B, *spatial, K]`` of a feature map ``[B, C, *spatial]``."""
    features = _fitting(features, head.in_channels, head.weight.dtype)
    # F.linear rather than a 1x1 convolution: it follows the same TF32 setting as the model's own
    # classifier, and the class softmax then runs over contiguous memory.
    logits = F.linear(features.flatten(2).transpose(1, 2), head.weight, head.bias)
    return logits.reshape(features.shape[0], *features.shape[2:], -1)


def log_probabilities(logits: Tensor, t1: Tensor, t2: Tensor, t3: Tensor | None = None) -> Tensor:
    """Log-probabilities ``[B, K]`` of region logits ``[B, *spatial, K]``."""
    classes, weights = _tempered(logits, t1, t2, t3)
    # Sums of logarithms: finite for a class hundreds of logits behind, where log(p) is not.
    joint = F.log_softmax(classes, dim=2) + F.log_softmax(weights, dim=1)
    return torch.logsumexp(joint, dim=1)


def cape_maps(
    head: CapeHead, logits: Tensor, chosen: Tensor | None = None, *, relative: bool = False
) -> Tensor:
    """Maps ``[B, K, *spatial]`` of region logits; ``[B, 1, *spatial]`` of ``chosen`` ``[B]``."""
    classes, weights = _tempered(logits, head.t1, head.t2)
    if not relative:
        # A product of two softmaxes, not exp(log + log): the sum stays 1 to rounding.
        classes, weights = classes.softmax(dim=2), weights.softmax(dim=1)
    if chosen is not None:
        classes = classes.gather(2, chosen.view(-1, 1, 1).expand(-1, classes.shape[1], 1))
    maps = torch.relu(classes + weights) if relative else classes * weights
    return maps.transpose(1, 2).reshape(logits.shape[0], -1, *logits.shape[1:-1]).contiguous()


def _tempered(
    logits: Tensor, t1: Tensor, t2: Tensor, t3: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Class logits ``[B, N, K]`` and weight logits ``[B, N, 1]``, in float32 or wider."""
    dtype = torch.promote_types(torch.promote_types(logits.dtype, t1.dtype), torch.float32)
    t1, t2 = (t.to(dtype) if t3 is None else t.to(dtype) + t3.to(dtype) for t in (t1, t2))
    logits = logits.to(dtype).flatten(1, -2)
    # Times exp(-t), not divided by exp(t): the backward pass of a division costs twice as much.
    return logits * (-t1).exp(), logits.mean(dim=2, keepdim=True) * (-t2).exp()


def _fitting(features: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Features in the head's type: narrower types are widened, wider ones refused, not rounded."""
    require_floats(features=features)
    shape = tuple(features.shape)
    if features.dim() not in (4, 5):
        raise ValueError(
            f"features must be [B, C, h, w] or [B, C, d, h, w], not {shape}: add a batch axis with "
            "features.unsqueeze(0), or reshape tokens [B, N, C]"
        )
    if shape[1] != channels:
        last = shape[-1] == channels
        hint = "features.movedim(-1, 1)" if last else "the map that enters the pooling layer"
        raise ValueError(f"the head takes {channels} channels, not {shape[1]}: pass {hint}")
    if features.numel() == 0:
        raise ValueError(f"the feature map {shape} is empty: pass at least one image and region")
    if torch.promote_types(features.dtype, dtype) != dtype:
        raise TypeError(f"features are {features.dtype} but the head is {dtype}: use .to({dtype})")
    return features.to(dtype)


def require_floats(**tensors: object) -> None:
    """Refuse, by its name, what is not a tensor of floating-point numbers."""
    for name, given in tensors.items():
        if not isinstance(given, Tensor) or not given.is_floating_point():
            kind = given.dtype if isinstance(given, Tensor) else f"a {type(given).__name__}"
            raise TypeError(f"{name} must be floats, not {kind}: torch.as_tensor({name}).float()")
