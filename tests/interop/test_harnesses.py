"""Glue for harnesses: shapes and values by hand, real harnesses where installed, refusals."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam, LayerGradientXActivation, NoiseTunnel
from captum.metrics import infidelity, sensitivity_max
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.metrics.cam_mult_image import CamMultImageConfidenceChange
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from fam_plugins import FAM, LayerCape, LayerFam, SimilarityModel
from fam_plugins.interop.harnesses import (
    for_captum,
    for_grad_cam,
    for_quantus,
    for_torchcam,
    quantus_problems,
)
from tests.contracts.explainers import cape_model, similarity_model
from tests.networks import State, classifier, encoder, pooled

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 1])


def numbers_in(result):
    """Every number of what a metric of Quantus gives: one, a list, a dictionary of lists."""
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, (list, tuple, np.ndarray)):
        for part in result:
            yield from numbers_in(part)
    else:
        yield float(result)


class TestForQuantus:
    @pytest.mark.parametrize("method", [LayerFam, LayerGradCam, FAM, GradCAM])
    def test_gives_numpy_at_the_size_of_the_input(self, method):
        model = similarity_model()
        maps = for_quantus(method, "encoder.last")(
            model=model, inputs=IMAGES.numpy(), targets=LABELS.numpy(), device="cpu", anything=1
        )
        assert maps.shape == (3, 1, 8, 8)
        assert maps.dtype == np.float32

    def test_is_the_enlarged_map(self):
        model = similarity_model()
        maps = for_quantus(LayerFam, "last", rule="centred")(model, IMAGES.numpy(), LABELS.numpy())
        small = LayerFam(model, "last", rule="centred").attribute(IMAGES, LABELS)
        expected = LayerFam.interpolate(small, (8, 8), "bilinear")
        np.testing.assert_allclose(maps, expected.numpy(), atol=1e-6)

    @pytest.mark.parametrize("rule", ["fam", "centred"])
    def test_options_reach_a_class_of_grad_cam(self, rule):
        model = similarity_model()
        maps = for_quantus(FAM, "last", rule=rule)(model, IMAGES.numpy(), LABELS.numpy())
        targets = [ClassifierOutputTarget(int(label)) for label in LABELS]
        expected = FAM(model, ["last"], rule=rule)(IMAGES, targets)
        np.testing.assert_allclose(maps[:, 0], expected, atol=1e-6)
        other = FAM(model, ["last"], rule={"fam": "centred", "centred": "fam"}[rule])
        assert not np.allclose(maps[:, 0], other(IMAGES, targets), atol=0.01)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_images_take_the_dtype_of_the_model(self, dtype):
        model = similarity_model().to(dtype)
        explain = for_quantus(LayerFam, "last")
        maps = [
            explain(model, IMAGES.numpy().astype(kind), LABELS.numpy())
            for kind in (np.float32, np.float64)
        ]
        assert [one.dtype for one in maps] == [np.float32] * 2
        np.testing.assert_array_equal(*maps)

    def test_follows_the_layer_into_a_deep_copy(self):
        explain = for_quantus(LayerFam, "last", rule="additive")
        model = similarity_model()
        randomised = copy.deepcopy(model)
        nn.init.normal_(randomised.encoder.features.weight)
        one = explain(model, IMAGES.numpy(), LABELS.numpy())
        other = explain(randomised, IMAGES.numpy(), LABELS.numpy())
        assert not np.allclose(one, other)
        np.testing.assert_array_equal(one, explain(model, IMAGES.numpy(), LABELS.numpy()))

    def test_cape(self):
        model = cape_model()
        maps = for_quantus(LayerCape, "feature_map")(model, IMAGES.numpy(), LABELS.numpy())
        small = LayerCape(model, "feature_map").attribute(IMAGES, LABELS)
        expected = nn.functional.interpolate(small, (8, 8), mode="bilinear")
        np.testing.assert_allclose(maps, expected.detach().numpy(), atol=1e-6)

    def test_a_bare_encoder_is_refused_and_a_classifier_takes_a_word(self):
        explain = for_quantus(LayerFam, "last")
        with pytest.raises(ValueError, match=r"wrap it, SimilarityModel\(encoder, references\)"):
            explain(encoder(), IMAGES.numpy(), LABELS.numpy())
        with pytest.raises(ValueError, match="pass classifier=True if they are scores"):
            explain(classifier(), IMAGES.numpy(), LABELS.numpy())
        sure = for_quantus(LayerFam, "last", classifier=True)
        assert sure(classifier(), IMAGES.numpy(), LABELS.numpy()).shape == (3, 1, 8, 8)

    def test_a_constant_map_is_refused(self):
        model = SimilarityModel(pooled(), torch.eye(3))
        flat = np.ones((2, 3, 4, 4), dtype=np.float32)
        with pytest.raises(ValueError, match="map of image 0 is constant.*use another rule"):
            for_quantus(LayerFam, "encoder.0")(model, flat, np.array([0, 1]))

    def test_not_a_number_is_refused(self):
        images = np.full((1, 3, 8, 8), np.nan, dtype=np.float32)
        for method in (LayerFam, GradCAM):
            with pytest.raises(ValueError, match="NaN"):
                for_quantus(method, "last")(similarity_model(), images, np.array([0]))


class TestForCaptum:
    @pytest.mark.parametrize("make", [LayerFam, LayerGradCam])
    def test_sensitivity_and_infidelity_run(self, make):
        model = similarity_model()
        explain = for_captum(make(model, model.encoder.last))
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

    @pytest.mark.parametrize("mode", ["nearest", "bilinear"])
    def test_maps_are_enlarged_in_the_mode_asked_for(self, mode):
        model = similarity_model()
        (maps,) = for_captum(LayerFam(model, "last"), interpolate_mode=mode)(IMAGES, target=LABELS)
        small = LayerFam(model, "last").attribute(IMAGES, LABELS)
        expected = nn.functional.interpolate(small, (8, 8), mode=mode).expand(-1, 3, -1, -1)
        torch.testing.assert_close(maps, expected)

    def test_one_map_per_channel_is_refused(self):
        explain = for_captum(LayerFam(similarity_model(), "last"))
        with pytest.raises(ValueError, match=r"\(3, 6, 4, 4\), not \[B, 1, h, w\].*sum the chan"):
            explain(IMAGES, target=LABELS, attr_dim_summation=False)

    def test_not_a_number_is_refused(self):
        with pytest.raises(ValueError, match="NaN"):
            for_captum(LayerFam(similarity_model(), "last"))(IMAGES * torch.nan, target=0)

    def test_volumes_are_refused(self):
        class Flat:
            def attribute(self, images):
                return images.flatten(1)

        with pytest.raises(ValueError, match="explain a convolutional layer"):
            for_captum(Flat())(IMAGES)


class TestForGradCam:
    @pytest.mark.parametrize("images", [IMAGES, IMAGES[..., :6]], ids=["square", "upright"])
    def test_equal_the_cam_of_the_same_rule(self, images):
        model = similarity_model()
        maps = LayerFam(model, "last", rule="centred").attribute(images, LABELS)
        targets = [ClassifierOutputTarget(int(label)) for label in LABELS]
        expected = FAM(model, ["last"], rule="centred")(images, targets)
        cams = for_grad_cam(maps, images.shape[2:])
        np.testing.assert_allclose(cams, expected, atol=1e-6)
        assert CamMultImageConfidenceChange()(images, cams, targets, model).shape == (3,)

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
            for_grad_cam(maps, (8, 8))


class TestForTorchcam:
    def test_maps_of_the_images_seen_last(self):
        model = similarity_model()
        before = State.of(model)
        with for_torchcam(LayerFam(model, "last", rule="centred")) as extractor:
            with pytest.raises(RuntimeError, match="run extractor.model"):
                extractor(0)
            scores = extractor.model(IMAGES)
            (maps,) = extractor(LABELS.tolist(), scores, normalized=False)
            expected = LayerFam(model, "last", rule="centred").attribute(IMAGES, LABELS)
            torch.testing.assert_close(maps, expected[:, 0].clamp_min(0))
            (nearest,) = extractor(None, scores)
            assert nearest.amin() == 0
            assert nearest.amax(dim=(1, 2)).eq(1).all()
            (again,) = extractor(scores.argmax(1).tolist(), scores)
            torch.testing.assert_close(nearest, again, rtol=0, atol=0)
            raw = LayerFam(model, "last", rule="centred").attribute(IMAGES, scores.argmax(1))
            for one, positive in zip(nearest, raw[:, 0].clamp_min(0), strict=True):
                low, high = positive.min(), positive.max()
                torch.testing.assert_close(one, (positive - low) / (high - low))
            assert extractor.fuse_cams([nearest]) is nearest
            with pytest.raises(ValueError, match="pass class_idx"):
                extractor(targets=lambda o: o)
        before.assert_unchanged(model)

    def test_what_the_attribution_runs_is_not_what_the_user_ran(self):
        model = similarity_model()
        noisy = NoiseTunnel(LayerFam(model, "last", rule="centred"))
        seen = []
        attribute = noisy.attribute

        def listen(images, target):
            seen.append(images)
            torch.manual_seed(0)
            return attribute(images, target=target, nt_samples=3, stdevs=0.1)

        noisy.attribute = listen

        def crash(extractor):
            with extractor._hooks_off():
                extractor.model(IMAGES * 0)
                raise KeyError

        with for_torchcam(noisy) as extractor:
            scores = extractor.model(IMAGES)
            first, second = (extractor(LABELS.tolist(), scores)[0] for _ in range(2))
            torch.testing.assert_close(first, second, rtol=0, atol=0)
            with extractor._hooks_off():
                extractor.model(IMAGES * 0)
            extractor(0)
            with pytest.raises(KeyError):
                crash(extractor)
            extractor(0)
            extractor.model(IMAGES.flip(0))
            extractor(0)
        assert [torch.equal(one, IMAGES) for one in seen] == [True] * 4 + [False]
        assert torch.equal(seen[-1], IMAGES.flip(0))

    def test_maps_above_zero_are_scaled_from_their_own_minimum(self):
        model = SimilarityModel(pooled(), torch.eye(3))
        with for_torchcam(LayerFam(model, "encoder.0")) as extractor:
            (maps,) = extractor(0, extractor.model(IMAGES + 0.5))
        assert LayerFam(model, "encoder.0").attribute(IMAGES + 0.5, 0).min() > 0
        assert maps.amin(dim=(1, 2)).eq(0).all()
        assert maps.amax(dim=(1, 2)).eq(1).all()

    @pytest.mark.parametrize("normalized", [False, True])
    def test_bad_maps_are_refused(self, normalized):
        model = SimilarityModel(pooled(), torch.eye(3))
        with for_torchcam(LayerFam(model, "encoder.0")) as extractor:
            extractor.model(torch.ones(2, 3, 4, 4))
            with pytest.raises(ValueError, match="map of image 0 is constant"):
                extractor([0, 1], normalized=normalized)
            extractor._images = torch.full((2, 3, 4, 4), torch.nan)
            with pytest.raises(ValueError, match="NaN"):
                extractor([0, 1], normalized=normalized)

    def test_one_map_per_channel_is_refused(self):
        model = similarity_model()
        with for_torchcam(LayerGradientXActivation(model, model.encoder.last)) as extractor:
            extractor.model(IMAGES)
            with pytest.raises(ValueError, match="sum the channels"):
                extractor(0)

    def test_a_classifier_takes_a_word(self):
        net = classifier()
        with for_torchcam(LayerFam(net, "last"), classifier=True) as extractor:
            (maps,) = extractor(2, extractor.model(IMAGES), normalized=False)
        expected = LayerFam(net, "last").attribute(IMAGES, 2)
        torch.testing.assert_close(maps, expected[:, 0].clamp_min(0))

    def test_volumes_keep_their_dimensions(self):
        volumes = torch.rand(2, 3, 4, 5, 6)
        encoder_3d = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
        model = SimilarityModel(encoder_3d, torch.eye(3))
        with for_torchcam(LayerFam(model, "encoder.0")) as extractor:
            (maps,) = extractor(0, extractor.model(volumes), normalized=False)
        expected = LayerFam(model, "encoder.0").attribute(volumes, 0)
        torch.testing.assert_close(maps, expected[:, 0].clamp_min(0))

    def test_bad_models_are_refused_and_stay_clean(self):
        net = encoder()
        before = State.of(net)
        with pytest.raises(ValueError, match="wrap it, SimilarityModel"):
            for_torchcam(LayerFam(net, "last"))
        with pytest.raises(TypeError, match="explain a module"):
            for_torchcam(LayerFam(lambda x: net(x), net.last))
        before.assert_unchanged(net)

    def test_both_metrics(self):
        metrics = pytest.importorskip("torchcam.metrics", reason="torchcam is an extra")
        if not hasattr(metrics, "DeletionInsertionMetric"):
            pytest.skip("this torchcam is older than 0.5")
        model = similarity_model()
        softmax = torch.nn.Softmax(dim=-1)
        with for_torchcam(LayerFam(model, "last")) as extractor:
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


class TestQuantusMetrics:
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
            explain_func=for_quantus(LayerFam, "last", rule="centred"),
            device="cpu",
        )
        numbers = list(numbers_in(result))
        assert len(numbers) >= 3
        assert all(map(math.isfinite, numbers))

    def test_a_value_by_hand(self, quantus):
        """Attribution mass inside a mask, over all of it."""
        model = similarity_model()
        explain = for_quantus(FAM, "last")
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


@pytest.mark.parametrize(
    "use",
    [
        lambda model: for_torchcam(LayerFam(model, "encoder.0")),
        lambda model: for_quantus(LayerFam, "encoder.0")(
            model, IMAGES.numpy(), np.zeros(3, dtype=int)
        ),
    ],
    ids=["torchcam", "quantus"],
)
def test_one_reference_warns_of_the_softmax_and_two_do_not(use):
    with pytest.warns(UserWarning, match="softmax is constantly 1") as caught:
        use(SimilarityModel(pooled(), torch.eye(3)[:1]))
    assert [one.filename for one in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(SimilarityModel(pooled(), torch.eye(3)[:2]))


def test_no_partner_is_imported_before_it_is_needed():
    code = (
        "import sys, fam_plugins.interop\n"
        "partners = {'captum', 'pytorch_grad_cam', 'quantus', 'torchcam', 'easyfsl'}\n"
        "assert not partners & set(sys.modules)\n"
        "import fam_plugins.interop.harnesses\n"
        "assert not partners & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
