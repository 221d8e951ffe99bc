"""Explain a contrastive encoder on its pooled features and through its projection head.

Trains a small encoder on scikit-learn's handwritten digits as SimCLR does (arXiv 2002.05709),
without labels, and checks it by k nearest neighbours on held-out digits. A pair of digits is then
explained twice: on the pooled backbone features, which is what such encoders are used for, and
through the projection head, which is what they were trained on. Both maps are exact; of the second
the head's biases carry a part, which no region does. Writes a picture of each.

    python compat_examples/contrastive.py --out out
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import digits as digits_data
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from fam_plugins import LayerFam, SimilarityModel
from fam_plugins.core.decompose import Decomposition
from fam_plugins.plots import plot_pair

Loss = Callable[[Tensor, Tensor], Tensor]


class ContrastiveEncoder(nn.Module):
    """A backbone with pooled features and a projection head of one hidden layer.

    Args:
        projection: The head ``[B, 128]`` -> ``[B, 64]``; one of plain torch by default.
    """

    def __init__(self, projection: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = digits_data.Encoder(head=False)
        self.projection = projection or nn.Sequential(
            nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, 1, H, W]`` -> projections ``[B, 64]``."""
        return self.projection(self.backbone(images))


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """One random view: shifted in its field, turned, scaled, sheared, brightened, with noise."""
    fields = digits_data.place(images, generator)
    count = len(fields)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, scale, shear = uniform(-0.35, 0.35), uniform(0.85, 1.2), uniform(-0.25, 0.25)
    zero = torch.zeros(count)
    rows = [
        torch.stack([scale * angle.cos(), scale * (shear - angle.sin()), zero], dim=1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), zero], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(fields.shape), align_corners=False)
    turned = F.grid_sample(fields, grid, align_corners=False)
    bright = uniform(0.6, 1.0)[:, None, None, None]
    return turned * bright + 0.05 * torch.randn(turned.shape, generator=generator)


def nt_xent(a: Tensor, b: Tensor, temperature: float = 0.2) -> Tensor:
    """SimCLR's loss: each view must find the other view of its image among all the others."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(logits, partner)


def train(
    encoder: ContrastiveEncoder,
    loss_function: Loss,
    data: digits_data.Digits,
    *,
    steps: int,
    batch: int,
    seed: int,
    device: str,
) -> ContrastiveEncoder:
    """Train backbone and projection head on two views an image; labels are never looked at."""
    generator = torch.Generator().manual_seed(seed)
    encoder = encoder.to(device).train()
    optimiser = torch.optim.Adam(encoder.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    bar = tqdm(range(steps), desc="contrastive training")
    for _ in bar:
        drawn = torch.randperm(len(data.train), generator=generator)[:batch]
        views = torch.cat([view(data.train[drawn], generator) for _ in range(2)]).to(device)
        loss = loss_function(*encoder(views).chunk(2))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return encoder.eval()


def embed(encoder: nn.Module, images: Tensor, device: str) -> Tensor:
    with torch.no_grad():
        return F.normalize(encoder(images.to(device)), dim=1).cpu()


def knn_accuracy(
    encoder: nn.Module, data: digits_data.Digits, device: str, *, k: int = 5, seed: int = 0
) -> float:
    """Held-out digits classified by their ``k`` most similar training digits."""
    generator = torch.Generator().manual_seed(seed)
    gallery = embed(encoder, digits_data.place(data.train, generator), device)
    queries = embed(encoder, digits_data.place(data.held_out, generator), device)
    nearest = (queries @ gallery.T).topk(k, dim=1).indices
    votes = F.one_hot(data.train_labels[nearest], 10).sum(dim=1)
    return float((votes.argmax(dim=1) == data.held_out_labels).float().mean())


def explain(
    encoder: nn.Module, layer: nn.Module, a: Tensor, b: Tensor, gallery: Tensor
) -> list[Decomposition]:
    """Where the score of a pair went, in both of its images.

    The contrast is the training digits: what makes these two more alike than digits are anyway?
    """
    return [
        LayerFam(
            SimilarityModel(encoder, reference, contrast=gallery), layer, rule="additive"
        ).decompose(query, target=0)
        for query, reference in ((a, b), (b, a))
    ]


def main(
    make_encoder: Callable[[], ContrastiveEncoder] = ContrastiveEncoder,
    loss_function: Loss = nt_xent,
    name: str = "contrastive",
) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--digit", type=int, default=5, choices=range(10), help="which to explain")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    data = digits_data.load(args.seed)
    torch.manual_seed(args.seed)
    encoder = train(
        make_encoder(),
        loss_function,
        data,
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        device=args.device,
    )
    named = {"pooled backbone features": encoder.backbone, "projection head": encoder}
    print("k-NN accuracy on held-out digits (k = 5, cosine; no label was used in training):")
    for what, network in named.items():
        print(f"  {what}: {knn_accuracy(network, data, args.device, seed=args.seed):.1%}")

    rows = (data.held_out_labels == args.digit).nonzero().flatten()[:2]
    fields = digits_data.place(data.held_out[rows], torch.Generator().manual_seed(args.seed))
    a, b = fields.to(args.device).split(1)
    gallery = digits_data.place(data.train[:500], torch.Generator().manual_seed(args.seed))
    gaps, rest = {}, {}
    print(f"\ntwo held-out digits, both a {args.digit}; contrast: 500 training digits")
    for what, network in named.items():
        sides = explain(network, encoder.backbone.features, a, b, gallery.to(args.device))
        parts = {name: part.item() for name, part in sides[0].parts.items()}
        gaps[what] = max(side.gap.abs().item() for side in sides)
        score, rest[what] = sides[0].score.item(), parts.get("bias", 0.0)
        shown = ", ".join(f"{name} {part:.4f}" for name, part in parts.items())
        print(f"  {what}: score {score:.4f} = {shown}; gap up to {gaps[what]:.1e}")
        figure = plot_pair(a[0], b[0], *(side.maps for side in sides), rule="additive")
        figure.suptitle(
            f"{what}: score {score:.3f}, in regions {parts['regions']:.3f}", fontsize=10
        )
        path = args.out / f"{name}_{what.split()[0]}.png"
        figure.savefig(path, dpi=110)
        print(f"  wrote {path}")

    pooled, projected = rest.values()
    assert max(gaps.values()) < 1e-5, f"the parts miss the score by {max(gaps.values()):.0e}"
    assert abs(pooled) < 1e-5 < abs(projected), f"biases carry {pooled:.0e} and {projected:.0e}"


if __name__ == "__main__":
    main()
