"""Maps without torch: scores and maps of ten digits in one ONNX file, run by ONNX Runtime.

Trains an embedding on scikit-learn's digits, writes encoder, prototypes and maps as one graph, runs
it on mosaics that the exporter has not seen, and compares with LayerFam, and with the time that the
exported encoder takes alone.

    pip install -e '.[onnx]'
    python compat_examples/export_onnx.py --out out
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import digits as digits_data
import numpy as np
import onnxruntime
import torch

from fam_plugins import LayerFam, SimilarityModel
from fam_plugins.export import MapModel
from fam_plugins.plots import plot_episode


def session(module: torch.nn.Module, images: torch.Tensor, path: Path):
    """Write a module of any batch size as ONNX, and open it in ONNX Runtime."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(
            module,
            (images,),
            path,
            input_names=["images"],
            dynamic_shapes=({0: "batch"},),
            dynamo=True,
            verbose=False,
        )
    one_thread = onnxruntime.SessionOptions()
    one_thread.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, one_thread, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=250)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    digits = digits_data.load()
    encoder = digits_data.train_encoder(digits, steps=args.steps).eval()
    print(f"few-shot accuracy: {digits_data.few_shot_accuracy(encoder, digits):.1%}")
    supports = digits_data.place(digits.train, torch.Generator().manual_seed(0))
    model = SimilarityModel.from_support(encoder, supports, digits.train_labels, contrast="others")
    drawn = digits_data.mosaics(digits, 100)
    queries = torch.stack([mosaic.query for mosaic in drawn])

    maps_of = MapModel(model, encoder.features, example=queries[:1], rule="centred", smooth=True)
    path = args.out / "maps.onnx"
    exported = session(maps_of, queries[:2], path)
    alone = session(encoder, queries[:2], args.out / "encoder.onnx")
    print(f"wrote {path}, which needs ONNX Runtime and nothing else")

    pixels = queries.numpy()
    scores, maps = exported.run(None, {"images": pixels})  # [100, 10], [100, 10, h, w]
    explainer = LayerFam(model, encoder.features, rule="centred", smooth=True)
    expected = explainer.attribute_references(queries)[:, :, 0].numpy()
    apart = float(abs(maps - expected).max() / abs(expected).max())
    print(f"furthest from LayerFam's maps: {apart:.0e} of the largest value")

    found = [
        digits_data.energy_and_pointing(torch.from_numpy(of_image[digit]), field)
        for of_image, mosaic in zip(maps, drawn, strict=True)
        for field, digit in enumerate(mosaic.digits)
    ]
    energy, point = np.mean(found, axis=0)
    print(f"each of four digits is found: energy {energy:.2f}, point {point:.2f} (chance 0.25)")

    times: dict[str, list[float]] = {"encoder alone": [], "scores and maps": []}
    for _ in range(30):
        for name, run in zip(times, (alone, exported), strict=True):
            start = time.perf_counter()
            run.run(None, {"images": pixels[:8]})
            times[name].append(time.perf_counter() - start)
    of_encoder, of_maps = (statistics.median(each) for each in times.values())
    print(f"time of eight images, against the exported encoder alone: {of_maps / of_encoder:.2f}")

    shown = drawn[0]
    fields = supports[[int((digits.train_labels == d).nonzero()[0]) for d in shown.digits]]
    figure = plot_episode(
        queries[:1],
        fields,
        torch.from_numpy(maps[:1, shown.digits])[:, :, None],
        scores=torch.from_numpy(scores[:1, shown.digits]),
        labels=[str(digit) for digit in shown.digits],
        rule="centred",
    )
    target = args.out / "export_onnx.png"
    figure.savefig(target, dpi=110)
    print(f"wrote {target}")

    assert apart < 1e-5, f"ONNX Runtime's maps are {apart:.0e} away from LayerFam's"
    assert energy > 0.5, f"only {energy:.2f} of the energy is on the digit"


if __name__ == "__main__":
    main()
