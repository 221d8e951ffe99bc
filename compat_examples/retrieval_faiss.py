"""Retrieval: the hits of one query, explained on both sides from one forward pass of the query.

Trains an embedding on scikit-learn's digits, writes the gallery to disk, searches it with faiss
(or scikit-learn's NearestNeighbors where faiss is not installed), and explains the hits of a
mosaic of four digits. The gallery stays on disk; only the hits' rows are read.

The published rule is weak at telling objects apart, and the printed numbers show it; the picture is
that of "centred" with a contrast set.

    pip install faiss-cpu
    python compat_examples/retrieval_faiss.py --out out
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import digits as digits_data
import numpy as np
import torch
import torch.nn.functional as F

from fam_plugins import LayerFam, SimilarityModel, explain_hits


def search(gallery: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, str]:
    """Indices ``[B, k]`` of the nearest rows by cosine; both must be L2-normalised."""
    try:
        import faiss
    except ImportError:
        from sklearn.neighbors import NearestNeighbors

        found = NearestNeighbors(n_neighbors=k).fit(gallery).kneighbors(queries)
        return found[1], "scikit-learn"
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery)
    return index.search(queries, k)[1], "faiss"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=250)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    digits = digits_data.load()
    encoder = digits_data.train_encoder(digits, steps=args.steps)
    generator = torch.Generator().manual_seed(0)
    images = digits_data.place(digits.train, generator)
    queries = digits_data.place(digits.held_out, generator)
    with torch.no_grad():
        rows = F.normalize(encoder(images), dim=1).numpy()
        wanted = F.normalize(encoder(queries), dim=1).numpy()
    path = args.out / "gallery.npy"
    np.save(path, rows)
    nearest, tool = search(rows, wanted, 1)
    right = digits.train_labels[nearest[:, 0]] == digits.held_out_labels
    print(f"precision at 1 with {tool}: {right.float().mean():.1%}, {len(rows)} in the gallery")

    gallery = np.load(path, mmap_mode="r")
    mean = torch.tensor(rows.mean(axis=0, keepdims=True))
    shares: dict[str, list[float]] = {"published rule": [], "centred, with contrast": []}
    for mosaic in digits_data.mosaics(digits, 50):
        query = mosaic.query[None]
        with torch.no_grad():
            embedding = F.normalize(encoder(query), dim=1).numpy()
        indices, _ = search(rows, embedding, 5)
        fields = [
            mosaic.digits.index(label) if label in mosaic.digits else None
            for label in digits.train_labels[indices[0]].tolist()
        ]
        for name, contrast, rule in (
            ("published rule", None, "fam"),
            ("centred, with contrast", mean, "centred"),
        ):
            model = SimilarityModel(encoder, gallery, contrast=contrast)
            maps = LayerFam(model, encoder.features, rule=rule).attribute_references(query, indices)
            shares[name] += [
                digits_data.energy_and_pointing(hit[0], field)[0]
                for hit, field in zip(maps[0], fields, strict=True)
                if field is not None
            ]
    print("\nenergy on the digit that the hit shows (0.25 by chance), top 5 of 50 mosaics:")
    for name, found in shares.items():
        print(f"  {sum(found) / len(found):.2f}  {name}")

    hits = images[indices[0]]
    explained = explain_hits(encoder, encoder.features, query, hits, rule="centred", contrast=mean)
    names = [f"a {label}" for label in digits.train_labels[indices[0]].tolist()]
    figure = explained.plot(captions=names)
    target = args.out / "retrieval_faiss.png"
    figure.savefig(target, dpi=110)
    print(f"wrote {target}")

    published, centred = (sum(found) / len(found) for found in shares.values())
    assert centred > 0.4, f"only {centred:.2f} of the energy is on the digit that the hit shows"
    assert centred > published + 0.1, "centred finds the hit's digit no better than fam"
    # The picture explains the query of the last mosaic a second time.
    apart = float((explained.query_maps - maps[0]).abs().max() / maps.abs().max())
    assert apart < 1e-3, f"explain_hits' maps of the query are {apart:.0e} away from LayerFam's"


if __name__ == "__main__":
    main()
