"""Small vision transformers, trained on canvases of digits so that embeddings can be compared."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.edgenext import EdgeNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

# The examples are scripts, not a package: they find each other by their folder.
sys.path.insert(0, str(Path(__file__).parents[3] / "compat_examples"))

import digits as digits_data

PATCH, SIDE = 5, 4
"""Pixels to the side of a patch, and patches to the side of a digit's field: none lies in two."""
TRANSFORMER = {
    "img_size": 2 * digits_data.CELL,
    "patch_size": PATCH,
    "in_chans": 1,
    "num_classes": 0,
}
TRANSFORMER |= {"embed_dim": 64, "num_heads": 4, "mlp_ratio": 2.0, "dynamic_img_size": True}
TRANSFORMER |= {"pos_embed": "none"}


class Vit(VisionTransformer):
    """timm's, with a position in the field of a digit and one of the field.

    So that what is learnt of a digit in one field holds in the others, and for single images.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**TRANSFORMER, **settings)
        self.inside = nn.Parameter(0.3 * torch.randn(SIDE, SIDE, self.embed_dim))
        self.fields = nn.Parameter(0.3 * torch.randn(2, 2, self.embed_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):  # timm's are for wide networks: here all would be 0
                nn.init.xavier_uniform_(module.weight)
        self.patch_embed.proj.weight.data.mul_(4)

    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        bias = near(x.shape[2] // PATCH, x.shape[3] // PATCH, self.num_prefix_tokens)
        return super().forward_features(x, attn_mask=bias)

    def _pos_embed(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        fields = self.fields.repeat_interleave(SIDE, 0).repeat_interleave(SIDE, 1)
        position = self.inside.repeat(2, 2, 1) + fields
        x = (x + position[:height, :width]).flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x


def near(height: int, width: int, prefix: int) -> Tensor:
    """What is added to attention logits, ``[1, heads, T, T]``: less by the distance of two patches.

    ALiBi in two dimensions (Fuller et al., NeurIPS 2023), from head to head over longer ways;
    a class token sees all alike.
    """
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
    slopes = torch.tensor([2.0, 1.0, 1.0, 0.5])[:, None, None]
    return F.pad(-slopes * torch.cdist(places, places), (prefix, 0, prefix, 0))[None]


@dataclass(frozen=True)
class Kind:
    """A family of networks.

    Attributes:
        settings: Of timm's VisionTransformer; none for the hybrid.
        most: The most digits of a training canvas.
        steps: Of training.
        layers: What is explained, by title: early to late.
        recipe: The title of the layer that pytorch-grad-cam's documentation names.
    """

    settings: dict[str, Any]
    layers: dict[str, str]
    recipe: str = "last norm1"
    most: int = 4
    steps: int = 900


def _layers(depth: int, last: dict[str, str]) -> dict[str, str]:
    """Layers of timm's VisionTransformer: the input of a block is the output of the one before."""
    return {
        "patches": "patch_embed.proj",
        "block 0": "norm_pre",
        "middle block": f"blocks.{depth // 2 - 1}",
        "last block": f"blocks.{depth - 2}",
        "last norm1": f"blocks.{depth - 1}.norm1",
        **last,
    }


def _vit(depth: int, pool: str, last: dict[str, str]) -> dict[str, Any]:
    settings = {"depth": depth, "global_pool": pool, "class_token": pool == "token"}
    return {"settings": settings, "layers": _layers(depth, last)}


BEHIND = {"behind the last block": "blocks.3"}
KINDS = {
    "class token": Kind(**_vit(4, "token", {})),
    "attention pooling": Kind(**_vit(4, "map", BEHIND | {"last norm": "norm"}), steps=600),
    "mean + norm": Kind(**_vit(4, "avg", BEHIND), steps=600),
    "class token, single digits": Kind(**_vit(4, "token", {}), most=1, steps=450),
    "conv-attention hybrid": Kind(
        {}, {f"stage {k}": f"1.stages.{k}" for k in range(4)}, recipe="stage 3", steps=300
    ),
}
"""What is trained."""


@dataclass(frozen=True)
class Problem:
    """What one network is asked, and how often its four nearest references are the four digits."""

    encoder: nn.Module
    dataset: TensorDataset
    found: float


