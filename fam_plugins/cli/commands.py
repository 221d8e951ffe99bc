"""The commands: files in, pictures and tables out, each written whole or not at all."""

from __future__ import annotations

import os
import re
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_grad_cam import GradCAM
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.datasets import ImageFolder

from fam_plugins import LayerFam, SimilarityModel, explain_hits, explain_pair, gallery_mean
from fam_plugins.cli.models import load_encoder
from fam_plugins.cli.sheet import contact_sheet
from fam_plugins.core.choose_layer import choose_layer, follow
from fam_plugins.core.images import load_images
from fam_plugins.core.messages import with_progress
from fam_plugins.core.references import at_home
from fam_plugins.core.scores import embed
from fam_plugins.dataset import explain_dataset
from fam_plugins.plots import plot_episode, plot_pair
from fam_plugins.quality import evaluate

__all__ = ["Run"]

RANDOM = "RANDOM WEIGHTS: these maps mean nothing"


class _Files:
    """A folder's pictures by path: loaded when their turn comes, and named when they cannot be."""

    def __init__(self, files: list[Path], load: Callable[[str], Tensor]) -> None:
        self.ids, self._load = [str(file) for file in files], load

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> tuple[str, Tensor]:
        try:
            return self.ids[row], self._load(self.ids[row])
        except Exception as error:
            warnings.warn(f"left out: {error}", stacklevel=1)
            raise


class Run(Namespace):
    """Arguments and the encoder they name; a method for each command."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        given = self.model, self.weights, self.mean, self.std, self.size
        self.encoder, self.transform = load_encoder(*given)
        self.encoder.to(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.options = {"rule": self.rule, "smooth": self.smooth}
        if self.weights == "none":
            warnings.warn(RANDOM, stacklevel=1)

    def pair(self) -> None:
        """Two pictures, and what makes each like the other."""
        if not self.gallery:
            warnings.warn("maps are clearer with --gallery, a folder of the like", stacklevel=1)
        self.options["contrast"] = self.gallery and gallery_mean(self._embed(self.gallery))
        given = self.encoder, self.layer, self.a, self.b
        self._write(explain_pair(*given, transform=self.transform, **self.options).plot(), self.out)

    def map(self) -> None:
        """What makes each picture like each reference."""
        images, references = self._load(self.image), self._load(self.reference)
        maps, scores, _ = self._explainer().attribute_references(images, return_scores=True)
        told = {"labels": [file.name for file in self.reference], "rule": self.rule}
        told |= {"scores": scores, "transform": self.transform}
        self._write(plot_episode(images, references, maps, **told), self.out)

    def search(self) -> None:
        """The nearest pictures of a gallery: a picture for each query, and a page of all."""
        model, sheet = SimilarityModel(self.encoder, self._embed(self.gallery)), list[Any]()
        self.options |= {"contrast": gallery_mean(model.references), "transform": self.transform}
        root = os.path.commonpath([file.parent for file in self.gallery])
        for number, query in enumerate(self.image, 1):
            ranked = [self.gallery[row] for row in model(self._load(query))[0].argsort().flip(0)]
            hits = [file for file in ranked if not file.samefile(query)][: self.k]
            if not hits:
                raise ValueError("no hits: the gallery holds the query alone")
            found = explain_hits(self.encoder, self.layer, query, hits, **self.options)
            names, one = [os.path.relpath(hit, root) for hit in hits], found.source
            file = self.out / f"{number}-{query.stem}.png"
            self._write(found.plot(captions=names), file)
            sheet.append((query.name, []))
            sides = names, one.b, found.query_maps, found.hit_maps, found.scores
            for name, image, in_query, in_hit, score in zip(*sides, strict=True):
                told = {"titles": (query.name, name), "rule": self.rule} | one.undo
                figure = plot_pair(one.a[0], image, in_query, in_hit, **told)
                sheet[-1][1].append((name, float(score), figure._repr_png_()))
        weights = RANDOM if self.weights == "none" else f"weights {Path(self.weights).name}"
        page = contact_sheet(sheet, f"{self.model}, {weights}, rule {self.rule}")
        self._write(page, self.out / "index.html")

    def dataset(self) -> None:
        """Maps of a folder's pictures for each reference, in Parquet."""
        items = _Files(self.folder, lambda file: self._load(file)[0].cpu())
        explain_dataset(self._explainer(), items, self.out, on_error="record")
        print(self.out)

    def quality(self) -> None:
        """How good maps are on labelled pictures, beside Grad-CAM's."""
        data = ImageFolder(self.labelled, lambda image: self._load(image)[0].cpu())
        layer = self._layer(self._load(data.imgs[0][0]))
        methods = {self.rule: self.rule, "GradCAM": GradCAM}
        options = {"contrast": self.contrast or "others", "smooth": self.smooth}
        found = evaluate(methods, self.encoder, layer, data, **options)
        print(found)
        self._write(found.plot(), self.out)

    def layers(self) -> None:
        """Layers that can be explained, and how much of a score their regions carry."""
        warnings.filterwarnings("ignore", "the regions carry")  # as the table says
        images = self._load(self.sample or load_sample_images().images)
        model, best = SimilarityModel(self.encoder, images), self._layer(images)
        names = {part: name for name, part in self.encoder.named_modules()}
        _, cuts = follow(self.encoder, names, partial(embed, self.encoder), images[:1])
        for layer, _, output, *_ in cuts:
            if layer is best or not re.search(r"\b\d+\.", names[layer]):  # inside no block
                share, note = "-", "  <- recommended" * (layer is best)
                with suppress(ValueError):  # such as a layer of which only a class token is read
                    explainer = LayerFam(model, layer, rule="additive")
                    maps, scores, _ = explainer.attribute_references(images, return_scores=True)
                    share = f"{float(maps.sum() / scores.sum()):.0%}"
                print(f"{names[layer]:32} {[*output.shape[1:]]!s:>16} {share:>6}{note}")

    def _load(self, given: Any) -> Tensor:
        return at_home(load_images(given, self.transform), self.encoder, "images")

    def _embed(self, files: list[Path]) -> Tensor:
        parts = with_progress([files[at : at + 32] for at in range(0, len(files), 32)], "embedding")
        with torch.no_grad():
            return torch.cat([embed(self.encoder, self._load(some)) for some in parts])

    def _layer(self, images: Tensor) -> Any:
        return choose_layer(self.encoder, self.layer, partial(embed, self.encoder), images[:1])

    def _explainer(self) -> LayerFam:
        """Of the references, less their likeness to each other or to a gallery."""
        references, labels = self._load(self.reference), [str(file) for file in self.reference]
        against: Any = "others" if len(labels) > 1 else None
        if self.gallery and self.contrast != "others":
            against = self._embed(self.gallery)
        model = SimilarityModel(self.encoder, references, contrast=against, labels=labels)
        return LayerFam(model, self._layer(references), **self.options)

    def _write(self, made: Any, file: Path) -> None:
        part = file.with_name(f".part-{file.name}")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            if isinstance(made, str):
                part.write_text(made, encoding="utf-8")
            else:
                if self.weights == "none":
                    made.suptitle(RANDOM, color="red")
                made.savefig(part, dpi=150)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
        print(file)
