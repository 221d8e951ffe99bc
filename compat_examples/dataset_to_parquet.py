"""A whole data set to Parquet: every held-out digit, its best reference, and what is found in them.

Trains an embedding on scikit-learn's digits, stops a run half-way as a power cut would, resumes it,
and reads from the file what no single map tells: where on average the evidence for a digit lies,
and which digits are taken for which.

    pip install -e '.[dataset]'
    python compat_examples/dataset_to_parquet.py --out out
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import digits as digits_data
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap

from fam_plugins import LayerFam, SimilarityModel
from fam_plugins.dataset import explain_dataset, read_maps


class PowerFailsError(Exception):
    """Stands for whatever stops a long run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=250)
    args = parser.parse_args()
    store = args.out / "digit_maps"
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir(parents=True)

    digits = digits_data.load()
    encoder = digits_data.train_encoder(digits, steps=args.steps)
    generator = torch.Generator().manual_seed(0)
    names = [f"{digit}" for digit in range(10)]
    supports = digits_data.place(digits.train, generator)
    model = SimilarityModel.from_support(
        encoder, supports, [names[k] for k in digits.train_labels.tolist()], contrast="others"
    )
    explainer = LayerFam(model, encoder.features, rule="additive")
    images = digits_data.place(digits.held_out, generator)
    ids = [f"{n:04d}-is-{k}" for n, k in enumerate(digits.held_out_labels.tolist())]

    def until_the_power_fails():
        for number, item in enumerate(zip(ids, images, strict=True)):
            if number == 300:
                raise PowerFailsError
            yield item

    options = {"top_k": 1, "rows_per_part": 128}
    try:
        explain_dataset(explainer, until_the_power_fails(), store, **options)
    except PowerFailsError:
        kept = read_maps(store)[0].count_rows()
        print(f"stopped after 300 images: {kept} rows are whole")
    start = time.perf_counter()
    explain_dataset(explainer, list(zip(ids, images, strict=True)), store, **options)
    _, rows = read_maps(store)
    found = list(rows)
    size = sum(part.stat().st_size for part in store.iterdir())
    print(
        f"resumed: {len(found)} rows, {len(found) - kept} of them in "
        f"{time.perf_counter() - start:.1f} s, {size / len(found):.0f} bytes each"
    )

    of = np.array([int(row["id"][-1]) for row in found])
    best = np.array([int(row["label"]) for row in found])
    right = float((of == best).mean())
    print(f"\nthe best of ten prototypes is right for {right:.1%} of {len(found)} held-out digits")
    coverage = np.array([row["coverage"] for row in found])
    gap = max(abs(float(r["map"].sum()) - r["coverage"] * r["score"]) for r in found)
    print(f"a map sums to {np.median(coverage):.2f} of its score (the rest is the head's bias)")
    wrong = [(row["id"], row["label"], f"{row['score']:.2f}") for row in found]
    wrong = [row for row, is_right in zip(wrong, of == best, strict=True) if not is_right]
    print(
        "taken for another:", *(f"{name} for {label} ({score})" for name, label, score in wrong[:5])
    )

    maps = np.stack([row["map"].astype(np.float32) for row in found])
    mean_maps = np.stack([maps[of == k].mean(0) for k in range(10)])
    figure = plt.figure(figsize=(9, 7.6), layout="constrained")
    figure.suptitle(f"Mean image and mean map of {len(found)} held-out digits, read from Parquet")
    axes = figure.subplots(4, 5)
    # As the package's plots colour it: green raises the score, red lowers it.
    colours = LinearSegmentedColormap.from_list("signed", ["#f02020", "white", "#00a030"])
    most = abs(mean_maps).max()
    for k in range(10):
        above, below = axes[k // 5 * 2 : k // 5 * 2 + 2, k % 5]
        above.imshow(images[torch.from_numpy(np.flatnonzero(of == k))].mean((0, 1)), cmap="gray_r")
        drawn = below.imshow(mean_maps[k], cmap=colours, vmin=-most, vmax=most)
        above.set_title(f"{k}: {(best[of == k] == k).mean():.0%} recognised", fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([]), axis.set_yticks([])
    figure.colorbar(drawn, ax=axes, label="share of the score in a region, mean", shrink=0.6)
    target = args.out / "dataset_to_parquet.png"
    figure.savefig(target, dpi=110)
    print(f"wrote {target}")

    assert 0 < kept < 300, f"{kept} rows were kept"
    assert len({row["id"] for row in found}) == len(found) == len(ids), "a row is lost or doubled"
    assert right > 0.9, f"only {right:.1%} right"
    # The stored maps are those of LayerFam, to the rounding of half precision.
    one = int(np.flatnonzero(of == best)[0])
    row = found[one]
    expected = explainer.attribute(images[one : one + 1], target=row["label"])[0, 0].numpy()
    apart = float(abs(row["map"] - expected).max() / abs(expected).max())
    assert apart < 1e-3, f"a stored map is {apart:.0e} away from LayerFam's"
    assert gap < 2e-3, f"a stored map is {gap:.0e} away from what it should sum to"


if __name__ == "__main__":
    main()
