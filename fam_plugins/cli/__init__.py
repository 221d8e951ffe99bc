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

    Example:
        >>> main(["layers", "resnet50"])  # unknown model 'resnet50': write torchvision:NAME, ...
        2
    """
    given = sys.argv[1:] if argv is None else argv
    try:
        asked = _parser().parse_args(given)
        if getattr(asked, "contrast", "") == "gallery" and not getattr(asked, "gallery", True):
            raise ValueError("--contrast gallery needs --gallery, a folder of pictures")
        drawn = COMMANDS[asked.command][2].endswith(".png")
        if drawn and asked.out.suffix.lower() not in PICTURES:
            raise ValueError(f"--out must end in {' or '.join(PICTURES)}, not {asked.out}")
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def _folder(text: str) -> list[Path]:
    ends = tuple(Image.registered_extensions())
    found = sorted(file for file in Path(text).rglob("*") if file.suffix.lower() in ends)
    if not found:
        raise ArgumentTypeError(f"no such folder, or no pictures in it: {text}")
    return found


PICTURES = ".png", ".jpg", ".pdf", ".svg"
NAMES = "torchvision:NAME, timm:NAME, hf:NAME, open_clip:NAME/WEIGHTS or file.py:FUNCTION"
FILE: dict[str, Any] = {"type": _picture, "metavar": "IMAGE"}
FOLDER: dict[str, Any] = {"type": _folder, "metavar": "FOLDER"}
RGB: dict[str, Any] = {"type": float, "nargs": 3, "metavar": ("R", "G", "B")}
OPTIONS: dict[str, dict[str, Any]] = {
    "a": FILE,
    "b": FILE,
    "image": FILE | {"nargs": "+"},
    "sample": FILE | {"nargs": "*", "help": "by default scikit-learn's two photographs"},
    "folder": FOLDER | {"help": "pictures, at any depth"},
    "labelled": {"type": Path, "metavar": "FOLDER", "help": "has a folder of pictures per class"},
    "model": {"metavar": "MODEL", "help": NAMES},
    "--reference": FILE | {"nargs": "+", "required": True, "help": "what to compare with"},
    "--gallery": FOLDER | {"help": "pictures; maps show what makes a match unlike these"},
    "--gallery!": FOLDER | {"help": "the pictures to search", "required": True},
    "-k": {"type": _positive, "default": 5, "help": "how many hits (5)"},
    "--contrast": {"choices": ["others", "gallery"], "help": "unlike the others, or the gallery?"},
    "--model": {
        "default": "torchvision:resnet50",
        "help": f"{NAMES}; by default torchvision:resnet50",
    },
    "--weights": {"default": "default", "help": "default, none (random), or a file: a state dict"},
    "--mean": RGB | {"help": "of the pixels that the weights were trained on, in 0 to 1"},
    "--std": RGB | {"help": "their standard deviation"},
    "--size": {"type": int, "metavar": "PIXELS", "help": "side of the square cut from a picture"},
    "--device": {"help": "cpu, cuda:1, ...; by default a GPU if there is one"},
    "--traceback": {"action": "store_true", "help": "show where an error comes from"},
    "--layer": {"metavar": "NAME", "help": "the layer to explain; found if left out"},
    "--rule": {"choices": ["centred", "additive", "gradcam", "fam"], "help": "(centred)"},
    "--smooth": {"action": BooleanOptionalAction, "help": "steadier maps (yes)"},
    "--out": {"type": Path, "help": "the file or folder to write"},
}
MODEL = "--weights --mean --std --size --device --traceback"
MANY, LOOK = "--gallery --contrast", "--model --layer --rule --smooth --out"
COMMANDS = {  # what it shows, its options, what it writes
    "pair": ("what in two pictures makes them alike", f"a b --gallery {LOOK}", "pair.png"),
    "map": ("what makes pictures like references", f"image --reference {MANY} {LOOK}", "map.png"),
    "search": ("the nearest of a gallery, and why", f"image --gallery! -k {LOOK}", "search"),
    "dataset": ("maps of a folder, as Parquet", f"folder --reference {MANY} {LOOK}", "maps"),
    "quality": ("how good maps are", f"labelled --contrast {LOOK}", "quality.png"),
    "layers": ("the layers, and what each carries of a score", "model sample", ""),
}


def _parser() -> ArgumentParser:
    parser = _Parser(
        "fam-plugins",
        description="Which parts of pictures make them alike, for any encoder of pictures?",
        epilog="For example: fam-plugins pair a.jpg b.jpg --model timm:resnet50",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, options, out) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"Shows {text}.")
        for option in f"{options} {MODEL}".split():
            command.add_argument(option.rstrip("!"), **OPTIONS[option])
        command.set_defaults(out=Path(out), layer=None, rule="centred", smooth=True)
    return parser
