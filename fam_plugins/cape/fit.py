"""Post-fitting: teach the CAPE head what the trained classifier says."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fam_plugins.cape.batches import (
    FeatureCache,
    checked_batches,
    computed_features,
    refuse_one_shot,
)
from fam_plugins.cape.checkpoint import fingerprint, load_progress, prepare_path, save_progress
from fam_plugins.cape.loss import cape_loss
from fam_plugins.cape.model import CapeModel
from fam_plugins.core.eval_mode import eval_mode

__all__ = ["FitHistory", "fit_cape_head"]


@dataclass
class FitHistory:
    """What happened in each epoch, measured on the training images as they passed by.

    Attributes:
        loss: mean distillation loss, in nats (times T²).
        agreement: share of images for which both heads have the same top class, in [0, 1].
        confidence: mean probability of the CAPE head's top class, in [0, 1].
        interrupted: whether Ctrl-C ended the fit early.
    """

    loss: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    interrupted: bool = False


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
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> FitHistory:
    """Fit the CAPE head of a trained model by distillation; nothing else changes.

    The authors' "post-fitting" (PF): backbone and classifier frozen, batch norm in eval mode, SGD
    on the head alone with their settings as defaults. Labels are not needed. Modes,
    ``requires_grad`` and ``.grad`` of every parameter are given back as they were.

    Source: arXiv:2404.02388 and the settings of its released code (batches of 32, 30 epochs).

    Args:
        model: what :func:`with_cape_head` returned.
        loader: yields images ``[B, C, H, W]`` or tuples that start with them, preprocessed as the
            model expects; moved to the model's device and type.
        epochs: how many epochs in all, those of a resumed checkpoint included; >= 1.
        lr: learning rate of SGD, > 0.
        momentum: momentum of SGD, in [0, 1).
        weight_decay: weight decay of SGD, >= 0.
        step_size: epochs between two reductions of the learning rate, >= 1.
        gamma: factor of each reduction, in (0, 1].
        temperature: temperature T of the teacher, > 0.
        cache: compute features once and keep them in host memory (images · C · h · w numbers, up
            to twice that while collecting), shuffled anew every epoch; an epoch then costs the
            head alone. Random augmentation is frozen as the first pass drew it.
        path: file for head and optimiser after each epoch, written atomically. When it exists
            already, the fit continues from it.
        progress: show a tqdm progress bar.

    Returns:
        Loss, agreement of the two heads and mean confidence per epoch. After Ctrl-C: of the
        complete epochs; the head keeps what it has learnt by then.

    Raises:
        TypeError: ``model`` has no CAPE head, or the loader yields something other than images.
        ValueError: a setting out of range, an empty loader, wrong shapes, NaN images, or a file
            that is damaged or belongs to another fit.
        FloatingPointError: the loss is no longer finite.

        Whatever is raised, the head is as after the last complete epoch.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fam_plugins.cape import fit_cape_head, with_cape_head
        >>> net = nn.Sequential(
        ...     nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        ...     nn.Flatten(), nn.Linear(8, 3),
        ... )
        >>> model = with_cape_head(net)
        >>> history = fit_cape_head(model, [torch.randn(4, 1, 8, 8)], epochs=2, progress=False)
        >>> len(history.loss)
        2
    """
    if not isinstance(model, CapeModel):
        raise TypeError(
            f"model is a {type(model).__name__}: pass what with_cape_head(model) returned"
        )
    settings = {
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "step_size": step_size,
        "gamma": gamma,
        "temperature": temperature,
    }
    _check_settings(epochs, settings)
    if not cache and epochs > 1:
        refuse_one_shot(loader)
    target = None if path is None else prepare_path(path)
    teacher = fingerprint(model.classifier)
    saved = None
    if target is not None and target.exists():
        saved = load_progress(target, model.head, teacher=teacher, settings=settings)

    with _only_head_trains(model):
        fit = _Fit(model, settings)
        if saved is not None:
            fit.resume(saved)
        try:
            fit.run(loader, epochs, cache, target, teacher, progress)
        except KeyboardInterrupt:
            fit.history.interrupted = True
            warnings.warn(
                f"stopped after {len(fit.history.loss)} of {epochs} epochs; the head is usable",
                stacklevel=2,
            )
        except BaseException:
            fit.roll_back()
            raise
    return fit.history


class _Fit:
    """State of one run: head, optimiser, schedule, history."""

    def __init__(self, model: CapeModel, settings: dict[str, float]) -> None:
        self.model = model
        self.head = model.head
        self.settings = settings
        self.history = FitHistory()
        self.optimizer = torch.optim.SGD(
            self.head.parameters(),
            lr=settings["lr"],
            momentum=settings["momentum"],
            weight_decay=settings["weight_decay"],
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(
            self.optimizer, int(settings["step_size"]), settings["gamma"]
        )
        self._remember()

    def resume(self, saved: dict[str, Any]) -> None:
        self.head.load_state_dict(saved["head"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.history = FitHistory(**saved["history"])
        self._remember()

    def roll_back(self) -> None:
        self.head.load_state_dict(self._last_good)

    def run(
        self,
        loader: Iterable[Any],
        epochs: int,
        cache: bool,
        target: Path | None,
        teacher: str,
        progress: bool,
    ) -> None:
        if len(self.history.loss) >= epochs:
            return
        kept = FeatureCache(self._computed(loader, progress)) if cache else None
        for epoch in range(len(self.history.loss), epochs):
            batches = kept.shuffled(epoch) if kept else self._computed(loader)
            length = len(kept) if kept else _length(loader)
            with _bar(batches, length, f"CAPE head {epoch + 1}/{epochs}", progress) as bar:
                self._epoch(bar)
            self.scheduler.step()
            self._remember()
            if target is not None:
                state = {
                    "head": self.head.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                    "history": asdict(self.history),
                    "settings": self.settings,
                    "teacher": teacher,
                }
                save_progress(target, state)

    def _epoch(self, bar: Any) -> None:
        # Sums stay on the device: reading them at every step would stall a GPU.
        totals: Tensor | None = None
        count = 0
        for features, logits in bar:
            loss = cape_loss(
                self.head, features, logits, alpha=0, temperature=self.settings["temperature"]
            )
            with torch.no_grad():
                top, top_class = self.head(features).max(dim=1)
                same = (top_class == logits.argmax(dim=1)).sum()
                sums = torch.stack([loss * len(logits), same.to(loss.dtype), top.exp().sum()])
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            totals = sums if totals is None else totals + sums
            count += len(logits)
        assert totals is not None  # checked_batches refuses an empty loader
        loss_sum, same_sum, top_sum = totals.tolist()
        if not math.isfinite(loss_sum):
            raise FloatingPointError(
                f"the loss was not finite in epoch {len(self.history.loss) + 1}: lower lr (now "
                f"{self.settings['lr']}), fit in float32 when the head is half precision (now "
                f"{self.head.weight.dtype}), and check that the model's features are finite"
            )
        self.history.loss.append(loss_sum / count)
        self.history.agreement.append(same_sum / count)
        self.history.confidence.append(top_sum / count)

    def _computed(
        self, loader: Iterable[Any], progress: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and the teacher's logits of every batch, without gradients."""
        batches = checked_batches(loader, self.model, labelled=False)
        with _bar(batches, _length(loader), "CAPE features", progress) as bar:
            for images, _ in bar:
                yield computed_features(self.model, images)

    def _remember(self) -> None:
        self._last_good = {k: v.detach().clone() for k, v in self.head.state_dict().items()}


