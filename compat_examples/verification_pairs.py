"""Are these two the same digit? Maps for both images of a pair, and what separates two digits.

Trains an embedding on scikit-learn's digits, verifies held-out pairs by their cosine, and explains
mosaics of two digits each that share one: the shared digit should light up in both.

The published rule is weak at telling objects apart, and the printed numbers show it; the pictures
are that of "centred" with a contrast set, and the pairs of regions that match best.

    python compat_examples/verification_pairs.py --out out
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import digits as digits_data
import torch
import torch.nn.functional as F
from torch import Tensor

from fam_plugins import explain_pair, gallery_mean
from fam_plugins.plots import plot_matches, plot_pair


def verification_accuracy(encoder: torch.nn.Module, digits: digits_data.Digits) -> float:
    """Balanced accuracy at the best threshold of the cosine, over all held-out pairs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        z = F.normalize(encoder(digits_data.place(digits.held_out, generator)), dim=1)
    upper = torch.triu(torch.ones(len(z), len(z), dtype=torch.bool), diagonal=1)
    cosine = (z @ z.T)[upper]
    same = (digits.held_out_labels[:, None] == digits.held_out_labels)[upper]
    rates = [
        ((cosine[same] > t).float().mean() + (cosine[~same] <= t).float().mean()) / 2
        for t in torch.linspace(-1, 1, 201)
    ]
    return float(max(rates))


def strip(digits: digits_data.Digits, classes: list[int], generator: torch.Generator) -> Tensor:
    """Held-out digits of these classes side by side, ``[1, 1, 20, 20 * len(classes)]``."""
    chosen = []
    for label in classes:
        rows = (digits.held_out_labels == label).nonzero().flatten()
        chosen.append(int(rows[torch.randint(0, len(rows), (1,), generator=generator)]))
    fields = digits_data.place(digits.held_out[chosen], generator)
    return torch.cat(list(fields), dim=2)[None]


def share(attribution: Tensor, position: int, count: int) -> float:
    """The positive energy of a map ``[1, 1, h, w]`` on one of ``count`` fields side by side."""
    width = attribution.shape[3] // count
    energy = attribution.clamp_min(0)
    part = energy[..., position * width : (position + 1) * width]
    return float(part.sum() / energy.sum().clamp_min(1e-12))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=250)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    digits = digits_data.load()
    encoder = digits_data.train_encoder(digits, head=False, steps=args.steps)
    print(f"verification accuracy: {verification_accuracy(encoder, digits):.1%}")

    generator = torch.Generator().manual_seed(1)
    gallery = digits_data.place(digits.train, generator)
    mean = gallery_mean(encoder, torch.split(gallery, 128))
    energy: dict[str, list[float]] = {"published rule": [], "centred, with contrast": []}
    for _ in range(100):
        shared, other, another = torch.randperm(10, generator=generator)[:3].tolist()
        a = strip(digits, [shared, other], generator)
        b = strip(digits, [another, shared], generator)
        for name, options in (
            ("published rule", {"rule": "fam"}),
            ("centred, with contrast", {"rule": "centred", "contrast": mean}),
        ):
            pair = explain_pair(encoder, encoder.features, a, b, **options)
            energy[name] += [share(pair.map_a, 0, 2), share(pair.map_b, 1, 2)]
    print("\nenergy on the shared digit, both images of 100 pairs (0.50 by chance):")
    for name, shares in energy.items():
        print(f"  {sum(shares) / len(shares):.2f}  {name}")

    exact = explain_pair(
        encoder, encoder.features, a, b, contrast=mean, difference=True, joint=True
    )
    score = float(exact.score)
    sums = [float(part.sum()) for part in (exact.joint, exact.difference_a)]
    print(f"\nscore {score:.4f}, all pairs of regions sum to {sums[0]:.4f}")
    print(f"and the difference to {sums[1]:.4f}")
    grid_a, grid_b = exact.map_a.shape[2:], exact.map_b.shape[2:]
    strongest = exact.joint[0, :-1, :-1].flatten().topk(8).indices.tolist()
    joined = [
        (i % grid_a[1] < grid_a[1] / 2, j % grid_b[1] >= grid_b[1] / 2)
        for i, j in (divmod(place, exact.joint.shape[2] - 1) for place in strongest)
    ]
    print(
        f"of the 8 strongest pairs of regions, {joined.count((True, True))} join the shared digit"
    )
    figure = plot_pair(
        a[0], b[0], pair.map_a[0], pair.map_b[0], score=pair.score[0],
        titles=(f"{shared} and {other}", f"{another} and {shared}"),
        rule="centred",
    )  # fmt: skip
    path = args.out / "verification_pairs.png"
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")
    path = args.out / "verification_matches.png"
    plot_matches(
        a[0], b[0], exact.joint, grid_a=grid_a, grid_b=grid_b,
        titles=(f"{shared} and {other}", f"{another} and {shared}"),
    ).savefig(path, dpi=80)  # fmt: skip
    print(f"wrote {path}")

    published, centred = (sum(shares) / len(shares) for shares in energy.values())
    assert centred > 0.8, f"only {centred:.2f} of the energy is on the shared digit"
    assert centred > published + 0.05, "centred finds the shared digit no better than fam"
    assert joined.count((True, True)) >= 6, "the strongest pairs of regions join other digits"
    # The embedding is pooled without a head, so there is no constant term.
    for found, wanted in zip(sums, (score, 1 - score), strict=True):
        assert abs(found - wanted) < 1e-4, f"it sums to {found:.6f}, not to {wanted:.6f}"


if __name__ == "__main__":
    main()
