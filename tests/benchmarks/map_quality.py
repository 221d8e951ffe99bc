"""How good are the maps? FAM's rules and CAPE beside Grad-CAM and its relatives.

Trains small networks of three kinds on scikit-learn's digits, measures every method on each with
:func:`fam_plugins.quality.evaluate`, and writes ``map_quality.md``, ``map_quality.json`` and
``map_quality.png``. No download. All values are saved after every network; ``--redraw`` writes
what is there again, ``--publish`` also into the READMEs, whose sentences follow by rule.

    python -m tests.benchmarks.map_quality --out out

In a minute, with fewer and worse trained networks, and fails where a contrast set no longer finds
the match or CAPE no longer tells two classes apart:

    python -m tests.benchmarks.map_quality --quick --out out

On images of your own (CUB, ImageNet, ...), one network, intervals over images:

    python -m tests.benchmarks.map_quality --image-folder DIR --arch resnet50 --weights DEFAULT
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError

import joblib
import numpy as np
import torch
from tqdm.auto import tqdm

from fam_plugins.quality import Evaluation, evaluate
from tests.benchmarks.quality import cape_part, picture, report, similarity_part, verdict
from tests.benchmarks.quality.methods import SETTINGS, explainers, row
from tests.benchmarks.quality.problems import (
    KINDS,
    check_similarity,
    digits_problem,
    folder_problem,
)

VALUES = "map_quality.joblib"
"""The means of every network, kept so that tables and picture can be drawn again."""

ROOT = Path(__file__).parents[2]
SUMMARY = Path(__file__).with_name("map_quality.json")
PAGES = {
    ROOT / "README.md": verdict.first_page,
    Path(__file__).with_name("README.md"): verdict.benchmarks_page,
}
"""Pages with a block that follows from the summary, and the rule that writes it."""

Similarity = dict[str, dict[int, tuple[similarity_part.Means, float]]]
Cape = dict[int, tuple[str, dict[str, dict[str, float]], dict[str, dict[str, float]]]]


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.image_folder is not None:
        _folder(options)
        return
    if options.redraw or options.publish:
        _write(options, *joblib.load(options.out / VALUES))
        return
    started = time.perf_counter()
    jobs = [
        joblib.delayed(_similarity)(options, seed, kind)
        for seed in options.seeds
        for kind in options.kinds
    ]
    jobs += [joblib.delayed(_cape)(options, seed) for seed in options.seeds]
    # One thread a network and as many networks as cores: small networks gain little from threads.
    running = joblib.Parallel(n_jobs=options.jobs, return_as="generator_unordered")(jobs)
    similarity: Similarity = {}
    cape: Cape = {}
    for kind, seed, *rest in tqdm(running, total=len(jobs), desc="networks", smoothing=0):
        if kind == "cape":
            cape[seed] = tuple(rest)
        else:
            similarity.setdefault(kind, {})[seed] = tuple(rest)
        found = (vars(options), similarity, cape, time.perf_counter() - started)
        joblib.dump(found, options.out / VALUES)
    _write(options, *found)
    print(f"wrote map_quality.md, map_quality.json and map_quality.png in {options.out}")
    if options.quick:
        _check(similarity, cape)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--mosaics", type=int, default=24, help="a network")
    parser.add_argument("--singles", type=int, default=24, help="single images a network")
    parser.add_argument("--steps", type=int, default=8, help="of deletion and insertion")
    parser.add_argument("--randomised", type=int, default=5, help="mosaics for randomisation")
    parser.add_argument("--train-steps", type=int, default=250, help="of the digits embedding")
    parser.add_argument("--epochs", type=int, default=15, help="of the digits classifier")
    parser.add_argument("--jobs", type=int, default=-1, help="networks at a time; -1 = cores")
    parser.add_argument("--image-folder", help="one subfolder a class")
    parser.add_argument("--arch", default="resnet50", help="a torchvision ConvNet")
    parser.add_argument("--weights", default="DEFAULT", help="a state dict, or DEFAULT to download")
    parser.add_argument("--size", type=int, default=224, help="pixels of one image of the folder")
    parser.add_argument("--similarity", type=check_similarity, default="cosine")
    parser.add_argument("--redraw", action="store_true", help="only write what was measured")
    parser.add_argument("--publish", action="store_true", help="the same, also into the READMEs")
    parser.add_argument("--quick", action="store_true", help="one seed, few images, and a check")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.jobs, options.kinds = [0], 1, list(KINDS)[:2]
        options.mosaics, options.singles, options.steps, options.randomised = 12, 2, 4, 1
        options.train_steps, options.epochs = 100, 5
    return options


def _check(similarity: Similarity, cape: Cape) -> None:
    """What the tables are there to show, with margins for few images and short training."""
    contrasted = row("centred", "others", False)
    for kind, by_seed in similarity.items():
        for rows, _ in by_seed.values():
            fam, centred = rows["fam"]["energy"], rows[contrasted]["energy"]
            assert centred > 0.45, f"{kind}: only {centred:.2f} of the energy is on the match"
            assert centred > fam + 0.1, f"{kind}: centred {centred:.2f}, fam {fam:.2f}"
            worst, least = (rows[label]["mosaic deletion"] for label in (contrasted, "random"))
            assert worst < least, f"{kind}: deletion {worst:.3f}, in random order {least:.3f}"
    for _, own, _ in cape.values():
        ours, theirs = (own[label]["top-2 overlap"] for label in ("CAPE", "Grad-CAM"))
        assert ours < theirs, f"CAPE's maps of two classes overlap by {ours:.2f}, {theirs:.2f}"
        # A map and its negative differ in how much of the image they cover.
        covered = own["CAPE"]["complexity"]
        assert covered < 0.5, f"CAPE's map of the top class covers {covered:.2f} of the image"


def _similarity(
    options: argparse.Namespace, seed: int, kind: str
) -> tuple[str, int, similarity_part.Means, float]:
    torch.set_num_threads(1)
    problem = digits_problem(kind, seed, options.train_steps)
    counts = similarity_part.Counts(
        options.mosaics, options.singles, options.steps, options.randomised
    )
    return kind, seed, *similarity_part.measure(problem, counts, seed)


def _cape(options: argparse.Namespace, seed: int) -> tuple[Any, ...]:
    torch.set_num_threads(1)
    model, images, facts = cape_part.fitted_model(
        seed, train_epochs=options.epochs, fit_epochs=2 * options.epochs
    )
    own, vanilla = (
        {
            label: {name: float(np.nanmean(values)) for name, values in columns.items()}
            for label, columns in cape_part.measure(model, images, judge).items()
        }
        for judge in ("own", "vanilla")
    )
    return "cape", seed, facts, own, vanilla


def _folder(options: argparse.Namespace) -> None:
    """One network on images of the user's: intervals cover other images, not other networks."""
    try:
        problem = folder_problem(
            options.image_folder,
            options.arch,
            options.weights,
            similarity=options.similarity,
            size=options.size,
        )
    except URLError as error:
        raise SystemExit(
            f"The weights of {options.arch} could not be downloaded ({error.reason}): pass a state "
            "dict that is here already, --weights FILE"
        ) from None
    values: dict[str, Any] = {}
    for contrast, smooth in SETTINGS:
        found = evaluate(
            explainers(contrast, smooth),
            **vars(problem),
            contrast=contrast,
            smooth=smooth,
            mosaics=options.mosaics,
            singles=options.singles,
            steps=options.steps,
            seed=options.seeds[0],
        )
        values |= {row(name, contrast, smooth): found.values[name] for name in found.values}
    whole = Evaluation(values, found.accuracy)
    title = f"# {options.arch} on {Path(options.image_folder).name}"
    text = f"{title}\n\nAccuracy of the nearest reference: {whole.accuracy:.1%}.\n\n{whole}\n"
    (options.out / "map_quality.md").write_text(text, encoding="utf-8")
    whole.plot().savefig(options.out / "map_quality.png", dpi=80)
    print(text)


