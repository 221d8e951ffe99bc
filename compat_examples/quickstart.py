"""Which of four digits does a reference match? FAM in Captum and in pytorch-grad-cam.

Trains a small embedding on scikit-learn's handwritten digits, checks its few-shot accuracy on
held-out ones, then explains mosaics: four digits in one query, and a reference that matches one of
them. Three explainers look at the same SimilarityModel: LayerFam, FAM, and the two libraries' own
Grad-CAM. Prints a table and writes it as JSON, with a picture.

    python compat_examples/quickstart.py --out out
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import digits as digits_data
import matplotlib.pyplot as plt
import numpy as np
import torch
from captum.attr import LayerGradCam
from captum.attr import visualization as viz
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor
from tqdm.auto import tqdm

from fam_plugins import FAM, LayerFam, SimilarityModel

RULES = ("fam", "additive", "centred", "gradcam")


@dataclass(frozen=True)
class Method:
    """One row of the table: an explainer, its rule, and whether the model has a contrast."""

    tool: str
    rule: str
    contrast: bool
    explain: Callable[[SimilarityModel, Tensor, int], Tensor]
    smooth: bool = False


def methods() -> list[Method]:
    """Every rule with and without contrast through both adapters, and Grad-CAM as it ships.

    Last, with contrast and smoothed: the recommended setting, and Grad-CAM at the same.
    """
    tools = {"LayerFam (Captum)": layer_fam, "FAM (pytorch-grad-cam)": fam}
    rows = []
    for contrast in (False, True):
        for tool, made in tools.items():
            rows += [Method(tool, rule, contrast, made(rule)) for rule in RULES]
        rows.append(Method("Captum's LayerGradCam", "", contrast, captum_gradcam))
        rows.append(Method("pytorch-grad-cam's GradCAM", "", contrast, pytorch_gradcam))
    for tool, made in tools.items():
        rows += [
            Method(tool, rule, True, made(rule, True), True) for rule in ("centred", "gradcam")
        ]
    return rows


def layer_fam(rule: str, smooth: bool = False) -> Callable[[SimilarityModel, Tensor, int], Tensor]:
    def explain(model: SimilarityModel, query: Tensor, target: int) -> Tensor:
        explainer = LayerFam(model, model.encoder.features, rule=rule, smooth=smooth)
        return explainer.attribute(query, target=target)[0, 0]

    return explain


def fam(rule: str, smooth: bool = False) -> Callable[[SimilarityModel, Tensor, int], Tensor]:
    def explain(model: SimilarityModel, query: Tensor, target: int) -> Tensor:
        with FAM(model, [model.encoder.features], rule=rule, smooth=smooth) as cam:
            return torch.from_numpy(cam(query, [ClassifierOutputTarget(target)])[0])

    return explain


def captum_gradcam(model: SimilarityModel, query: Tensor, target: int) -> Tensor:
    explainer = LayerGradCam(model, model.encoder.features)
    return explainer.attribute(query, target=target).detach()[0, 0]


def pytorch_gradcam(model: SimilarityModel, query: Tensor, target: int) -> Tensor:
    with GradCAM(model, [model.encoder.features]) as cam:
        return torch.from_numpy(cam(query, [ClassifierOutputTarget(target)])[0])


def episode(
    encoder: digits_data.Encoder, mosaic: digits_data.Mosaic, contrast: bool
) -> SimilarityModel:
    """The four prototypes of a mosaic; with contrast, each against the other three."""
    return SimilarityModel.from_support(
        encoder,
        mosaic.supports,
        mosaic.support_labels,
        contrast="others" if contrast else None,
    )


@dataclass
class Row:
    """What was measured for one method, one entry a mosaic."""

    energy: list[float]
    pointing: list[float]
    milliseconds: list[float]
    delta: list[float]


def measure(
    encoder: digits_data.Encoder, drawn: list[digits_data.Mosaic], device: str
) -> dict[Method, Row]:
    """Explain every mosaic with every method."""
    rows: dict[Method, Row] = defaultdict(lambda: Row([], [], [], []))
    table = methods()
    # The table shows the published rule under a contrast too; the library rightly warns of it.
    warnings.filterwarnings("ignore", message='rule "fam"')
    for mosaic in tqdm(drawn, desc="explaining mosaics"):
        query = mosaic.query[None].to(device)
        models = {contrast: episode(encoder, mosaic, contrast) for contrast in (False, True)}
        for method in table:
            model, row = models[method.contrast], rows[method]
            start = time.perf_counter()
            attribution = method.explain(model, query, mosaic.target).cpu()
            row.milliseconds.append(1000 * (time.perf_counter() - start))
            energy, hit = digits_data.energy_and_pointing(attribution, mosaic.target)
            row.energy.append(energy)
            row.pointing.append(hit)
            if method.tool.startswith("LayerFam") and method.rule == "additive":
                explainer = LayerFam(model, model.encoder.features, rule="additive")
                _, delta = explainer.attribute(
                    query, target=mosaic.target, return_convergence_delta=True
                )
                row.delta.append(abs(delta.item()))
    return rows


def interval(values: list[float]) -> float:
    """Half the width of the 95 % interval of a mean."""
    return 1.96 * float(np.std(values)) / len(values) ** 0.5


def print_table(rows: dict[Method, Row], count: int) -> None:
    print(f"\n{count} mosaics of four digits; chance is 0.25 for energy and for pointing\n")
    print(
        "| tool | rule | contrast | smoothed | energy on the matching digit |"
        " brightest point on it | convergence delta | ms per image |"
    )
    print("|---" * 8 + "|")
    for method, row in rows.items():
        delta = f"{max(row.delta):.0e}" if row.delta else ""
        print(
            f"| {method.tool} | {method.rule} | {'others' if method.contrast else 'none'} | "
            f"{'yes' if method.smooth else 'no'} | "
            f"{np.mean(row.energy):.3f} ± {interval(row.energy):.3f} | "
            f"{np.mean(row.pointing):.3f} | {delta} | {np.median(row.milliseconds):.1f} |"
        )


def energies(rows: dict[Method, Row]) -> dict[tuple[str, str, bool, bool], np.ndarray]:
    """Energy on every mosaic by tool, rule, contrast and smoothing."""
    return {
        (m.tool.split()[0], m.rule, m.contrast, m.smooth): np.array(r.energy)
        for m, r in rows.items()
    }


def print_verdict(rows: dict[Method, Row]) -> None:
    """Compare the recommended setting to its rivals, mosaic by mosaic, on this one network."""
    energy = energies(rows)
    best = energy["LayerFam", "centred", True, True]
    print("\nenergy of centred with contrast, smoothed, minus that of (95 % interval, paired):")
    for name, key in {
        "fam, the published rule": ("LayerFam", "fam", False, False),
        "Captum's LayerGradCam": ("Captum's", "", False, False),
        "Captum's LayerGradCam, also with contrast": ("Captum's", "", True, False),
        "the same, smoothed as well": ("LayerFam", "gradcam", True, True),
    }.items():
        gap = best - energy[key]
        half = interval(gap.tolist())
        word = "more" if gap.mean() > half else "less" if gap.mean() < -half else "no difference"
        print(f"  {name}: {gap.mean():+.3f} ± {half:.3f} ({word} on this network)")


def as_json(rows: dict[Method, Row], accuracy: float, count: int) -> dict[str, object]:
    """The table's numbers, and what they depend on besides the seed."""
    return {
        "accuracy": accuracy,
        "mosaics": count,
        "threads": torch.get_num_threads(),
        "rows": [
            {
                "tool": method.tool,
                "rule": method.rule,
                "contrast": "others" if method.contrast else "none",
                "smooth": method.smooth,
                "energy": float(np.mean(row.energy)),
                "interval": interval(row.energy),
                "pointing": float(np.mean(row.pointing)),
            }
            for method, row in rows.items()
        ],
    }


