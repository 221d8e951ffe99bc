"""An encoder, references, and mosaics to explain: what the similarity maps are measured on."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from fam_plugins import prototypes
from fam_plugins.core.contrast import Contrast
from fam_plugins.core.references import embed_once
from fam_plugins.core.scores import score
from fam_plugins.core.similarity import find_similarity

# The examples are scripts, not a package: they find each other by their folder.
sys.path.insert(0, str(Path(__file__).parents[3] / "compat_examples"))

import digits as digits_data


@dataclass(frozen=True)
class Problem:
    """What one network is asked.

    Attributes:
        name: For the table.
        seed: What the data and the training were drawn with.
        encoder: Images -> embeddings ``[B, D]``, in eval mode.
        layer: Name of the layer whose maps are judged.
        similarity: How embeddings are compared.
        facts: Accuracy and settings, for the table.
        supports: Images ``[S, ...]`` with ``support_labels``; their prototypes are the references.
        gallery: Images ``[M, ...]`` of every class; their mean is what "gallery" contrasts with.
        mosaics: ``[Q, ...]``, four classes each, ``classes`` ``[Q, 4]`` in reading order.
        cells: ``[Q]``, the cell that the explained reference matches.
        other_cells: ``[Q]``, another cell, for reference sensitivity.
        singles: ``[P, ...]`` images of one object, ``single_classes`` ``[P]``.
        patch: Height and width in pixels of what deletion removes at once, in a mosaic.
        single_patch: The same in a single image.
    """

    name: str
    seed: int
    encoder: nn.Module
    layer: str
    similarity: str
    facts: str
    supports: Tensor
    support_labels: Tensor
    gallery: Tensor
    mosaics: Tensor
    classes: Tensor
    cells: Tensor
    other_cells: Tensor
    singles: Tensor
    single_classes: Tensor
    patch: int
    single_patch: int
    _embedded: tuple[Tensor, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shots = embed_once(self.encoder, self.supports, "supports", 64)
        gallery = embed_once(self.encoder, self.gallery, "gallery", 64)
        references = prototypes(shots, self.support_labels.tolist(), self.similarity)
        object.__setattr__(self, "_embedded", (references, gallery))

    @property
    def references(self) -> Tensor:
        """One prototype a class, ``[K, D]``."""
        return self._embedded[0]

    @property
    def gallery_embeddings(self) -> Tensor:
        """``[M, D]``."""
        return self._embedded[1]

    @property
    def targets(self) -> Tensor:
        """The reference that each mosaic is explained for, ``[Q]``."""
        return self.classes.gather(1, self.cells[:, None])[:, 0]

    @property
    def other_targets(self) -> Tensor:
        """A reference that matches another cell, ``[Q]``."""
        return self.classes.gather(1, self.other_cells[:, None])[:, 0]

    def contrast(self, kind: str | None) -> Contrast:
        """``None``, ``"others"`` or ``"gallery"`` as the library takes it."""
        if kind == "gallery":
            return self.gallery_embeddings
        return "others" if kind == "others" else None

    def scores(self, embeddings: Tensor, contrast: str | None = None) -> Tensor:
        """Embeddings ``[B, D]`` -> scores ``[B, K]``."""
        return score(self.similarity, embeddings, self.references, self.contrast(contrast))

    def with_encoder(self, encoder: nn.Module) -> Problem:
        """The same questions to another network; references are embedded anew."""
        return replace(self, encoder=encoder)


def digits_problem(
    seed: int, *, head: bool, mosaics: int, singles: int, shots: int = 5, steps: int = 250
) -> Problem:
    """Train the embedding of the examples on scikit-learn's digits and draw questions.

    References and gallery come from the training part, everything explained from the held-out one.
    """
    digits = digits_data.load(seed)
    encoder = digits_data.train_encoder(digits, head=head, steps=steps, seed=seed)
    accuracy = digits_data.few_shot_accuracy(encoder, digits, seed=seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    drawn = digits_data.mosaics(digits, mosaics, shots=1, seed=seed)
    cells = torch.tensor([mosaic.target for mosaic in drawn])
    rows = torch.cat(
        [(digits.train_labels == label).nonzero()[:, 0][:shots] for label in range(10)]
    )
    chosen = torch.randperm(len(digits.held_out), generator=generator)[:singles]
    gallery = torch.randperm(len(digits.train), generator=generator)[:100]
    return Problem(
        name="digits, linear head" if head else "digits, pooled ReLU features",
        seed=seed,
        encoder=encoder,
        layer="features",
        similarity="cosine",
        facts=f"few-shot accuracy {accuracy:.1%} (10-way, 5-shot, held-out digits)",
        supports=digits_data.place(digits.train[rows], generator),
        support_labels=digits.train_labels[rows],
        gallery=digits_data.place(digits.train[gallery], generator),
        mosaics=torch.stack([mosaic.query for mosaic in drawn]),
        classes=torch.tensor([mosaic.digits for mosaic in drawn]),
        cells=cells,
        other_cells=_other_cells(cells, generator),
        singles=digits_data.place(digits.held_out[chosen], generator),
        single_classes=digits.held_out_labels[chosen],
        patch=4,
        single_patch=2,
    )


def folder_problem(
    folder: str,
    arch: str,
    weights: str | None,
    *,
    seed: int,
    mosaics: int,
    singles: int,
    similarity: str = "cosine",
    size: int = 224,
    shots: int = 5,
) -> Problem:
    """A torchvision network on an image folder, one subfolder a class.

    The first ``shots`` images of a random order of every class make its reference, the next ones
    are explained. Mosaics are as large as four images.

    Args:
        folder: As :class:`torchvision.datasets.ImageFolder` takes it; at least four classes of
            more than ``shots`` images.
        arch: A convolutional torchvision classifier; its last linear layers are taken off.
        weights: ``"DEFAULT"`` (downloads), the path of a state dict, or ``None`` (untrained).
        seed: For the draws.
        mosaics: How many mosaics.
        singles: How many single images.
        similarity: How embeddings are compared.
        size: Height and width in pixels of one image, a multiple of 16.
        shots: Images a reference.

    Raises:
        ValueError: If the folder or the network does not fit.
    """
    given = torchvision.models.get_model_weights(arch).DEFAULT if weights == "DEFAULT" else None
    network = torchvision.models.get_model(arch, weights=given).eval()
    if weights is not None and given is None:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        network.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        )
    _remove_classifier(network)
    settings = given.transforms() if given is not None else None
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(size),
            torchvision.transforms.CenterCrop(size),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(
                settings.mean if settings else [0.485, 0.456, 0.406],
                settings.std if settings else [0.229, 0.224, 0.225],
            ),
        ]
    )
    dataset = torchvision.datasets.ImageFolder(folder, transform)
    labels = torch.tensor(dataset.targets)
    generator = torch.Generator().manual_seed(seed)
    by_class = [
        _shuffled((labels == k).nonzero()[:, 0], generator) for k in range(len(dataset.classes))
    ]
    if len(by_class) < 4 or min(map(len, by_class)) <= shots:
        raise ValueError(f"{folder} needs at least 4 classes of more than {shots} images each")

    def load(rows: Tensor) -> Tensor:
        return torch.stack([dataset[row][0] for row in rows.tolist()])

    supports = torch.cat([rows[:shots] for rows in by_class])
    held_out = [rows[shots:] for rows in by_class]
    classes = torch.stack(
        [torch.randperm(len(by_class), generator=generator)[:4] for _ in range(mosaics)]
    )
    cells = torch.randint(0, 4, (mosaics,), generator=generator)
    queries = [
        _tile(load(torch.stack([_shuffled(held_out[k], generator)[0] for k in four.tolist()])))
        for four in classes
    ]
    single_rows = _shuffled(torch.cat(held_out), generator)[:singles]
    images = load(supports)
    problem = Problem(
        name=f"{arch} on {Path(folder).name}",
        seed=seed,
        encoder=network,
        layer=last_map(network, queries[0][None]),
        similarity=similarity,
        facts="",
        supports=images,
        support_labels=labels[supports],
        gallery=images,
        mosaics=torch.stack(queries),
        classes=classes,
        cells=cells,
        other_cells=_other_cells(cells, generator),
        singles=load(single_rows),
        single_classes=labels[single_rows],
        patch=size // 8,
        single_patch=size // 16,
    )
    with torch.no_grad():
        nearest = problem.scores(embed_once(network, problem.singles, "images", 32)).argmax(dim=1)
    accuracy = (nearest == problem.single_classes).double().mean().item()
    ways = len(by_class)
    return replace(
        problem,
        facts=f"few-shot accuracy {accuracy:.1%} ({ways}-way, {shots}-shot)",
    )


def last_map(network: nn.Module, images: Tensor) -> str:
    """Name of the last layer that gives a feature map ``[B, C, h, w]`` of several regions.

    Raises:
        ValueError: If there is none, as in vision transformers.
    """
    found: list[str] = []
    handles = [
        module.register_forward_hook(
            lambda _m, _i, out, name=name: (
                found.append(name)
                if isinstance(out, Tensor) and out.dim() == 4 and min(out.shape[2:]) > 1
                else None
            )
        )
        for name, module in network.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError("no layer of the network gives a feature map [B, C, h, w]: use a ConvNet")
    return found[-1]


def check_similarity(name: str) -> str:
    """Refuse unknown names before anything is trained."""
    return find_similarity(name).name


def _remove_classifier(network: nn.Module) -> None:
    for name in ("fc", "classifier", "head"):
        if isinstance(getattr(network, name, None), nn.Module):
            setattr(network, name, nn.Identity())
            return
    raise ValueError(f"{type(network).__name__} has no fc, classifier or head to take off")


def _other_cells(cells: Tensor, generator: torch.Generator) -> Tensor:
    return (cells + torch.randint(1, 4, cells.shape, generator=generator)) % 4


def _shuffled(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)]


def _tile(images: Tensor) -> Tensor:
    rows = [torch.cat([images[0], images[1]], dim=2), torch.cat([images[2], images[3]], dim=2)]
    return torch.cat(rows, dim=1)
