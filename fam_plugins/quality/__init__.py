"""How good are the maps? Methods compared on your own labelled images and encoder."""

from __future__ import annotations

from fam_plugins.quality.evaluate import evaluate
from fam_plugins.quality.measures import Evaluation

__all__ = ["Evaluation", "evaluate"]
