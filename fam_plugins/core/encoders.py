"""Encoders as their libraries make them: which call embeds images, and what is picked out of it.

A model is told by its methods and by what it returns, and not wrapped: layers keep their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fam_plugins.core.eval_mode import check_module

__all__ = ["Output", "as_encoder", "image_call", "is_open_clip", "pick_embeddings", "pixels_of"]

Output = str | Callable[[Any], Tensor] | None


class _UnitLength(nn.Module):
    """Embeddings divided by their length, as an InferenceModel returns them."""

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings)


def as_encoder(given: Any) -> Any:
    """The module in what a user gives as an encoder, refused if it embeds no images.

    pytorch-metric-learning's ``{"trunk": ..., "embedder": ...}`` or InferenceModel becomes one
    module of the same layers, ``trunk.*`` and ``embedder.*``.
    """
    parts = dict(given) if hasattr(type(given), "keys") else getattr(given, "__dict__", {})
    if "trunk" in parts:
        given = nn.Sequential()
        for name in [name for name in ("trunk", "embedder") if parts.get(name) is not None]:
            check_module(parts[name], f"the encoder's {name}")
            given.add_module(name, parts[name])
        if parts.get("normalize_embeddings"):
            given.add_module("normalize", _UnitLength())
        given.training = parts["trunk"].training
    check_module(given, "encoder", ' or {"trunk": ..., "embedder": ...}')
    image_call(given)
    return given


def image_call(encoder: Any) -> Any:
    """What embeds images: a module itself, or the image tower of one that also embeds texts."""
    if is_open_clip(encoder):
        return encoder.encode_image
    if hasattr(encoder, "get_image_features"):  # transformers
        return encoder.get_image_features
    takes = getattr(encoder, "main_input_name", "pixel_values")
    texts = isinstance(getattr(encoder, "token_embedding", None), nn.Embedding)
    if texts or takes != "pixel_values" or hasattr(encoder, "encode_text"):
        raise ValueError(
            f"{type(encoder).__name__} has no image tower: pass the whole model (CLIPModel) "
            "or its image tower (CLIPVisionModelWithProjection)"
        )
    return encoder


def is_open_clip(model: Any) -> bool:
    """Whether a model embeds images and texts by open_clip's two methods."""
    return hasattr(model, "encode_image") and hasattr(model, "encode_text")


def pick_embeddings(output: Any, field: Output = None) -> Any:
    """The embeddings in what an encoder returned: a tensor, or a field of an output object.

    By default ``image_embeds`` or ``text_embeds``, else ``pooler_output``; ``[B, D, 1, 1]`` is
    flattened.
    """
    found = _picked(output, field)
    pooled = isinstance(found, Tensor) and found.shape[2:] == (1, 1)
    return found.flatten(1) if pooled else found


def _picked(output: Any, field: Output) -> Any:
    if callable(field) or (field is None and isinstance(output, Tensor)):
        return field(output) if callable(field) else output
    # Objects of transformers are mappings of what they hold, others have attributes.
    known = output if isinstance(output, Mapping) else dict(getattr(output, "__dict__", {}))
    known = getattr(output, "_asdict", lambda: known)()
    for name in (field,) if field else ("image_embeds", "text_embeds", "pooler_output"):
        found = known.get(name)
        if isinstance(found, Tensor):
            return found
    listed = ", ".join(str(name) for name, value in known.items() if value is not None)
    raise TypeError(
        f"the encoder returns a {type(output).__name__}{listed and f' of {listed}'}, "
        f"{f'which has no tensor {field!r}' if field else 'not a tensor'}: name a field, "
        'SimilarityModel(..., output="name"), or for the class token output=lambda out: '
        "out.last_hidden_state[:, 0], or wrap it in a module that picks the embeddings [B, D]"
    )


def pixels_of(given: Mapping[str, Any], what: str = "images") -> tuple[Tensor, ...]:
    """The tensors in an image processor's output that a model takes, its pixels first."""
    if "pixel_values" not in given:
        raise TypeError(
            f"{what} must be a tensor or an array, or a processor's output with pixel_values, and "
            f"these have {', '.join(map(str, given)) or 'nothing'}: call the processor with images"
        )
    # The latter two are of SigLIP 2 for images of any shape (NaFlex).
    names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    found = tuple(given[name] for name in names if name in given)
    if not all(isinstance(tensor, Tensor) for tensor in found):
        fix = 'call the processor with return_tensors="pt"'
        raise TypeError(f"{what} hold a {type(found[0]).__name__} as pixels, not a tensor: {fix}")
    return found
