"""Means over trained networks, and how far the mean over further networks may be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.stats import t


@dataclass(frozen=True)
class Estimate:
    """A mean over networks, half of its interval, and how many networks there are."""

    value: float
    half: float
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of zero, otherwise 0."""
        return int(np.sign(self.value)) if abs(self.value) > self.half else 0


def over_networks(values: Iterable[float], comparisons: int = 1) -> Estimate:
    """Mean and Student's t interval over one value per network; NaN where it is undefined.

    One value is itself a mean over dozens of images, so nearly normal, and there are few of them:
    the bootstrap's percentiles would be too narrow. 95 % hold for ``comparisons`` such intervals
    together (Bonferroni).
    """
    known = np.asarray([value for value in values if np.isfinite(value)], dtype=float)
    if len(known) < 2:
        value = float(known[0]) if len(known) else np.nan
        return Estimate(value, np.nan, len(known))
    quantile = t.ppf(1 - 0.025 / comparisons, len(known) - 1)
    half = quantile * known.std(ddof=1) / np.sqrt(len(known))
    return Estimate(float(known.mean()), float(half), len(known))
