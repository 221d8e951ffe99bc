"""A web server has one model and many threads: explaining must not disturb those who only call."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from fam_plugins import CAPE, LayerCape
from fam_plugins.cape import with_cape_head
from tests.networks import State

from .conftest import small_network

SECONDS = 0.6
TARGETS = [ClassifierOutputTarget(2)] * 4


def layer_cape(model):
    return LayerCape(model).attribute(IMAGES, target=2)


def cape(model):
    cam = CAPE(model)
    cam(IMAGES, TARGETS)
    return cam.probability_maps


IMAGES = torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "explainers", [[layer_cape], [cape], [layer_cape, cape]], ids=["LayerCape", "CAPE", "both"]
)
def test_four_threads_explain_beside_three_that_only_call(explainers):
    model = with_cape_head(small_network()).eval()
    expected_maps, before = layer_cape(model), State.of(model)
    with torch.no_grad():
        expected = {call: call(IMAGES) for call in (model, model.vanilla, model.features)}
    stop, trouble, counts = threading.Event(), [], []

    def work(step):
        count = 0
        try:
            while not stop.is_set():
                step()
                count += 1
        except BaseException as error:
            trouble.append(error)
        counts.append(count)

    def explain(explainer):
        maps = explainer(model)
        torch.testing.assert_close(maps, expected_maps)
        assert not maps.requires_grad

    def serve(call):
        with torch.no_grad():
            output = call(IMAGES)
        assert not output.requires_grad
        torch.testing.assert_close(output, expected[call])

    steps = [lambda e=e: explain(e) for e in (explainers * 4)[:4]]
    steps += [lambda c=c: serve(c) for c in expected]
    threads = [threading.Thread(target=work, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    time.sleep(SECONDS)
    stop.set()
    for thread in threads:
        thread.join()
    assert not trouble, trouble[0]
    assert min(counts) > 0
    before.assert_unchanged(model)
