"""FAM and CAPE inside Captum."""

from __future__ import annotations

try:
    import captum as _partner  # noqa: F401
except ImportError as error:
    raise ImportError("fam_plugins.captum needs Captum: pip install captum") from error

from fam_plugins.captum.layer_cape import LayerCape
from fam_plugins.captum.layer_fam import LayerFam

__all__ = ["LayerCape", "LayerFam"]
