"""pytorch-grad-cam's metrics on FAM and CAPE: ``for_grad_cam`` is the one line of glue.

python compat_examples/harness_grad_cam_metrics.py
"""

from __future__ import annotations

import harness_models
import numpy as np
import torch
from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence, IncreaseInConfidence
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

from fam_plugins.interop.harnesses import for_grad_cam


def main() -> None:
    bench = harness_models.prepare()
    targets = [ClassifierOutputSoftmaxTarget(int(label)) for label in bench.labels]
    rows = {}
    for case in bench.cases:
        maps = case.attribution().attribute(bench.images, target=bench.labels).detach()
        cams = for_grad_cam(maps, bench.images.shape[2:])  # the one line
        torch.manual_seed(0)
        np.random.seed(0)  # ROAD draws its noise from there
        metrics = {
            "drop in confidence, lower is better": DropInConfidence(),
            "increase in confidence, higher is better": IncreaseInConfidence(),
            "ROAD, higher is better": ROADCombined([20, 40, 60, 80]),
        }
        rows[case.name] = {
            name: f"{metric(bench.images, cams, targets, case.model).mean():.3f}"
            for name, metric in metrics.items()
        }
    harness_models.print_table(rows)
    for name, row in rows.items():
        drop, _, road = map(float, row.values())
        assert drop < 0.4, f"{name}: what the map keeps loses {drop:.2f} of the confidence"
        assert road > 0, f"{name}: what ranks first matters less to the model than what ranks last"


if __name__ == "__main__":
    main()
