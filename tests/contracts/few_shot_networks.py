"""The two backbones of the few-shot literature, small: Conv-4 and ResNet-12."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Conv4(nn.Module):
    """Four blocks of convolution, batch norm, ReLU, pooling; the map itself, flattened, is the
    embedding (Matching Networks, arXiv 1606.04080; ProtoNet, arXiv 1703.05175)."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        blocks = []
        for width in (3, channels, channels, channels):
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(width, channels, 3, padding=1),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                    nn.MaxPool2d(2),
                )
            )
        self.layers = nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(1)


class Residual(nn.Module):
    """Three convolutions beside a projection, LeakyReLU, pooling (TADAM, arXiv 1805.10123)."""

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__()
        widths = [narrow, wide, wide]
        self.convs = nn.ModuleList(nn.Conv2d(w, wide, 3, padding=1, bias=False) for w in widths)
        self.norms = nn.ModuleList(nn.BatchNorm2d(wide) for _ in widths)
        self.shortcut = nn.Sequential(nn.Conv2d(narrow, wide, 1, bias=False), nn.BatchNorm2d(wide))

    def forward(self, maps: Tensor) -> Tensor:
        out = maps
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            out = norm(conv(out))
            if index < 2:
                out = F.leaky_relu(out, 0.1)
        return F.max_pool2d(F.leaky_relu(out + self.shortcut(maps), 0.1), 2)


class ResNet12(nn.Module):
    """Four residual blocks, then the mean over regions."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 16, 24)) -> None:
        super().__init__()
        narrow = (3, *widths[:-1])
        self.blocks = nn.Sequential(*map(Residual, widths, narrow))

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images).mean(dim=(2, 3))
