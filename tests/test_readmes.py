"""Every README: its code runs as printed, its links lead somewhere, its rules are spelt out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    "README.md",
    "fam_plugins/README.md",
    "fam_plugins/cape/README.md",
    "compat_examples/README.md",
    "tests/benchmarks/README.md",
    ".github/CONTRIBUTING.md",
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[object]:
    return [
        pytest.param(code, id=f"{name}-{number}")
        for name in FILES
        for number, (language, code) in enumerate(FENCE.findall((ROOT / name).read_text()), 1)
        if language == "python"
    ]


@pytest.mark.parametrize("code", blocks())
def test_a_block_runs_as_printed(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    exec(compile(code, "block", "exec"), {"__name__": "block"})


def test_the_first_page_stays_short():
    text = FENCE.sub("", (ROOT / "README.md").read_text())
    words = [word for word in text.split() if any(map(str.isalnum, word))]
    assert len(words) <= 1000


@pytest.mark.parametrize("name", FILES)
def test_links_and_pictures_exist(name):
    text = FENCE.sub("", (ROOT / name).read_text())
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    missing = [link for link in links if not ((ROOT / name).parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("name", FILES)
def test_every_explainer_names_its_rule(name):
    text = (ROOT / name).read_text()
    # Arguments may hold calls themselves, one level deep.
    calls = re.findall(r"\b(?:LayerFam|FAM)\((?:[^()]|\([^()]*\))*\)", text)
    assert len(calls) == len(re.findall(r"\b(?:LayerFam|FAM)\(", text))
    assert [call for call in calls if "rule=" not in call] == []


def test_the_map_of_the_code_names_every_file():
    package = ROOT / "fam_plugins"
    named = set(re.findall(r"\w+\.py\b", (package / "README.md").read_text()))
    assert named == {file.name for file in package.rglob("*.py")}
