"""Does the README's table still say what its command prints?

    python compat_examples/quickstart.py --out out
    python -m tests.benchmarks.check_tables out/quickstart.json

Exits with 1 and the differing rows where a number of the README is further from the one in the
file than chance and threads explain.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "README.md"

OTHER_THREADS = 0.025
"""How far the same command moves an energy when it trains on another number of threads.

The sums of a convolution then run in another order, so that another network comes out: on one
thread instead of the README's two, energies move by up to .024 and the accuracy by .3 %. Another
processor or torch may do the same. An interval covers the draw of mosaics, not that, so it is added
to the interval.
"""


@dataclass(frozen=True)
class Row:
    """One row of the table: its key, and what it claims."""

    rule: str
    smooth: bool
    contrast: str
    energy: float
    interval: float
    pointing: float


def table(text: str) -> list[Row]:
    """The rows of the README's quickstart table."""
    rows = []
    for line in text.splitlines():
        found = re.fullmatch(
            r"\| .*`(\w+)`(?: \(published\))?(, smoothed)? \| (none|others) \| "
            r"(\S+) ± (\S+) \| (\S+) \|",
            line.replace("*", ""),
        )
        if found:
            rule, smooth, contrast, *numbers = found.groups()
            rows.append(Row(rule, smooth is not None, contrast, *map(float, numbers)))
    return rows


def differences(text: str, measured: dict[str, Any]) -> list[str]:
    """What the README's text says otherwise than a file of ``quickstart.py``, in words."""
    claims = table(text)
    by_key = {
        (row["tool"].split()[0], row["rule"], row["smooth"], row["contrast"]): row
        for row in measured["rows"]
    }
    wrong = []
    if len(claims) != 6:
        wrong.append(f"the README's table has {len(claims)} rows that could be read, not 6")
    for claim in claims:
        name = f"{claim.rule}, contrast {claim.contrast}" + ", smoothed" * claim.smooth
        found = by_key["LayerFam", claim.rule, claim.smooth, claim.contrast]
        allowed = max(claim.interval, found["interval"]) + OTHER_THREADS
        if not abs(claim.energy - found["energy"]) <= allowed:
            wrong.append(f"{name}: energy {claim.energy}, measured {found['energy']:.3f}")
        share = found["pointing"]
        chance = 1.96 * math.sqrt(max(share * (1 - share), 0.01) / measured["mosaics"])
        if not abs(claim.pointing - share) <= chance + OTHER_THREADS:
            wrong.append(f"{name}: point {claim.pointing}, measured {share:.3f}")
        theirs = by_key["Captum's", "", False, claim.contrast]
        # One row of the README stands for both.
        plain = claim.rule == "gradcam" and not claim.smooth
        if plain and not abs(found["energy"] - theirs["energy"]) < 1e-3:
            wrong.append(f"{name}: {found['energy']:.3f}, Captum's own {theirs['energy']:.3f}")
    accuracy = re.search(r"network has (\S+) % few-shot accuracy", text)
    if not accuracy or not abs(float(accuracy[1]) / 100 - measured["accuracy"]) <= 0.01:
        wrong.append(f"the accuracy is {measured['accuracy']:.1%}, which the README does not say")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="quickstart.json, as quickstart.py writes it")
    measured = json.loads(parser.parse_args().file.read_text(encoding="utf-8"))
    wrong = differences(README.read_text(encoding="utf-8"), measured)
    if wrong:
        raise SystemExit("README.md does not say what quickstart.py prints:\n" + "\n".join(wrong))
    print(f"README.md says what quickstart.py printed on {measured['threads']} thread(s)")


if __name__ == "__main__":
    main()
