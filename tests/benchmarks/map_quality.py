"""How good are the maps? FAM's rules and CAPE beside Grad-CAM and its relatives.

Trains small networks on scikit-learn's digits, measures every method, and writes ``map_quality.md``
and ``map_quality.png``. No download. All values are saved after
every network; ``--redraw`` makes tables and picture of what is there.

    python -m tests.benchmarks.map_quality --out out

In a minute, with fewer and worse trained networks, and fails where a contrast set no longer finds
the match or CAPE no longer tells two classes apart:

    python -m tests.benchmarks.map_quality --quick --out out

On images of your own (CUB, ImageNet, ...), similarity part only:

    python -m tests.benchmarks.map_quality --image-folder DIR --arch resnet50 --weights DEFAULT
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import joblib
import numpy as np
import torch
from tqdm.auto import tqdm

from tests.benchmarks.quality import cape_part, picture, report, similarity_part
from tests.benchmarks.quality.problems import check_similarity, digits_problem, folder_problem

VALUES = "map_quality.joblib"
"""Every value of every image, kept so that tables and picture can be drawn again."""

Measured = dict[str, dict[int, tuple[str, report.Rows]]]


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    if options.redraw:
        _write(options, *joblib.load(options.out / VALUES))
        return
    started = time.perf_counter()
    jobs = [
        joblib.delayed(_similarity)(options, seed, head)
        for seed in options.seeds
        for head in _heads(options)
    ]
    if options.image_folder is None:
        jobs += [joblib.delayed(_cape)(options, seed) for seed in options.seeds]
    # One thread a network and as many networks as cores: small networks gain little from threads.
    running = joblib.Parallel(n_jobs=options.jobs, return_as="generator_unordered")(jobs)
    similarity: Measured = {}
    cape: dict[int, tuple[str, report.Rows, report.Rows]] = {}
    for kind, seed, *rest in tqdm(running, total=len(jobs), desc="networks", smoothing=0):
        if kind == "cape":
            cape[seed] = tuple(rest)
        else:
            similarity.setdefault(kind, {})[seed] = tuple(rest)
        found = (similarity, cape, time.perf_counter() - started)
        options.out.mkdir(parents=True, exist_ok=True)
        joblib.dump(found, options.out / VALUES)
    _write(options, *found)
    print(f"wrote {options.out / 'map_quality.md'} and {options.out / 'map_quality.png'}")
    if options.quick:
        _check(similarity, cape)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mosaics", type=int, default=60, help="a network")
    parser.add_argument("--singles", type=int, default=60, help="single images a network")
    parser.add_argument("--steps", type=int, default=10, help="of deletion and insertion")
    parser.add_argument("--randomised", type=int, default=10, help="mosaics for randomisation")
    parser.add_argument("--timed", type=int, default=5, help="mosaics timed one by one")
    parser.add_argument("--train-steps", type=int, default=250, help="of the digits embedding")
    parser.add_argument("--epochs", type=int, default=15, help="of the digits classifier")
    parser.add_argument("--baseline", choices=("blur", "mean"), default="blur")
    parser.add_argument("--jobs", type=int, default=-1, help="networks at a time; -1 = cores")
    parser.add_argument("--image-folder", help="one subfolder a class")
    parser.add_argument("--arch", default="resnet50", help="a torchvision ConvNet")
    parser.add_argument("--weights", default="DEFAULT", help="a state dict, or DEFAULT to download")
    parser.add_argument("--size", type=int, default=224, help="pixels of one image of the folder")
    parser.add_argument("--similarity", type=check_similarity, default="cosine")
    parser.add_argument("--redraw", action="store_true", help="only the table and the picture")
    parser.add_argument("--quick", action="store_true", help="one seed, few images, and a check")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.jobs, options.mosaics, options.singles = [0], 1, 12, 2
        options.steps, options.randomised, options.timed = 4, 1, 1
        options.train_steps, options.epochs = 100, 5
    return options


def _check(similarity: Measured, cape: dict[int, tuple[str, report.Rows, report.Rows]]) -> None:
    """What the tables are there to show, with margins for few images and short training."""

    def mean(rows: report.Rows, label: str, column: str) -> float:
        return float(np.nanmean(rows[label][column]))

    for kind, by_seed in similarity.items():
        for _, rows in by_seed.values():
            fam, centred = (
                mean(rows, label, "energy")
                for label in ("rule fam", "rule centred, contrast others")
            )
            assert centred > 0.45, f"{kind}: only {centred:.2f} of the energy is on the match"
            assert centred > fam + 0.1, f"{kind}: centred {centred:.2f}, fam {fam:.2f}"
            worst = mean(rows, "rule centred, contrast others", "mosaic contrastive deletion")
            least = mean(rows, "random", "mosaic contrastive deletion")
            assert worst < least, f"{kind}: deletion {worst:.3f}, in random order {least:.3f}"
    for _, own, _ in cape.values():
        ours, theirs = (mean(own, label, "top-2 overlap") for label in ("CAPE", "Grad-CAM"))
        assert ours < theirs, f"CAPE's maps of two classes overlap by {ours:.2f}, {theirs:.2f}"
        # A map and its negative differ in how much of the image they cover.
        covered = mean(own, "CAPE", "complexity")
        assert covered < 0.5, f"CAPE's map of the top class covers {covered:.2f} of the image"


def _heads(options: argparse.Namespace) -> tuple[bool, ...]:
    return (True, False) if options.image_folder is None else (True,)


def _similarity(
    options: argparse.Namespace, seed: int, head: bool
) -> tuple[str, int, str, report.Rows]:
    torch.set_num_threads(1)
    drawn = {"mosaics": options.mosaics, "singles": options.singles}
    if options.image_folder is None:
        problem = digits_problem(seed, head=head, steps=options.train_steps, **drawn)
    else:
        problem = folder_problem(
            options.image_folder,
            options.arch,
            options.weights,
            seed=seed,
            similarity=options.similarity,
            size=options.size,
            **drawn,
        )
    counts = similarity_part.Counts(
        options.randomised, options.timed, options.steps, options.baseline
    )
    return problem.name, seed, problem.facts, similarity_part.measure(problem, counts)


def _cape(options: argparse.Namespace, seed: int) -> tuple[str, int, str, report.Rows, report.Rows]:
    torch.set_num_threads(1)
    model, images, facts = cape_part.fitted_model(
        seed, train_epochs=options.epochs, fit_epochs=2 * options.epochs
    )
    own, vanilla = (cape_part.measure(model, images, judge) for judge in ("own", "vanilla"))
    return "cape", seed, facts, own, vanilla


def _write(
    options: argparse.Namespace,
    similarity: Measured,
    cape: dict[int, tuple[str, report.Rows, report.Rows]],
    seconds: float,
) -> None:
    pooled: dict[str, report.Rows] = {}
    parts = [_preamble(options, seconds)]
    for kind, by_seed in sorted(similarity.items()):
        networks = [by_seed[seed][1] for seed in sorted(by_seed)]
        pooled[kind] = similarity_part.pool(networks)
        facts = [f"seed {seed}: {by_seed[seed][0]}" for seed in sorted(by_seed)]
        parts.append(report.similarity_section(kind, facts, networks, pooled[kind]))
    own = None
    if cape:
        facts = [f"seed {seed}: {cape[seed][0]}" for seed in sorted(cape)]
        own, vanilla = (
            similarity_part.pool([cape[seed][i] for seed in sorted(cape)]) for i in (1, 2)
        )
        parts.append(report.cape_section(facts, own, vanilla))
    (options.out / "map_quality.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    picture.draw(pooled, own, options.out / "map_quality.png")


def _preamble(options: argparse.Namespace, seconds: float) -> str:
    blur = "the image under a Gaussian blur (sigma a fifth of a cell)"
    baseline = blur if options.baseline == "blur" else "the mean of the gallery"
    return _TEXT.format(
        seeds=" ".join(map(str, options.seeds)),
        mosaics=options.mosaics,
        singles=options.singles,
        steps=options.steps,
        randomised=options.randomised,
        baseline=baseline,
        seconds=seconds,
        machine=f"{platform.machine()} CPU, one thread a network, torch {torch.__version__}, "
        f"NumPy {np.__version__}",
    )


_TEXT = """# How good are the maps?

