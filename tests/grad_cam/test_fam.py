"""FAM and SimilarityTarget beyond the shared contract: BaseCAM's promises, not its traps."""

from __future__ import annotations

import copy
import gc
import inspect
import math
from importlib.metadata import version

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.base_cam import BaseCAM
from pytorch_grad_cam.utils.image import scale_cam_image
from pytorch_grad_cam.utils.model_targets import (
    BinaryClassifierOutputTarget,
    ClassifierOutputSoftmaxTarget,
    ClassifierOutputTarget,
    RawScoresOutputTarget,
    SemanticSegmentationTarget,
)
from torch import nn

from fam_plugins import FAM, SimilarityModel, SimilarityTarget
from fam_plugins.core.scores import score
from tests.contracts.explainers import similarity_model
from tests.networks import State, classifier, encoder

IMAGES = torch.randn(3, 3, 8, 10, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
TARGETS = [ClassifierOutputTarget(1)] * 3


def test_takes_the_arguments_of_grad_cam_in_their_order():
    ours = list(inspect.signature(FAM).parameters.values())
    theirs = list(inspect.signature(GradCAM).parameters)
    assert [p.name for p in ours] == [*theirs, "rule", "smooth", "tail"]
    assert [p.kind is p.KEYWORD_ONLY for p in ours] == [False] * len(theirs) + [True] * 3
    call = list(inspect.signature(FAM.__call__).parameters)
    assert call == list(inspect.signature(GradCAM.__call__).parameters)


class TestResult:
    def test_is_the_positive_part_stretched_and_resized_as_grad_cam_does(self):
        cam = FAM(similarity_model(), ["last"], rule="centred")
        result = cam(IMAGES, TARGETS)
        signed = cam.attributions[0][:, 0].numpy()
        expected = scale_cam_image(scale_cam_image(np.maximum(signed, 0), (10, 8)))
        np.testing.assert_allclose(result, expected, atol=1e-6)
        assert isinstance(cam, BaseCAM)

    def test_several_layers_are_averaged(self):
        cam = FAM(similarity_model(), ["last", "conv"])
        both = cam(IMAGES, TARGETS)
        assert [tuple(a.shape) for a in cam.attributions] == [(3, 1, 4, 5), (3, 1, 8, 10)]
        each = [scale_cam_image(np.maximum(a[:, 0].numpy(), 0), (10, 8)) for a in cam.attributions]
        np.testing.assert_allclose(both, scale_cam_image(np.mean(each, axis=0)), atol=1e-6)

    def test_no_targets_means_the_highest_output(self):
        model = similarity_model()
        nearest = model(IMAGES).argmax(dim=1).tolist()
        expected = FAM(model, ["last"])(IMAGES, [ClassifierOutputTarget(i) for i in nearest])
        np.testing.assert_array_equal(FAM(model, ["last"])(IMAGES), expected)
        with pytest.raises(ValueError, match="pass targets"):
            FAM(nn.Sequential(encoder(), nn.Unflatten(1, (3, 2))), ["0.last"])(IMAGES)

    def test_outputs_are_at_hand_and_detached(self):
        model = similarity_model("sqeuclidean")
        cam = FAM(model, ["last"])
        cam(IMAGES, TARGETS)
        torch.testing.assert_close(cam.outputs, model(IMAGES).detach())
        assert not cam.outputs.requires_grad

    @pytest.mark.parametrize("eigen_smooth", [False, True])
    @pytest.mark.parametrize("aug_smooth", [False, True])
    def test_smoothing(self, aug_smooth, eigen_smooth):
        cam = FAM(similarity_model(), ["last"], rule="centred")
        result = cam(IMAGES, TARGETS, aug_smooth=aug_smooth, eigen_smooth=eigen_smooth)
        assert (cam.attributions is None) == aug_smooth
        passes = []
        for factor in (0.9, 1, 1.1) if aug_smooth else (1,):
            for turn in (lambda x: x, lambda x: x[..., ::-1]) if aug_smooth else (lambda x: x,):
                images = torch.from_numpy(turn(factor * IMAGES.numpy()).copy())
                passes.append(turn(cam(images, TARGETS, eigen_smooth=eigen_smooth)))
        np.testing.assert_allclose(result, np.mean(passes, axis=0), atol=1e-5)
        assert result.max() > 0.5

    def test_eigen_smooth_projects_what_the_rule_weighs(self):
        model = similarity_model()
        ours = FAM(model, ["last"], rule="gradcam")(IMAGES, TARGETS, eigen_smooth=True)
        theirs = GradCAM(model, [model.encoder.last])(IMAGES, TARGETS, eigen_smooth=True)
        np.testing.assert_allclose(ours, theirs, atol=1e-4)

    def test_volumes(self):
        net = nn.Sequential(
            nn.Conv3d(2, 4, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten()
        ).eval()
        model = SimilarityModel(net, torch.eye(4))
        cam = FAM(model, [net[0]])
        volumes = torch.randn(2, 2, 3, 4, 5)
        if version("grad-cam") == "1.5.0":  # resizes pictures only
            with pytest.raises(ValueError, match="pip install -U grad-cam"):
                cam(volumes, TARGETS[:2])
            return
        result = cam(volumes, TARGETS[:2])
        assert result.shape == (2, 3, 4, 5)
        assert cam.attributions[0].shape == (2, 1, 3, 4, 5)
        with pytest.raises(ValueError, match="for volumes leave it out"):
            cam(volumes, TARGETS[:2], aug_smooth=True)

    def test_tokens_through_a_reshape_transform(self):
        class Tokens(nn.Module):
            def __init__(self):
                super().__init__()
                self.net, self.tokens = encoder(), nn.Identity()

            def forward(self, x):
                maps = self.net.features(self.net.relu(self.net.norm(self.net.conv(x))))
                return self.tokens(maps.flatten(2).transpose(1, 2)).mean(dim=1)

        net = Tokens().eval()
        target = [SimilarityTarget(ROWS[0])] * 3
        cam = FAM(net, [net.tokens], lambda t: t.transpose(1, 2).reshape(len(t), -1, 4, 5))
        expected = FAM(net, [net.net.features])(IMAGES, target)
        np.testing.assert_allclose(cam(IMAGES, target), expected, atol=1e-5)
        for wrong in (lambda t: t, lambda t: t.flatten(), lambda t: [t]):
            with pytest.raises(ValueError, match="reshape_transform gives"):
                FAM(net, [net.tokens], wrong)(IMAGES, target)
        with pytest.raises(ValueError, match="layer 'tokens' gives 20 tokens.*pass tokens_to_map"):
            FAM(net, [net.tokens])(IMAGES, target)


class TestTargets:
    def test_any_callable_with_the_gradient_of_the_frozen_scores(self):
        model = similarity_model("sqeuclidean")
        cam = FAM(model, ["last"], rule="additive")
        maps = []
        for target in (ClassifierOutputTarget(0), ClassifierOutputTarget(1), lambda o: o[0] - o[1]):
            cam(IMAGES, [target] * 3)
            maps.append(cam.attributions[0])
        torch.testing.assert_close(maps[2], maps[0] - maps[1])

    @pytest.mark.parametrize(
        "target", [ClassifierOutputSoftmaxTarget(1), lambda o: o.max()], ids=["softmax", "lambda"]
    )
    def test_friends_of_the_classifier_target(self, target):
        net = classifier()
        ours = FAM(net, ["last"], rule="gradcam")(IMAGES, [target] * 3)
        np.testing.assert_allclose(ours, GradCAM(net, [net.last])(IMAGES, [target] * 3), atol=1e-5)

    def test_single_output_models(self):
        net = nn.Sequential(classifier(), nn.Linear(5, 1)).eval()
        for target in (BinaryClassifierOutputTarget(0), RawScoresOutputTarget()):
            ours = FAM(net, [net[0].last], rule="gradcam")(IMAGES, [target] * 3)
            theirs = GradCAM(net, [net[0].last])(IMAGES, [target] * 3)
            np.testing.assert_allclose(ours, theirs, atol=1e-5)

    def test_segmentation(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
        target = [SemanticSegmentationTarget(1, np.ones((8, 10), dtype=np.float32))] * 3
        ours = FAM(net, [net[1]], rule="gradcam")(IMAGES, target)
        np.testing.assert_allclose(ours, GradCAM(net, [net[1]])(IMAGES, target), atol=1e-5)

    @pytest.mark.parametrize("count", [0, 1, 2, 4])
    def test_another_number_than_images_is_refused_before_any_work(self, count):
        model = similarity_model()
        cam = FAM(model, ["last"])
        with pytest.raises(ValueError, match=f"{count} targets for 3 images"):
            cam(IMAGES, [ClassifierOutputTarget(0)] * count)
        assert model.encoder.calls == 0

    def test_what_cannot_be_called_is_refused_before_any_work(self):
        model = similarity_model()
        with pytest.raises(TypeError, match=r"wrap it, ClassifierOutputTarget\(3\)"):
            FAM(model, ["last"])(IMAGES, [3, 3, 3])
        assert model.encoder.calls == 0

    def test_more_than_one_number_is_refused(self):
        model = similarity_model()
        before = State.of(model)
        with pytest.raises(ValueError, match=r"returns \(5,\), not one number"):
            FAM(model, ["last"])(IMAGES, [lambda o: o] * 3)
        with pytest.raises(ValueError, match="returns float, not one number"):
            FAM(model, ["last"])(IMAGES, [lambda o: 1.0] * 3)
        with pytest.raises(IndexError):
            FAM(model, ["last"])(IMAGES, [ClassifierOutputTarget(9)] * 3)
        before.assert_unchanged(model)


def _holds_a_graph(tensor):
    try:
        return tensor.grad_fn is not None
    except RuntimeError:  # an undefined tensor, which torch 2.3 leaves about
        return False


class TestNoTrapOfBaseCam:
    def test_no_hook_lives_between_calls(self):
        model = similarity_model()
        before = State.of(model)
        cam = FAM(model, ["last"])
        before.assert_unchanged(model)
        cam(IMAGES, TARGETS)
        before.assert_unchanged(model)
        copy.deepcopy(model)

    def test_the_graph_is_let_go(self):
        cam = FAM(similarity_model(), ["last"])
        cam(IMAGES, TARGETS)
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        assert not [tensor for tensor in tensors if _holds_a_graph(tensor)]

    def test_an_index_error_of_the_users_is_not_swallowed(self):
        with pytest.raises(IndexError, match="mine"), FAM(similarity_model(), ["last"]):
            raise IndexError("mine")

    def test_a_failed_construction_raises_only_its_own_error(self):
        with pytest.raises(ValueError, match="unknown rule"):
            FAM(similarity_model(), ["last"], rule="nope")
        gc.collect()  # pytest turns an exception inside __del__ into a warning, and that into -W

    def test_the_model_may_move_after_construction(self):
        model = similarity_model()
        cam = FAM(model, ["last"])
        assert cam.device == torch.device("cpu")
        model.to("meta")
        assert cam.device == torch.device("meta")

    def test_images_go_where_the_model_is(self):
        seen = []

        class Notes(nn.Module):
            def forward(self, images):
                seen.append(images.device)
                raise KeyError("seen enough")

        model = nn.Sequential(Notes(), nn.Conv2d(3, 4, 1)).to("meta")
        cam = FAM(model, ["1"])
        for explain in (lambda: cam(IMAGES, TARGETS), lambda: cam.attribute_references(IMAGES)):
            with pytest.raises(KeyError, match="seen enough"):
                explain()
        assert seen == [torch.device("meta")] * 2

    def test_layers_must_be_a_list(self):
        net = classifier()
        with pytest.raises(TypeError, match=r"must be a list of layers, such as \[model.layer4\]"):
            FAM(net, net.last)
        with pytest.raises(ValueError, match="target_layers is empty"):
            FAM(net, [])

    def test_images_need_their_batch_dimension(self):
        with pytest.raises(ValueError, match=r"image\[None\]"):
            FAM(classifier(), ["last"])(IMAGES[0], None)

    def test_contrast_under_fam_warns(self):
        model = similarity_model(contrast="others")
        with pytest.warns(UserWarning, match='use rule="centred"'):
            FAM(model, ["last"])(IMAGES, TARGETS)
        target = SimilarityTarget(ROWS[0], contrast=ROWS[1:])
        with pytest.warns(UserWarning, match='use rule="centred"'):
            FAM(encoder(), ["last"])(IMAGES, [target] * 3)


class TestSimilarityTarget:
    @pytest.mark.parametrize("similarity", ["cosine", "dot", "sqeuclidean"])
    @pytest.mark.parametrize("contrast", [None, ROWS[1:], ROWS[1]], ids=["none", "set", "one"])
    def test_scores_one_embedding_or_a_batch(self, similarity, contrast):
        z = torch.randn(5, 6)
        target = SimilarityTarget(ROWS[0], similarity, contrast)
        rows = contrast if contrast is None or contrast.dim() == 2 else contrast[None]
        expected = score(similarity, z, ROWS[:1], rows)[:, 0]
        torch.testing.assert_close(target(z), expected)
        for one, value in zip(z, expected, strict=True):
            assert target(one).dim() == 0
            torch.testing.assert_close(target(one), value)

    def test_explains_an_encoder_as_the_similarity_model_does(self):
        net = encoder()
        for rule in ("fam", "additive", "centred", "gradcam"):
            ours = FAM(net, ["last"], rule=rule)
            ours(IMAGES, [SimilarityTarget(ROWS[2])] * 3)
            model = FAM(SimilarityModel(net, ROWS), ["last"], rule=rule)
            model(IMAGES, [ClassifierOutputTarget(2)] * 3)
            torch.testing.assert_close(ours.attributions[0], model.attributions[0])

    def test_the_reference_carries_no_graph(self):
        net = encoder()
        reference = net(IMAGES[:1])
        target = SimilarityTarget(reference)
        assert not target.reference.requires_grad
        copy.deepcopy(target)
        with GradCAM(net, [net.last]) as cam:
            fresh = cam(IMAGES, [SimilarityTarget(net(IMAGES[:1]))] * 3)
        with GradCAM(net, [net.last]) as cam:
            np.testing.assert_allclose(cam(IMAGES, [target] * 3), fresh, atol=1e-6)

    def test_the_reference_is_copied(self):
        rows = ROWS.clone()
        target = SimilarityTarget(rows[0], contrast=rows[1:])
        expected = target(IMAGES.new_ones(6))
        rows.neg_()
        assert torch.equal(target(IMAGES.new_ones(6)), expected)

    def test_made_in_inference_mode_it_serves_a_gradient(self):
        for similarity in ("cosine", "dot", "sqeuclidean"):
            with torch.inference_mode():
                target = SimilarityTarget(ROWS[0].clone(), similarity, ROWS[1:].clone())
            z = torch.ones(6, requires_grad=True)
            target(z).backward()
            assert z.grad.abs().sum() > 0

    def test_follows_the_output_in_dtype(self):
        assert SimilarityTarget(ROWS[0].double())(ROWS.half()).dtype == torch.float16
        assert SimilarityTarget(ROWS[0].numpy())(ROWS).shape == (4,)

    @pytest.mark.parametrize(
        ("reference", "options", "message"),
        [
            (ROWS, {}, "average several shots with fam_plugins.prototypes"),
            (torch.full((6,), math.nan), {}, "NaN"),
            (torch.ones(0), {}, r"pass embeddings \[D\]"),
            (torch.ones(1, 6, 2, 2), {}, "embed images with the encoder first"),
            (ROWS[0], {"similarity": "l2"}, "unknown similarity 'l2'"),
            (ROWS[0], {"contrast": torch.ones(1, 5)}, "same encoder"),
        ],
    )
    def test_bad_references_are_refused(self, reference, options, message):
        with pytest.raises(ValueError, match=message):
            SimilarityTarget(reference, **options)

    def test_bad_outputs_are_refused(self):
        target = SimilarityTarget(ROWS[0])
        with pytest.raises(TypeError, match="returns a dict"):
            target({"z": ROWS})
        with pytest.raises(ValueError, match="append pooling"):
            target(torch.ones(6, 2, 2))
        with pytest.raises(ValueError, match="5 values and the references have 6"):
            target(torch.ones(5))
