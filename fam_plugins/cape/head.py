"""The CAPE head: a linear classifier whose heatmap is a probability."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_plugins.cape.released import head_state_from_release

__all__ = ["CapeHead", "checked_features"]


class CapeHead(nn.Module):
    """Classify a feature map as a mixture of its regions, so that the map itself is a probability.

    Every region ``i`` of the feature map ``f`` is classified by the same linear layer,
    ``M_k(i) = W_k · f(i) + b_k``, and a softmax over regions says how much each one counts::

        c_k(i) = M_k(i) / exp(t1)              class logits of region i
        w(i)   = mean_k M_k(i) / exp(t2)       weight logit of region i
        P_k(i) = softmax_k(c(i)) · softmax_i(w)
        p_k    = sum_i P_k(i)

    ``P`` is the CAPE map: "this region carries 12 % of the 45 % for class k". It sums to ``p_k``
    over regions and to 1 over regions and classes.

    The published formula divides by a sum over every pair of regions, a ``[B, K, N, N]`` tensor.
    That tensor is an outer sum, so the product of two softmaxes above is the same number; nothing
    here is larger than ``[B, K, N]`` (or than a copy of the features).

    Calling the head gives **log-probabilities** ``[B, K]``: their softmax is ``p`` itself, so
    every tool for classifiers (argmax, cross-entropy, attribution of a class) works as it is.

    Source: Chowdhury et al., "CAPE: CAM as a Probabilistic Ensemble for Enhanced DNN
    Interpretation", CVPR 2024 (arXiv:2404.02388).

    Numerics: float16 and bfloat16 heads run their matrix product in that type and everything after
    it in float32, and return float32, as ``torch.autocast`` does for softmax: one region's share
    of one class in a thousand is below what float16 can hold. Float32 and float64 stay what they
    are. Half-precision features may be fed to a float32 or float64 head.

    Args:
        in_channels: channels C of the feature map, >= 1.
        num_classes: number of classes K, >= 2 (with one class every probability is 1).
        bias: learn an additive bias per class.
        device: where the parameters are created.
        dtype: floating type of the parameters.

    Attributes:
        weight: ``[K, C]``, the classifier's weight.
        bias: ``[K]`` or None.
        t1: logarithm of the temperature of the class logits, a scalar, 0 at first.
        t2: logarithm of the temperature of the region weights, a scalar, 0 at first.
        t3: logarithm of a further temperature of both, used by the training loss alone.

    Raises:
        ValueError: ``in_channels`` < 1 or ``num_classes`` < 2.

    Example:
        >>> import torch
        >>> from fam_plugins.cape import CapeHead
        >>> head = CapeHead(in_channels=16, num_classes=5)
        >>> features = torch.randn(2, 16, 7, 7)
        >>> maps = head.contributions(features)
        >>> maps.shape
        torch.Size([2, 5, 7, 7])
        >>> torch.allclose(maps.sum(dim=(2, 3)), head(features).exp())
        True
    """

    bias: nn.Parameter | None

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
        if in_channels < 1:
            raise ValueError(f"in_channels is {in_channels}: a feature map has at least 1 channel")
        if num_classes < 2:
            raise ValueError(
                f"num_classes is {num_classes}: CAPE shares probability among classes, so it needs "
                "at least 2 (give a binary classifier two outputs instead of one)"
            )
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.weight = nn.Parameter(
            torch.empty(num_classes, in_channels, device=device, dtype=dtype)
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.t1 = nn.Parameter(torch.zeros((), device=device, dtype=dtype))
        self.t2 = nn.Parameter(torch.zeros((), device=device, dtype=dtype))
        self.t3 = nn.Parameter(torch.zeros((), device=device, dtype=dtype))
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
            linear: the classifier after global average pooling; with or without bias.

        Returns:
            A head of the same type, on the same device, with temperatures of 1.

        Raises:
            TypeError: ``linear`` is not an ``nn.Linear``.

        Example:
            >>> from torch import nn
            >>> head = CapeHead.from_linear(nn.Linear(16, 5, bias=False))
            >>> head.bias is None
            True
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"from_linear takes the model's nn.Linear classifier, got {type(linear).__name__}; "
                "for resnet50 that is model.fc"
            )
        head = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        with torch.no_grad():
            head.weight.copy_(linear.weight)
            if head.bias is not None:
                head.bias.copy_(linear.bias)
        return head

    @classmethod
    def from_released_state_dict(cls, state_dict: Mapping[str, Tensor]) -> CapeHead:
        """Build the head of a checkpoint written by the authors' released code.

        Args:
            state_dict: the checkpoint, as ``torch.load(path, weights_only=True)`` gives it; names
                outside the CAPE head are ignored.

        Returns:
            A head of the checkpoint's size and type.

        Raises:
            ValueError: names of the CAPE head are missing or sizes contradict each other.

        Example:
            >>> import torch
            >>> released = {
            ...     "classifiers.cape.2.weight": torch.randn(5, 16),
            ...     "classifiers.cape.2.bias": torch.randn(5),
            ...     "t1.T": torch.zeros(1), "t2.T": torch.zeros(1), "t3.T": torch.zeros(1, 1, 1, 1),
            ... }
            >>> CapeHead.from_released_state_dict(released)
            CapeHead(in_channels=16, num_classes=5, bias=True)
        """
        state = head_state_from_release(state_dict)
        weight = state["weight"]
        head = cls(weight.shape[1], weight.shape[0], bias="bias" in state, dtype=weight.dtype)
        head.load_state_dict(state)
        return head

    def forward(self, features: Tensor) -> Tensor:
        """Log-probabilities of the classes.

        Args:
            features: feature map ``[B, C, h, w]`` or ``[B, C, d, h, w]``.

        Returns:
            ``log p``, ``[B, K]``, each in (-inf, 0]; finite wherever the logits are.

        Raises:
            TypeError: features are not floating point, or wider than the head.
            ValueError: features are not 4-D or 5-D, are empty, or have other channels.
        """
        return self._log_probs(self._region_logits(features), soft=False)

    def soft_log_probs(self, features: Tensor) -> Tensor:
        """Log-probabilities at the further temperature ``exp(t3)``, for the training loss alone.

        Args:
            features: feature map ``[B, C, h, w]`` or ``[B, C, d, h, w]``.

        Returns:
            ``[B, K]``, log-probabilities with both kinds of logits divided by ``exp(t3)`` as well.

        Raises:
            TypeError: as calling the head.
            ValueError: as calling the head.
        """
        return self._log_probs(self._region_logits(features), soft=True)

    def class_maps(self, features: Tensor) -> Tensor:
        """Class logits of every region, the maps that CAM shows (with the bias).

        Their mean over regions is what the same classifier says after global average pooling.

        Args:
            features: feature map ``[B, C, h, w]`` or ``[B, C, d, h, w]``.

        Returns:
            ``M``, ``[B, K, h, w]`` (or ``[B, K, d, h, w]``), signed.

        Raises:
            TypeError: as calling the head.
            ValueError: as calling the head.
        """
        return self._as_maps(self._region_logits(features), features)

    def contributions(self, features: Tensor) -> Tensor:
        """The CAPE map: the probability that each region contributes to each class.

        Args:
            features: feature map ``[B, C, h, w]`` or ``[B, C, d, h, w]``.

        Returns:
            ``P``, ``[B, K, h, w]`` (or ``[B, K, d, h, w]``), in [0, 1]; sums to the class
            probability over regions, and to 1 over regions and classes.

        Raises:
            TypeError: as calling the head.
            ValueError: as calling the head.
        """
        class_logits, weight_logits = self._tempered(self._region_logits(features), soft=False)
        # A product of two softmaxes, not exp(log + log): the sum stays 1 to rounding.
        share = torch.softmax(class_logits, dim=2) * torch.softmax(weight_logits, dim=1)
        return self._as_maps(share, features)

    def relative(self, features: Tensor) -> Tensor:
        """The µ-CAPE map ``relu(c_k(i) + w(i))``: relative, not a probability.

        It shows faint contributions that the exponential of the CAPE map hides. Adding one
        constant to all logits changes it, while it leaves :meth:`contributions` as it is.

        Args:
            features: feature map ``[B, C, h, w]`` or ``[B, C, d, h, w]``.

        Returns:
            ``[B, K, h, w]`` (or ``[B, K, d, h, w]``), >= 0, in units of logits.

        Raises:
            TypeError: as calling the head.
            ValueError: as calling the head.
        """
        class_logits, weight_logits = self._tempered(self._region_logits(features), soft=False)
        return self._as_maps(torch.relu(class_logits + weight_logits), features)

    def extra_repr(self) -> str:
        """Sizes, as ``nn.Linear`` prints them."""
        return (
            f"in_channels={self.in_channels}, num_classes={self.num_classes}, "
            f"bias={self.bias is not None}"
        )

    def _region_logits(self, features: Tensor) -> Tensor:
        """M as ``[B, N, K]``: the classifier at every region, classes last.

        ``F.linear`` rather than a 1x1 convolution: it follows the same TF32 setting as the model's
        own classifier, and the class softmax then runs over contiguous memory.
        """
        features = checked_features(features, self.in_channels, self.weight.dtype)
        return F.linear(features.flatten(2).mT, self.weight, self.bias)

    def _tempered(self, logits: Tensor, *, soft: bool) -> tuple[Tensor, Tensor]:
        """Class logits ``[B, N, K]`` and weight logits ``[B, N, 1]``, in float32 or wider."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        dtype = torch.promote_types(dtype, self.weight.dtype)
        logits = logits.to(dtype)
        extra = self.t3.to(dtype) if soft else 0.0
        # Times exp(-t), not divided by exp(t): the backward pass of a division costs twice as much.
        class_logits = logits * (-self.t1.to(dtype) - extra).exp()
        weight_logits = logits.mean(dim=2, keepdim=True) * (-self.t2.to(dtype) - extra).exp()
        return class_logits, weight_logits

    def _log_probs(self, logits: Tensor, *, soft: bool) -> Tensor:
        class_logits, weight_logits = self._tempered(logits, soft=soft)
        # Sums of logarithms: finite for a class hundreds of logits behind, where log(p) is not.
        joint = F.log_softmax(class_logits, dim=2) + F.log_softmax(weight_logits, dim=1)
        return torch.logsumexp(joint, dim=1)

    def _as_maps(self, by_region: Tensor, features: Tensor) -> Tensor:
        """``[B, N, K]`` back to ``[B, K, *spatial]``."""
        return by_region.mT.reshape(by_region.shape[0], -1, *features.shape[2:]).contiguous()


