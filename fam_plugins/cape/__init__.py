"""CAPE: a classifier head whose heatmap is a probability.

Source: Chowdhury et al., "CAPE: CAM as a Probabilistic Ensemble for Enhanced DNN
Interpretation", CVPR 2024 (arXiv:2404.02388).
"""

from .calibrate import Calibration, calibrate_temperature
from .convert import CapeModel, with_cape_head
from .fit import FitHistory, fit_cape_head
from .head import CapeHead
from .loss import cape_loss
from .released import (
    head_state_from_release,
    head_state_to_release,
    resnet_state_from_release,
)
from .upsample import upsample_conserving_mass

__all__ = [
    "Calibration",
    "CapeHead",
    "CapeModel",
    "FitHistory",
    "calibrate_temperature",
    "cape_loss",
    "fit_cape_head",
    "head_state_from_release",
    "head_state_to_release",
    "resnet_state_from_release",
    "upsample_conserving_mass",
    "with_cape_head",
]
