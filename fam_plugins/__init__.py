"""Explain models that compare images, inside Captum and pytorch-grad-cam.

* :class:`SimilarityModel` makes an encoder and its references a model whose classes are the
  references, for every Captum and pytorch-grad-cam tool.
* :class:`LayerFam` (Captum) and :class:`FAM` (pytorch-grad-cam) are the Feature Activation Map
  (arXiv 2307.05017) and its sibling rules; :class:`Rule` and :class:`Similarity` add your own.
* :mod:`fam_plugins.cape` gives a classifier a head whose heatmap is a probability (CAPE, CVPR 2024,
  arXiv 2404.02388); :class:`LayerCape` and :class:`CAPE` show it.
* :func:`explain_pair` explains two images in both; :mod:`fam_plugins.plots` draws;
  :func:`fam_plugins.quality.evaluate` measures maps on your own images and encoder;
  :mod:`fam_plugins.interop` fits evaluation harnesses and few-shot libraries.

Everything loads on first use; importing this package loads neither of the two tools, nor torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fam_plugins.captum import LayerCape, LayerFam
    from fam_plugins.core.frozen_tail import frozen_tail
    from fam_plugins.core.images import load_images
    from fam_plugins.core.references import gallery_mean, prototypes
    from fam_plugins.core.rules import Rule
    from fam_plugins.core.scores import frozen_scores
    from fam_plugins.core.similarity import Similarity
    from fam_plugins.core.similarity_model import SimilarityModel
    from fam_plugins.core.transforms import channels_last_to_map, infer_transform, tokens_to_map
    from fam_plugins.grad_cam import CAPE, FAM, SimilarityTarget
    from fam_plugins.hits import HitsExplanation, explain_hits
    from fam_plugins.interop.easyfsl import from_easyfsl
    from fam_plugins.pair import PairExplanation, explain_pair
    from fam_plugins.verification import Calibration, calibrate_threshold

# Without the submodules: ``from fam_plugins import *`` must not rebind a user's ``captum``.
__all__ = [
    "CAPE",
    "FAM",
    "Calibration",
    "HitsExplanation",
    "LayerCape",
    "LayerFam",
    "PairExplanation",
    "Rule",
    "Similarity",
    "SimilarityModel",
    "SimilarityTarget",
    "calibrate_threshold",
    "channels_last_to_map",
    "explain_hits",
    "explain_pair",
    "from_easyfsl",
    "frozen_scores",
    "frozen_tail",
    "gallery_mean",
    "infer_transform",
    "load_images",
    "prototypes",
    "tokens_to_map",
]

__version__ = "0.1.0"

# Loaded on first use: a command that only says what is wrong must not wait for torch.
_HOMES = (
    "core.frozen_tail", "core.images", "core.references", "core.rules", "core.scores",
    "core.similarity_model", "core.transforms", "hits", "pair", "verification", "interop.easyfsl",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("LayerCape", "LayerFam"):
        return getattr(import_module(f"{__name__}.captum"), name)
    if name in ("CAPE", "FAM", "SimilarityTarget"):
        return getattr(import_module(f"{__name__}.grad_cam"), name)
    if name in __all__:
        homes = (vars(import_module(f"{__name__}.{home}")) for home in _HOMES)
        return globals().setdefault(name, next(home[name] for home in homes if name in home))
    if find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
