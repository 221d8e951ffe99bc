"""The command ``fam-plugins``: pictures and tables without a line of Python."""

from __future__ import annotations

import sys
import warnings
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from fam_plugins.cli.models import check_model

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; by default those of the process.

    Returns:
        The exit code: 0; 2, with one sentence on stderr; or 130 after Ctrl-C.
    """
    given = sys.argv[1:] if argv is None else argv
    try:
        asked = _parser().parse_args(given)
        if getattr(asked, "contrast", "") == "gallery" and not getattr(asked, "gallery", True):
            raise ValueError("--contrast gallery needs --gallery, a folder of pictures")
        check_model(asked.model, asked.weights)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            warnings.filterwarnings("ignore", "contrast= is left out")  # in words of Python
            warnings.showwarning = lambda message, *_: _say(message)
            from fam_plugins.cli.commands import Run  # and torch, which takes seconds

            getattr(Run(**vars(asked)), asked.command)()
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # of any library of models, too
        if "--traceback" in given:
            raise
        _say(error if str(error) else type(error).__name__)
        return 2
    return 0


def _say(message: object) -> None:
    print("fam-plugins:", str(message).strip().partition("\n")[0], file=sys.stderr)


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _picture(text: str) -> Path:
    try:
        Image.open(text).close()
    except OSError as error:
        raise ArgumentTypeError(f"{error.strerror or 'not a picture'}: {text}") from error
    return Path(text)


def _folder(text: str) -> list[Path]:
    ends = tuple(Image.registered_extensions())
    found = sorted(file for file in Path(text).rglob("*") if file.suffix.lower() in ends)
    if not found:
        raise ArgumentTypeError(f"no such folder, or no pictures in it: {text}")
    return found


NAMES = "torchvision:NAME, timm:NAME, hf:NAME, open_clip:NAME/WEIGHTS or file.py:FUNCTION"
FILE: dict[str, Any] = {"type": _picture, "metavar": "IMAGE"}
OPTIONS: dict[str, dict[str, Any]] = {
    "a": FILE,
    "b": FILE,
    "image": FILE | {"nargs": "+"},
    "sample": FILE | {"nargs": "*", "help": "by default scikit-learn's two photographs"},
    "folder": {"type": _folder, "help": "pictures, at any depth"},
    "labelled": {"type": Path, "help": "a folder with one folder of pictures per class"},
    "model": {"help": NAMES},
    "--reference": FILE | {"nargs": "+", "required": True, "help": "what to compare with"},
    "--gallery": {"type": _folder, "help": "a folder; maps show what these pictures do not have"},
    "--gallery!": {"type": _folder, "help": "the folder to search", "required": True},
    "-k": {"type": int, "default": 5, "help": "how many hits (5)"},
    "--contrast": {"choices": ["others", "gallery"], "help": "other references, or the gallery"},
    "--model": {"default": "torchvision:resnet50", "metavar": "MODEL", "help": NAMES},
    "--weights": {"default": "default", "help": "default, none (random) or a file, a state dict"},
    "--mean": {"type": float, "nargs": 3, "help": "of the pixels the weights were trained on"},
    "--std": {"type": float, "nargs": 3, "help": "the same"},
    "--size": {"type": int, "help": "side of the square cut from a picture, in pixels"},
    "--device": {"help": "cpu, cuda:1, ...; a GPU if there is one"},
    "--traceback": {"action": "store_true", "help": "show where an error comes from"},
    "--layer": {"help": "which to explain; found if left out"},
    "--rule": {"default": "centred", "choices": ["centred", "additive", "gradcam", "fam"]},
    "--smooth": {"action": BooleanOptionalAction, "default": True, "help": "steadier maps"},
    "--out": {"type": Path, "help": "the file or folder to write"},
}
COMMANDS = {  # what it does, its own options, what it writes
    "pair": ("what makes two pictures alike, in both", "a b --gallery", "pair.png"),
    "map": (
        "what makes pictures like references",
        "image --reference --contrast --gallery",
        "map.png",
    ),
    "search": ("the nearest of a gallery, and why", "image --gallery! -k", "search"),
    "dataset": ("maps of a folder, in Parquet", "folder --reference --contrast --gallery", "maps"),
    "quality": ("how good maps are, against Grad-CAM", "labelled --contrast", "quality.png"),
    "layers": ("what there is to explain", "model sample", ""),
}


def _parser() -> ArgumentParser:
    parser = _Parser("fam-plugins", description="What makes pictures alike, for any encoder.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, own, out) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"Show {text}.")
        for option in [*own.split(), *list(OPTIONS)[list(OPTIONS).index("--model") :]]:
            if option != "--model" or name != "layers":
                command.add_argument(option.rstrip("!"), **OPTIONS[option])
        command.set_defaults(out=Path(out))
    return parser
