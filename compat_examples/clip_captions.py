"""Captions as references: which part of a photograph matches which words?

Two photographs stand side by side, and open_clip's CLIP compares them with captions. Each caption
is a reference, and contrast="others" asks "why this caption, not the others". Prints the scores,
checks that they are open_clip's own cosines, and writes a picture.

    pip install open_clip_torch
    python compat_examples/clip_captions.py --out out             # downloads the weights
    python compat_examples/clip_captions.py --out out --random    # a small model, no network
"""

from __future__ import annotations

import json

import matplotlib

matplotlib.use("Agg")

import hub
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_tensor

from fam_plugins import LayerFam, SimilarityModel
from fam_plugins.plots import plot_episode

CAPTIONS = ["a temple", "a flower", "a bicycle"]
TEMPLATES = ["a photo of {}.", "a picture of {} in a park."]


def small_config() -> str:
    """Make a small CLIP known to open_clip, under the name that is returned."""
    import open_clip

    text = {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    vision = {"image_size": 224, "layers": 4, "width": 128, "head_width": 32, "patch_size": 16}
    config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}
    path = hub.folder() / "small-random.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return path.stem


def card(caption: str) -> torch.Tensor:
    """The caption as a picture ``[3, 112, 112]``, to stand where a reference image would."""
    picture = Image.new("RGB", (112, 112), "white")
    ImageDraw.Draw(picture).text((56, 56), caption, "black", anchor="mm", font_size=20)
    return to_tensor(picture)


def main() -> None:
    args = hub.arguments(__doc__.splitlines()[0], "ViT-B-32", pretrained="laion2b_s34b_b79k")
    open_clip = hub.import_library("open_clip", "open_clip_torch")
    name, weights = (small_config(), None) if args.random else (args.model, args.pretrained)

    clip, _, preprocess = hub.loaded(
        lambda: open_clip.create_model_and_transforms(name, pretrained=weights),
        f"{name}, {weights}",
    )
    clip = clip.eval().to(args.device)
    tokenizer = open_clip.get_tokenizer(name)
    query, photos = hub.photographs()
    images = torch.stack([preprocess(picture) for picture in hub.pictures(query)]).to(args.device)

    model = SimilarityModel.from_text(clip, tokenizer, CAPTIONS, TEMPLATES, contrast="others")
    # The input of the middle block: LayerFam(model, rule=...) finds it by itself, and says so.
    layer = f"visual.transformer.resblocks.{len(clip.visual.transformer.resblocks) // 2 - 1}"
    explainer = LayerFam(model, layer, rule="centred")
    maps = torch.stack([explainer.attribute(images, target=c) for c in CAPTIONS], dim=1)
    with torch.no_grad():
        scores = model(images)

        # What open_clip itself makes of the same texts, its logit scale left out.
        plain = SimilarityModel.from_text(clip, tokenizer, CAPTIONS)
        tokens = tokenizer(CAPTIONS).to(args.device)
        own = F.normalize(clip.encode_image(images)) @ F.normalize(clip.encode_text(tokens)).T
        gap = float((plain(images) - own).abs().max())
        alone = torch.stack([preprocess(p) for p in hub.pictures(photos)]).to(args.device)
        best = [CAPTIONS[row] for row in plain(alone).argmax(dim=1)]

    print(f"{name}, {'random weights' if args.random else weights}, layer {layer}")
    print(f"off open_clip's own cosines: {gap:.0e}; the photographs alone: {best}\n")
    print("| caption | score, less the others | energy on the temple's half |")
    print("|---|---|---|")
    for row, caption in enumerate(CAPTIONS):
        energy = "-" if args.random else f"{hub.energy_on(0, maps[0, row, 0]):.2f}"
        print(f"| {caption} | {float(scores[0, row]):+.4f} | {energy} |")

    cards = [card(caption) for caption in CAPTIONS]
    figure = plot_episode(query, cards, maps, scores=scores, labels=CAPTIONS, rule="centred")
    if args.random:
        figure.suptitle(hub.RANDOM, fontsize=10)
    figure.savefig(args.out / "clip_captions.png", dpi=110)
    print(f"wrote {args.out / 'clip_captions.png'}")

    assert gap < 1e-5, f"{gap:.0e} off what open_clip computes"
    assert abs(float(scores.sum())) < 1e-5, "scores less the mean of the others do not sum to zero"
    assert maps.abs().amax() > 0, "the maps are empty"
    by_row = explainer.attribute(images, target=model.index("a flower"))
    assert torch.equal(by_row, maps[:, 1]), "a caption and its row are explained differently"
    assert args.random or best == CAPTIONS[:2], f"the photographs are taken for {best}"


if __name__ == "__main__":
    main()
