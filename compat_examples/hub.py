"""What the examples of published encoders share: photographs, and weights from a hub.

With ``--random`` a small model of random weights is saved to a folder and loaded from there, so
that what runs is what runs with the published one.
"""

from __future__ import annotations

import argparse
import atexit
import os
import tempfile
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import urlopen

import torch
from PIL.Image import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms import functional as T

PHOTOGRAPHS = ("china.jpg", "flower.jpg")
RANDOM = "RANDOM WEIGHTS: these maps mean nothing"
F = TypeVar("F")


def arguments(description: str, model: str, **defaults: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--model", default=model)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--random", action="store_true", help="a small model of random weights, without a network"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if args.random:
        expect_random()
    return args


def expect_random() -> None:
    """Of random weights it is no news how little of a score the patches carry."""
    warnings.filterwarnings("ignore", message="the regions carry")


def import_library(name: str, package: str) -> ModuleType:
    """Import a library; without a network, in a mode that does not retry a hub for a minute."""
    try:
        urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=10).close()
    except HTTPError:
        pass  # An answer, if an unfriendly one: there is a network.
    except OSError:
        # Read when the hub is imported; weights that were downloaded before are still found.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return import_module(name)
    except ImportError as error:
        raise SystemExit(f"this example needs {name}: pip install {package}") from error


def loaded(load: Callable[[], F], name: str) -> F:
    """What ``load`` returns; without a network and a copy on disk, an end with the fix."""
    try:
        return load()
    # Hubs raise many kinds of errors without a network; whichever it was is printed.
    except Exception as error:
        raise SystemExit(
            f"{name} could not be loaded ({type(error).__name__}: {error}).\nConnect once, and it "
            "is kept; or see with --random that the code runs, on a model of random weights."
        ) from error


def encoder_and_processor(name: str, shown: str) -> tuple[Any, Any]:
    """A model of transformers and its image processor, both by :func:`loaded`."""
    import transformers  # by import_library before

    model = loaded(lambda: transformers.AutoModel.from_pretrained(name), shown)
    processor = loaded(lambda: transformers.AutoImageProcessor.from_pretrained(name), shown)
    return model.eval(), processor


def folder() -> Path:
    """A new folder, gone when the program ends."""
    made = tempfile.TemporaryDirectory()
    atexit.register(made.cleanup)
    return Path(made.name)


def saved(*parts: Any) -> str:
    """A folder that ``from_pretrained`` loads a model and its processor from."""
    place = folder()
    for part in parts:
        part.save_pretrained(place)
    return str(place)


def photographs() -> tuple[Tensor, Tensor]:
    """The query ``[1, 3, 224, 224]`` with both photographs, and a reference of each.

    Every reference is the mirrored lower three quarters of its photograph, at another scale.
    """
    halves, references = [], []
    for name in PHOTOGRAPHS:
        image = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1) / 255
        square = T.center_crop(image, [420, 420])
        halves.append(T.resize(square[:, :, 105:315], [224, 112], antialias=True))
        part = T.hflip(square[:, 105:, 52:367])
        references.append(T.resize(part, [224, 224], antialias=True))
    return torch.cat(halves, dim=2)[None].clamp(0, 1), torch.stack(references).clamp(0, 1)


def pictures(images: Tensor) -> list[Image]:
    """Images ``[B, 3, H, W]`` in [0, 1] as files give them and processors take them."""
    return [T.to_pil_image(image) for image in images]


def energy_on(half: int, attribution: Tensor) -> float:
    """Share of the positive part of a map ``[h, w]`` on one half of the query; 0.5 by chance."""
    size = attribution.shape[1] // 2
    energy = attribution.clamp_min(0)
    # A middle column belongs to neither half.
    sides = [energy[:, :size].sum(), energy[:, attribution.shape[1] - size :].sum()]
    return float(sides[half] / (sides[0] + sides[1]).clamp_min(1e-12))
