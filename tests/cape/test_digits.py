"""The example's own functions, on real images, with fewer epochs."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fam_plugins.cape import calibrate_temperature, fit_cape_head, with_cape_head

matplotlib = pytest.importorskip("matplotlib", reason="the example needs matplotlib")

SCRIPT = Path(__file__).parents[2] / "compat_examples" / "cape_head.py"


@pytest.fixture(scope="module")
def example():
    for needed in ("sklearn", "matplotlib", "captum"):
        pytest.importorskip(needed, reason=f"the example needs {needed}")
    spec = importlib.util.spec_from_file_location("cape_head_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_heads_agree_on_held_out_digits(example, tmp_path):
    torch.manual_seed(0)
    train_set, held_set, test_set = example.load_splits(0)
    loader = DataLoader(train_set, batch_size=32, shuffle=True)
    network = example.small_network()
    example.train(network, loader, torch.device("cpu"), epochs=5)
    images, labels = test_set.tensors
    with torch.no_grad():
        assert (network(images).argmax(1) == labels).double().mean() > 0.9

    model = with_cape_head(network, example_input=images[:2])
    history = fit_cape_head(model, loader, epochs=8, cache=True, progress=False)
    assert history.loss[-1] < 0.6 * history.loss[0]
    fitted, _, _ = example.agreement_and_confidence(model, images)
    report = calibrate_temperature(model, DataLoader(held_set, batch_size=64))
    calibrated, _, _ = example.agreement_and_confidence(model, images)
    assert min(fitted, calibrated) >= 0.97
    assert report.nll_after < report.nll_before
    assert report.ece_after < report.ece_before

    with torch.no_grad():
        features = model.features(images)
        maps, p = model.head.probability_maps(features), model(images).exp()
    torch.testing.assert_close(maps.sum((2, 3)), p, rtol=0, atol=1e-6)

    picture = tmp_path / "new" / "digit.png"
    example.draw(model, images[0], int(labels[0]), picture)
    colours, counts = np.unique(
        (matplotlib.image.imread(picture)[..., :3] * 255).round().reshape(-1, 3),
        axis=0,
        return_counts=True,
    )
    top = p[0].topk(3).indices
    shown = (maps[0, top] / maps[0, top].max()).numpy().reshape(3, -1)
    for share in (shown[0].max(), *shown.min(axis=1), *shown.max(axis=1)):
        wanted = np.array(matplotlib.colormaps["viridis"](share)[:3]) * 255
        close = np.abs(colours - wanted).max(axis=1) <= 2
        assert counts[close].sum() > 1000, f"no region is as bright as {share:.2f} of the maximum"
    white = (colours == 255).all(axis=1)
    assert 0.2 < counts[white].sum() / counts.sum() < 0.9
