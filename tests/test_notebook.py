"""The notebook runs from its first cell to its last and shows its pictures; git holds no output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fam_plugins

NOTEBOOK = Path(__file__).parents[1] / "compat_examples" / "first_steps.ipynb"


def test_no_output_is_in_git():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"]] == []


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook run in a fresh kernel, where no download succeeds; its code cells."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient runs notebooks")
    pytest.importorskip("ipykernel", reason="ipykernel runs notebooks")
    for needed in ("matplotlib", "sklearn", "PIL"):
        pytest.importorskip(needed, reason="the notebook draws photographs")
    import nbformat

    folder = tmp_path_factory.mktemp("kernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(fam_plugins.__file__).parents[1]))
        patch.setenv("TORCH_HOME", str(folder))
        patch.setenv("https_proxy", "http://127.0.0.1:9")  # a port that nothing answers
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        options = {"timeout": 300, "kernel_name": "python3"}
        place = {"metadata": {"path": str(folder)}}
        nbclient.NotebookClient(notebook, resources=place, **options).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_figure_shows_itself(executed):
    drawn = [cell for cell in executed if ".plot" in cell.source or "plot_" in cell.source]
    assert len(drawn) >= 6
    for cell in drawn:
        shown = [out.data for out in cell.outputs if "image/png" in out.get("data", {})]
        assert len(shown) == 1, cell.source
        assert len(shown[0]["image/png"]) > 10_000, cell.source
    # No backend is asked to.
    assert "%matplotlib" not in "".join(cell.source for cell in executed)


def test_weights_that_mean_nothing_are_announced(executed):
    printed = "".join(out.get("text", "") for out in executed[0].outputs)
    assert "could not be downloaded" in printed
    assert "RANDOM WEIGHTS" in printed
    assert "maps mean nothing" in printed


def test_nothing_of_ours_warns(executed):
    errors = [out.text for cell in executed for out in cell.outputs if out.get("name") == "stderr"]
    assert [text for text in errors if "UserWarning" in text] == []
