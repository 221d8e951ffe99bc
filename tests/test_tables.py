"""The check of the README's numbers passes on those numbers and on no others."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from tests.benchmarks.check_tables import differences, table

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def measured():
    """A file of quickstart.py that says what the README says."""
    rows = [
        {
            "tool": "LayerFam (Captum)",
            "rule": row.rule,
            "smooth": row.smooth,
            "contrast": row.contrast,
            "energy": row.energy,
            "interval": row.interval,
            "pointing": row.pointing,
        }
        for row in table(TEXT)
    ]
    rows += [
        {**row, "tool": "Captum's LayerGradCam", "rule": "", "smooth": False, "contrast": contrast}
        for row in rows
        for contrast in ("none", "others")
        if row["rule"] == "gradcam" and not row["smooth"]
    ]
    return {"accuracy": 0.994, "mosaics": 300, "threads": 2, "rows": rows}


def test_the_table_is_read(measured):
    assert [(row.rule, row.contrast, row.smooth) for row in table(TEXT)] == [
        ("fam", "none", False),
        ("centred", "none", False),
        ("centred", "others", False),
        ("gradcam", "others", False),
        ("centred", "others", True),
        ("gradcam", "others", True),
    ]
    assert all(0.25 < row.energy < row.pointing < 1 for row in table(TEXT))
    assert differences(TEXT, measured) == []


@pytest.mark.parametrize("row", range(6))
@pytest.mark.parametrize(("column", "by"), [("energy", -0.06), ("pointing", -0.1)])
def test_a_number_that_moved_is_found(measured, row, column, by):
    moved = copy.deepcopy(measured)
    moved["rows"][row][column] += by
    assert any(moved["rows"][row]["rule"] in line for line in differences(TEXT, moved))


def test_training_noise_passes(measured):
    for row in measured["rows"]:
        row["energy"] += 0.025
    assert differences(TEXT, measured) == []


def test_a_table_that_is_gone_and_another_accuracy_are_found(measured):
    assert "0 rows" in differences(TEXT.replace("±", "+-"), measured)[0]
    measured["accuracy"] = 0.93
    assert "93.0%" in differences(TEXT, measured)[0]
