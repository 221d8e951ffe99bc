"""Images -> rows of a table, from one forward pass; and the settings that these rows depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fam_plugins.core.eval_mode import place_of
from fam_plugins.core.gallery import Gallery
from fam_plugins.core.layer_pass import find_layer
from fam_plugins.core.messages import warn_user

__all__ = ["Explain", "load_extra"]


class Explain:
    """A LayerFam and which references of an image it explains: images -> :class:`pyarrow.Table`."""

    def __init__(self, explainer: Any, top_k: int | None, targets: Any) -> None:
        known = hasattr(explainer, "attribute_references") and hasattr(explainer, "forward_func")
        if not known or explainer.layer in (None, "patches"):
            fix = 'LayerFam(model, "layer4", rule="centred"), its layer a name or a module'
            raise TypeError(f"explainer must be {fix}, so that all maps are of one layer")
        model = getattr(explainer.forward_func, "__self__", explainer.forward_func)
        count = len(getattr(model, "references", range(top_k or 0)))
        wrong = top_k not in (None, *range(1, count + 1)) or not isinstance(targets, Mapping | None)
        if wrong or (top_k and targets is not None):
            raise ValueError(f"pass top_k of 1 to {count}, or a dict from image ids as targets")
        self.module = model if isinstance(model, nn.Module) else nn.Module()
        self._explainer, self._model, self._top_k, self._targets = explainer, model, top_k, targets
        self._labels, self._pa = getattr(model, "labels", None), load_extra("pyarrow", "dataset")
        self._fits: int | None = None  # images at a time, where memory has run out
        self.settings, pa = json.dumps(self._depends_on(), sort_keys=True), self._pa
        text, number, halves = pa.string(), pa.float32(), pa.list_(pa.float16())
        types = {"id": text, "reference": pa.int64(), "label": text, "score": number}
        types |= {"coverage": number, "map": halves, "shape": pa.list_(pa.int32()), "error": text}
        self.schema = pa.schema(types, metadata={"fam_plugins": self.settings})

    def __call__(self, ids: list[str], images: Any, failed: Any = ()) -> Any:
        """Rows of images ``[n, ...]``, then one for each ``(id, reason)`` of those that failed."""
        tables, at, before, (device, dtype) = list[Any](), 0, self._fits, place_of(self.module)
        while at < len(ids):
            end = at + (self._fits or len(ids))
            part = images[at:end].to(device=device, dtype=dtype, non_blocking=True)
            try:
                tables.append(self._pass(ids[at:end], part))
                at = end
            except torch.cuda.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self._fits = len(part) // 2
        if before != self._fits:
            warn_user(f"out of memory: from here on, {self._fits} images at a time")
        broken = [{"id": name, "error": reason} for name, reason in failed]
        return self._pa.concat_tables([*tables, self._pa.Table.from_pylist(broken, self.schema)])

    def _pass(self, ids: list[str], images: Tensor) -> Any:
        chosen: Any = self._top_k and (lambda scores: scores.topk(self._top_k).indices)
        if self._targets is not None:
            if missing := [name for name in ids if name not in self._targets]:
                raise ValueError(f"targets lacks image {missing[0]!r}: add it, or leave it out")
            asked = [self._targets[name] for name in ids]
            chosen = [[self._model.index(t) if isinstance(t, str) else int(t)] for t in asked]
        found = self._explainer.attribute_references(images, chosen, return_scores=True)
        maps, scores, references = found
        share = torch.full_like(scores, torch.nan)
        if self._explainer.rule.adds_up:
            share = (maps.float().flatten(2).sum(dim=2) / scores).where(scores != 0, share)
        if (half := maps.half()).isinf().any():
            raise ValueError("a map does not fit into float16: use cosine, or smaller embeddings")
        values = [t.flatten().cpu() for t in (references, scores.float(), share.float(), half)]
        of, score, coverage, flat = (value.numpy() for value in values)
        pa, count, shape = self._pa, len(of), np.array(maps.shape[3:], np.int32)
        each = np.arange(count + 1, dtype=np.int32)
        columns = {
            "id": np.repeat(ids, count // len(ids)),
            "reference": of,
            "label": [self._labels and str(self._labels[row]) for row in of],
            "score": score,
            "coverage": pa.array(coverage, from_pandas=True),
            "error": pa.nulls(count),
            "map": pa.ListArray.from_arrays(each * (len(flat) // count), flat),
            "shape": pa.ListArray.from_arrays(each * len(shape), np.tile(shape, count)),
        }
        return pa.table(columns, schema=self.schema)

    def _depends_on(self) -> dict[str, Any]:
        explainer, state, told = self._explainer, self.module.state_dict(), dict[str, Any]()
        if isinstance(rows := getattr(self._model, "references", None), Gallery):
            some = rows.array[:: -(-len(rows) // 2**16)]
            state["references"] = torch.tensor(some)
        for name, value in state.items():
            if isinstance(value, Tensor):
                of = told.setdefault(f"hash of {name.partition('.')[0]}", hashlib.blake2b())
                of.update(f"{name}{value.dtype}{value.shape}".encode())
                of.update(value.detach().cpu().flatten().view(torch.uint8).numpy().data)
        told = {name: of.hexdigest()[:16] for name, of in told.items()}
        every = "all" if self._targets is None else "targets"
        told["references"] = f"top {self._top_k}" if self._top_k else every
        told["model"] = type(getattr(self._model, "encoder", self._model)).__qualname__
        told["layer"] = find_layer(explainer.forward_func, explainer.layer)[1]
        told["scores"], told["smooth"] = self.module.extra_repr(), explainer.smooth
        told["rule"], told["tail"] = explainer.rule.name, explainer.tail or explainer.rule.tail
        told["transform"] = getattr(explainer.reshape_transform, "__qualname__", None)
        told["transform"] = told["transform"] or repr(explainer.reshape_transform)
        told["torch"] = str(torch.__version__)
        return told | {"fam_plugins": import_module("fam_plugins").__version__}


def load_extra(module: str, extra: str = "dataset") -> Any:
    """Import what comes with an extra, or say which."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'fam-plugins[{extra}]'") from error
