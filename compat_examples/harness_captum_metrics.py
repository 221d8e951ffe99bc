"""Captum's metrics on FAM and CAPE: ``for_captum`` is the one line of glue.

python compat_examples/harness_captum_metrics.py
"""

from __future__ import annotations

import harness_models
import torch
from captum.metrics import infidelity, sensitivity_max

from fam_plugins.interop.harnesses import for_captum


def perturb(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    noise = 0.1 * torch.randn_like(images)
    return noise, images - noise


def main() -> None:
    bench = harness_models.prepare()
    rows = {}
    for case in bench.cases:
        explain = for_captum(case.attribution())  # the one line
        torch.manual_seed(0)
        sensitivity = sensitivity_max(explain, bench.images, target=bench.labels)
        (maps,) = explain(bench.images, target=bench.labels)
        unfaithful = infidelity(
            case.model, perturb, bench.images, maps, target=bench.labels, n_perturb_samples=20,
            normalize=True,
        )  # fmt: skip
        rows[case.name] = {
            "sensitivity_max, lower is better": f"{sensitivity.mean():.3f}",
            "infidelity (normalised), lower is better": f"{unfaithful.mean():.4f}",
        }
    harness_models.print_table(rows)


if __name__ == "__main__":
    main()
