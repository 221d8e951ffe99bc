"""An embedding trained with pytorch-metric-learning, explained under its own distance.

Trains on scikit-learn's digits with a triplet loss under ``LpDistance``, measures precision at 1
under it, and hands the very distance object to SimilarityModel.

The published rule is weak at telling objects apart, and the printed numbers show it; the picture is
that of "centred" with a contrast set.

    pip install pytorch-metric-learning
    python compat_examples/metric_learning.py --out out
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import digits as digits_data
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from tqdm.auto import tqdm

from fam_plugins import LayerFam, SimilarityModel
from fam_plugins.plots import plot_episode


def train(digits: digits_data.Digits, distance: LpDistance, steps: int) -> digits_data.Encoder:
    """Batches of 96 digits; every triplet within the margin counts."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    encoder = digits_data.Encoder()
    loss_of = TripletMarginLoss(margin=0.2, distance=distance)
    optimiser = torch.optim.Adam(encoder.parameters(), lr=2e-3)
    bar = tqdm(range(steps), desc="training with triplets")
    for _ in bar:
        rows = torch.randperm(len(digits.train), generator=generator)[:96]
        images = digits_data.place(digits.train[rows], generator)
        loss = loss_of(encoder(images), digits.train_labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return encoder.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    digits = digits_data.load()
    distance = LpDistance(normalize_embeddings=True, p=2, power=1)
    encoder = train(digits, distance, args.steps)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gallery = encoder(digits_data.place(digits.train, generator))
        queries = encoder(digits_data.place(digits.held_out, generator))
        nearest = distance(queries, gallery).argmin(dim=1)
    right = digits.train_labels[nearest] == digits.held_out_labels
    print(f"precision at 1: {right.float().mean():.1%}")

    energy: dict[str, list[float]] = {"published rule": [], "centred, with contrast": []}
    apart = 0.0
    for mosaic in digits_data.mosaics(digits, 50):
        query = mosaic.query[None]
        for name, contrast, rule in (
            ("published rule", None, "fam"),
            ("centred, with contrast", "others", "centred"),
        ):
            model = SimilarityModel.from_support(
                encoder, mosaic.supports, mosaic.support_labels,
                similarity=distance, contrast=contrast,
            )  # fmt: skip
            if contrast is None:
                with torch.no_grad():
                    theirs = -distance(encoder(query), model.references)
                    apart = max(apart, float((model(query) - theirs).abs().max()))
            maps = LayerFam(model, encoder.features, rule=rule).attribute_references(query)
            energy[name] += [
                digits_data.energy_and_pointing(maps[0, field, 0], field)[0] for field in range(4)
            ]
    print(f"scores differ from the library's by at most {apart:.0e}\n")
    print("energy on the digit of the prototype (0.25 by chance), 50 mosaics:")
    for name, shares in energy.items():
        print(f"  {sum(shares) / len(shares):.2f}  {name}")

    first = [mosaic.support_labels.index(label) for label in range(4)]
    figure = plot_episode(
        query, mosaic.supports[first], maps, scores=model(query), labels=mosaic.digits,
        rule="centred",
    )  # fmt: skip
    path = args.out / "metric_learning.png"
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")

    assert apart < 1e-4, f"the scores are {apart:.0e} away from the library's"
    published, centred = (sum(shares) / len(shares) for shares in energy.values())
    assert centred > 0.45, f"only {centred:.2f} of the energy is on the prototype's digit"
    assert centred > published + 0.1, "centred finds the prototype's digit no better than fam"


if __name__ == "__main__":
    main()
