"""CAPE: a classifier head whose heatmap is a probability.

Source: Chowdhury et al., "CAPE: CAM as a Probabilistic Ensemble for Enhanced DNN
Interpretation", CVPR 2024 (arXiv:2404.02388).
"""

from fam_plugins.cape.calibrate import Calibration, calibrate_temperature
from fam_plugins.cape.fit import FitHistory, fit_cape_head
from fam_plugins.cape.head import CapeHead
from fam_plugins.cape.loss import cape_loss
from fam_plugins.cape.model import CapeModel, with_cape_head
from fam_plugins.cape.released import (
    head_state_from_release,
    head_state_to_release,
    resnet_state_from_release,
)
from fam_plugins.cape.upsample import upsample_conserving_mass

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
