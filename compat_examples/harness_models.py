"""Two trained networks on real images, and the explainers that the harness examples compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import digits as digits_data
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from fam_plugins import LayerCape, LayerFam, SimilarityModel
from fam_plugins.cape import calibrate_temperature, fit_cape_head, with_cape_head


@dataclass(frozen=True)
class Case:
    """One explainer on one model: a row of the tables."""

    name: str
    model: nn.Module
    method: Callable[..., Any]
    layer: str
    options: dict[str, Any] = field(default_factory=dict)

    def attribution(self) -> Any:
        """The layer attribution on the model itself."""
        return self.method(self.model, self.model.get_submodule(self.layer), **self.options)


@dataclass(frozen=True)
class Bench:
    """What a harness needs.

    Attributes:
        cases: Grad-CAM beside FAM on a similarity model, and beside CAPE on a classifier.
        images: Held-out digits ``[B, 1, 20, 20]`` in [0, 1] whose maps all cases can give: the
            positive part of Grad-CAM is zero now and then.
        labels: ``[B]``, which is also the index of the matching reference.
        masks: ``[B, 1, 20, 20]``, where the ink is.
    """

    cases: list[Case]
    images: Tensor
    labels: Tensor
    masks: Tensor


def prepare(count: int = 16, seed: int = 0) -> Bench:
    """Train both networks (half a minute), print their accuracy, and draw held-out digits."""
    data = digits_data.load(seed)
    generator = torch.Generator().manual_seed(seed)
    encoder = digits_data.train_encoder(data, seed=seed)
    accuracy = digits_data.few_shot_accuracy(encoder, data, seed=seed)
    print(f"embedding: few-shot accuracy on held-out digits {accuracy:.1%}")
    fields = digits_data.place(data.train, generator)
    similarity = SimilarityModel.from_support(
        encoder, fields[:200], data.train_labels[:200], contrast="others"
    )

    held_out = digits_data.place(data.held_out, generator)
    cut = len(held_out) // 2
    classifier = train_classifier(fields, data.train_labels, seed)
    with torch.no_grad():
        right = classifier(held_out[cut:]).argmax(1) == data.held_out_labels[cut:]
    print(f"classifier: accuracy on held-out digits {right.float().mean():.1%}")
    cape = with_cape_head(classifier, example_input=fields[:2])
    loader = DataLoader(TensorDataset(fields, data.train_labels), 32, shuffle=True)
    fit_cape_head(cape, loader, epochs=15, cache=True)
    calibrate_temperature(
        cape, DataLoader(TensorDataset(held_out[:cut], data.held_out_labels[:cut]), 64)
    )
    layer = "encoder.features"
    cases = [
        Case("similarity: Grad-CAM", similarity, LayerGradCam, layer),
        Case("similarity: additive", similarity, LayerFam, layer, {"rule": "additive"}),
        Case("similarity: centred", similarity, LayerFam, layer, {"rule": "centred"}),
        Case("CAPE head: Grad-CAM", cape, LayerGradCam, "feature_map"),
        Case("CAPE head: CAPE", cape, LayerCape, "feature_map"),
    ]
    candidates, labels = (
        held_out[cut : cut + 2 * count],
        data.held_out_labels[cut : cut + 2 * count],
    )
    varied = torch.stack([_varied(case, candidates, labels) for case in cases]).all(dim=0)
    chosen = varied.nonzero().flatten()[:count]
    assert len(chosen) >= count // 2, f"only {len(chosen)} images have a positive part in every map"
    left_out = int((~varied[: chosen[-1]]).sum())
    print(f"{len(chosen)} digits; {left_out} left out: a harness ranks no constant map")
    images = candidates[chosen]
    return Bench(cases=cases, images=images, labels=labels[chosen], masks=images > 0.2)


def _varied(case: Case, images: Tensor, labels: Tensor) -> Tensor:
    """Whether the positive part of each map differs from pixel to pixel, ``[B]``."""
    maps = case.attribution().attribute(images, target=labels).detach().clamp_min(0).flatten(1)
    return maps.amax(dim=1) > maps.amin(dim=1)


def train_classifier(images: Tensor, labels: Tensor, seed: int, epochs: int = 6) -> nn.Module:
    """An ordinary classifier on the same trunk: pooling, then one linear layer."""
    torch.manual_seed(seed)
    trunk = digits_data.Encoder(head=False)
    network = nn.Sequential(
        trunk.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)
    )
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    loader = DataLoader(TensorDataset(images, labels), 32, shuffle=True)
    for _ in tqdm(range(epochs), desc="training the classifier"):
        for batch, wanted in loader:
            loss = F.cross_entropy(network(batch), wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return network.eval()


def print_table(rows: dict[str, dict[str, str]]) -> None:
    """Print ``{row: {column: value}}`` as Markdown."""
    columns = list(next(iter(rows.values())))
    print("\n| |" + "".join(f" {name} |" for name in columns))
    print("|---|" + "---|" * len(columns))
    for name, row in rows.items():
        print(f"| {name} |" + "".join(f" {row[column]} |" for column in columns))
