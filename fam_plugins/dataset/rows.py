"""Images -> rows of a table, from one forward pass; and what these rows depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fam_plugins.core.decompose import region_sum
from fam_plugins.core.eval_mode import place_of
from fam_plugins.core.gallery import Gallery
from fam_plugins.core.layer_pass import find_layer
from fam_plugins.core.messages import warn_user
from fam_plugins.core.scores import check_floats

__all__ = ["Explain", "load_extra"]


class Explain:
    """A LayerFam and which references of an image it explains: images -> :class:`pyarrow.Table`."""

    def __init__(self, explainer: Any, top_k: int | None, targets: Any) -> None:
        known = hasattr(explainer, "attribute_references") and hasattr(explainer, "forward_func")
        if not known or explainer.layer in (None, "patches"):
            raise TypeError(
                "explainer must be a LayerFam with a layer that is named or a module, so that all "
                'maps are of one: LayerFam(model, "layer4", rule="centred")'
            )
        self.model = getattr(explainer.forward_func, "__self__", explainer.forward_func)
        self.explainer, self._top_k, self._targets = explainer, top_k, targets
        count = len(getattr(self.model, "references", range(top_k or 0)))
        if top_k is not None and not (targets is None and 1 <= top_k <= count):
            raise ValueError(f"top_k must be 1 to {count}, the references, without targets")
        if not isinstance(targets, Mapping | None):
            raise TypeError("targets must be a dict of one index or label per image id")
        self._labels = getattr(self.model, "labels", None)
        self._fits: int | None = None
        self._pa = pa = load_extra("pyarrow", "dataset")
        text, number = pa.string(), pa.float32()
        types = {"id": text, "reference": pa.int64(), "label": text, "score": number}
        types |= {"coverage": number, "map": pa.list_(pa.float16()), "shape": pa.list_(pa.int32())}
        self.settings = json.dumps(self._depends_on(), sort_keys=True)
        self.schema = pa.schema(types | {"error": text}, metadata={"fam_plugins": self.settings})

    def __call__(self, ids: list[str], images: Tensor | None, failed: Any = ()) -> Any:
        """Rows of images ``[n, ...]``, then one for each ``(id, reason)`` of those that failed."""
        tables, at, before = list[Any](), 0, self._fits
        broken = [{"id": name, "error": reason} for name, reason in failed]
        if images is not None:
            check_floats(images, "images")
            device, dtype = (
                place_of(self.model) if isinstance(self.model, nn.Module) else (None,) * 2
            )
        while images is not None and at < len(images):
            end = at + (self._fits or len(images))
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
        return self._pa.concat_tables([*tables, self._pa.Table.from_pylist(broken, self.schema)])

    def _pass(self, ids: list[str], images: Tensor) -> Any:
        chosen: Any = self._top_k and (lambda scores: scores.topk(self._top_k).indices)
        if self._targets is not None:
            if missing := [name for name in ids if name not in self._targets]:
                raise ValueError(f"targets lacks image {missing[0]!r}: add it, or leave it out")
            asked = [self._targets[name] for name in ids]
            chosen = [[self.model.index(t) if isinstance(t, str) else int(t)] for t in asked]
        found = self.explainer.attribute_references(images, chosen, return_scores=True)
        maps, scores, references = found
        if isinstance(maps, tuple):
            raise ValueError("the layer gives several tensors: a reshape_transform can pick one")
        coverage = torch.full_like(scores, torch.nan)
        if self.explainer.rule.adds_up:
            coverage = (region_sum(maps.float(), leading=2) / scores).where(scores != 0, coverage)
        if (half := maps.half()).isinf().any():
            raise ValueError("a map does not fit into float16: use cosine, or smaller embeddings")
        values = [t.flatten().cpu() for t in (references, scores.float(), coverage.float(), half)]
        of, score, share, flat = (value.numpy() for value in values)
        pa, shape = self._pa, np.array(maps.shape[3:], np.int32)
        labels = self._labels or [None] * (of.max() + 1)
        each = np.arange(len(of) + 1, dtype=np.int32)
        columns = [
            pa.array(np.repeat(ids, len(of) // len(ids))),
            pa.array(of),
            pa.array([label and str(label) for label in labels], pa.string()).take(pa.array(of)),
            pa.array(score),
            pa.array(share, from_pandas=True),
            pa.ListArray.from_arrays(each * (len(flat) // len(of)), flat),
            pa.ListArray.from_arrays(each * len(shape), np.tile(shape, len(of))),
            pa.nulls(len(of), pa.string()),
        ]
        return pa.table(columns, schema=self.schema)

    def _depends_on(self) -> dict[str, Any]:
        """Settings by name; weights and references as hashes, of a gallery those of some rows."""
        from fam_plugins import __version__

        explainer, model, module = self.explainer, self.model, isinstance(self.model, nn.Module)
        transform, state = explainer.reshape_transform, model.state_dict() if module else {}
        if isinstance(rows := getattr(model, "references", None), Gallery):
            state["references"] = torch.tensor(rows.array[:: -(-len(rows) // 2**16)])
        found: dict[str, Any] = {}
        for name, value in state.items():
            if isinstance(value, Tensor):
                of = found.setdefault(f"hash of {name.partition('.')[0]}", hashlib.blake2b())
                of.update(f"{name}{value.dtype}{value.shape}".encode())
                of.update(value.detach().cpu().flatten().view(torch.uint8).numpy().data)
        return {name: of.hexdigest()[:16] for name, of in found.items()} | {
            "references": f"top {self._top_k}"
            if self._top_k
            else "targets"
            if self._targets is not None
            else "all",
            "model": type(getattr(model, "encoder", model)).__qualname__,
            "scores": model.extra_repr() if module else model.__qualname__,
            "layer": find_layer(explainer.forward_func, explainer.layer)[1],
            "rule": explainer.rule.name,
            "tail": explainer.tail or explainer.rule.tail,
            "smooth": explainer.smooth,
            "transform": getattr(transform, "__qualname__", repr(transform)),
            "fam_plugins": __version__,
            "torch": torch.__version__,
        }


def load_extra(module: str, extra: str) -> Any:
    """Import what comes with an extra, or say which."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'fam-plugins[{extra}]'") from error