def build(kind: str) -> nn.Module:
    """The network of a kind, untrained."""
    settings = KINDS[kind].settings
    if settings:
        network = Vit(**settings)
        network.head = nn.BatchNorm1d(network.embed_dim, affine=False)
        return network
    hybrid = EdgeNeXt(
        in_chans=1,
        num_classes=0,
        dims=(16, 32, 48, 64),
        depths=(1, 2, 2, 2),
        global_block_counts=(0, 1, 1, 1),
        heads=(2, 2, 4, 4),
        d2_scales=(2, 2, 3, 4),
    )
    hybrid.head.fc = nn.BatchNorm1d(64, affine=False)
    # So that five halvings leave a region for every field.
    return nn.Sequential(nn.Upsample(scale_factor=1.6, mode="bilinear"), hybrid)


def problem(kind: str, seed: int, steps: int | None = None) -> Problem:
    """Train one network; what is asked comes from digits it has not seen."""
    digits = digits_data.load(seed)
    encoder = trained(kind, digits, seed, steps or KINDS[kind].steps)
    generator = torch.Generator().manual_seed(1000 + seed)
    fields = digits_data.place(digits.held_out, generator)
    dataset = TensorDataset(fields, digits.held_out_labels)
    return Problem(encoder, dataset, found_of_four(encoder, dataset, generator))


def canvases(
    fields: Tensor, labels: Tensor, count: int, most: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Canvases of one to ``most`` digits ``[N, 1, H, H]``, their digits ``[N, 4]``, which show."""
    rows = torch.stack([torch.randperm(len(labels), generator=generator)[:4] for _ in range(count)])
    here = torch.stack([torch.randperm(4, generator=generator) for _ in range(count)])
    shown = here < torch.randint(1, most + 1, (count, 1), generator=generator)
    tiles = fields[rows, 0] * shown[..., None, None]
    return canvas(tiles), labels[rows], shown


def trained(kind: str, digits: digits_data.Digits, seed: int, steps: int) -> nn.Module:
    """A network whose embedding of a canvas is near the prototype of every digit on it.

    Every step draws 20 single digits in fields of their own and 24 canvases; the target of the
    softmax over ten learnt prototypes is shared by the digits shown.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    encoder, most = build(kind), KINDS[kind].most
    prototypes, scale = nn.Parameter(torch.randn(10, 64)), nn.Parameter(torch.tensor(10.0))
    weights = [*encoder.parameters(), prototypes, scale]
    optimiser = torch.optim.AdamW(weights, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps, pct_start=0.1)

    def loss(embeddings: Tensor, wanted: Tensor) -> Tensor:
        close = F.normalize(embeddings, dim=1) @ F.normalize(prototypes, dim=1).T
        return F.cross_entropy(scale * close, wanted)

    for _ in range(steps):
        some = torch.randperm(len(digits.train), generator=generator)[:116]
        fields, labels = digits_data.place(digits.train[some], generator), digits.train_labels[some]
        fields = fields + 0.05 * torch.randn(fields.shape, generator=generator)
        images, drawn, shown = canvases(fields[20:], labels[20:], 24, most, generator)
        present = torch.zeros(24, 10).scatter_add(1, drawn, shown.float()).clamp_max(1)
        total = loss(encoder(images), present / present.sum(dim=1, keepdim=True))
        total = total + loss(encoder(fields[:20]), labels[:20])
        optimiser.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
    return encoder.eval()


def found_of_four(
    encoder: nn.Module, dataset: TensorDataset, generator: torch.Generator, count: int = 100
) -> float:
    """Share of a mosaic's four digits that are among its four nearest prototypes."""
    fields, labels = dataset.tensors
    rows = [torch.nonzero(labels == label).flatten() for label in range(10)]
    rest = torch.cat([of[5:] for of in rows])
    shots = fields[torch.cat([of[:5] for of in rows])]
    four = torch.stack([torch.randperm(10, generator=generator)[:4] for _ in range(count)])
    mosaics = []
    for wanted in four.tolist():
        mixed = rest[torch.randperm(len(rest), generator=generator)]
        chosen = [next(row for row in mixed.tolist() if labels[row] == k) for k in wanted]
        mosaics.append(canvas(fields[chosen, 0]))
    with torch.no_grad():
        prototypes = F.normalize(encoder(shots), dim=1).reshape(10, 5, -1).mean(dim=1)
        near_by = F.normalize(encoder(torch.stack(mosaics)), dim=1) @ F.normalize(prototypes).T
    nearest = near_by.topk(4).indices
    return (four[:, :, None] == nearest[:, None]).any(dim=2).double().mean().item()


def canvas(tiles: Tensor) -> Tensor:
    """Four fields ``[..., 4, H, H]`` in reading order -> ``[..., 1, 2H, 2H]``."""
    side = tiles.shape[-1]
    rows = tiles.unflatten(-3, (2, 2)).transpose(-3, -2)
    return rows.reshape(*tiles.shape[:-3], 1, 2 * side, 2 * side)