def _write(
    options: argparse.Namespace,
    measured: dict[str, Any],
    similarity: Similarity,
    cape: Cape,
    seconds: float,
) -> None:
    """Write the report, the picture and, once there are all parts, the summary."""
    kinds = {}
    for kind in [kind for kind in KINDS if kind in similarity]:
        networks = [similarity[kind][seed] for seed in sorted(similarity[kind])]
        rows = report.side_by_side([means for means, _ in networks])
        kinds[kind] = ([accuracy for _, accuracy in networks], rows)
    facts = [f"seed {seed}: {cape[seed][0]}" for seed in sorted(cape)]
    own, vanilla = (
        report.side_by_side([cape[seed][part] for seed in sorted(cape)]) for part in (1, 2)
    )
    counts = {
        "networks": len(measured["seeds"]),
        "mosaics": measured["mosaics"],
        "singles": measured["singles"],
    }
    summary = report.summary(kinds, own, counts)
    parts = [_preamble(measured, seconds)]
    parts += [report.similarity_section(kind, *found) for kind, found in kinds.items()]
    parts += [report.cape_section(facts, own, vanilla)]
    parts += [f"## In words, by rule\n\n{verdict.benchmarks_page(summary)}"]
    (options.out / "map_quality.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    text = report.as_text(summary)
    (options.out / SUMMARY.name).write_text(text, encoding="utf-8")
    drawn = {
        kind: {label: rows[label] for label in rows if label in verdict.SHOWN}
        for kind, (_, rows) in kinds.items()
    }
    picture.draw(drawn, own, options.out / "map_quality.png")
    if options.publish:
        SUMMARY.write_text(text, encoding="utf-8")
        for page, rule in PAGES.items():
            written = verdict.insert(page.read_text(encoding="utf-8"), rule(summary))
            page.write_text(written, encoding="utf-8")
        pictures = ROOT / "compat_examples" / "pictures"
        (pictures / "map_quality.png").write_bytes((options.out / "map_quality.png").read_bytes())


def _preamble(measured: dict[str, Any], seconds: float) -> str:
    machine = (
        f"{platform.machine()} CPU, one thread a network, torch {torch.__version__}, "
        f"NumPy {np.__version__}"
    )
    seeds = " ".join(map(str, measured["seeds"]))
    return _TEXT.format(**{**measured, "seeds": seeds}, seconds=seconds, machine=machine)


_TEXT = """# How good are the maps?

`python -m tests.benchmarks.map_quality`, seeds {seeds}; {seconds:.0f} s, {machine}.

**Intervals are over networks.** Every network, trained from its own seed on its own split, gives
one mean over its images; a value is the mean of those with its 95 % Student t interval. There are
few networks, and their means are near normal: percentiles of a bootstrap would be too narrow.

**Questions.** {mosaics} mosaics of four classes and {singles} single images a network, none of them
seen in training. References are 5-shot prototypes of ten classes. "contrast others" explains the
score minus the mean score of all other references, "contrast gallery" minus the mean score of their
images. "smoothed": each map is smoothed with [1, 2, 1]' [1, 2, 1] / 16, before it is cut at 0.

* **Energy, brightest point, pixel AUC**: the share of a map's positive part in the cell that
  matches the reference (arXiv 1910.01279; chance .25), whether its maximum is there (arXiv
  1608.00507; chance .25), and the area under the ROC curve of its pixels (chance .5). Energy
  depends on where a map has its zero; the other two do not.
* **Deletion, insertion**: area under the score minus the mean score of the other references, while
  patches are blurred, or restored, in the map's order, in {steps} steps (arXiv 1806.07421); equal
  patches in random order.
* **Reference sensitivity**: Spearman's rank correlation of a mosaic's maps for two references that
  match different cells. Near 1 the map ignores the reference. A random map scores 0 without merit.
* **Model randomisation**: mean rank correlation with the original map over a cascade from the
  output down (arXiv 1810.03292), {randomised} mosaics a network, contrast others, smoothed.
* **Additivity error**: mean |sum of the map - score|. `additive` leaves out what belongs to no
  region: the bias of a linear head, the constant part of a squared distance.
* pytorch-grad-cam's maps are cut at 0 by that package, while ours keep their sign, which also
  orders the patches below 0; `gradcam` is Grad-CAM with its sign, as Captum's LayerGradCam.
* A dash in a correlation: the map is constant, or was not measured.
* **CAPE part** (protocol of arXiv 2404.02388, definitions of the papers it builds on): with
  maps scaled to [0, 1], Y the confidence on the image, O on image x map, D on image x (1 - map):
  average drop max(0, Y-O)/Y and increase in confidence [O > Y] (arXiv 1710.11063), average drop
  in deletion (Y-D)/Y (arXiv 2102.05228), ADCC = harmonic mean of coherency, 1 - complexity and
  1 - drop (arXiv 2104.10252). Overlap is the soft intersection over union, sum min / sum max, of
  the scaled maps of the two top classes; that formula is ours. CAM is shown without ReLU,
  Grad-CAM with it; on global average pooling they are otherwise the same map."""


if __name__ == "__main__":
    main()
