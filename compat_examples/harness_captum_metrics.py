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


def on_ink(maps: torch.Tensor, masks: torch.Tensor) -> float:
    """How much of the positive part of the maps lies on the ink, over all images."""
    positive = maps.clamp_min(0)
    return float(positive[masks].sum() / positive.sum().clamp_min(1e-12))


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
            "positive part on the ink": f"{on_ink(maps, bench.masks):.2f}",
        }
    harness_models.print_table(rows)
    ink = float(bench.masks.float().mean())
    print(f"\nthe ink covers {ink:.2f} of the images")
    # Neither of Captum's metrics knows a map from its negative: one compares maps with each other,
    # the other fits a factor, of any sign.
    for name, row in rows.items():
        share, change = float(row["positive part on the ink"]), float(next(iter(row.values())))
        assert share > 1.15 * ink, f"{name}: {share:.2f} on the ink, which covers {ink:.2f}"
        assert 0 < change < 1, f"{name}: a little noise changes the map by {change:.2f} of itself"


if __name__ == "__main__":
    main()
