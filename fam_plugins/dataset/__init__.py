"""Maps of whole data sets: :func:`explain_dataset` writes them to Parquet and resumes."""

from fam_plugins.dataset.explain import explain_dataset
from fam_plugins.dataset.store import read_maps, to_fiftyone

__all__ = ["explain_dataset", "read_maps", "to_fiftyone"]
