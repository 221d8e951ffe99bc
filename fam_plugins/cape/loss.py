"""What a CAPE head is trained with: distillation from the model's own classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fam_plugins.cape.head import CapeHead

__all__ = ["cape_loss"]


def cape_loss(
    head: CapeHead,
    features: Tensor,
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 2.0,
) -> Tensor:
    """Loss for training a model and its CAPE head together, or the head alone.

    ::

        alpha · CE(logits, labels)
          + beta · T² · KL( softmax(logits / T) || head.soft_log_probs(features) )

    The second term teaches the head what the classifier says. Its teacher (``logits``) and its
    input (``features``) are detached here, so CAPE never changes what the model learns: gradients
    of the backbone and of its classifier come from the first term alone.

    * ``alpha = beta = 1`` with labels: train everything from the start, the authors' setting "TS".
    * ``alpha = 0``, no labels: the head alone, "PF"; :func:`fit_cape_head` does the whole loop.

    Source: arXiv:2404.02388, and its released code for the settings.

    Args:
        head: the CAPE head.
        features: feature map ``[B, C, h, w]`` (or 5-D) that enters pooling.
        logits: the model's own class logits ``[B, K]``.
        labels: class indices ``[B]``, int64; needed when ``alpha`` is not 0.
        alpha: weight of the cross-entropy, >= 0.
        beta: weight of the distillation, >= 0.
        temperature: T of the teacher, > 0.

    Returns:
        A scalar in nats, mean over the batch, float32 or wider.

    Raises:
        TypeError: ``labels`` are not whole numbers.
        ValueError: shapes that do not match, labels missing or out of range, a weight or
            temperature out of range.

    Example:
        In a training loop, with ``model`` from :func:`with_cape_head`, the first two lines would
        be ``features, logits = model.features_and_logits(images)``.

        >>> import torch
        >>> from fam_plugins.cape import CapeHead, cape_loss
        >>> features = torch.randn(4, 8, 7, 7, requires_grad=True)
        >>> logits = torch.randn(4, 3, requires_grad=True)
        >>> loss = cape_loss(CapeHead(8, 3), features, logits, torch.tensor([0, 1, 2, 0]))
        >>> loss.backward()
        >>> features.grad is None  # CAPE does not train the backbone
        True
    """
    _check_weights(alpha, beta, temperature)
    if logits.ndim != 2 or logits.shape != (features.shape[0], head.num_classes):
        raise ValueError(
            f"logits must be [{features.shape[0]}, {head.num_classes}] (images, the head's "
            f"classes), got {tuple(logits.shape)}"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = logits.new_zeros(())
    if alpha:
        if labels is None:
            raise ValueError("labels are needed for the cross-entropy: pass them, or alpha=0")
        check_labels(labels, images=logits.shape[0], classes=head.num_classes)
        loss = loss + alpha * F.cross_entropy(logits, labels.long())
    if beta:
        teacher = F.log_softmax(logits.detach() / temperature, dim=1)
        student = head.soft_log_probs(features.detach())
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        loss = loss + beta * temperature**2 * divergence
    return loss


def check_labels(labels: Tensor, *, images: int, classes: int) -> None:
    """Refuse labels that are not one class index per image."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"labels are {labels.dtype}: pass class indices [B] as int64; for one-hot or soft "
            "labels take labels.argmax(dim=1)"
        )
    if labels.shape != (images,):
        raise ValueError(
            f"labels are {tuple(labels.shape)}: pass one class index for each of the {images} "
            "images, [B]"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"label {low if low < 0 else high} is out of range: the classifier knows classes 0 to "
            f"{classes - 1}"
        )


def _check_weights(alpha: float, beta: float, temperature: float) -> None:
    # Written as "not (x >= 0)" so that NaN is refused too.
    if not (alpha >= 0 and beta >= 0 and alpha + beta > 0):
        raise ValueError(f"alpha = {alpha}, beta = {beta}: use weights >= 0, not both 0")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be > 0")
