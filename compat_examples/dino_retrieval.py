"""Retrieval with DINOv2: what in the query makes it like each of its hits?

A gallery of crops of two photographs is embedded once. The query shows both photographs side by
side; its nearest crops are explained from one forward pass of it, and the best of them on its own
side too. Prints the hits, checks the embeddings against transformers' own, writes a picture.

    pip install transformers
    python compat_examples/dino_retrieval.py --out out             # downloads the weights
    python compat_examples/dino_retrieval.py --out out --random    # a small model, no network
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import hub
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms import functional as T

from fam_plugins import LayerFam, SimilarityModel, explain_hits
from fam_plugins.plots import plot_retrieval

HITS = 4


def small_model() -> str:
    """A folder with a small DINOv2 of random weights and an image processor."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=224, patch_size=14
    )
    crop = {"height": 224, "width": 224}
    return hub.saved(
        Dinov2Model(config), BitImageProcessor(size={"shortest_edge": 224}, crop_size=crop)
    )


def crops() -> tuple[Tensor, list[str]]:
    """Six crops of each photograph, half of them mirrored, ``[12, 3, 224, 224]``; their names."""
    images, names = [], []
    for name in hub.PHOTOGRAPHS:
        photo = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1) / 255
        for place in range(6):
            part = T.resized_crop(photo, 60, 70 + 40 * place, 300, 300, [224, 224], antialias=True)
            images.append((T.hflip(part) if place % 2 else part).clamp(0, 1))
            names.append(f"{name.split('.')[0]} {place}")
    return torch.stack(images), names


def main() -> None:
    args = hub.arguments(__doc__.splitlines()[0], "facebook/dinov2-small")
    hub.import_library("transformers", "transformers")
    name = small_model() if args.random else args.model

    encoder, processor = hub.encoder_and_processor(name, args.model)
    encoder = encoder.to(args.device)
    gallery, names = crops()
    query, _ = hub.photographs()
    given = processor(images=hub.pictures(gallery), return_tensors="pt")
    images = processor(images=hub.pictures(query), return_tensors="pt").to(args.device).pixel_values

    model = SimilarityModel(encoder, given, contrast="others", labels=names)
    with torch.no_grad():
        scores, hits = model(images).topk(HITS, dim=1)
        own = encoder(**given.to(args.device)).pooler_output
        alike = torch.nn.functional.cosine_similarity(own[:, None], own[None], dim=2)
    found = [names[row] for row in hits[0].tolist()]
    neighbours = alike.fill_diagonal_(-1).argmax(dim=1).tolist()
    same = [names[row].split()[0] == names[near].split()[0] for row, near in enumerate(neighbours)]

    # The input of the middle block: LayerFam(model, rule=...) finds it by itself, and says so.
    layer = f"encoder.layer.{len(encoder.encoder.layer) // 2 - 1}"
    maps = LayerFam(model, layer, rule="centred").attribute_references(images, hits)
    single = LayerFam(model, layer, rule="centred").attribute(images, target=found[0])
    gap = float((maps[:, 0] - single).abs().max() / single.abs().max())
    explained = explain_hits(
        encoder, layer, images, given.pixel_values[hits[0].cpu()].to(args.device),
        rule="centred", contrast=model.references,
    )  # fmt: skip

    print(f"{'a small model, random weights' if args.random else args.model}, layer {layer}")
    print(f"crops whose nearest crop is of the same photograph: {sum(same)} of {len(same)}\n")
    print("| hit | score, less the others | energy on its photograph's half of the query |")
    print("|---|---|---|")
    for place, hit in enumerate(found):
        half = [photo.split(".")[0] for photo in hub.PHOTOGRAPHS].index(hit.split()[0])
        energy = "-" if args.random else f"{hub.energy_on(half, maps[0, place, 0]):.2f}"
        print(f"| {hit} | {float(scores[0, place]):+.4f} | {energy} |")

    shown = gallery[hits[0].cpu()]
    figure = plot_retrieval(
        query[0], shown, maps[0], explained.hit_maps, scores[0], captions=found, rule="centred"
    )
    if args.random:
        figure.suptitle(hub.RANDOM, fontsize=10)
    figure.savefig(args.out / "dino_retrieval.png", dpi=110)
    print(f"wrote {args.out / 'dino_retrieval.png'}")

    off = float((model.references - own).abs().max())
    assert off < 1e-4, f"the gallery is {off:.0e} off what transformers computes"
    assert gap < 1e-4, f"one reference and many are {gap:.0e} apart"
    assert single.shape[2:] == (16, 16), f"the map is {tuple(single.shape)}"
    assert args.random or sum(same) >= 11, "crops of one photograph are not each other's nearest"


if __name__ == "__main__":
    main()
