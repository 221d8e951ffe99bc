"""Which layer of a transformer, and what to hold constant behind it? LayerFam beside its peers.

Trains small transformers of several kinds on canvases of one to four of scikit-learn's digits, and
measures LayerFam at every layer with every tail, pytorch-grad-cam's GradCAM at its usual and at
every other layer, torchcam's LeGrad, Grad-ECLIP, attention rollout and a random map, all with the
same contrast; and the partners' own methods with and without ``frozen_tail()``.

    python -m tests.benchmarks.vit_quality --out out            # half an hour on two cores
    python -m tests.benchmarks.vit_quality --quick --out out    # one network, and a check

No download. ``--publish`` writes what was measured into the README of this folder, whose sentences
follow by rule. Needs ``pip install 'fam-plugins[timm,torchcam]'``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import joblib
import torch
from tqdm.auto import tqdm

from tests.benchmarks.quality import verdict, vit_verdict, vits
from tests.benchmarks.quality.report import as_text, side_by_side
from tests.benchmarks.quality.vit_methods import Means, fam_row, measure, partner_row

SUMMARY = Path(__file__).with_name(vit_verdict.SOURCE)
README = Path(__file__).with_name("README.md")
PICTURE = Path(__file__).parents[2] / "compat_examples" / "pictures" / "vit_quality.png"

Found = dict[str, dict[int, tuple[Means, float, float]]]
"""Kind -> seed -> rows, accuracy on single digits, share found of a mosaic's digits."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--kinds", nargs="+", choices=vits.KINDS, default=list(vits.KINDS))
    parser.add_argument("--mosaics", type=int, default=24, help="a network")
    parser.add_argument("--singles", type=int, default=16, help="single images a network")
    parser.add_argument("--steps", type=int, default=6, help="of deletion and insertion")
    parser.add_argument("--train-steps", type=int, help="as the kind says if left out")
    parser.add_argument("--jobs", type=int, default=-1, help="networks at a time; -1 = cores")
    parser.add_argument("--publish", action="store_true", help="write what was measured")
    parser.add_argument("--quick", action="store_true", help="one network, and a check")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / SUMMARY.name
    if options.publish:
        SUMMARY.write_text(kept.read_text(encoding="utf-8"), encoding="utf-8")
        summary = json.loads(SUMMARY.read_text(encoding="utf-8"))
        vit_verdict.picture(summary).savefig(PICTURE, dpi=80)
        block = vit_verdict.page(summary)
        text = verdict.insert(README.read_text(encoding="utf-8"), block, SUMMARY.name)
        README.write_text(text, encoding="utf-8")
        return
    if options.quick:
        options.seeds, options.kinds, options.jobs = [0], ["class token"], 1
        options.mosaics, options.singles, options.steps, options.train_steps = 12, 4, 2, 200
    # One thread a network and as many networks as cores: small networks gain little from threads.
    jobs = [
        joblib.delayed(_network)(options, kind, seed)
        for kind in options.kinds
        for seed in options.seeds
    ]
    running = joblib.Parallel(n_jobs=options.jobs, return_as="generator_unordered")(jobs)
    found: Found = {kind: {} for kind in options.kinds}
    for kind, seed, *rest in tqdm(running, total=len(jobs), desc="networks", smoothing=0):
        found[kind][seed] = tuple(rest)
        print(f"{kind}, seed {seed}: accuracy {rest[1]:.0%}, of a mosaic's digits {rest[2]:.0%}")
    summary = _summary(vars(options), found)
    kept.write_text(as_text(summary), encoding="utf-8")
    kept.with_suffix(".md").write_text(vit_verdict.page(summary) + "\n", encoding="utf-8")
    print(f"wrote {kept} and {kept.with_suffix('.md')}")
    if options.quick:
        check(found["class token"][0][0])


def check(rows: Means) -> None:
    """What must hold also on a network that was hardly trained."""
    ours = rows[fam_row("additive", "patches", "frozen")]["energy"]
    theirs = rows[partner_row("LayerGradientXActivation", "")]["energy"]
    assert abs(ours - theirs) < 1e-3, f"inside frozen_tail Captum's energy is {theirs}, not {ours}"
    best = max(rows[fam_row("additive", "block 0", tail)]["energy"] for tail in ("frozen", "norms"))
    true = rows[fam_row("additive", "block 0", "true")]["energy"]
    assert best > true, f"at block 0 freezing gives {best:.3f}, the true gradient {true:.3f}"
    share = rows[fam_row("additive", "last block", "true")]["coverage"]
    assert abs(share) < 0.1, f"behind a norm the true gradient's shares sum to {share:.2f}, not 0"


def _network(options: argparse.Namespace, kind: str, seed: int) -> tuple[Any, ...]:
    torch.set_num_threads(1)
    given = vits.problem(kind, seed, options.train_steps)
    rows, accuracy = measure(
        kind,
        given,
        mosaics=options.mosaics,
        singles=options.singles,
        steps=options.steps,
        seed=seed,
    )
    return kind, seed, rows, accuracy, given.found


def _summary(measured: dict[str, Any], found: Found) -> dict[str, Any]:
    kinds = {}
    for kind, by_seed in found.items():
        networks = [by_seed[seed] for seed in sorted(by_seed)]
        rows = side_by_side([rows for rows, _, _ in networks])
        kinds[kind] = {
            "accuracy": [round(accuracy, 4) for _, accuracy, _ in networks],
            "found": [round(share, 4) for _, _, share in networks],
            "rows": {
                label: {name: [round(v, 4) for v in values] for name, values in columns.items()}
                for label, columns in rows.items()
            },
        }
    return {"networks": len(measured["seeds"]), "mosaics": measured["mosaics"], "kinds": kinds}


if __name__ == "__main__":
    main()
