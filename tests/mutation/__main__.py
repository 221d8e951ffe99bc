"""Put each mutant of the table into a copy of the tree, run its tests, and say what survived.

python -m tests.mutation [--only FILE] [--most N]

Needs ``os.fork``: every mutant runs in a child that has torch and both partners imported already.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

from tests.mutation.table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
SECONDS = 300
"""How long the tests of a mutant may take: one that loops for ever is noticed too."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument(
        "--only", default="", metavar="FILE", help="part of its path or of the change"
    )
    parser.add_argument("--most", type=int, default=len(MUTANTS), metavar="N", help="the first N")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in str(mutant)][: options.most]
    for heavy in ("torchvision", "captum.attr", "pytorch_grad_cam", "matplotlib.figure"):
        import_module(heavy)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        shutil.copy(ROOT / "pyproject.toml", tree)
        for part in ("fam_plugins", "tests"):
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, tree / part, ignore=skip)
        everything = list(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
        for test in everything:
            if (outcome := run(tree, [test])) != "survived":
                print(f"{test} without a mutant: {outcome}; mend that first")
                return 2
        counts: dict[str, Counter[str]] = {}
        for number, mutant in enumerate(chosen, 1):
            start = time.perf_counter()
            outcome = try_out(tree, mutant)
            counts.setdefault(mutant.file, Counter())[outcome] += 1
            seconds = time.perf_counter() - start
            print(f"{number:4} {outcome:8} {seconds:5.1f} s  {mutant}", flush=True)
    return summary(counts)


def try_out(tree: Path, mutant: Mutant) -> str:
    """Killed or survived; stale if the text is not there exactly once."""
    path = tree / mutant.file
    healthy = path.read_text()
    if healthy.count(mutant.old) != 1:
        return "stale"
    path.write_text(healthy.replace(mutant.old, mutant.new))
    try:
        return run(tree, mutant.tests)
    finally:
        path.write_text(healthy)


def run(tree: Path, tests: list[str] | tuple[str, ...]) -> str:
    """Run tests of a tree in a child process."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        for name in [n for n in sys.modules if n.partition(".")[0] in ("tests", "fam_plugins")]:
            del sys.modules[name]
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        sys.dont_write_bytecode = True
        os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        return "no tests"
    return "killed" if code else "survived"


def summary(counts: dict[str, Counter[str]]) -> int:
    """Print how many of each file were noticed; 0 if all were."""
    total: Counter[str] = Counter()
    print(f"\n{'':44}killed  survived  other")
    for file, of_file in [*sorted(counts.items()), ("all", total)]:
        other = of_file.total() - of_file["killed"] - of_file["survived"]
        print(f"{file:44}{of_file['killed']:6}{of_file['survived']:10}{other:7}")
        total += of_file if file != "all" else Counter()
    share = total["killed"] / max(total.total(), 1)
    print(f"{share:.1%} of {total.total()} mutants killed")
    return int(total["killed"] != total.total())


if __name__ == "__main__":
    sys.exit(main())
