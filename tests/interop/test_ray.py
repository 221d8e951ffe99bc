"""Ray Data on a local cluster: a run that fails, one that loses a worker, and what is refused."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from fam_plugins.dataset import explain_dataset
from fam_plugins.interop.ray import _Worker, explain_with_ray
from tests.dataset.stored import explainer, image, items, rows_in

ray = pytest.importorskip("ray", reason="Ray is an extra")
pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an extra")
pytest.importorskip("ray.data", reason="Ray Data is an extra")

IMAGES, FILES = 64, 8


@pytest.fixture(scope="module")
def cluster():
    """Six CPUs by name: two for the workers, four for listing, reading, filtering, writing."""
    root = str(Path(__file__).parents[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", root)
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False)
    before = ray.data.DataContext.get_current().checkpoint_config
    yield
    assert ray.data.DataContext.get_current().checkpoint_config is before
    ray.shutdown()


def names(folder: Path) -> str:
    """A data set of ids, in several files so that several workers have something to do."""
    (folder / "names").mkdir()
    (folder / "pids").mkdir()
    for part in range(FILES):
        of = [f"{number:04d}.png" for number in range(part, IMAGES, FILES)]
        parquet.write_table(pa.table({"id": of}), folder / "names" / f"{part}.parquet")
    return str(folder / "names")


def test_a_failed_run_and_a_killed_worker_leave_the_rows_of_one_process(tmp_path, cluster):
    source, out = names(tmp_path), tmp_path / "out"

    def load(row):
        with open(tmp_path / "pids" / str(os.getpid()), "a") as seen:
            seen.write(row["id"] + "\n")
        time.sleep(0.05)
        if row["id"] == "0037.png" and not (tmp_path / "mended").exists():
            time.sleep(1)  # others are written meanwhile
            raise OSError("a truncated file")
        return {"id": row["id"], "image": image(int(row["id"][:4])).numpy()}

    def run() -> None:
        explain_with_ray(
            explainer(contrast="others"),
            lambda: ray.data.read_parquet(source).repartition(FILES).map(load),
            out,
            workers=2,
            batch_size=4,
        )

    with pytest.raises(Exception, match="a truncated file"):
        run()
    (tmp_path / "mended").touch()
    earlier = set(os.listdir(tmp_path / "pids"))
    killed = []

    def kill() -> None:
        """A worker in the midst of its work."""
        while not killed:
            time.sleep(0.02)
            for pid in set(os.listdir(tmp_path / "pids")) - earlier:
                if len((tmp_path / "pids" / pid).read_text().split()) >= 3:
                    os.kill(int(pid), signal.SIGKILL)
                    killed.append(pid)
                    return

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    run()
    thread.join(timeout=10)
    assert killed
    assert len(set(os.listdir(tmp_path / "pids")) - earlier) >= 2  # others did the rest
    explain_dataset(explainer(contrast="others"), items(IMAGES), tmp_path / "one", batch_size=4)
    found, wanted = rows_in(out), rows_in(tmp_path / "one")
    assert [row[:4] for row in found] == [row[:4] for row in wanted]
    for mine, theirs in zip(found, wanted, strict=True):  # batches differ: so does rounding
        assert mine[4:6] == pytest.approx(theirs[4:6], abs=1e-5)
        assert mine[6:7] == theirs[6:7]
        for one, other in zip(mine[-1], theirs[-1], strict=True):
            assert one == pytest.approx(other, rel=2e-3, abs=1e-6)


def test_what_ray_would_write_twice_is_left_out(tmp_path, cluster):
    """It does not ask what is done of a data set that it has not read itself."""
    made, out, beside = explainer(), tmp_path / "out", tmp_path / "out.checkpoint"
    explain_dataset(made, items(3), out)
    beside.mkdir()
    for name in ("torn-0.parquet",):  # as a stop between writing and noting leaves it
        (out / name).write_bytes(b"half a part")
        parquet.write_table(pa.table({"id": ["0003.png"]}), beside / "torn.pending.parquet")
    rows = [{"id": name, "image": picture.numpy()} for name, picture in items(5)]
    explain_with_ray(made, lambda: ray.data.from_items(rows), out)
    explain_dataset(made, items(5), tmp_path / "one")
    assert [row[:4] for row in rows_in(out)] == [row[:4] for row in rows_in(tmp_path / "one")]
    assert not (out / "torn-0.parquet").exists()


def test_what_would_hang_or_mix_is_refused(tmp_path, cluster):
    made, source = explainer(), names(tmp_path)

    def read():
        return ray.data.read_parquet(source)

    with pytest.raises(TypeError, match="must be a function"):
        explain_with_ray(made, read(), tmp_path / "a")
    with pytest.raises(ValueError, match="3 workers need 7 CPUs, there are 6"):
        explain_with_ray(made, read, tmp_path / "a", workers=3)
    explain_dataset(made, items(2), tmp_path / "b")
    with pytest.raises(ValueError, match="other settings: .*rule"):
        explain_with_ray(explainer("centred"), read, tmp_path / "b")


def test_blocks_that_ray_would_cut_are_refused():
    class Large:
        nbytes = 2**26 + 1

    worker = _Worker.__new__(_Worker)
    worker._explain, worker._done = (lambda *_: Large()), set()
    with pytest.raises(ValueError, match="64 MiB of maps: lower batch_size"):
        worker({"id": ["a"], "image": [image(0).numpy()]})
