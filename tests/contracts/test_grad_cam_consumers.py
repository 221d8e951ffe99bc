"""Every tool of pytorch-grad-cam that takes a CAM class or its maps, fed with FAM."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import pytorch_grad_cam
import torch
from pytorch_grad_cam import GradCAM, ScoreCAM
from pytorch_grad_cam.metrics.cam_mult_image import (
    CamMultImageConfidenceChange,
    DropInConfidence,
    IncreaseInConfidence,
)
from pytorch_grad_cam.metrics.road import ROADCombined
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from fam_plugins import FAM, SimilarityModel, SimilarityTarget
from tests.contracts.explainers import similarity_model
from tests.networks import State, classifier, encoder

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGETS = [ClassifierOutputTarget(1), ClassifierOutputTarget(3)]


def partner(name: str):
    """A tool that only newer releases have; older ones are claimed too."""
    if not hasattr(pytorch_grad_cam, name):
        pytest.skip(f"this grad-cam has no {name}")
    return getattr(pytorch_grad_cam, name)


def assert_is_cam(result: np.ndarray) -> None:
    """Values in [0, 1], and each map from (nearly) nothing to (nearly) one."""
    assert result.shape == (2, 32, 32)
    assert result.min() >= 0
    assert result.max() <= 1 + 1e-6
    assert (np.ptp(result, axis=(1, 2)) > 0.5).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [("RefineCAM", {}), ("SESS", {"num_scales": 2, "use_softmax_scores": False})],
)
def test_methods_built_on_methods(name, options):
    """With the rule of Grad-CAM they give what Grad-CAM gives, and the rule reaches ours."""
    model = similarity_model()
    layers = [model.encoder.last, model.encoder.conv]
    results = {}
    for base, rule in ((GradCAM, None), (FAM, "gradcam"), (FAM, "centred")):
        chosen = {} if rule is None else {"rule": rule}
        method = partner(name)(model, layers, base_method=base, **options, **chosen)
        results[rule] = method(IMAGES, TARGETS)
    np.testing.assert_allclose(results["gradcam"], results[None], atol=1e-4)
    assert_is_cam(results["centred"])
    assert np.abs(results["centred"] - results["gradcam"]).max() > 0.05


def test_finer_cam_differentiates_the_tail_only():
    model = classifier()
    before = State.of(model)
    finer_class = partner("FinerCAM")
    with finer_class(model, [model.last], base_method=FAM) as finer:
        ours = finer(IMAGES)
    assert_is_cam(ours)
    before.assert_unchanged(model)
    with finer_class(model, [model.last], base_method=partial(FAM, rule="gradcam")) as finer:
        ours = finer(IMAGES)
    with finer_class(model, [model.last], base_method=GradCAM) as finer:
        np.testing.assert_allclose(ours, finer(IMAGES), atol=1e-5)


@pytest.mark.parametrize(
    "metric", [CamMultImageConfidenceChange, DropInConfidence, IncreaseInConfidence]
)
def test_confidence_metrics(metric):
    model = similarity_model()
    cams = FAM(model, ["last"])(IMAGES, TARGETS)
    values = metric()(IMAGES, cams, TARGETS, model)
    assert values.shape == (2,)
    change = torch.stack(
        [
            target(model(image[None] * torch.from_numpy(cam))[0]) - target(model(image[None])[0])
            for image, cam, target in zip(IMAGES, cams, TARGETS, strict=True)
        ]
    )
    expected = {
        CamMultImageConfidenceChange: change,
        DropInConfidence: (-change).clamp_min(0),
        IncreaseInConfidence: (change > 0).float(),
    }[metric]
    np.testing.assert_allclose(values, expected.detach().numpy(), atol=1e-5)


def test_road():
    model = similarity_model()
    cams = FAM(model, ["last"])(IMAGES, TARGETS)
    road = ROADCombined(percentiles=[20, 60])
    values, upside_down, empty = (
        road(IMAGES, maps, TARGETS, model) for maps in (cams, 1 - cams, np.zeros_like(cams))
    )
    assert values.shape == (2,)
    # It halves the difference between removing the least and the most relevant pixels first.
    largest = np.abs(values).max()
    np.testing.assert_allclose(upside_down, -values, atol=0.1 * largest)
    assert np.abs(empty).max() < 0.1 * largest


def test_arcc():
    try:
        from pytorch_grad_cam.metrics.arcc import ARCC
    except ImportError:
        pytest.skip("this grad-cam has no ARCC")
    model = similarity_model()
    found = []
    for cam in (FAM(model, ["last"], rule="gradcam"), GradCAM(model, [model.encoder.last])):
        arcc = ARCC(base_method=cam, road_percentiles=[20, 60])
        cams = cam(IMAGES, TARGETS)
        found.append(arcc.coherency(IMAGES, cams, TARGETS, model, cam))
        assert np.isfinite(arcc(IMAGES, cams, TARGETS, model)).all()
    np.testing.assert_allclose(*found, atol=1e-4)


def test_metrics_take_similarity_targets_on_a_bare_encoder():
    net = encoder()
    targets = [SimilarityTarget(torch.ones(6)), SimilarityTarget(torch.eye(6)[0])]
    cams = FAM(net, ["last"])(IMAGES, targets)
    assert CamMultImageConfidenceChange()(IMAGES, cams, targets, net).shape == (2,)


def test_their_methods_explain_a_similarity_model():
    model = similarity_model()
    for method in (GradCAM, ScoreCAM):
        with method(model, [model.encoder.last]) as cam:
            cam.batch_size = 4
            assert_is_cam(cam(IMAGES, TARGETS))
    nearest = model(IMAGES).argmax(dim=1).tolist()
    with GradCAM(model, [model.encoder.last]) as cam:
        np.testing.assert_array_equal(
            cam(IMAGES, None), cam(IMAGES, [ClassifierOutputTarget(i) for i in nearest])
        )


def test_their_methods_take_similarity_targets():
    net = encoder()
    rows = torch.randn(2, 6)
    with GradCAM(net, [net.last]) as cam:
        ours = cam(IMAGES, [SimilarityTarget(row) for row in rows])
    model = SimilarityModel(net, rows)
    with GradCAM(model, [net.last]) as cam:
        expected = cam(IMAGES, [ClassifierOutputTarget(0), ClassifierOutputTarget(1)])
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_pictures():
    cams = FAM(similarity_model(), ["last"])(IMAGES, TARGETS)
    picture = show_cam_on_image(IMAGES[0].permute(1, 2, 0).numpy(), cams[0], use_rgb=True)
    assert picture.shape == (32, 32, 3)
    assert picture.dtype == np.uint8
