"""Maps and scores as users give them, checked for drawing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fam_plugins.core.references import as_tensor

__all__ = ["as_floats", "as_maps", "as_scores", "check_titles"]


def as_maps(maps: Any, leading: tuple[int, ...], what: str) -> Tensor:
    """Check maps ``[*leading, 1, h, w]`` or without the 1, and return ``[*leading, h, w]``."""
    given = as_floats(maps, what)
    shape = tuple(given.shape)
    if not leading and given.dim() == 4 and len(given) == 1:  # of a batch of one
        given = given[0]
    if given.dim() == len(leading) + 3 and given.shape[-3] == 1:
        given = given.squeeze(-3)
    if tuple(given.shape[:-2]) != leading or given.dim() < 2 or 0 in given.shape:
        wanted = ", ".join(map(str, (*leading, 1, "h", "w")))
        raise ValueError(
            f"{what} has shape {shape}, not [{wanted}]: pass the maps "
            "as LayerFam returns them, one per image that is shown"
        )
    if not torch.isfinite(given).all():
        raise ValueError(f"{what} holds NaN or infinite values: check the images and the weights")
    return given


def as_scores(scores: Any, shape: tuple[int, ...]) -> Tensor:
    """Check that there is one score per map, and return them as ``shape``."""
    parts = scores if isinstance(scores, (list, tuple)) else [scores]
    if parts and all(isinstance(part, Tensor) for part in parts):  # a list of tensors
        scores = torch.stack([*parts]) if len(parts) > 1 else parts[0]
    given = as_floats(scores, "scores")
    if given.squeeze().shape != torch.empty(shape).squeeze().shape or given.isnan().any():
        raise ValueError(
            f"scores has shape {tuple(given.shape)}, not {list(shape) or 'one number'}, or holds "
            "NaN: pass one per map (of a batch, score[i])"
        )
    return given.reshape(shape)


def as_floats(values: Any, what: str) -> Tensor:
    """What a user gave as float32 on the host."""
    given = as_tensor(values, what)
    if given.is_complex():
        raise TypeError(f"{what} is complex: pass real values (.abs() or .real)")
    return given.detach().float().cpu()


def check_titles(titles: Any) -> None:
    """Refuse other than two titles."""
    if not isinstance(titles, (tuple, list)) or len(titles) != 2:
        raise ValueError(f"titles are {titles!r}: pass two, one per image")
