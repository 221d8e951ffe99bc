"""Post-fitting: teach the CAPE head the output of the trained classifier."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from fam_plugins.cape.batches import FeatureCache, feature_batches
from fam_plugins.cape.checkpoint import Checkpoint
from fam_plugins.cape.head import CapeHead, classify_regions, log_probabilities
from fam_plugins.cape.loss import distillation
from fam_plugins.cape.model import CapeModel, is_finite, require_cape_model
from fam_plugins.core.eval_mode import eval_mode

__all__ = ["FitHistory", "fit_cape_head"]


@dataclass
class FitHistory:
    """What happened in each epoch, measured on the training images as they passed by.

    Attributes:
        loss: Mean distillation loss, in nats (times T²).
        agreement: Share of images for which both heads have the same top class, in [0, 1].
        confidence: Mean probability of the CAPE head's top class, in [0, 1].
        interrupted: Whether Ctrl-C ended the fit early.
    """

    loss: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    interrupted: bool = False


# NaN fails every comparison.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (lambda n: isinstance(n, int) and n >= 1, "an int, at least 1"),
    "lr": (lambda x: 0 < x < math.inf, "a float above 0"),
    "momentum": (lambda x: 0 <= x < 1, "a float in [0, 1)"),
    "weight_decay": (lambda x: 0 <= x < math.inf, "a float, at least 0"),
    "step_size": (lambda n: isinstance(n, int) and n >= 1, "an int, at least 1"),
    "gamma": (lambda x: 0 < x <= 1, "a float in (0, 1]"),
    "temperature": (lambda x: 0 < x < math.inf, "a float above 0"),
}


def fit_cape_head(
    model: CapeModel,
    loader: Iterable[Any],
    *,
    epochs: int = 30,
    lr: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    step_size: int = 30,
    gamma: float = 0.1,
    temperature: float = 2.0,
    cache: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> FitHistory:
    """Fit the CAPE head of a trained model by distillation; nothing else changes.

    The authors' "post-fitting" (PF): backbone and classifier frozen, batch norm in eval mode, SGD
    on the head alone with their settings as defaults. Labels are not needed. Modes,
    ``requires_grad`` and ``.grad`` of every parameter stay as they were. Source: CAPE (CVPR 2024,
    arXiv 2404.02388) and the settings of its released code (batches of 32, 30 epochs).

    Args:
        model: What :func:`with_cape_head` returned.
        loader: Yields images ``[B, C, H, W]``, or tuples or dicts as :func:`gallery_mean` takes,
            preprocessed as the model expects; moved to the model's device and type.
        epochs: How many epochs in all, those of a resumed checkpoint included; at least 1.
        lr: Learning rate of SGD, above 0.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: Weight decay of SGD, at least 0.
        step_size: Epochs between two reductions of the learning rate, at least 1.
        gamma: Factor of each reduction, in (0, 1].
        temperature: Temperature T of the teacher, above 0.
        cache: Compute features once and keep them in host memory (images · C · h · w numbers, up
            to twice that while collecting), shuffled anew every epoch: an epoch then costs the
            head alone. Random augmentation stays as the first pass drew it.
        checkpoint: File for head and optimiser after each epoch, written atomically. If it exists
            already, the fit continues from it.
        progress: Show a tqdm progress bar.

    Returns:
        Loss, agreement of the two heads and mean confidence per epoch. After Ctrl-C: of the
        complete epochs; the head keeps what it has learnt by then.

    Raises:
        TypeError: If ``model`` has no CAPE head, or the loader yields something else than images.
        ValueError: If a setting is out of range, the loader is empty, images do not fit, or the
            checkpoint is damaged or belongs to another fit.
        FloatingPointError: If the loss is no longer finite. Whatever is raised, the head is as
            after the last complete epoch.

    Example:
        >>> from torch import nn
        >>> from fam_plugins.cape import with_cape_head
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> model = with_cape_head(net.append(nn.Linear(8, 3)))
        >>> history = fit_cape_head(model, [torch.randn(4, 1, 8, 8)], epochs=2, progress=False)
        >>> len(history.loss)
        2
    """
    from tqdm import tqdm

    require_cape_model(model, loader)
    settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    settings |= {"step_size": step_size, "gamma": gamma, "temperature": temperature}
    for name, value in {"epochs": epochs, **settings}.items():
        fits, wanted = _RANGES[name]
        if not isinstance(value, (int, float)) or not fits(value):
            raise ValueError(f"{name} must be {wanted}, not {value!r}")
    settings = {name: float(value) for name, value in settings.items()}  # no file holds numpy's
    if not cache and epochs > 1 and isinstance(loader, Iterator):
        raise TypeError("an iterator can be read only once: pass a DataLoader, or cache=True")
    file = None if checkpoint is None else Checkpoint(Path(checkpoint), model, settings)
    head, history, kept = model.head, FitHistory(), None
    bar = partial(tqdm, disable=not progress, leave=False)
    with _only_head_trains(model):
        rates = settings["lr"], settings["momentum"], 0, settings["weight_decay"]
        optimizer = SGD(head.parameters(), *rates)
        scheduler = StepLR(optimizer, int(step_size), settings["gamma"])
        parts: dict[str, Any] = {"head": head, "optimizer": optimizer, "scheduler": scheduler}
        if saved := file and file.load(parts):
            history = FitHistory(**saved["history"])
        last_good = copy.deepcopy(head.state_dict())
        try:
            for epoch in range(len(history.loss), epochs):
                if cache and kept is None:
                    with bar(loader, desc="CAPE features") as images:
                        kept = FeatureCache(feature_batches(images, model))
                items, total = (kept.shuffled(epoch), len(kept)) if kept else (loader, None)
                with bar(items, desc=f"CAPE head {epoch + 1}/{epochs}", total=total) as shown:
                    batches = shown if kept else feature_batches(shown, model)
                    loss, agreement, confidence = _epoch(head, batches, optimizer, temperature)
                if not math.isfinite(loss) or not is_finite(head):
                    raise FloatingPointError(
                        f"the fit is not finite in epoch {epoch + 1}: lower lr, check that the "
                        f"features are finite, and fit in float32 (the head is {head.weight.dtype})"
                    )
                history.loss.append(loss)
                history.agreement.append(agreement)
                history.confidence.append(confidence)
                scheduler.step()
                last_good = copy.deepcopy(head.state_dict())
                if file is not None:
                    states = {name: part.state_dict() for name, part in parts.items()}
                    file.save(**states, history=asdict(history))
        except KeyboardInterrupt:
            history.interrupted = True
            warnings.warn(
                f"stopped after {len(history.loss)} of {epochs} epochs; the head is usable",
                stacklevel=2,
            )
        except BaseException:
            head.load_state_dict(last_good)
            raise
    return history


def _epoch(
    head: CapeHead, batches: Iterable[tuple[Any, ...]], optimizer: SGD, temperature: float
) -> list[float]:
    """Train on every batch once; return mean loss, agreement and confidence per image."""
    sums, count = [], 0
    for features, logits, *_ in batches:
        regions = classify_regions(head, features)
        soft = log_probabilities(regions, head.t1, head.t2, head.t3)
        loss = distillation(soft, logits, temperature)
        with torch.no_grad():
            top, top_class = log_probabilities(regions, head.t1, head.t2).max(dim=1)
            same = (top_class == logits.argmax(dim=1)).sum()
            # Sums stay on the device: reading them at every step would stall a GPU.
            sums.append(torch.stack([loss * len(logits), same, top.exp().sum()]))
        count += len(logits)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return [total / count for total in torch.stack(sums).sum(dim=0).tolist()]


@contextmanager
def _only_head_trains(model: CapeModel) -> Iterator[None]:
    """Eval mode and trainable head inside; modes, flags and gradients as before afterwards."""
    before = [(p, p.requires_grad, p.grad) for p in model.head.parameters()]
    try:
        with eval_mode(model), torch.inference_mode(False):  # which records gradients too
            for parameter, _, _ in before:
                parameter.requires_grad_(True)
            yield
    finally:
        for parameter, flag, grad in before:
            parameter.requires_grad_(flag)
            parameter.grad = grad