def check(rows: dict[Method, Row]) -> None:
    """What the table is there to show, with room for another seed and other threads."""
    energy = energies(rows)
    for tool in ("LayerFam", "FAM"):
        published = energy[tool, "fam", False, False]
        for smooth in (False, True):
            best = energy[tool, "centred", True, smooth]
            assert best.mean() > 0.5, (
                f"{tool}: only {best.mean():.2f} of the energy is on the match"
            )
            assert best.mean() > published.mean() + 0.1, f"{tool}: centred is no better than fam"
    for contrast in (False, True):
        ours = energy["LayerFam", "gradcam", contrast, False]
        theirs = energy["Captum's", "", contrast, False]
        apart = np.abs(ours - theirs).max()
        assert apart < 1e-3, f'rule="gradcam" is {apart:.0e} away from Captum\'s LayerGradCam'
    worst = max(max(row.delta, default=0.0) for row in rows.values())
    assert worst < 1e-4, f"behind a linear head the additive map misses the score by {worst:.0e}"


def draw(
    encoder: digits_data.Encoder, drawn: list[digits_data.Mosaic], device: str, path: Path
) -> None:
    """Draw a few mosaics with each explainer's map in its own library's style."""
    best = "centred,\ncontrast, smoothed"
    columns: list[tuple[str, str, str, bool]] = [
        ("captum", "LayerFam, fam\n(published)", "fam", False),
        ("captum", f"LayerFam, {best}", "centred", True),
        ("captum", "LayerFam, gradcam,\ncontrast, smoothed", "gradcam", True),
        ("captum", "Captum's\nLayerGradCam", "", False),
        ("grad_cam", "FAM, fam\n(published)", "fam", False),
        ("grad_cam", f"FAM, {best}", "centred", True),
        ("grad_cam", "pytorch-grad-cam's\nGradCAM", "", False),
    ]
    figure, axes = plt.subplots(
        len(drawn), 2 + len(columns), figsize=(1.75 * (2 + len(columns)), 1.85 * len(drawn) + 0.7)
    )
    for line, mosaic in zip(axes, drawn, strict=True):
        query = mosaic.query[None].to(device)
        image = mosaic.query[0].numpy()
        first = mosaic.supports[mosaic.support_labels.index(mosaic.target)]
        _show(line[0], first[0].numpy(), "reference\n(1 of 5 shots)", f"a {_digit(mosaic)}")
        _show(line[1], image, "query", "the match is boxed")
        for axis, (style, title, rule, contrast) in zip(line[2:], columns, strict=True):
            model = episode(encoder, mosaic, contrast)
            if style == "captum":
                explain = layer_fam(rule, contrast) if rule else captum_gradcam
                attribution = explain(model, query, mosaic.target).cpu()[None, None]
                upsampled = LayerFam.interpolate(attribution, image.shape, "bilinear")[0, 0]
                viz.visualize_image_attr(
                    upsampled.numpy()[..., None],
                    image[..., None].repeat(3, axis=2),
                    method="blended_heat_map",
                    sign="all",
                    plt_fig_axis=(figure, axis),
                    use_pyplot=False,
                )
            else:
                explain = fam(rule, contrast) if rule else pytorch_gradcam
                attribution = explain(model, query, mosaic.target)
                overlay = show_cam_on_image(
                    image[..., None].repeat(3, axis=2), attribution.numpy(), use_rgb=True
                )
                axis.imshow(overlay)
            energy, _ = digits_data.energy_and_pointing(attribution.squeeze(), mosaic.target)
            _show(axis, None, title, f"{energy:.0%} on the match")
        for axis in line[1:]:
            _box(axis, mosaic.target)
    for line in axes[1:]:
        for axis in line:
            axis.set_title("")
    figure.suptitle(
        "Which digit does the reference match? Green (Captum) or red (pytorch-grad-cam) speaks for "
        "the match.",
        fontsize=12,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _digit(mosaic: digits_data.Mosaic) -> int:
    return mosaic.digits[mosaic.target]


def _show(axis: plt.Axes, image: np.ndarray | None, title: str, label: str) -> None:
    if image is not None:
        axis.imshow(image, cmap="gray")
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(label, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])


