"""Everything under torch.set_default_device("meta"), a stand-in for a GPU.

What is made on the CPU says so, and what belongs to the model follows the model.
"""

import copy

import pytest
import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from fam_plugins import CAPE, LayerCape
from fam_plugins.cape import (
    calibrate_temperature,
    cape_loss,
    fit_cape_head,
    upsample_conserving_mass,
    with_cape_head,
)

from .conftest import QUIET, default_device


def fitted(network, batches, folder, **options):
    model = with_cape_head(copy.deepcopy(network))
    path = folder / "head.pt"
    for epochs in (1, 3):
        fit_cape_head(model, batches, epochs=epochs, lr=0.05, checkpoint=path, **options, **QUIET)
    path.unlink()
    return model.head.state_dict()


def calibrated(network, batches, folder):
    model = with_cape_head(copy.deepcopy(network))
    calibrate_temperature(model, [(images, labels) for images, labels in batches])
    return model.head.state_dict()


def maps(network, batches, folder):
    model, (images, _) = with_cape_head(network.eval()), batches[0]
    cam = CAPE(model)
    cam(images, [ClassifierOutputTarget(1)] * len(images))
    found = LayerCape(model).attribute(images, 1)
    assert torch.equal(cam.probability_maps, found)
    return {mode: upsample_conserving_mass(found, 14, mode) for mode in ("nearest", "bilinear")}


def losses(network, batches, folder):
    model, (images, labels) = with_cape_head(network.eval()), batches[0]
    features, logits = model.features_and_logits(images)
    return {"loss": cape_loss(model.head, features, logits, labels).detach()}


@pytest.mark.filterwarnings("ignore:the best temperature shift")
@pytest.mark.parametrize(
    ("work", "options"),
    [(fitted, {}), (fitted, {"cache": True}), (calibrated, {}), (maps, {}), (losses, {})],
    ids=["fit", "cached-fit", "calibrate", "maps", "loss"],
)
def test_another_default_device_changes_nothing(network, batches, tmp_path, work, options):
    expected = work(network, batches, tmp_path, **options)
    with default_device("meta"):
        found = work(network, batches, tmp_path, **options)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
