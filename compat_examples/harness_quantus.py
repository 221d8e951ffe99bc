"""Quantus on FAM and CAPE: ``for_quantus`` is the one line of glue.

pip install 'fam-plugins[quantus]'
python compat_examples/harness_quantus.py
"""

from __future__ import annotations

import contextlib
import io
import warnings

import harness_models
import numpy as np
import torch
from tqdm.auto import tqdm

from fam_plugins.interop.harnesses import for_quantus, quantus_problems

try:
    import quantus
except ImportError as error:
    raise SystemExit(
        f"this example needs Quantus ({error}): pip install 'fam-plugins[quantus]'"
    ) from error

QUIET = {"disable_warnings": True, "display_progressbar": False}
PERTURB = {"perturb_baseline": "black", **QUIET}

METRICS = {
    "FaithfulnessCorrelation": lambda: quantus.FaithfulnessCorrelation(
        nr_runs=20, subset_size=40, **PERTURB
    ),
    "FaithfulnessEstimate": lambda: quantus.FaithfulnessEstimate(features_in_step=20, **PERTURB),
    "MonotonicityCorrelation": lambda: quantus.MonotonicityCorrelation(
        nr_samples=5, features_in_step=40, **PERTURB
    ),
    "PixelFlipping": lambda: quantus.PixelFlipping(
        features_in_step=20, return_auc_per_sample=True, **PERTURB
    ),
    "Selectivity": lambda: quantus.Selectivity(patch_size=4, **PERTURB),
    "SensitivityN": lambda: quantus.SensitivityN(
        features_in_step=40, n_max_percentage=0.8, **PERTURB
    ),
    "Infidelity": lambda: quantus.Infidelity(
        n_perturb_samples=5, perturb_patch_sizes=[4], **PERTURB
    ),
    "ROAD": lambda: quantus.ROAD(noise=0.01, percentages=[20, 50, 80], **QUIET),
    "Sufficiency": lambda: quantus.Sufficiency(threshold=0.6, **QUIET),
    "LocalLipschitzEstimate": lambda: quantus.LocalLipschitzEstimate(nr_samples=3, **QUIET),
    "MaxSensitivity": lambda: quantus.MaxSensitivity(nr_samples=3, **QUIET),
    "AvgSensitivity": lambda: quantus.AvgSensitivity(nr_samples=3, **QUIET),
    "Consistency": lambda: quantus.Consistency(**QUIET),
    "RelativeInputStability": lambda: quantus.RelativeInputStability(nr_samples=3, **QUIET),
    "RelativeOutputStability": lambda: quantus.RelativeOutputStability(nr_samples=3, **QUIET),
    "PointingGame": lambda: quantus.PointingGame(**QUIET),
    "AttributionLocalisation": lambda: quantus.AttributionLocalisation(**QUIET),
    "RelevanceMassAccuracy": lambda: quantus.RelevanceMassAccuracy(abs=True, **QUIET),
    "RelevanceRankAccuracy": lambda: quantus.RelevanceRankAccuracy(**QUIET),
    "TopKIntersection": lambda: quantus.TopKIntersection(k=40, **QUIET),
    "AUC": lambda: quantus.AUC(**QUIET),
    "Sparseness": lambda: quantus.Sparseness(**QUIET),
    "Complexity": lambda: quantus.Complexity(**QUIET),
    "EffectiveComplexity": lambda: quantus.EffectiveComplexity(eps=0.5, normalise=True, **QUIET),
    "MPRT": lambda: quantus.MPRT(layer_order="top_down", **QUIET),
    "RandomLogit": lambda: quantus.RandomLogit(num_classes=10, seed=0, **QUIET),
    "NonSensitivity": lambda: quantus.NonSensitivity(features_in_step=1, **PERTURB),
}


def evaluate(name: str, case: harness_models.Case, bench: harness_models.Bench) -> str:
    """One metric on one explainer: its mean over the images, or why there is none."""
    explain = for_quantus(case.method, case.layer, **case.options)  # the one line
    torch.manual_seed(0)
    np.random.seed(0)
    try:
        # Quantus prints while it runs.
        with contextlib.redirect_stdout(io.StringIO()):
            result = METRICS[name]()(
                model=case.model,
                x_batch=bench.images.numpy(),
                y_batch=bench.labels.numpy(),
                s_batch=bench.masks.numpy(),
                explain_func=explain,
                softmax=True,
                device="cpu",
            )
    except Exception as error:
        reason = quantus_problems().get(name)
        return f"broken in Quantus: {reason}" if reason else f"{type(error).__name__}: {error}"
    return f"{average(result):.3f}"


def average(result: object) -> float:
    """Quantus answers with a number, a list, or a dictionary of lists."""
    if isinstance(result, dict):
        return float(np.mean([average(value) for value in result.values()]))
    return float(np.nanmean(np.asarray(result, dtype=float)))


def main() -> None:
    warnings.filterwarnings("ignore", module="quantus")
    bench = harness_models.prepare(count=8)
    rows = {
        name: {case.name: evaluate(name, case, bench) for case in bench.cases}
        for name in tqdm(METRICS, desc="Quantus metrics")
    }
    harness_models.print_table(rows)
    ran = sum(all(_is_number(value) for value in row.values()) for row in rows.values())
    print(f"\n{ran} of {len(METRICS)} metrics ran on every explainer")
    known = quantus_problems()
    for name, row in rows.items():
        failed = {case: value for case, value in row.items() if not _is_number(value)}
        assert not failed or name in known, f"{name} does not run: {failed}"
    for case in bench.cases:
        estimate, area = (float(rows[n][case.name]) for n in ("FaithfulnessEstimate", "AUC"))
        assert estimate > 0, f"{case.name}: the score falls least where the map is highest"
        assert area > 0.5, f"{case.name}: the map ranks ink behind background, AUC {area}"


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    main()
