"""Every method of the table as a function from images and targets to maps."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytorch_grad_cam
import torch
from torch import Tensor

from fam_plugins import LayerFam, SimilarityModel, SimilarityTarget
from fam_plugins.core.layer_pass import LayerPass
from tests.benchmarks.quality.path_rule import path_map
from tests.benchmarks.quality.problems import Problem

Explain = Callable[[Problem, Tensor, Tensor], Tensor]
CONTRASTS = (None, "others")


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: What it is called.
        contrast: What the explained score subtracts: ``None``, ``"gallery"`` or ``"others"``.
        explain: Problem, images ``[B, ...]``, targets ``[B]`` -> maps ``[B, h, w]``, signed where
            the method is.
        group: ``"ours"``, ``"pytorch-grad-cam"`` or ``"control"``.
        adds_up_to: For maps in units of the score: what their sum should be, ``"score"`` or, for
            the path rule, ``"difference"`` to the baseline's score.
        slow: Whether it takes dozens of forward passes an image.
    """

    name: str
    contrast: str | None
    explain: Explain
    group: str
    adds_up_to: str | None = None
    slow: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}, contrast {self.contrast}" if self.contrast else self.name


def all_methods() -> list[Method]:
    """The rows in the order of the table."""
    rows = [
        Method(
            f"rule {rule}",
            contrast,
            _rule(rule, contrast),
            "ours",
            adds_up_to="score" if rule != "fam" else None,
        )
        for contrast in CONTRASTS
        for rule in ("fam", "additive", "centred", "gradcam")
    ]
    rows += [
        Method("path rule", contrast, _path(contrast), "ours", adds_up_to="difference")
        for contrast in CONTRASTS
    ]
    rows += [
        Method("GradCAM", contrast, _grad_cam("GradCAM", contrast), "pytorch-grad-cam")
        for contrast in CONTRASTS
    ]
    rows += [
        Method(name, None, _grad_cam(name, None), "pytorch-grad-cam", slow=name == "ScoreCAM")
        for name in ("GradCAMPlusPlus", "HiResCAM", "LayerCAM", "EigenCAM", "ScoreCAM")
    ]
    return [
        *rows,
        Method("channel mean", None, _channel_mean, "control"),
        Method("random", None, _random, "control"),
        Method("uniform", None, _uniform, "control"),
    ]


def _rule(rule: str, contrast: str | None) -> Explain:
    def explain(problem: Problem, images: Tensor, targets: Tensor) -> Tensor:
        model = SimilarityModel(
            problem.encoder,
            problem.references,
            similarity=problem.similarity,
            contrast=problem.contrast(contrast),
        )
        with warnings.catch_warnings():
            # The table shows the published rule with contrast too; the library rightly warns.
            warnings.filterwarnings("ignore", message='rule "fam"')
            maps = LayerFam(model, problem.layer, rule=rule).attribute(images, target=targets)
        return maps[:, 0]

    return explain


def _path(contrast: str | None) -> Explain:
    def explain(problem: Problem, images: Tensor, targets: Tensor) -> Tensor:
        def chosen(embeddings: Tensor) -> Tensor:
            return problem.scores(embeddings, contrast).gather(1, targets[:, None])[:, 0]

        layer = problem.encoder.get_submodule(problem.layer)
        baseline = problem.gallery_embeddings.mean(dim=0)
        return path_map(problem.encoder, layer, chosen, images, baseline)

    return explain


def _grad_cam(name: str, contrast: str | None) -> Explain:
    def explain(problem: Problem, images: Tensor, targets: Tensor) -> Tensor:
        rows = torch.arange(len(problem.references))
        against = {
            None: lambda _k: None,
            "gallery": lambda _k: problem.gallery_embeddings,
            "others": lambda k: problem.references[rows != k],
        }[contrast]
        wanted = {
            k: SimilarityTarget(problem.references[k], problem.similarity, against(k))
            for k in set(targets.tolist())
        }
        layers = [problem.encoder.get_submodule(problem.layer)]
        with getattr(pytorch_grad_cam, name)(problem.encoder, layers) as cam:
            cam.batch_size = 128
            with contextlib.redirect_stderr(io.StringIO()):  # ScoreCAM draws a bar per image
                maps = cam(images, [wanted[k] for k in targets.tolist()])
        problem.encoder.zero_grad(set_to_none=True)
        return torch.from_numpy(maps)

    return explain


def _activation(problem: Problem, images: Tensor) -> Tensor:
    one = LayerPass(problem.encoder, [problem.layer], differentiate=False)
    one.run(lambda: problem.encoder(images))
    ((activation,),) = one.tracked
    return activation


def _channel_mean(problem: Problem, images: Tensor, _targets: Tensor) -> Tensor:
    return _activation(problem, images).mean(dim=1)


def _random(problem: Problem, images: Tensor, _targets: Tensor) -> Tensor:
    return torch.rand(_activation(problem, images).mean(dim=1).shape)


def _uniform(problem: Problem, images: Tensor, _targets: Tensor) -> Tensor:
    return torch.ones_like(_activation(problem, images).mean(dim=1))
