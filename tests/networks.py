"""Tiny networks for the tests, and a look at what an explanation may have left behind."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.vgg import VGG, make_layers


class TinyNet(nn.Module):
    """Convolution, in-place ReLU, global average pooling, linear output."""

    def __init__(self, outputs: int = 5, channels: int = 6, head: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.features = nn.Conv2d(channels, channels, 3, padding=1, stride=2)
        self.last = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, outputs) if head is None else head
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        maps = self.last(self.features(self.relu(self.norm(self.conv(images)))))
        return self.head(self.pool(maps).flatten(1))


def encoder(channels: int = 6) -> TinyNet:
    """A pooled embedding without a head, in eval mode."""
    torch.manual_seed(0)
    return TinyNet(channels=channels, head=nn.Identity()).eval()


def classifier() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet().eval()


class OwnBackward(torch.autograd.Function):
    """Looks at values, which cannot be vectorised."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return grad * (2 if grad.sum().item() < 1e9 else 0)


def narrow_vgg(num_classes: int = 1000) -> VGG:
    """torchvision's VGG in its form, a fraction of its 130 million weights."""
    with torch.device("meta"):  # its own classifier alone takes a second to draw
        net = VGG(nn.Sequential())
    net.features = make_layers([8, "M", 8, "M", 16, 16, "M", 16, 16, "M", 16, 16, "M"])
    net.classifier = nn.Sequential(
        nn.Linear(16 * 49, 32), nn.ReLU(True), nn.Dropout(),
        nn.Linear(32, 32), nn.ReLU(True), nn.Dropout(),
        nn.Linear(32, num_classes),
    )  # fmt: skip
    return net


def narrow_convnext(num_classes: int = 1000) -> ConvNeXt:
    """torchvision's ConvNeXt, one narrow block per stage."""
    stages = [CNBlockConfig(*widths, 1) for widths in pairwise((8, 16, 24, 32, None))]
    return ConvNeXt(stages, num_classes=num_classes)


def pooled() -> nn.Sequential:
    """No parameters: the feature map is the input, the embedding its mean."""
    return nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@dataclass
class State:
    """Everything of a model and an input that an explanation must leave as it was."""

    training: dict[str, bool]
    hooks: dict[str, int]
    grads: dict[str, Tensor | None]
    requires_grad: dict[str, bool]
    values: dict[str, Tensor]
    grad_enabled: bool

    @classmethod
    def of(cls, model: nn.Module) -> State:
        return cls(
            training={n: m.training for n, m in model.named_modules()},
            hooks={
                n: len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
                for n, m in model.named_modules()
            },
            grads={n: copy.copy(p.grad) for n, p in model.named_parameters()},
            requires_grad={n: p.requires_grad for n, p in model.named_parameters()},
            values={n: v.clone() for n, v in model.state_dict().items()},
            grad_enabled=torch.is_grad_enabled(),
        )

    def assert_unchanged(self, model: nn.Module) -> None:
        now = State.of(model)
        assert now.training == self.training
        assert now.hooks == self.hooks
        assert now.requires_grad == self.requires_grad
        assert now.grad_enabled == self.grad_enabled
        for name, grad in self.grads.items():
            if grad is None:
                assert now.grads[name] is None, f"{name} received a gradient"
            else:
                assert torch.equal(grad, now.grads[name])
        for name, value in self.values.items():
            assert torch.equal(value, now.values[name]), f"{name} changed"