def checked_features(features: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Return ``features`` in the head's type, or raise.

    Narrower types are widened (a float32 head on a bfloat16 backbone is a sound choice); wider
    ones are refused rather than silently rounded.

    Args:
        features: ``[B, C, h, w]`` or ``[B, C, d, h, w]``.
        channels: C that the head was built for.
        dtype: the head's floating type.

    Returns:
        The features in ``dtype``.

    Raises:
        TypeError: features are not floating point, or wider than ``dtype``.
        ValueError: features are not 4-D or 5-D, are empty, or have other channels.
    """
    shape = tuple(features.shape)
    if features.ndim not in (4, 5):
        raise ValueError(
            f"CapeHead takes a feature map [B, C, h, w] or [B, C, d, h, w], got {features.ndim}-D "
            f"{shape}; add a batch axis with features.unsqueeze(0), or reshape tokens [B, N, C] to "
            "[B, C, h, w]"
        )
    if features.shape[1] != channels:
        hint = "take the map that enters the pooling layer"
        if features.shape[-1] == channels:
            hint = "channels come last here, use features.movedim(-1, 1)"
        raise ValueError(
            f"CapeHead was built for {channels} channels, got {features.shape[1]} in {shape}; "
            f"{hint}"
        )
    if features.numel() == 0:
        raise ValueError(f"the feature map {shape} is empty: pass at least one image and region")
    if not features.is_floating_point():
        raise TypeError(f"features are {features.dtype}: convert them with features.float()")
    if torch.promote_types(features.dtype, dtype) != dtype:
        raise TypeError(
            f"features are {features.dtype} but the head is {dtype}: use head.to({features.dtype}) "
            f"or features.to({dtype})"
        )
    return features.to(dtype)
