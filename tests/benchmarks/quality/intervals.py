"""Means with 95 % bootstrap intervals, of single columns and of paired differences."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.stats import bootstrap


@dataclass(frozen=True)
class Estimate:
    """A mean (or median), its 95 % interval, and how many values went into it."""

    value: float
    low: float
    high: float
    count: int

    def above_zero(self) -> bool:
        return self.low > 0

    def below_zero(self) -> bool:
        return self.high < 0


def estimate(values: np.ndarray, *, median: bool = False, resamples: int = 2000) -> Estimate:
    """Bootstrap a mean over images, leaving out images on which the value is undefined (NaN)."""
    values = np.asarray(values, dtype=float)
    return _estimate(values[np.isfinite(values)].tobytes(), median, resamples)


# Tables, verdict and picture ask for the same columns again and again.
@cache
def _estimate(given: bytes, median: bool, resamples: int) -> Estimate:
    values = np.frombuffer(given)
    if len(values) == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    statistic = np.median if median else np.mean
    value = float(statistic(values))
    if len(values) == 1:
        return Estimate(value, np.nan, np.nan, 1)
    # Percentiles rather than BCa: they stay defined for constant columns and for zeros and ones.
    interval = bootstrap(
        (values,), statistic, n_resamples=resamples, method="percentile", rng=0
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high), len(values))


def paired(first: np.ndarray, second: np.ndarray) -> Estimate:
    """``first - second``, image by image."""
    return estimate(np.asarray(first, dtype=float) - np.asarray(second, dtype=float))
