"""The examples of published encoders, on small models of random weights; offline, a clear end."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "compat_examples"
LIBRARIES = {
    "clip_captions": "open_clip",
    "dino_retrieval": "transformers",
    "siglip_pairs": "transformers",
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run an example as a script, without asking for a network."""
    for needed in ("matplotlib", "sklearn", "PIL"):
        pytest.importorskip(needed, reason="examples draw photographs")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def offline(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    for name in ("hub",):  # it may have been imported with another urlopen
        monkeypatch.delitem(sys.modules, name, raising=False)

    def script(name, *arguments):
        pytest.importorskip(LIBRARIES[name], reason="an extra")
        monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path / "new"), *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return tmp_path / "new" / f"{name}.png"

    return script


@pytest.mark.parametrize("name", LIBRARIES)
def test_runs_on_random_weights_and_says_so(run, capsys, name):
    picture = run(name, "--random", "--device", "cpu")
    assert picture.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "random weights" in printed
    assert "| - |" in printed  # no energy of a map that means nothing
    assert f"wrote {picture}" in printed


@pytest.mark.parametrize("name", LIBRARIES)
def test_without_a_network_the_end_names_the_fix(run, monkeypatch, name):
    library = pytest.importorskip(LIBRARIES[name], reason="an extra")

    def unreachable(wanted, *_args, **_kwargs):
        raise OSError(f"We couldn't connect to load {wanted}")

    if name == "clip_captions":
        monkeypatch.setattr(library, "create_model_and_transforms", unreachable)
    else:
        monkeypatch.setattr(library.AutoModel, "from_pretrained", unreachable)
    with pytest.raises(SystemExit, match=r"could not be loaded \(OSError.*\n.*--random"):
        run(name)


def test_a_missing_library_is_named(run, monkeypatch):
    pytest.importorskip("open_clip", reason="an extra")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    import hub

    with pytest.raises(SystemExit, match="needs open_clip: pip install open_clip_torch"):
        hub.import_library("open_clip", "open_clip_torch")
