"""Captions as references: texts embedded once, by the text tower beside a model's image tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fam_plugins.core.encoders import is_open_clip, pick_embeddings
from fam_plugins.core.eval_mode import check_module, eval_mode, place_of
from fam_plugins.core.messages import with_progress
from fam_plugins.core.references import check_chunk_size
from fam_plugins.core.similarity import unit_length

__all__ = ["Template", "embed_captions"]

Template = str | Callable[[str], str]


def embed_captions(
    model: Any, tokenizer: Any, captions: Sequence[str], templates: Any, chunk_size: int
) -> Tensor:
    """Captions -> ``[N, D]`` of unit length: each the mean of its texts' unit vectors (CLIP)."""
    check_chunk_size(chunk_size)
    texts = _texts(captions, templates)
    call = _text_call(model, tokenizer)
    chunks = [texts[i : i + chunk_size] for i in range(0, len(texts), chunk_size)]
    with eval_mode(model), torch.inference_mode(False), torch.no_grad():
        parts = [pick_embeddings(call(chunk)) for chunk in with_progress(chunks, "embedding texts")]
        rows = torch.cat(parts)
        units = unit_length(rows.to(torch.promote_types(rows.dtype, torch.float32)))
        means = units.reshape(len(captions), -1, units.shape[1]).mean(dim=1)
        return unit_length(means).to(rows.dtype)


def _texts(captions: Sequence[str], templates: str | Sequence[Template] | None) -> list[str]:
    """Every caption in every template, caption by caption."""
    if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
        raise TypeError('captions must be a list of strings, such as ["a cat", "a dog"]')
    if not captions or not all(caption.strip() for caption in captions):
        raise ValueError("captions are empty: pass at least one, and no empty string")
    chosen = [templates] if isinstance(templates, str) else templates or ["{}"]
    for template in chosen:
        if not callable(template) and "{}" not in template:
            fix = 'write it as "a photo of a {}."'
            raise ValueError(f"template {template!r} has no {{}} for the caption: {fix}")
    return [t(name) if callable(t) else t.replace("{}", name) for name in captions for t in chosen]


def _text_call(model: Any, tokenizer: Any) -> Callable[[list[str]], Any]:
    """What embeds texts; nothing is run yet."""
    check_module(model)
    tokenize = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if not callable(tokenize) or hasattr(tokenize, "image_mean"):
        raise TypeError(
            f"{type(tokenizer).__name__} is no tokenizer: pass open_clip.get_tokenizer(name), or "
            "AutoProcessor.from_pretrained(name) of transformers"
        )
    if is_open_clip(model):
        return lambda texts: model.encode_text(tokenize(texts).to(place_of(model)[0]))
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise ValueError(
            f"{type(model).__name__} has not both an image and a text tower: pass the whole model, "
            "such as CLIPModel, SiglipModel or one of open_clip"
        )
    # SigLIP was trained on texts of one length; CLIP does not look at what follows a text's end.
    length = model.config.text_config.max_position_embeddings
    length = min(length, getattr(tokenize, "model_max_length", length))
    options = {"padding": "max_length", "max_length": length, "truncation": True}

    def call(texts: list[str]) -> Any:
        tokens = tokenize(texts, return_tensors="pt", **options)
        return model.get_text_features(**tokens.to(place_of(model)[0]))

    return call
