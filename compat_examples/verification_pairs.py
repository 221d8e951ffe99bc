"""Are these two the same digit? Maps for both images of a pair, and what separates two digits.

Trains an embedding on scikit-learn's digits, finds the threshold of the cosine above which two
digits are the same, on half of the held-out pairs, and tries it on the other half. Then explains
mosaics of two digits each that share one: the shared digit should light up in both, and the map of
the margin says how much each region moves the pair above the threshold or below it.

The published rule is weak at telling objects apart, and the printed numbers show it; the pictures
are that of "centred" with a contrast set, the pairs of regions that match best, and the margin.

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

from fam_plugins import calibrate_threshold, explain_pair, gallery_mean


def held_out_pairs(encoder: torch.nn.Module, digits: digits_data.Digits) -> list[Tensor]:
    """Cosines ``[P]`` and whether the digits are the same, of all pairs in either half."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        z = F.normalize(encoder(digits_data.place(digits.held_out, generator)), dim=1)
    halves = []
    for start in range(2):
        rows, labels = z[start::2], digits.held_out_labels[start::2]
        upper = torch.triu(torch.ones(len(rows), len(rows), dtype=torch.bool), diagonal=1)
        halves += [(rows @ rows.T)[upper], (labels[:, None] == labels)[upper]]
    return halves


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
    known, known_same, scores, same = held_out_pairs(encoder, digits)
    found = calibrate_threshold(known, known_same)
    accepted = scores >= found.threshold
    falsely = float(accepted[~same].float().mean())
    missed = float((~accepted[same]).float().mean())
    print(
        f"the same from a cosine of {found.threshold:.3f} on: equal error rate "
        f"{found.equal_error_rate:.1%} on {len(known)} pairs that were known;"
    )
    print(f"of {len(scores)} others, {falsely:.1%} are accepted falsely and {missed:.1%} rejected")

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
    margin = pair.margin(found.threshold)
    answer = "the same" if pair.same(found.threshold) else "not the same"
    print(f"the mosaics drawn are {answer}: {float(margin.score):+.3f} from the threshold")
    titles = (f"{shared} and {other}", f"{another} and {shared}")
    for name, figure in (
        ("pairs", pair.plot(titles=titles)),
        ("matches", exact.plot_matches(titles=titles)),
        ("margin", margin.plot(titles=titles)),
    ):
        path = args.out / f"verification_{name}.png"
        figure.savefig(path, dpi=110)
        print(f"wrote {path}")

    assert found.equal_error_rate < 0.1, f"an equal error rate of {found.equal_error_rate:.2f}"
    assert max(falsely, missed) < 2 * found.equal_error_rate + 0.02, (
        "the threshold does not carry over"
    )
    for part in (margin.map_a, margin.map_b):
        gap = abs(float(part.sum() - (pair.score - found.threshold)))
        assert gap < 1e-4, f"the map of the margin misses it by {gap:.0e}"
    published, centred = (sum(shares) / len(shares) for shares in energy.values())
    assert centred > 0.8, f"only {centred:.2f} of the energy is on the shared digit"
    assert centred > published + 0.05, "centred finds the shared digit no better than fam"
    assert joined.count((True, True)) >= 6, "the strongest pairs of regions join other digits"
    # The embedding is pooled without a head, so there is no constant term.
    for found, wanted in zip(sums, (score, 1 - score), strict=True):
        assert abs(found - wanted) < 1e-4, f"it sums to {found:.6f}, not to {wanted:.6f}"


if __name__ == "__main__":
    main()
