"""Importing: light, lazy, and independent of the partner that is not there."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import fam_plugins


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return result.stdout


def test_importing_loads_neither_partner():
    heavy = run(
        "import sys, fam_plugins; fam_plugins.SimilarityModel; fam_plugins.prototypes;"
        "print([m for m in ('captum', 'pytorch_grad_cam', 'cv2', 'matplotlib', 'sklearn')"
        " if m in sys.modules])"
    )
    assert heavy.strip() == "[]"


def test_importing_loads_no_torch_until_a_name_is_used():
    out = run(
        "import sys, fam_plugins; print('torch' in sys.modules)\n"
        "from fam_plugins import *; print(SimilarityModel.__name__, 'torch' in sys.modules)"
    )
    assert out.split() == ["False", "SimilarityModel", "True"]


@pytest.mark.parametrize(
    ("missing", "use", "fix", "other"),
    [
        ("captum", "LayerFam", "pip install captum", "FAM"),
        ("pytorch_grad_cam", "FAM", "pip install grad-cam", "LayerFam"),
    ],
)
def test_one_missing_partner_does_not_break_the_other(missing, use, fix, other):
    out = run(
        f"import sys; sys.modules[{missing!r}] = None\n"
        "import fam_plugins\n"
        f"try: fam_plugins.{use}\n"
        "except ImportError as error: print(error)\n"
        f"print(fam_plugins.{other}.__name__)"
    )
    assert fix in out
    assert other in out.splitlines()[-1]


def test_every_public_name_is_there():
    for name in fam_plugins.__all__:
        assert getattr(fam_plugins, name) is not None
        assert name in dir(fam_plugins)
    assert fam_plugins.captum.LayerFam is fam_plugins.LayerFam
    assert fam_plugins.grad_cam.FAM is fam_plugins.FAM
    with pytest.raises(AttributeError, match="no attribute 'LayerFAM'"):
        _ = fam_plugins.LayerFAM


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert version("fam-plugins") == fam_plugins.__version__
    except PackageNotFoundError:
        assert re.fullmatch(r"\d+\.\d+\.\d+", fam_plugins.__version__)
