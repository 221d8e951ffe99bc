"""A torchvision classifier with its ImageNet weights, and a real photograph, for the drop-ins."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2
from torchvision.transforms import functional as T


@dataclass(frozen=True)
class Photograph:
    """A photograph as a model takes it and as a person sees it.

    Attributes:
        input: ``[1, 3, H, W]``, normalised.
        shown: ``[H, W, 3]`` in [0, 1].
    """

    input: Tensor
    shown: Tensor


def arguments(description: str, *, image: bool = True) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    if image:
        parser.add_argument(
            "--image", default="china.jpg", help="a file, or scikit-learn's china.jpg or flower.jpg"
        )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--weights", type=Path, help="a state dict of MobileNetV2; downloaded if not given"
    )
    parser.add_argument("--mean", type=float, nargs=3, default=[0.485, 0.456, 0.406])
    parser.add_argument("--std", type=float, nargs=3, default=[0.229, 0.224, 0.225])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def load_model(weights: Path | None) -> tuple[nn.Module, str]:
    """MobileNetV2 with ImageNet weights: from a file, or downloaded, or (said aloud) random.

    Returns:
        The model in eval mode, and what a picture made with it must say about its weights.
    """
    if weights is not None:
        model = mobilenet_v2()
        state = torch.load(weights, weights_only=True, map_location="cpu")
        model.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        )
        return model.eval(), ""
    try:
        return mobilenet_v2(weights=MobileNet_V2_Weights.DEFAULT).eval(), ""
    except (URLError, OSError) as error:
        print(
            f"The ImageNet weights could not be downloaded ({error}).\n"
            "Going on with RANDOM weights: this shows that the code runs, and its map means "
            "nothing.\nWith a network, or with --weights FILE, the map is real."
        )
        torch.manual_seed(0)
        return settled(mobilenet_v2()), "RANDOM WEIGHTS: these maps mean nothing"


def settled(model: nn.Module) -> nn.Module:
    """Fit batch norm's statistics to a photograph, and return the model in eval mode.

    With the statistics that random weights come with, activations vanish layer by layer, and the
    maps are nothing but rounding.
    """
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain average of what was seen
    photograph = load_photograph("china.jpg", [0.5] * 3, [0.5] * 3).input
    with torch.no_grad():
        model.train()(torch.cat([photograph, photograph.flip(3)]))
    return model.eval()


def load_photograph(name: str, mean: list[float], std: list[float]) -> Photograph:
    """Load a photograph and cut its middle to 224 x 224 pixels."""
    if name in ("china.jpg", "flower.jpg"):
        pixels = torch.from_numpy(load_sample_image(name).copy())
    else:
        from PIL import Image

        pixels = T.pil_to_tensor(Image.open(name).convert("RGB")).permute(1, 2, 0)
    image = T.center_crop(T.resize(pixels.permute(2, 0, 1), 256, antialias=True), [224, 224]) / 255
    return Photograph(T.normalize(image, mean, std)[None], image.permute(1, 2, 0))


def top_class(model: nn.Module, photograph: Tensor) -> tuple[int, str, float]:
    """The class a model predicts: its index, its name, and its probability."""
    with torch.no_grad():
        probability, index = model(photograph).softmax(dim=1)[0].max(dim=0)
    return int(index), MobileNet_V2_Weights.DEFAULT.meta["categories"][index], float(probability)