def _box(axis: plt.Axes, target: int) -> None:
    top, left = divmod(target, 2)
    cell = digits_data.CELL
    corner = (left * cell - 0.5, top * cell - 0.5)
    axis.add_patch(plt.Rectangle(corner, cell, cell, fill=False, edgecolor="gold", linewidth=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for the picture and the numbers"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mosaics", type=int, default=300, help="how many to explain")
    parser.add_argument(
        "--no-head", action="store_true", help="embed with the pooled ReLU features themselves"
    )
    args = parser.parse_args()
    if args.mosaics < 4:
        parser.error("--mosaics must be at least 4, the number drawn in the picture")
    args.out.mkdir(parents=True, exist_ok=True)

    data = digits_data.load(args.seed)
    encoder = digits_data.train_encoder(
        data, head=not args.no_head, seed=args.seed, device=args.device
    )
    accuracy = digits_data.few_shot_accuracy(encoder, data, seed=args.seed)
    print(f"few-shot accuracy on held-out digits (10-way, 5-shot): {accuracy:.1%}")
    if accuracy < 0.9:
        raise SystemExit("the embedding is too weak to explain: below 90 %")

    drawn = digits_data.mosaics(data, args.mosaics, seed=args.seed)
    rows = measure(encoder, drawn, args.device)
    print_table(rows, len(drawn))
    print_verdict(rows)
    path = args.out / "quickstart.png"
    draw(encoder, drawn[:4], args.device, path)
    numbers = args.out / "quickstart.json"
    numbers.write_text(json.dumps(as_json(rows, accuracy, len(drawn)), indent=1) + "\n")
    print(f"\nwrote {path} and {numbers}")
    check(rows)


if __name__ == "__main__":
    main()