@contextmanager
def _only_head_trains(model: CapeModel) -> Iterator[None]:
    """Eval mode and trainable head inside; modes, flags and gradients as before afterwards."""
    before = [(p, p.requires_grad, p.grad) for p in model.head.parameters()]
    try:
        with eval_mode(model), torch.enable_grad():
            for parameter, _, _ in before:
                parameter.grad = None
                parameter.requires_grad_(True)
            yield
    finally:
        for parameter, flag, grad in before:
            parameter.requires_grad_(flag)
            parameter.grad = grad


def _bar(batches: Iterable[Any], length: int | None, name: str, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(batches, total=length, desc=name, disable=not progress, leave=False)


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # an iterable data set
        return None


def _check_settings(epochs: int, settings: dict[str, float]) -> None:
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs is {epochs!r}: use a whole number >= 1")
    step = settings["step_size"]
    if int(step) != step or step < 1:
        raise ValueError(f"step_size is {step}: use a whole number >= 1")
    ranges = {
        "lr": (0 < settings["lr"] < math.inf, "> 0"),
        "momentum": (0 <= settings["momentum"] < 1, "in [0, 1)"),
        "weight_decay": (0 <= settings["weight_decay"] < math.inf, ">= 0"),
        "gamma": (0 < settings["gamma"] <= 1, "in (0, 1]"),
        "temperature": (0 < settings["temperature"] < math.inf, "> 0"),
    }
    for name, (fits, wanted) in ranges.items():
        if not fits:
            raise ValueError(f"{name} is {settings[name]}: it must be {wanted}")
