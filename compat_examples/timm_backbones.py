"""A transformer beside a ConvNet: the same question to a ViT, a Swin and a MobileNetV2.

Two photographs stand side by side in one query, and two references show parts of each of them,
mirrored. What in the query matches which reference? Every encoder answers through the same three
lines; only the layer differs, and reshape_transform="auto" lays out tokens and channels-last
maps. Prints how much of each map's energy is on the right photograph, and writes a picture of each
encoder.

Whatever the weights, rule="gradcam" is pytorch-grad-cam's own map, which is checked.

    python compat_examples/timm_backbones.py --out out
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pretrained
import torch
from hub import PHOTOGRAPHS, RANDOM, energy_on, expect_random, import_library, photographs
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torchvision.transforms import functional as T
from tqdm.auto import tqdm

from fam_plugins import FAM, LayerFam, SimilarityModel, infer_transform
from fam_plugins.plots import plot_episode


@dataclass(frozen=True)
class Backbone:
    """An encoder, the layer to explain, and how it wants its images normalised.

    Attributes:
        warning: What a picture made with it must say about its weights.
    """

    name: str
    encoder: nn.Module
    layer: str
    mean: list[float]
    std: list[float]
    warning: str


def backbones(args: argparse.Namespace) -> Iterator[Backbone]:
    """One after another, so that only one is in memory."""
    timm = import_library("timm", "timm")
    convnet, warning = pretrained.load_model(args.weights)
    convnet.classifier = nn.Identity()
    yield Backbone("mobilenet_v2", convnet, "features", args.mean, args.std, warning)
    # Swin's embedding is the mean of its normalised map: exact at "norm".
    yield from_timm(timm, "swin_tiny_patch4_window7_224", "norm")
    # ViT's embedding is its class token, which has read most of the patches before the last block.
    yield from_timm(timm, "vit_small_patch16_224", "blocks.5")


def from_timm(timm: ModuleType, name: str, layer: str) -> Backbone:
    """Load a timm encoder with its weights: downloaded, or (said aloud) random."""
    warning = ""
    try:
        encoder = timm.create_model(name, pretrained=True, num_classes=0)
    # Hubs raise many kinds of errors without a network; whichever it was is printed.
    except Exception as error:
        print(
            f"The weights of {name} could not be downloaded ({type(error).__name__}).\n"
            "Going on with RANDOM weights: this shows that the code runs, and its map means "
            "nothing."
        )
        torch.manual_seed(0)
        encoder, warning = timm.create_model(name, num_classes=0), RANDOM
    config = timm.data.resolve_model_data_config(encoder)
    mean, std = list(config["mean"]), list(config["std"])
    return Backbone(name, encoder.eval(), layer, mean, std, warning)


def apart_from_gradcam(model: SimilarityModel, layer: str, images: Tensor) -> float:
    """The largest gap between FAM's ``gradcam`` and GradCAM, both in [0, 1]; NaN if empty."""
    module = model.get_submodule(f"encoder.{layer}")
    transform = infer_transform(model, module, images)
    targets = [ClassifierOutputTarget(0)]
    with FAM(model, [module], transform, rule="gradcam") as cam:
        ours = cam(images, targets)
    with GradCAM(model, [module], transform) as cam:
        theirs = cam(images, targets)
    model.zero_grad(set_to_none=True)
    return float(abs(ours - theirs).max()) if theirs.max() > 0.5 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--weights", type=Path, help="a state dict of MobileNetV2; downloaded if not given"
    )
    parser.add_argument("--mean", type=float, nargs=3, default=[0.485, 0.456, 0.406])
    parser.add_argument("--std", type=float, nargs=3, default=[0.229, 0.224, 0.225])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    query, references = photographs()
    lines, faults = [], []
    for backbone in tqdm(backbones(args), total=3, desc="encoders"):
        encoder = backbone.encoder.to(args.device)
        images = T.normalize(query, backbone.mean, backbone.std).to(args.device)
        shots = T.normalize(references, backbone.mean, backbone.std).to(args.device)

        if backbone.warning:
            expect_random()
        model = SimilarityModel(encoder, shots, contrast="others")
        explainer = LayerFam(model, backbone.layer, rule="centred", reshape_transform="auto")
        maps = [explainer.attribute(images, target=j) for j in range(2)]

        exact = LayerFam(model, backbone.layer, rule="additive", reshape_transform="auto")
        found = exact.decompose(images, target=0)
        with torch.no_grad():
            scores = model(images)
        right = [energy_on(j, maps[j][0, 0]) for j in range(2)]
        rest = ", ".join(part for part in found.parts if part != "regions") or "nothing"
        gap = apart_from_gradcam(model, backbone.layer, images)
        if not gap < 1e-3:
            faults.append(f"{backbone.name}: {gap:.0e} away from GradCAM")
        if found.gap.abs() > 1e-4 * found.maps.abs().sum():
            faults.append(f"{backbone.name}: parts miss the score by {float(found.gap):.0e}")
        # On random weights nothing is on the match.
        if not backbone.warning and min(right) < 0.5:
            faults.append(f"{backbone.name}: only {min(right):.2f} of the energy is on the match")
        shown = ["-" if backbone.warning else f"{share:.2f}" for share in right]
        lines.append(
            f"| {backbone.name} | `{backbone.layer}` | {tuple(maps[0].shape[2:])} | {rest} "
            f"(gap {float(found.gap):.0e}) | {gap:.0e} | {shown[0]} | {shown[1]} | "
            f"{'random' if backbone.warning else 'pretrained'} |"
        )
        figure = plot_episode(
            query,
            references,
            torch.stack(maps, dim=1),
            scores=scores,
            labels=[name.split(".")[0] for name in PHOTOGRAPHS],
            rule="centred",
        )
        figure.suptitle(f"{backbone.name} {backbone.warning}".strip(), fontsize=10)
        path = args.out / f"timm_backbones_{backbone.name}.png"
        figure.savefig(path, dpi=110)
        tqdm.write(f"wrote {path}")

    print("\nenergy on the matching photograph (0.50 by chance), rule centred, contrast others\n")
    print("| encoder | layer | map | beside the regions | off GradCAM | china | flower | weights |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    assert not faults, "; ".join(faults)


if __name__ == "__main__":
    main()
