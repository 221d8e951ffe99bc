"""Glue for harnesses: shapes and values by hand, real harnesses where installed, refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from captum.metrics import infidelity, sensitivity_max
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.metrics.cam_mult_image import CamMultImageConfidenceChange
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from fam_plugins import FAM, LayerCape, LayerFam, SimilarityModel
from fam_plugins.interop.harnesses import (
    TorchcamExtractor,
    as_cams,
    as_explanation,
    check_scores,
    explain_func,
    quantus_problems,
)
from tests.contracts.explainers import cape_model, similarity_model
from tests.networks import State, classifier, encoder, pooled

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 1])


class TestExplainFunc:
    @pytest.mark.parametrize("method", [LayerFam, LayerGradCam, FAM, GradCAM])
    def test_gives_numpy_at_the_size_of_the_input(self, method):
        model = similarity_model()
        maps = explain_func(method, "encoder.last")(
            model=model, inputs=IMAGES.numpy(), targets=LABELS.numpy(), device="cpu", anything=1
        )
        assert maps.shape == (3, 1, 8, 8)
        assert maps.dtype == np.float32

    def test_is_the_enlarged_map(self):
        model = similarity_model()
        maps = explain_func(LayerFam, "last", rule="centred")(model, IMAGES.numpy(), LABELS.numpy())
        small = LayerFam(model, "last", rule="centred").attribute(IMAGES, LABELS)
        expected = LayerFam.interpolate(small, (8, 8), "bilinear")
        np.testing.assert_allclose(maps, expected.numpy(), atol=1e-6)

    def test_follows_the_layer_into_a_deep_copy(self):
        explain = explain_func(LayerFam, "last", rule="additive")
        model = similarity_model()
        randomised = copy.deepcopy(model)
        nn.init.normal_(randomised.encoder.features.weight)
        one = explain(model, IMAGES.numpy(), LABELS.numpy())
        other = explain(randomised, IMAGES.numpy(), LABELS.numpy())
        assert not np.allclose(one, other)
        np.testing.assert_array_equal(one, explain(model, IMAGES.numpy(), LABELS.numpy()))

    def test_cape(self):
        maps = explain_func(LayerCape, "feature_map")(cape_model(), IMAGES.numpy(), LABELS.numpy())
        assert maps.shape == (3, 1, 8, 8)

    def test_a_bare_encoder_is_refused_and_a_classifier_takes_a_word(self):
        explain = explain_func(LayerFam, "last")
        with pytest.raises(ValueError, match=r"wrap it, SimilarityModel\(encoder, references\)"):
            explain(encoder(), IMAGES.numpy(), LABELS.numpy())
        with pytest.raises(ValueError, match="say so with classifier=True"):
            explain(classifier(), IMAGES.numpy(), LABELS.numpy())
        sure = explain_func(LayerFam, "last", classifier=True)
        assert sure(classifier(), IMAGES.numpy(), LABELS.numpy()).shape == (3, 1, 8, 8)

    def test_a_constant_map_is_refused(self):
        model = SimilarityModel(pooled(), torch.eye(3))
        flat = np.ones((2, 3, 4, 4), dtype=np.float32)
        with pytest.raises(ValueError, match="map of image 0 is constant.*use another rule"):
            explain_func(LayerFam, "encoder.0")(model, flat, np.array([0, 1]))

    def test_not_a_number_is_refused(self):
        images = np.full((1, 3, 8, 8), np.nan, dtype=np.float32)
        with pytest.raises(ValueError, match="NaN"):
            explain_func(LayerFam, "last")(similarity_model(), images, np.array([0]))


class TestCaptumMetrics:
    @pytest.mark.parametrize("make", [LayerFam, LayerGradCam])
    def test_sensitivity_and_infidelity_run(self, make):
        model = similarity_model()
        explain = as_explanation(make(model, model.encoder.last))
        torch.manual_seed(0)
        assert sensitivity_max(explain, IMAGES, target=LABELS, n_perturb_samples=2).min() > 0
        (maps,) = explain((IMAGES,), target=LABELS)
        assert maps.shape == IMAGES.shape

        def perturb(images):
            return 0.1 * torch.ones_like(images), images - 0.1

        value = infidelity(model, perturb, IMAGES, maps, target=LABELS)
        with torch.no_grad():
            change = (model(IMAGES) - model(IMAGES - 0.1)).gather(1, LABELS[:, None])[:, 0]
        expected = ((0.1 * maps).sum(dim=(1, 2, 3)) - change).square()
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5)

    def test_volumes_are_refused(self):
        class Flat:
            def attribute(self, images):
                return images.flatten(1)

        with pytest.raises(ValueError, match="explain a convolutional layer"):
            as_explanation(Flat())(IMAGES)


class TestCams:
    def test_equal_the_cam_of_the_same_rule(self):
        model = similarity_model()
        maps = LayerFam(model, "last", rule="centred").attribute(IMAGES, LABELS)
        targets = [ClassifierOutputTarget(int(label)) for label in LABELS]
        expected = FAM(model, ["last"], rule="centred")(IMAGES, targets)
        cams = as_cams(maps, (8, 8))
        np.testing.assert_allclose(cams, expected, atol=1e-6)
        assert CamMultImageConfidenceChange()(IMAGES, cams, targets, model).shape == (3,)

    @pytest.mark.parametrize(
        ("maps", "message"),
        [
            (torch.ones(1, 2, 3, 3), "sum the channels"),
            (torch.ones(1, 1, 3, 3), "is constant"),
            (-torch.rand(1, 1, 3, 3), "is constant"),
            (torch.full((1, 1, 3, 3), float("nan")), "NaN"),
        ],
    )
    def test_bad_maps_are_refused(self, maps, message):
        with pytest.raises(ValueError, match=message):
            as_cams(maps, (8, 8))


class TestTorchcam:
    def test_maps_of_the_images_seen_last(self):
        model = similarity_model()
        before = State.of(model)
        with TorchcamExtractor(LayerFam(model, "last", rule="centred")) as extractor:
            with pytest.raises(RuntimeError, match="run extractor.model"):
                extractor(0)
            scores = extractor.model(IMAGES)
            (maps,) = extractor(LABELS.tolist(), scores, normalized=False)
            expected = LayerFam(model, "last", rule="centred").attribute(IMAGES, LABELS)
            torch.testing.assert_close(maps, expected[:, 0].clamp_min(0))
            (nearest,) = extractor(None, scores)
            assert nearest.amin() == 0
            assert nearest.amax(dim=(1, 2)).eq(1).all()
            assert extractor.fuse_cams([nearest]) is nearest
            with pytest.raises(ValueError, match="pass class_idx"):
                extractor(targets=lambda o: o)
        before.assert_unchanged(model)

    def test_bad_models_are_refused_and_stay_clean(self):
        net = encoder()
        before = State.of(net)
        with pytest.raises(ValueError, match="wrap it, SimilarityModel"):
            TorchcamExtractor(LayerFam(net, "last"))
        with pytest.raises(TypeError, match="explain a module"):
            TorchcamExtractor(LayerFam(lambda x: net(x), net.last))
        before.assert_unchanged(net)

    def test_both_metrics(self):
        metrics = pytest.importorskip("torchcam.metrics", reason="torchcam is an extra")
        if not hasattr(metrics, "DeletionInsertionMetric"):
            pytest.skip("this torchcam is older than 0.5")
        model = similarity_model()
        softmax = torch.nn.Softmax(dim=-1)
        with TorchcamExtractor(LayerFam(model, "last")) as extractor:
            drop = metrics.ClassificationMetric(extractor, softmax)
            curves = metrics.DeletionInsertionMetric(extractor, softmax, steps=4)
            for metric in (drop, curves):
                metric.update(IMAGES, LABELS.tolist())
            (maps,) = (extractor(LABELS.tolist(), extractor.model(IMAGES)),)
        values = drop.summary()
        large = nn.functional.interpolate(maps[0][:, None], (8, 8), mode="bilinear")
        with torch.no_grad():
            p = softmax(model(IMAGES)).gather(1, LABELS[:, None])[:, 0]
            masked = softmax(model(IMAGES * large)).gather(1, LABELS[:, None])[:, 0]
        assert values["avg_drop"] == pytest.approx(
            ((p - masked).clamp_min(0) / (p + 1e-7)).mean().item(), abs=1e-5
        )
        assert values["conf_increase"] == pytest.approx((p < masked).float().mean().item())
        assert 0 <= curves.summary()["deletion_auc"] <= 1


class TestQuantus:
    @pytest.fixture
    def quantus(self):
        return pytest.importorskip("quantus", reason="Quantus is an extra")

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("Sparseness", {}),
            ("Complexity", {}),
            ("PointingGame", {}),
            ("RelevanceMassAccuracy", {}),
            ("MaxSensitivity", {"nr_samples": 2}),
            ("MPRT", {"layer_order": "top_down"}),
            ("RandomLogit", {"num_classes": 5}),
        ],
    )
    def test_metrics_run_on_a_similarity_model(self, quantus, name, options):
        metric = getattr(quantus, name)(disable_warnings=True, display_progressbar=False, **options)
        masks = np.zeros((3, 1, 8, 8), dtype=bool)
        masks[:, :, 2:6, 2:6] = True
        result = metric(
            model=similarity_model(),
            x_batch=IMAGES.numpy(),
            y_batch=LABELS.numpy(),
            s_batch=masks,
            explain_func=explain_func(LayerFam, "last", rule="centred"),
            device="cpu",
        )
        assert result is not None

    def test_a_value_by_hand(self, quantus):
        """Attribution mass inside a mask, over all of it."""
        model = similarity_model()
        explain = explain_func(FAM, "last")
        masks = np.zeros((3, 1, 8, 8), dtype=bool)
        masks[:, :, :4] = True
        metric = quantus.RelevanceMassAccuracy(
            abs=False, normalise=False, disable_warnings=True, display_progressbar=False
        )
        values = metric(
            model=model, x_batch=IMAGES.numpy(), y_batch=LABELS.numpy(), s_batch=masks,
            explain_func=explain, device="cpu",
        )  # fmt: skip
        maps = explain(model, IMAGES.numpy(), LABELS.numpy())
        np.testing.assert_allclose(
            values, (maps * masks).sum((1, 2, 3)) / maps.sum((1, 2, 3)), rtol=1e-5
        )

    def test_its_own_problems_are_named(self):
        problems = quantus_problems()
        assert "ignores explain_func" in problems["SmoothMPRT"]
        assert ("Selectivity" in problems) == (not hasattr(np, "trapz"))


def test_one_reference_warns_of_the_softmax():
    with pytest.warns(UserWarning, match="softmax is constantly 1"):
        check_scores(SimilarityModel(pooled(), torch.eye(3)[:1]))
