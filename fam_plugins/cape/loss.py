"""What a CAPE head is trained with: distillation from the model's own classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fam_plugins.cape.head import CapeHead, require_floats

__all__ = ["cape_loss", "check_labels", "distillation"]


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

    Teacher (``logits``) and input (``features``) of the second term are detached here, so CAPE
    never changes what the model learns: its gradients come from the first term alone.

    * ``alpha = beta = 1`` with labels: train everything from the start, the authors' setting "TS".
    * ``alpha = 0``, no labels: the head alone, "PF"; :func:`fit_cape_head` does the whole loop.

    Source: CAPE (CVPR 2024, arXiv 2404.02388), and its released code for the settings.

    Args:
        head: The CAPE head.
        features: Feature map ``[B, C, h, w]`` (or 5-D) that enters pooling.
        logits: The model's own class logits ``[B, K]``.
        labels: Class indices ``[B]``, int64; needed unless ``alpha`` is 0.
        alpha: Weight of the cross-entropy, at least 0.
        beta: Weight of the distillation, at least 0.
        temperature: T of the teacher, above 0.

    Returns:
        A scalar in nats, mean over the batch, float32 or wider.

    Raises:
        TypeError: If ``labels`` are not whole numbers, or an argument is of another kind.
        ValueError: If shapes do not match, labels are missing, or something is out of range.

    Example:
        >>> features = torch.randn(4, 8, 7, 7, requires_grad=True)  # model.features_and_logits
        >>> logits = torch.randn(4, 3, requires_grad=True)
        >>> loss = cape_loss(CapeHead(8, 3), features, logits, torch.tensor([0, 1, 2, 0]))
        >>> loss.backward()
        >>> features.grad is None  # CAPE does not train the backbone
        True
    """
    if not isinstance(head, CapeHead):
        raise TypeError(f"head must be a CapeHead, as model.head, not a {type(head).__name__}")
    require_floats(features=features, logits=logits)
    ok = all(isinstance(x, (int, float)) and 0 <= x < torch.inf for x in (alpha, beta, temperature))
    if not ok or alpha + beta == 0 or temperature == 0:
        raise ValueError(
            "alpha and beta must be floats from 0 and not both 0, and temperature above 0, "
            f"not {alpha!r}, {beta!r} and {temperature!r}"
        )
    shape = (len(features), head.num_classes)
    if logits.shape != shape:
        raise ValueError(f"logits must be [B, K], {list(shape)}, not {list(logits.shape)}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = logits.new_zeros(())
    if alpha:
        if labels is None:
            raise ValueError("labels are needed for the cross-entropy: pass them, or alpha=0")
        check_labels(labels, images=shape[0], classes=shape[1])
        loss = loss + alpha * F.cross_entropy(logits, labels.long())
    if beta:
        student = head.soft_log_probs(features.detach())
        loss = loss + beta * distillation(student, logits, temperature)
    return loss


def distillation(student: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """``T² · KL(softmax(logits / T) || exp(student))``, mean over images; both are ``[B, K]``."""
    logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    teacher = F.log_softmax(logits / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def check_labels(labels: Tensor, *, images: int, classes: int) -> None:
    """Refuse labels that are not one class index per image, ``[B]``."""
    kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
    if kind not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"labels must be an int64 tensor, not {kind}: see labels.argmax(dim=1)")
    if labels.shape != (images,):
        shape = tuple(labels.shape)
        raise ValueError(f"pass one class index for each of the {images} images, not {shape}")
    wrong = labels[(labels < 0) | (labels >= classes)].tolist()
    if wrong:
        raise ValueError(f"label {wrong[0]} is out of range: classes go from 0 to {classes - 1}")
