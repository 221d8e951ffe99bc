"""Captions as references: texts embedded once by the text tower of a model that has two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fam_plugins.core.encoders import pick_embeddings
from fam_plugins.core.eval_mode import check_module, eval_mode, place_of
from fam_plugins.core.messages import with_progress
from fam_plugins.core.similarity import unit_length

__all__ = ["Template", "embed_captions", "filled"]

Template = str | Callable[[str], str]


def filled(
    captions: Iterable[str], templates: str | Sequence[Template] | None
) -> tuple[list[str], list[list[str]]]:
    """The captions, and the texts of each: one per template, with the caption in place of ``{}``.

    Raises:
        TypeError: If captions are no list of strings.
        ValueError: If there are none, one is empty, or a template has no place for it.
    """
    names = [captions] if isinstance(captions, str) else list(captions)
    if isinstance(captions, str) or not all(isinstance(name, str) for name in names):
        raise TypeError('captions must be a list of strings, such as ["a cat", "a dog"]')
    if not names or not all(name.strip() for name in names):
        raise ValueError("captions are empty: pass at least one, and no empty string")
    chosen = ["{}"] if templates is None else templates
    chosen = [chosen] if isinstance(chosen, str) else list(chosen)
    for template in chosen:
        if not callable(template) and "{}" not in template:
            raise ValueError(
                f"template {template!r} has no {{}} for the caption: "
                'write it as "a photo of a {}."'
            )
    if not chosen:
        raise ValueError('templates are empty: pass at least one, "a photo of a {}.", or None')
    texts = [[t(n) if callable(t) else t.replace("{}", n) for t in chosen] for n in names]
    return names, texts


def text_call(model: Any, tokenizer: Any) -> Callable[[list[str]], Any]:
    """Texts -> what the model's text tower makes of them; nothing is run yet.

    Raises:
        TypeError: If the tokenizer is none.
        ValueError: If the model has not both an image and a text tower.
    """
    check_module(model)
    # A processor holds the tokenizer beside the image processor.
    tokenize = getattr(tokenizer, "tokenizer", tokenizer)
    if not callable(tokenize) or hasattr(tokenize, "image_mean"):
        raise TypeError(
            f"{type(tokenizer).__name__} is no tokenizer: pass open_clip.get_tokenizer(name), or "
            "AutoProcessor.from_pretrained(name) of transformers"
        )
    for image, text in (("encode_image", "encode_text"), ("get_image_features",) * 2):
        text = text.replace("image", "text")
        missing = [name for name in (image, text) if not hasattr(model, name)]
        if len(missing) == 1:
            tower = "image" if missing == [image] else "text"
            raise ValueError(f"{type(model).__name__} has no {tower} tower (no {missing[0]})")
    if hasattr(model, "encode_text"):  # open_clip: a tensor of tokens
        return lambda texts: model.encode_text(tokenize(texts).to(place_of(model)[0]))
    if not hasattr(model, "get_text_features"):
        raise ValueError(
            f"{type(model).__name__} does not embed both images and texts: pass the whole model, "
            "such as CLIPModel, SiglipModel or one of open_clip, not one of its towers"
        )
    # SigLIP was trained on texts of one length; CLIP does not look at what follows a text's end.
    length = model.config.text_config.max_position_embeddings
    length = min(length, getattr(tokenize, "model_max_length", length))
    options = {"padding": "max_length", "max_length": length, "truncation": True}

    def call(texts: list[str]) -> Any:
        tokens = tokenize(texts, return_tensors="pt", **options)
        return model.get_text_features(**tokens.to(place_of(model)[0]))

    return call


def embed_captions(
    model: nn.Module,
    call: Callable[[list[str]], Any],
    texts: Sequence[Sequence[str]],
    chunk_size: int,
) -> Tensor:
    """Texts ``[N][t]`` -> ``[N, D]``: the mean of each caption's unit vectors, of unit length."""
    flat = [text for of_one in texts for text in of_one]
    chunks = [flat[i : i + chunk_size] for i in range(0, len(flat), chunk_size)]
    with eval_mode(model), torch.inference_mode(False), torch.no_grad():
        found = [pick_embeddings(call(c)) for c in with_progress(chunks, "embedding captions")]
        rows = torch.cat(found).float() if found[0].dtype != torch.float64 else torch.cat(found)
        means = unit_length(rows).reshape(len(texts), -1, rows.shape[1]).mean(dim=1)
        return unit_length(means).to(found[0].dtype)
