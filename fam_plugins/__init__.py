"""Explain models that compare images, inside Captum and pytorch-grad-cam.

* :class:`SimilarityModel` makes an encoder and its references a model whose classes are the
  references, for every Captum and pytorch-grad-cam tool.
* :mod:`fam_plugins.cape` gives a classifier a head whose heatmap is a probability (CAPE, CVPR 2024,
  arXiv 2404.02388).
* :class:`fam_plugins.captum.LayerFam` and :class:`fam_plugins.grad_cam.FAM` are the Feature
  Activation Map (arXiv 2307.05017) and its sibling rules in the two tools' own form;
  :class:`fam_plugins.captum.LayerCape` and :class:`fam_plugins.grad_cam.CAPE` are CAPE's.
* :func:`tokens_to_map`, :func:`channels_last_to_map` and :func:`infer_transform` lay out what
  transformers give as a map, for both tools.
* :mod:`fam_plugins.plots` draws pairs, episodes and ranked lists;
  :mod:`fam_plugins.interop.harnesses` fits explanations into evaluation harnesses.

The two tools load on first use of their adapter; importing this package loads neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fam_plugins import cape, captum, grad_cam, interop, plots
    from fam_plugins.captum import LayerCape, LayerFam
    from fam_plugins.core.references import gallery_mean, prototypes
    from fam_plugins.core.similarity import frozen_scores
    from fam_plugins.core.similarity_model import SimilarityModel
    from fam_plugins.core.transforms import channels_last_to_map, infer_transform, tokens_to_map
    from fam_plugins.grad_cam import CAPE, FAM, SimilarityTarget
    from fam_plugins.pair import explain_pair

__all__ = [
    "CAPE",
    "FAM",
    "LayerCape",
    "LayerFam",
    "SimilarityModel",
    "SimilarityTarget",
    "cape",
    "captum",
    "channels_last_to_map",
    "explain_pair",
    "frozen_scores",
    "gallery_mean",
    "grad_cam",
    "infer_transform",
    "interop",
    "plots",
    "prototypes",
    "tokens_to_map",
]

__version__ = "0.1.0"

_HOME = {
    "CAPE": "grad_cam",
    "FAM": "grad_cam",
    "LayerCape": "captum",
    "LayerFam": "captum",
    "SimilarityModel": "core.similarity_model",
    "SimilarityTarget": "grad_cam",
    "channels_last_to_map": "core.transforms",
    "explain_pair": "pair",
    "frozen_scores": "core.similarity",
    "gallery_mean": "core.references",
    "infer_transform": "core.transforms",
    "prototypes": "core.references",
    "tokens_to_map": "core.transforms",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in ("cape", "captum", "grad_cam", "interop", "plots"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
