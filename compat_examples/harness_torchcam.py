"""torchcam's metrics on FAM and CAPE: ``for_torchcam`` is the one line of glue.

pip install 'fam-plugins[torchcam]'
python compat_examples/harness_torchcam.py
"""

from __future__ import annotations

from functools import partial

import harness_models
import torch

from fam_plugins.interop.harnesses import for_torchcam

try:
    from torchcam.metrics import ClassificationMetric, DeletionInsertionMetric
except ImportError as error:
    raise SystemExit(
        f"this example needs torchcam 0.5 ({error}): pip install 'fam-plugins[torchcam]'"
    ) from error


def main() -> None:
    bench = harness_models.prepare()
    softmax = partial(torch.softmax, dim=-1)
    rows = {}
    for case in bench.cases:
        with for_torchcam(case.attribution()) as extractor:  # the one line
            confidence = ClassificationMetric(extractor, softmax)
            curves = DeletionInsertionMetric(extractor, softmax)
            for metric in (confidence, curves):
                metric.update(bench.images, bench.labels.tolist())
        values = confidence.summary() | curves.summary()
        rows[case.name] = {name: f"{value:.3f}" for name, value in values.items()}
    harness_models.print_table(rows)
    for name, row in rows.items():
        deletion, insertion = float(row["deletion_auc"]), float(row["insertion_auc"])
        assert insertion > deletion, (
            f"{name}: the first pixels of the map tell the class ({insertion}) no better than the "
            f"last ones ({deletion})"
        )


if __name__ == "__main__":
    main()