`python -m tests.benchmarks.map_quality`, seeds {seeds}; {seconds:.0f} s, {machine}. Every value
is a mean over images with its 95 % percentile bootstrap interval. Intervals cover the draw of
images, pooled over the trained networks; they do not cover the training of further networks.

**Questions.** {mosaics} mosaics of four classes and {singles} single images a network, none of them
seen in training. References are 5-shot prototypes of each class. "contrast others" explains the
score minus the mean score of all other references. The gallery, whose mean embedding is the
baseline of the path rule, is drawn from the training images.

* **Energy, brightest point**: the share of a map's positive part in the cell that matches the
  reference (arXiv 1910.01279), and whether its maximum is there (arXiv 1608.00507).
* **Deletion, insertion**: area under the score while patches go, or come, in the map's order, in
  {steps} steps (arXiv 1806.07421); equal patches in random order. What stands in for a patch:
  {baseline}. "Contrastive": the score minus the mean score of the other references.
* **Reference sensitivity**: Spearman's rank correlation of a mosaic's maps for two references that
  match different cells. Near 1 the map ignores the reference. A random map scores 0 without merit.
* **Model randomisation**: mean rank correlation with the original map over a cascade from the
  output down (arXiv 1810.03292), {randomised} mosaics a network. A random map scores 0 here too.
* **Additivity error**: mean |sum of the map - score|; for the path rule the score minus that of
  the baseline. `additive` leaves out the bias of a linear head, which belongs to no region; the
  convergence delta accounts for it. Dash: the map is not in units of the score.
* pytorch-grad-cam's methods explain the encoder through `SimilarityTarget`; their maps are cut at
  0 by that package, while ours keep their sign, which also orders the patches below 0.
* A dash in a correlation: the map is constant.
* **CAPE part** (protocol of arXiv 2404.02388, definitions of the papers it builds on): with
  maps scaled to [0, 1], Y the confidence on the image, O on image x map, D on image x (1 - map):
  average drop max(0, Y-O)/Y and increase in confidence [O > Y] (arXiv 1710.11063), average drop
  in deletion (Y-D)/Y (arXiv 2102.05228), ADCC = harmonic mean of coherency, 1 - complexity and
  1 - drop (arXiv 2104.10252). Overlap is the soft intersection over union, sum min / sum max, of
  the scaled maps of the two top classes; that formula is ours. CAM is shown without ReLU,
  Grad-CAM with it; on global average pooling they are otherwise the same map."""


if __name__ == "__main__":
    main()
