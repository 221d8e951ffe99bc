"""Two processes of torchrun, each with every second image, write into one folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fam_plugins.dataset import explain_dataset
from tests.dataset.stored import explainer, items, rows_in

pytest.importorskip("pyarrow", reason="pyarrow is an extra")

CODE = """
import sys
import torch.distributed as dist
from torch.utils.data import Subset
from fam_plugins.dataset import explain_dataset
from tests.dataset.stored import explainer, items

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
given = items(21)[: int(sys.argv[2])]
mine = Subset(given, range(rank, len(given), world))
explain_dataset(explainer(), mine, sys.argv[1], batch_size=1, rows_per_part=8)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_ranks_share_a_folder_and_resume(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(CODE)
    root = str(Path(__file__).parents[2])
    for count in (13, 21):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        command = [*launch, "--standalone", str(script), str(tmp_path / "out"), str(count)]
        env = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        names = {path.name[:10] for path in (tmp_path / "out").iterdir()}
        assert names == {"part-00000", "part-00001"}
    # One image per pass: batches of other images differ in rounding.
    explain_dataset(explainer(), items(21), tmp_path / "one", batch_size=1)
    assert rows_in(tmp_path / "out") == rows_in(tmp_path / "one")
    # One process goes on with what several began.
    explain_dataset(explainer(), items(22), tmp_path / "out", batch_size=2)
    assert len(rows_in(tmp_path / "out")) == 88
