"""A run that is killed at any point and run again holds what an undisturbed one holds."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fam_plugins.dataset import explain_dataset
from tests.dataset.stored import explainer, items, rows_in

pytest.importorskip("pyarrow", reason="pyarrow is an extra")

IMAGES = 120
OPTIONS = {"batch_size": 4, "rows_per_part": 24, "progress": False}
# One process that imports once and forks a run at every line it reads.
CODE = '''
import io, os, sys, time, torch, pyarrow.parquet, pyarrow.dataset
from fam_plugins.dataset import explain_dataset
from tests.dataset.stored import explainer, items
torch.set_num_threads(1)

def slowly(given):
    for item in given:
        time.sleep(0.002)
        yield item

write = pyarrow.parquet.write_table

def slow_disk(table, file):
    """Half of a part is there for a while, and a kill may come just then."""
    whole = io.BytesIO()
    write(table, whole)
    half = len(whole.getvalue()) // 2
    file.write(whole.getvalue()[:half])
    file.flush()
    time.sleep(0.01)
    file.write(whole.getvalue()[half:])

pyarrow.parquet.write_table = slow_disk
given = items({images})
for line in sys.stdin:
    run = os.fork()
    if run == 0:
        explain_dataset(explainer(), slowly(given), line.strip(), **{options})
        os._exit(0)
    print(run, flush=True)
    print(os.waitpid(run, 0)[1], flush=True)
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_and_resumes(tmp_path):
    explain_dataset(explainer(), items(IMAGES), tmp_path / "whole", **OPTIONS)
    wanted = rows_in(tmp_path / "whole")
    assert len(wanted) == 4 * IMAGES
    drawn = random.Random(0)
    root = str(Path(__file__).parents[2])
    code = CODE.format(images=IMAGES, options=OPTIONS)
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=-1, stdout=-1, text=True, cwd=root,
        env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip

    def run(out: Path, kill: bool) -> int:
        """The exit code of a run, killed within a few parts from where it starts."""
        parent.stdin.write(f"{out}\n")
        parent.stdin.flush()
        child = int(parent.stdout.readline())
        if kill:
            parts = len(list(out.glob("[!.]*"))) + drawn.randrange(8)
            with contextlib.suppress(ProcessLookupError):
                while len(list(out.glob("[!.]*"))) < parts:
                    time.sleep(0.001)
                    os.kill(child, 0)
                time.sleep(drawn.uniform(0, 0.05))
                os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(int(parent.stdout.readline()))

    killed = resumed = folder = 0
    try:
        while killed < 20 or resumed:
            out = tmp_path / str(folder)
            if run(out, killed < 20) == -signal.SIGKILL:
                killed += 1
                resumed += out.exists()
                continue
            assert rows_in(out) == wanted
            assert not list(out.glob(".*"))
            folder, resumed = folder + 1, 0
    finally:
        parent.stdin.close()
        parent.wait()
        parent.stdout.close()
    assert folder >= 2
