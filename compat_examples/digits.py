"""Real images without a download: scikit-learn's handwritten digits, an embedding, and mosaics.

Shared by the examples of this folder. Nothing here is specific to fam_plugins: it is the model and
the data that a user would bring along.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm.auto import tqdm

CELL = 20
"""Height and width of the field a digit is drawn on, in pixels."""


@dataclass(frozen=True)
class Digits:
    """1,797 handwritten digits at 16 x 16 pixels, split into a part to train on and one held out.

    Attributes:
        train: ``[S, 1, 16, 16]`` in [0, 1], with ``train_labels`` ``[S]``.
        held_out: The same for the part that no training sees.
    """

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def load(seed: int = 0) -> Digits:
    """Load the digits and hold out 30 % of them."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(16, 16), mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, targets = images[order], torch.tensor(labels)[order]
    cut = int(0.7 * len(images))
    return Digits(images[:cut], targets[:cut], images[cut:], targets[cut:])


def place(images: Tensor, generator: torch.Generator) -> Tensor:
    """Draw each digit somewhere in a field of its own: 16 x 16 -> 20 x 20 pixels."""
    room = CELL - images.shape[-1]
    fields = torch.zeros(len(images), 1, CELL, CELL)
    shifts = torch.randint(0, room + 1, (len(images), 2), generator=generator).tolist()
    for field, image, (top, left) in zip(fields, images, shifts, strict=True):
        field[:, top : top + image.shape[-2], left : left + image.shape[-1]] = image
    return fields


class Encoder(nn.Module):
    """A small convolutional trunk, the mean over its regions, and a linear projection head.

    Args:
        head: Project the pooled features, as contrastive and metric-learning models do; otherwise
            the pooled features, which end in a ReLU, are the embedding.
    """

    def __init__(self, head: bool = True) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(1, 32),
            nn.MaxPool2d(2),
            *_block(32, 64),
            nn.MaxPool2d(2),
            *_block(64, 64),
            *_block(64, 128),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(128, 64) if head else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, 1, H, W]`` -> embeddings ``[B, D]``."""
        return self.head(self.pool(self.features(images)).flatten(1))


def _block(channels_in: int, channels_out: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
    return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]


def train_encoder(
    digits: Digits,
    *,
    head: bool = True,
    similarity: str = "cosine",
    steps: int = 250,
    seed: int = 0,
    device: str = "cpu",
) -> Encoder:
    """Train an embedding episode by episode, as prototypical networks are.

    Every episode draws 4 supports and 6 queries of each of the ten digits; queries must be
    nearest to the prototype of their own digit, under cosine or, with ``similarity="sqeuclidean"``,
    the squared Euclidean distance.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder(head).to(device)
    optimiser = torch.optim.Adam(encoder.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    by_class = [(digits.train_labels == label).nonzero().flatten() for label in range(10)]
    wanted = torch.arange(10, device=device).repeat_interleave(6)
    bar = tqdm(range(steps), desc="training the embedding")
    for _ in bar:
        drawn = [rows[torch.randperm(len(rows), generator=generator)[:10]] for rows in by_class]
        images = place(digits.train[torch.cat(drawn)], generator)
        images = images + 0.05 * torch.randn(images.shape, generator=generator)
        embeddings = encoder(images.to(device)).reshape(10, 10, -1)
        if similarity == "sqeuclidean":
            references = embeddings[:, :4].mean(dim=1)
            logits = -torch.cdist(embeddings[:, 4:].flatten(0, 1), references).square()
        else:
            embeddings = F.normalize(embeddings, dim=2)
            references = F.normalize(embeddings[:, :4].mean(dim=1), dim=1)
            logits = 10 * embeddings[:, 4:].flatten(0, 1) @ references.T
        loss = F.cross_entropy(logits, wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return encoder.eval()


def few_shot_accuracy(
    encoder: nn.Module, digits: Digits, *, shots: int = 5, episodes: int = 100, seed: int = 0
) -> float:
    """Accuracy of ten-way classification by the nearest prototype, on held-out digits."""
    generator = torch.Generator().manual_seed(seed)
    device = next(encoder.parameters()).device
    with torch.no_grad():
        embeddings = F.normalize(encoder(place(digits.held_out, generator).to(device)), dim=1).cpu()
    right = total = 0
    for _ in range(episodes):
        drawn = torch.stack(
            [_draw(digits.held_out_labels, label, shots + 10, generator) for label in range(10)]
        )
        references = F.normalize(embeddings[drawn[:, :shots]].mean(dim=1), dim=1)
        nearest = (embeddings[drawn[:, shots:]] @ references.T).argmax(dim=-1)
        right += int((nearest == torch.arange(10)[:, None]).sum())
        total += nearest.numel()
    return right / total


@dataclass(frozen=True)
class Mosaic:
    """Four different digits in one query, and supports of the same four: a 4-way episode.

    Attributes:
        query: ``[1, 40, 40]``; fields in reading order.
        supports: ``[4 * shots, 1, 20, 20]``, other digits than those of the query.
        support_labels: Which field each support belongs to, 0 to 3.
        target: The field that the explained reference matches.
        digits: Which digit stands in each field.
    """

    query: Tensor
    supports: Tensor
    support_labels: list[int]
    target: int
    digits: list[int]


def mosaics(digits: Digits, count: int, *, shots: int = 5, seed: int = 0) -> list[Mosaic]:
    """Draw mosaics from the held-out digits."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(count):
        classes = torch.randperm(10, generator=generator)[:4].tolist()
        rows = [_draw(digits.held_out_labels, c, shots + 1, generator) for c in classes]
        fields = place(digits.held_out[torch.stack([row[0] for row in rows])], generator)
        drawn.append(
            Mosaic(
                query=_tile(fields),
                supports=place(digits.held_out[torch.cat([row[1:] for row in rows])], generator),
                support_labels=[field for field in range(4) for _ in range(shots)],
                target=int(torch.randint(0, 4, (1,), generator=generator)),
                digits=classes,
            )
        )
    return drawn


def energy_and_pointing(attribution: Tensor, target: int) -> tuple[float, float]:
    """How much of a map lies on the right field of a mosaic, and whether its brightest point does.

    Args:
        attribution: A map ``[h, w]`` over the mosaic; its positive part is the energy.
        target: The right field.

    Returns:
        Share of the energy in [0, 1] (0.25 by chance), and 1.0 or 0.0.
    """
    height, width = attribution.shape
    top, left = divmod(target, 2)
    energy = attribution.clamp_min(0)
    part = energy[
        top * height // 2 : (top + 1) * height // 2, left * width // 2 : (left + 1) * width // 2
    ]
    row, column = divmod(int(attribution.argmax()), width)
    hit = (2 * row // height, 2 * column // width) == (top, left)
    total = float(energy.sum())
    return (float(part.sum()) / total if total > 0 else 0.0), float(hit)


def _draw(labels: Tensor, label: int, count: int, generator: torch.Generator) -> Tensor:
    rows = (labels == label).nonzero().flatten()
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def _tile(fields: Tensor) -> Tensor:
    rows = [torch.cat([fields[0], fields[1]], dim=2), torch.cat([fields[2], fields[3]], dim=2)]
    return torch.cat(rows, dim=1)
