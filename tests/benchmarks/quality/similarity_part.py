"""Measure every method on every similarity problem; one value an image and metric."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.functional as vision
from torch import Tensor
from tqdm.auto import tqdm

from tests.benchmarks.quality import similarity_metrics as metrics
from tests.benchmarks.quality.methods import Method, all_methods
from tests.benchmarks.quality.problems import Problem
from tests.benchmarks.quality.randomise import randomised, stages

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Counts:
    """How much is measured, and how.

    Attributes:
        randomised: Mosaics for the randomisation test, of those there are.
        timed: Mosaics explained one by one for the milliseconds.
        steps: Steps of deletion and insertion.
        baseline: What stands in for a deleted patch: ``"blur"`` or ``"mean"`` (of the gallery).
    """

    randomised: int = 10
    timed: int = 10
    steps: int = 10
    baseline: str = "blur"


def measure(problem: Problem, counts: Counts) -> dict[str, Columns]:
    """Columns by label of method, on one problem."""
    torch.manual_seed(problem.seed)
    methods = all_methods()
    rows: dict[Method, Columns] = {}
    for method in tqdm(methods, desc=f"maps: {problem.name}, seed {problem.seed}"):
        maps = in_chunks(method, problem, problem.mosaics, problem.targets)
        rows[method] = {
            **_pointing(problem, maps),
            **_sensitivity(method, problem, maps),
            **_additivity(method, problem, maps),
            **_faithfulness(problem, maps, problem.mosaics, problem.targets, counts, "mosaic"),
            "ms": _milliseconds(method, problem, counts.timed),
        }
        singles = in_chunks(method, problem, problem.singles, problem.single_classes)
        rows[method] |= _faithfulness(
            problem, singles, problem.singles, problem.single_classes, counts, "single"
        )
    for method, correlation in _randomisation(problem, methods, counts.randomised).items():
        rows[method]["randomisation"] = correlation
    return {method.label: columns for method, columns in rows.items()}


def pool(measured: list[dict[str, Columns]]) -> dict[str, Columns]:
    """The same methods on several networks, images side by side."""
    return {
        label: {name: np.concatenate([rows[label][name] for rows in measured]) for name in columns}
        for label, columns in measured[0].items()
    }


def in_chunks(
    method: Method, problem: Problem, images: Tensor, targets: Tensor, size: int = 32
) -> Tensor:
    """Maps ``[B, h, w]`` on the CPU."""
    parts = zip(images.split(size), targets.split(size), strict=True)
    return torch.cat([method.explain(problem, *part).detach().cpu() for part in parts])


def _pointing(problem: Problem, maps: Tensor) -> Columns:
    size = tuple(problem.mosaics.shape[2:])
    # The positive part first, then the resizing: what pytorch-grad-cam does with its own maps.
    shown = metrics.resize(maps.clamp_min(0), size)
    return {
        "energy": metrics.energy_share(shown, problem.cells).numpy(),
        "point": metrics.brightest_in_cell(metrics.resize(maps, size), problem.cells).numpy(),
    }


def _sensitivity(method: Method, problem: Problem, maps: Tensor) -> Columns:
    other = in_chunks(method, problem, problem.mosaics, problem.other_targets)
    return {"sensitivity": metrics.rank_correlation(maps, other)}


def _additivity(method: Method, problem: Problem, maps: Tensor) -> Columns:
    if method.adds_up_to is None:
        return {"additivity": np.full(len(maps), np.nan)}

    def chosen(embeddings: Tensor) -> Tensor:
        scores = problem.scores(embeddings, method.contrast)
        return scores.gather(1, problem.targets[:, None])[:, 0]

    with torch.no_grad():
        wanted = chosen(torch.cat([problem.encoder(part) for part in problem.mosaics.split(64)]))
        if method.adds_up_to == "difference":
            baseline = problem.gallery_embeddings.mean(dim=0, keepdim=True)
            wanted = wanted - chosen(baseline.expand(len(maps), -1))
    return {"additivity": (maps.sum(dim=(1, 2)) - wanted).abs().numpy()}


def _faithfulness(
    problem: Problem, maps: Tensor, images: Tensor, targets: Tensor, counts: Counts, where: str
) -> Columns:
    patch = problem.patch if where == "mosaic" else problem.single_patch
    order = metrics.patch_order(
        metrics.resize(maps, tuple(images.shape[2:])),
        patch,
        torch.Generator().manual_seed(problem.seed),
    )
    baseline = baseline_images(problem, images, counts.baseline)

    columns: Columns = {}
    for name, insert in (("deletion", False), ("insertion", True)):
        # One pass serves both scores: all references are scored, and the right one picked after.
        curve = metrics.perturbation_curve(
            lambda part: problem.scores(problem.encoder(part)),
            images,
            baseline,
            order,
            patch,
            counts.steps,
            insert=insert,
        )
        areas = metrics.area(curve)
        score = areas.gather(1, targets[:, None])[:, 0]
        others = (areas.sum(dim=1) - score) / (areas.shape[1] - 1)
        columns[f"{where} {name}"] = score.numpy()
        columns[f"{where} contrastive {name}"] = (score - others).numpy()
    columns[f"{where} faithfulness"] = (
        columns[f"{where} contrastive insertion"] - columns[f"{where} contrastive deletion"]
    )
    return columns


def baseline_images(problem: Problem, images: Tensor, kind: str) -> Tensor:
    """What stands in for deleted patches: the image heavily blurred, or the gallery's mean."""
    if kind == "blur":
        # A fifth of a cell, wide enough that no stroke or texture survives.
        sigma = problem.singles.shape[-1] / 5
        kernel = 2 * min(int(2 * sigma), images.shape[-1] // 2 - 1) + 1
        return vision.gaussian_blur(images, [kernel, kernel], [sigma, sigma])
    mean = problem.gallery.mean(dim=(0, 2, 3), keepdim=True)
    return mean.expand_as(images)


def _milliseconds(method: Method, problem: Problem, count: int) -> np.ndarray:
    taken = []
    for image, target in zip(problem.mosaics[:count], problem.targets[:count], strict=True):
        start = time.perf_counter()
        method.explain(problem, image[None], target[None])
        taken.append(1000 * (time.perf_counter() - start))
    return np.array(taken)


def _randomisation(problem: Problem, methods: list[Method], count: int) -> dict[Method, np.ndarray]:
    """Mean over the stages of the rank correlation with the map of the trained network."""
    images, targets = problem.mosaics[:count], problem.targets[:count]
    trained = {method: in_chunks(method, problem, images, targets) for method in methods}
    found: dict[Method, list[np.ndarray]] = {method: [] for method in methods}
    reset: list[str] = []
    for part in tqdm(stages(problem.encoder), desc="randomising the network"):
        reset = reset + part
        asked = problem.with_encoder(randomised(problem.encoder, reset, problem.seed))
        for method in methods:
            maps = in_chunks(method, asked, images, targets)
            found[method].append(metrics.rank_correlation(trained[method], maps))
    # Undefined for an image if it is at every stage; a constant map at one stage leaves the rest.
    return {method: _mean_of_defined(np.stack(values)) for method, values in found.items()}


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    defined = np.isfinite(values)
    total = np.where(defined, values, 0).sum(axis=0)
    count = defined.sum(axis=0)
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
