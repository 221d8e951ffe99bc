"""Photographs under an ImageNet network: which one matches, where two agree, what was found.

Six photographs that come with scikit-image and scikit-learn: a cat, a cup of coffee, a rocket, an
astronaut, a temple and a flower. A reference is never the picture itself but another crop of it,
mirrored and with most of its colour taken out. Prints the network's class of each photograph, how
much of each map lies on the matching quarter of a mosaic, beside chance and beside Grad-CAM, and
writes five pictures.

    pip install scikit-image
    python compat_examples/photographs.py --out out

MobileNetV2's weights are downloaded by torchvision, or given: --weights FILE --mean M M M
--std S S S.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import pretrained
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torchvision.models import MobileNet_V2_Weights
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms import functional as T

from fam_plugins import (
    LayerCape,
    LayerFam,
    SimilarityModel,
    explain_hits,
    explain_pair,
    load_images,
)
from fam_plugins.cape import with_cape_head
from fam_plugins.plots import plot_episode

# Five layers of stride 2 centre their regions on every 32nd pixel from the first: on sides of this
# kind they reach from edge to edge, on others a map is drawn half a region off.
SMALL, LARGE, MOSAIC = 225, 449, 481
Box = tuple[int, int, int, int]  # top, left, height, width in pixels of the photograph

# Where the thing stands, and the part of it that a reference shows.
PLACES: dict[str, tuple[Box, Box]] = {
    "cat": ((0, 40, 300, 300), (60, 90, 220, 220)),
    "coffee": ((0, 70, 400, 400), (30, 150, 260, 260)),
    "rocket": ((60, 150, 360, 360), (110, 180, 300, 300)),
    "astronaut": ((0, 60, 400, 400), (0, 100, 290, 290)),
    "temple": ((27, 0, 400, 400), (60, 60, 280, 280)),
    "flower": ((27, 130, 400, 400), (60, 160, 320, 320)),
}
DISTRACTORS = ("brick", "camera", "coins", "grass", "horse", "moon", "stereo_motorcycle", "retina")
ASKED = ("temple", "coffee")  # one above the other in the query of the ranked list
# Photographs that show two of ImageNet's classes.
AMBIGUOUS: dict[str, tuple[Box, tuple[str, str]]] = {
    "rocket": ((125, 90, 277, 277), ("missile", "crane")),
    "stereo_motorcycle": ((120, 360, 375, 375), ("moped", "disk brake")),
}
CLASSES = MobileNet_V2_Weights.DEFAULT.meta["categories"]


def photographs() -> dict[str, Tensor]:
    """All photographs by name, ``[3, H, W]`` in [0, 1]."""
    try:
        from skimage import data
    except ImportError as error:
        raise SystemExit("this example needs scikit-image: pip install scikit-image") from error
    named = {"cat": data.chelsea(), "coffee": data.coffee(), "rocket": data.rocket()}
    named |= {"astronaut": data.astronaut(), "temple": load_sample_image("china.jpg")}
    named |= {"flower": load_sample_image("flower.jpg")}
    for name in DISTRACTORS:
        found = getattr(data, name)()
        named[name] = found[0] if isinstance(found, tuple) else found
    return {name: load_images(pixels, ToTensor())[0] for name, pixels in named.items()}


def crop(photograph: Tensor, box: Box, size: int) -> Tensor:
    """A part of a photograph as a square ``[3, size, size]``."""
    return T.resized_crop(photograph, *box, [size, size], antialias=True).clamp(0, 1)


def disguised(image: Tensor) -> Tensor:
    """Mirrored, brighter, and with a quarter of its colour."""
    return T.adjust_saturation(T.adjust_brightness(T.hflip(image), 1.15), 0.25)


def parts(box: Box) -> list[Box]:
    """Three overlapping parts of a box."""
    top, left, height, width = box
    return [
        (int(top + y * height), int(left + x * width), int(f * height), int(f * width))
        for f, y, x in ((0.85, 0, 0.15), (0.7, 0.3, 0), (0.62, 0.2, 0.38))
    ]


def place(name: str, photograph: Tensor) -> Box:
    """Where the thing of a photograph stands; of a distractor, the middle square."""
    if name in PLACES:
        return PLACES[name][0]
    height, width = photograph.shape[1:]
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


@dataclass(frozen=True)
class Network:
    """An ImageNet classifier, the same without its last layer, and how it takes its images.

    Attributes:
        caution: What a picture made with it must say about its weights; empty for real ones.
    """

    classifier: nn.Module
    encoder: nn.Module
    transform: Compose
    caution: str

    def takes(self, images: Sequence[Tensor]) -> Tensor:
        """Images in [0, 1] as a normalised batch where the network is."""
        return load_images(images, self.transform).to(next(self.encoder.parameters()))

    def embed(self, images: Sequence[Tensor]) -> Tensor:
        """Unit embeddings ``[B, 1280]``."""
        with torch.no_grad():
            return F.normalize(self.encoder(self.takes(images)), dim=1)


def load_network(args: argparse.Namespace) -> Network:
    classifier, caution = pretrained.load_model(args.weights)
    classifier = classifier.to(args.device).requires_grad_(False)
    encoder = nn.Sequential(classifier.features, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    transform = Compose([ToTensor(), Normalize(args.mean, args.std)])
    return Network(classifier, encoder, transform, caution)


def save(figure: Figure, path: Path, caution: str) -> None:
    """Write a picture as a JPEG, whose colours a small PNG would not keep."""
    if caution:
        figure.suptitle(caution, color="crimson")
    figure.savefig(path, dpi=120, bbox_inches="tight", pil_kwargs={"quality": 90})
    print(f"wrote {path}")


def mosaic(fields: Sequence[Tensor]) -> Tensor:
    """Four images as the quarters of one, in reading order."""
    whole = torch.cat([torch.cat([*fields[:2]], 2), torch.cat([*fields[2:]], 2)], 1)
    return T.resize(whole, [MOSAIC, MOSAIC], antialias=True).clamp(0, 1)


def on_quarter(attribution: Tensor, quarter: int) -> tuple[float, bool]:
    """Share of a map's positive part on one quarter of a mosaic, and whether its maximum is there.

    Args:
        attribution: ``[h, w]``, of even sides.
        quarter: 0 to 3 in reading order.
    """
    quarters = attribution.unflatten(0, (2, -1)).unflatten(2, (2, -1)).transpose(1, 2)
    quarters = quarters.flatten(0, 1).flatten(1)  # [4, regions]
    energy = quarters.clamp_min(0).sum(dim=1)
    found = int(quarters.amax(dim=1).argmax())
    return float(energy[quarter] / energy.sum().clamp_min(1e-12)), found == quarter


def measure(network: Network, fields: dict[str, Tensor], references: dict[str, Tensor]) -> Tensor:
    """Energy and pointing ``[methods, 2]`` over all mosaics of four photographs, and print them."""
    methods = {
        "centred, contrast others, smoothed": ("centred", "others", True),
        "centred, contrast others": ("centred", "others", False),
        "centred": ("centred", None, False),
        "Grad-CAM, contrast others, smoothed": ("gradcam", "others", True),
        "Grad-CAM, contrast others": ("gradcam", "others", False),
        "Grad-CAM": ("gradcam", None, False),
        "the published rule": ("fam", None, False),
    }
    generator = torch.Generator().manual_seed(0)
    embedded = dict(zip(references, network.embed([*references.values()]), strict=True))
    found: dict[str, list[tuple[float, bool]]] = {name: [] for name in methods}
    for chosen in combinations(fields, 4):
        names = [chosen[i] for i in torch.randperm(4, generator=generator)]
        query = network.takes([mosaic([fields[name] for name in names])])
        rows = torch.stack([embedded[name] for name in names])
        for method, (rule, contrast, smooth) in methods.items():
            model = SimilarityModel(network.encoder, rows, contrast=contrast)
            explainer = LayerFam(model, "0", rule=rule, smooth=smooth)
            maps = explainer.attribute_references(query)[0, :, 0]
            found[method] += [on_quarter(maps[j], j) for j in range(4)]
    # The last model is the plain one, whose Grad-CAM is Captum's, too.
    ours = LayerFam(model, "0", rule="gradcam").attribute(query, target=0)
    theirs = LayerGradCam(model, model.encoder[0]).attribute(query, target=0).detach()
    apart = float((ours - theirs).abs().max() / theirs.abs().max())
    assert apart < 1e-3, f"Grad-CAM is {apart:.0e} away from Captum's"

    count = len(found["Grad-CAM"])
    print(f"\n| {count} maps of mosaics (chance .25) | energy on the match | points to it |")
    print("|---|---|---|")
    means = torch.tensor([[*map(float, row)] for rows in found.values() for row in rows])
    means = means.view(len(methods), count, 2).mean(dim=1)
    for method, (energy, point) in zip(methods, means.tolist(), strict=True):
        print(f"| {method} | {energy:.3f} | {point:.3f} |")
    return means


def draw_mosaics(network: Network, photos: dict[str, Tensor]) -> Figure:
    """Two mosaics of the same photographs in another order, and a reference of each."""
    names = ["cat", "coffee", "flower", "temple"]
    references = [disguised(crop(photos[name], PLACES[name][1], SMALL)) for name in names]
    orders = [names, ["temple", "flower", "cat", "coffee"]]
    queries = [mosaic([crop(photos[n], PLACES[n][0], SMALL) for n in order]) for order in orders]
    model = SimilarityModel(network.encoder, network.takes(references), contrast="others")
    maps, scores, _ = LayerFam(model, "0", rule="centred", smooth=True).attribute_references(
        network.takes(queries), return_scores=True
    )
    return plot_episode(queries, references, maps, scores=scores, labels=names, rule="centred")


def draw_pairs(network: Network, photos: dict[str, Tensor], gallery: Tensor) -> list[Figure]:
    """Where two crops of the temple agree, and which parts of two crops of the cat match."""
    pairs = []
    for name, first, second in (
        ("temple", (60, 0, 367, 367), (20, 60, 300, 300)),
        ("cat", (0, 0, 300, 300), (40, 60, 250, 250)),
    ):
        a, b = crop(photos[name], first, LARGE), disguised(crop(photos[name], second, LARGE))
        options = {"rule": "centred", "contrast": gallery, "smooth": True, "joint": True}
        pairs.append(
            explain_pair(network.encoder, "0", a, b, transform=network.transform, **options)
        )
        total, score = float(pairs[-1].joint.sum()), float(pairs[-1].score)
        assert abs(total - score) < 1e-3, f"regions sum to {total:.4f}, the score is {score:.4f}"
    titles = ("a photograph", "another crop of it")
    return [pairs[0].plot(titles=titles), pairs[1].plot_matches(titles=titles)]


def gallery_of(photos: dict[str, Tensor]) -> tuple[list[Tensor], list[str]]:
    """Three crops of every photograph, two of them disguised, and what each shows."""
    images, names = [], []
    for name, photograph in photos.items():
        for row, part in enumerate(parts(place(name, photograph))):
            image = crop(photograph, part, SMALL)
            images.append(image if row == 1 else disguised(image))
            names.append(name)
    return images, names


def draw_hits(
    network: Network, photos: dict[str, Tensor], images: list[Tensor], gallery: Tensor
) -> tuple[Figure, list[int]]:
    """A query of two photographs and its five hits in the gallery, with the rows of the hits."""
    query = torch.cat([T.resize(photos[n], [LARGE, 3 * LARGE // 2]) for n in ASKED], dim=1)
    query = T.resize(query, [609, LARGE], antialias=True).clamp(0, 1)
    rows = (network.embed([query]) @ gallery.T)[0].topk(5).indices.tolist()
    found = explain_hits(
        network.encoder, "0", query, [images[row] for row in rows], transform=network.transform,
        rule="centred", contrast=gallery, smooth=True,
    )  # fmt: skip
    return found.plot(), rows


def draw_classes(network: Network, photos: dict[str, Tensor]) -> tuple[Figure, Tensor]:
    """CAPE's probability of each class by region, for photographs that show two of them.

    The head is a copy of the classifier's, not fitted, which takes training images: it says where
    in a photograph either class is seen, and is less sure than the classifier.

    Returns:
        The picture, and how much of the maps of both classes is on the same regions, 0 to 1.
    """
    classes = [label for _, labels in AMBIGUOUS.values() for label in labels]
    images = [crop(photos[name], box, SMALL) for name, (box, _) in AMBIGUOUS.items()]
    batch = network.takes(images)
    model = with_cape_head(network.classifier, example_input=batch)
    with torch.no_grad():
        theirs, ours = network.classifier(batch).softmax(dim=1), model(batch).exp()
    targets = [CLASSES.index(label) for label in classes]
    explainer = LayerCape(model)
    maps = torch.stack([explainer.attribute(batch, target=t) for t in targets], dim=1)
    gap = float((maps.sum((2, 3, 4)) - ours[:, targets]).abs().max())
    assert gap < 1e-4, f"a map misses its probability by {gap:.0e}"

    print("\n| photograph | class | CAPE | the classifier |\n|---|---|---|---|")
    overlaps = []
    for row, (name, (_, labels)) in enumerate(AMBIGUOUS.items()):
        for label in labels:
            at = CLASSES.index(label)
            print(f"| {name} | {label} | {ours[row, at]:.1%} | {theirs[row, at]:.1%} |")
        pair = maps[row, [classes.index(label) for label in labels]].flatten(1)
        overlaps.append((pair / pair.sum(dim=1, keepdim=True)).amin(dim=0).sum())
    unit = "probability that a region gives the class"
    options = {"scores": ours[:, targets], "labels": classes, "label": unit}
    return plot_episode(images, None, maps, **options), torch.stack(overlaps)


def main() -> None:
    args = pretrained.arguments(__doc__.splitlines()[0], image=False)
    torch.manual_seed(0)
    network, photos = load_network(args), photographs()
    fields = {name: crop(photos[name], PLACES[name][0], SMALL) for name in PLACES}
    references = {name: disguised(crop(photos[name], PLACES[name][1], SMALL)) for name in PLACES}

    print("| photograph | the network sees | in the reference | cosine of the two |")
    print("|---|---|---|---|")
    for name in PLACES:
        seen = [
            f"{label} ({probability:.0%})"
            for _, label, probability in (
                pretrained.top_class(network.classifier, network.takes([image]))
                for image in (fields[name], references[name])
            )
        ]
        cosine = float(network.embed([fields[name]]) @ network.embed([references[name]]).T)
        print(f"| {name} | {seen[0]} | {seen[1]} | {cosine:.2f} |")

    means = measure(network, fields, references)
    images, names = gallery_of(photos)
    gallery = network.embed(images)
    hits, rows = draw_hits(network, photos, images, gallery)
    found = [names[row] for row in rows]
    print(f"\nhits of {' and '.join(ASKED)} among {len(images)} crops: {', '.join(found)}")
    classes, overlaps = draw_classes(network, photos)
    for (_, labels), overlap in zip(AMBIGUOUS.values(), overlaps.tolist(), strict=True):
        print(f"the maps of {' and '.join(labels)} share {overlap:.0%} of their regions")
    pair, matches = draw_pairs(network, photos, gallery)
    mosaics = draw_mosaics(network, photos)
    figures = {"mosaics": mosaics, "pair": pair, "matches": matches, "hits": hits}
    for name, figure in {**figures, "classes": classes}.items():
        save(figure, args.out / f"photographs_{name}.jpg", network.caution)

    if network.caution:
        return  # of random weights nothing else can be said
    # Modest, as other weights than those of the gallery's pictures must pass as well.
    energy, points = means[0].tolist()
    assert energy > 0.5, f"only {energy:.2f} of the energy is on the match"
    assert points > 0.9, f"only {points:.2f} of the maps point to the match"
    assert found[0] in ASKED, f"the first hit of {ASKED} is {found[0]}"


if __name__ == "__main__":
    main()
