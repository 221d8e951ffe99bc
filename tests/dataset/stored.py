"""A tiny explainer, images with ids, and what a folder holds as comparable rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fam_plugins import LayerFam, SimilarityModel
from fam_plugins.dataset import read_maps


def explainer(rule: str = "additive", references: int = 4, **options) -> LayerFam:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 3, stride=2)
    encoder = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    encoder = encoder.append(nn.Flatten()).eval()
    names = [f"class {row}" for row in range(references)]
    model = SimilarityModel(encoder, torch.randn(references, 6), labels=names, **options)
    return LayerFam(model, "2", rule=rule)


def image(number: int, size: int = 12) -> Tensor:
    return torch.randn(3, size, size, generator=torch.Generator().manual_seed(number))


def items(count: int, start: int = 0) -> list[tuple[str, Tensor]]:
    return [(f"{number:04d}.png", image(number)) for number in range(start, start + count)]


def rows_in(out) -> list[tuple]:
    """Every row, maps as lists: sorted, so that the order of parts does not matter."""
    found = []
    for row in read_maps(out)[1]:
        maps = None if row["map"] is None else row["map"].tolist()
        found.append((row["id"], row["reference"], *list(row.values())[2:-1], maps))
    return sorted(found, key=lambda row: (row[0], -1 if row[1] is None else row[1]))
