"""Pairs with SigLIP: which regions of two images make them alike, in both of them?

The two photographs side by side, against a mirrored part of each. explain_pair takes the whole
SiglipModel and explains its image tower at the last norm, from where attention pooling makes the
embedding. Prints the scores, checks them against transformers' own, and writes a picture.

    pip install transformers
    python compat_examples/siglip_pairs.py --out out             # downloads the weights
    python compat_examples/siglip_pairs.py --out out --random    # a small model, no network
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import hub
import torch
import torch.nn.functional as F

from fam_plugins import SimilarityModel, explain_pair


def small_model() -> str:
    """A folder with a small SigLIP of random weights and an image processor."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = SiglipConfig(
        vision_config=size | {"num_hidden_layers": 4, "image_size": 224, "patch_size": 16},
        text_config=size | {"num_hidden_layers": 1, "vocab_size": 99, "projection_size": 64},
    )
    return hub.saved(SiglipModel(config), SiglipImageProcessor(size={"height": 224, "width": 224}))


def main() -> None:
    args = hub.arguments(__doc__.splitlines()[0], "google/siglip-base-patch16-224")
    hub.import_library("transformers", "transformers")
    name = small_model() if args.random else args.model

    siglip, processor = hub.encoder_and_processor(name, args.model)
    siglip = siglip.to(args.device)
    query, photos = hub.photographs()
    a = processor(images=hub.pictures(query.expand(2, -1, -1, -1)), return_tensors="pt")
    b = processor(images=hub.pictures(photos), return_tensors="pt")
    a, b = a.to(args.device), b.to(args.device)

    # The norm in front of the attention pooling: explain_pair(encoder, None, ...) finds it as well.
    layer = "vision_model.post_layernorm"
    pair = explain_pair(
        siglip, layer, 2 * hub.pictures(query), hub.pictures(photos), transform=processor,
        rule="centred", contrast=SimilarityModel(siglip, b).references,
    )  # fmt: skip
    with torch.no_grad():
        z = [F.normalize(SimilarityModel(siglip, part).references) for part in (a, b)]
        own = F.normalize(siglip.vision_model(**b).pooler_output)
        off = float((z[1] - own).abs().max())
        apart = float((pair.score - (z[0] * z[1]).sum(dim=1)).abs().max())

    print(f"{'a small model, random weights' if args.random else args.model}, layer {layer}\n")
    print("| the query and | cosine | energy on its half of the query |")
    print("|---|---|---|")
    for row, photo in enumerate(hub.PHOTOGRAPHS):
        energy = "-" if args.random else f"{hub.energy_on(row, pair.map_a[row, 0]):.2f}"
        print(f"| {photo.split('.')[0]} | {float(pair.score[row]):+.4f} | {energy} |")

    figure = pair.plot(0, titles=("both", "temple"))
    if args.random:
        figure.suptitle(hub.RANDOM, fontsize=10)
    figure.savefig(args.out / "siglip_pairs.png", dpi=110)
    print(f"wrote {args.out / 'siglip_pairs.png'}")

    assert off < 1e-5, f"the embeddings are {off:.0e} off what transformers computes"
    assert apart < 1e-5, f"scores are {apart:.0e} off the cosines of the embeddings"
    assert pair.map_a.shape == (2, 1, 14, 14), f"the maps are {tuple(pair.map_a.shape)}"
    assert float(pair.map_a[0].abs().max()) > 0, "the maps are empty"


if __name__ == "__main__":
    main()
