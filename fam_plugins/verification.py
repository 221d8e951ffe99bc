"""Same or different: where to put the threshold of a score."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = ["Calibration", "calibrate_threshold"]


class Calibration(NamedTuple):
    """A threshold and what it does on the pairs it was found on.

    Attributes:
        threshold: Pairs that score at least this are taken to be the same.
        false_accept_rate: Share of the different pairs that are taken to be the same.
        false_reject_rate: Share of the same pairs that are taken to be different.
        equal_error_rate: Where the two rates meet (EER), whatever the threshold chosen.
    """

    threshold: float
    false_accept_rate: float
    false_reject_rate: float
    equal_error_rate: float


def calibrate_threshold(
    scores: Any, same: Any, *, false_accept_rate: float | None = None
) -> Calibration:
    """Choose a threshold from pairs that are known to be the same or different.

    Args:
        scores: ``[P]``, such as ``explain_pair(...).score`` or cosines; larger: more alike.
        same: ``[P]``, true where both images show the same.
        false_accept_rate: The most that may be accepted falsely, in [0, 1]; by default the
            threshold at which both errors are equally frequent. It lies halfway between the two
            scores it separates.

    Returns:
        The threshold and its rates; ``pair.same(found.threshold)`` applies it.

    Raises:
        ImportError: If scikit-learn, which pytorch-grad-cam brings along, is missing.
        ValueError: If the numbers differ in length or are not finite, or if there are only same
            or only different pairs.

    Example:
        >>> calibrate_threshold([0.9, 0.7, 0.4, 0.1], [True, True, False, False]).threshold
        0.55
    """
    from sklearn.metrics import roc_curve

    values, known = (
        np.asarray(given.detach().cpu().double() if hasattr(given, "detach") else given)
        for given in (scores, same)
    )
    if values.ndim != 1 or values.shape != known.shape or not np.isfinite(values).all():
        raise ValueError(
            f"scores of shape {values.shape} and labels of shape {known.shape}: pass one finite "
            "score and one label for each pair"
        )
    if set(np.unique(known)) != {0, 1}:
        raise ValueError("labels must be true or false, and there must be pairs of both kinds")
    accepted, found, thresholds = roc_curve(known, values, drop_intermediate=False)
    rejected = 1 - found
    at = equal = int(np.abs(accepted - rejected).argmin())
    if false_accept_rate is not None:
        if not 0 <= false_accept_rate <= 1:
            raise ValueError(f"false_accept_rate must be in [0, 1], not {false_accept_rate!r}")
        at = int(np.flatnonzero(accepted <= false_accept_rate)[-1])
    # The curve starts where nothing is accepted, at infinity.
    threshold = min(thresholds[at], np.nextafter(values.max(), np.inf))
    below = values[values < threshold]
    if at and len(below):
        threshold = (threshold + below.max()) / 2
    rates = float(accepted[at]), float(rejected[at])
    return Calibration(float(threshold), *rates, float(accepted[equal] + rejected[equal]) / 2)
