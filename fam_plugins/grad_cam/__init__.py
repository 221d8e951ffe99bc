"""FAM and CAPE inside pytorch-grad-cam, and a similarity target for every method there."""

from __future__ import annotations

try:
    import pytorch_grad_cam as _partner  # noqa: F401
except ImportError as error:
    raise ImportError(
        "fam_plugins.grad_cam needs pytorch-grad-cam: pip install grad-cam"
    ) from error

from fam_plugins.grad_cam.cape import CAPE
from fam_plugins.grad_cam.fam import FAM
from fam_plugins.grad_cam.target import SimilarityTarget

__all__ = ["CAPE", "FAM", "SimilarityTarget"]
