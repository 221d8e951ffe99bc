"""The gallery: examples are run and shown, pictures are small; measures of the photographs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "compat_examples"


@pytest.fixture
def photographs(monkeypatch):
    for needed in ("matplotlib", "sklearn"):
        pytest.importorskip(needed, reason="examples draw photographs")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import photographs

    return photographs


def test_every_example_is_run_and_shown():
    scripts = [file for file in EXAMPLES.glob("*.py") if "__main__" in file.read_text()]
    run = (ROOT / ".ci" / "run").read_text() + (ROOT / "README.md").read_text()
    shown = (EXAMPLES / "README.md").read_text()
    assert len(scripts) > 15
    for script in scripts:
        assert re.search(rf"\b(harness_)?{script.stem.removeprefix('harness_')}\b", run), (
            script.name
        )
        assert f"compat_examples/{script.name}" in shown or f"`{script.name}`" in shown, script.name


def test_every_picture_is_shown_and_small():
    pages = "".join(file.read_text() for file in ROOT.rglob("*.md") if ".venv" not in file.parts)
    for picture in (EXAMPLES / "pictures").iterdir():
        assert picture.name in pages
        assert picture.stat().st_size < 300_000, picture.name


def test_energy_and_pointing_of_a_quarter(photographs):
    attribution = torch.zeros(4, 4)
    attribution[0, 3], attribution[3, 0], attribution[3, 1] = 0.5, 1.0, 0.5
    attribution[1, 1] = -9.0  # speaks against, which is no energy
    assert photographs.on_quarter(attribution, 1) == (0.25, False)
    assert photographs.on_quarter(attribution, 2) == (0.75, True)
    assert photographs.on_quarter(attribution, 0) == (0.0, False)


def test_quarters_of_a_mosaic_are_in_reading_order(photographs):
    fields = [torch.full((3, 10, 10), value) for value in (0.1, 0.2, 0.3, 0.4)]
    whole = photographs.mosaic(fields)
    corners = whole[0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.allclose(torch.tensor([0.1, 0.2, 0.3, 0.4]))


def test_a_missing_library_is_named(photographs, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(SystemExit, match="pip install scikit-image"):
        photographs.photographs()
