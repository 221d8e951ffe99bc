"""What every explainer promises, whatever the rule and the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.contracts.explainers import CASES, MODELS, TROUBLED, network
from tests.networks import State

IMAGES = torch.randn(3, 3, 8, 10, generator=torch.Generator().manual_seed(0))
TARGETS = [0, 3, 1]
LAYER = dict.fromkeys(MODELS, "last") | {"cape": "model.last"}

pytestmark = pytest.mark.filterwarnings('ignore:rule "fam" rescales')

each_explainer = pytest.mark.parametrize("explainer", TROUBLED, ids=str)


@pytest.mark.parametrize(("explainer", "kind"), CASES, ids=str)
class TestEveryModel:
    def test_shape_dtype_and_detachment(self, explainer, kind):
        maps = explainer.explain(MODELS[kind](), LAYER[kind], IMAGES, TARGETS)
        assert maps.shape == (3, 1, 4, 5)
        assert maps.dtype == torch.float32
        assert maps.is_contiguous()
        assert not maps.requires_grad

    def test_a_batch_equals_its_images_one_by_one(self, explainer, kind):
        model = MODELS[kind]()
        whole = explainer.explain(model, LAYER[kind], IMAGES, TARGETS)
        for i in range(3):
            alone = explainer.explain(model, LAYER[kind], IMAGES[i : i + 1], TARGETS[i : i + 1])
            torch.testing.assert_close(whole[i : i + 1], alone)

    def test_one_forward_pass(self, explainer, kind):
        model = MODELS[kind]()
        network(model).calls = 0
        explainer.explain(model, LAYER[kind], IMAGES, TARGETS)
        assert network(model).calls == 1

    def test_leaves_nothing_behind(self, explainer, kind):
        model = MODELS[kind]()
        model(IMAGES).sum().backward()  # gradients of the user's own that must survive
        images = IMAGES.clone()
        before = State.of(model)
        explainer.explain(model, LAYER[kind], images, TARGETS)
        before.assert_unchanged(model)
        assert not images.requires_grad
        assert torch.equal(images, IMAGES)

    def test_frozen_parameters_change_nothing(self, explainer, kind):
        model = MODELS[kind]()
        expected = explainer.explain(model, LAYER[kind], IMAGES, TARGETS)
        result = explainer.explain(model.requires_grad_(False), LAYER[kind], IMAGES, TARGETS)
        torch.testing.assert_close(result, expected)

    @pytest.mark.parametrize("layer", ["conv", "norm", "features"])
    def test_in_place_operations_behind_the_layer_do_not_reach_the_map(
        self, explainer, kind, layer
    ):
        model = MODELS[kind]()
        layer = LAYER[kind] if kind == "cape" else layer  # CAPE explains the last map only
        expected = explainer.explain(model, layer, IMAGES, TARGETS)
        network(model).relu.inplace = network(model).last.inplace = False
        torch.testing.assert_close(explainer.explain(model, layer, IMAGES, TARGETS), expected)

    def test_user_gradient_modes_change_nothing(self, explainer, kind):
        model = MODELS[kind]()
        expected = explainer.explain(model, LAYER[kind], IMAGES, TARGETS)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(explainer.explain(model, LAYER[kind], IMAGES, TARGETS), expected)
                assert not torch.is_grad_enabled()

    def test_images_with_gradient_are_left_alone(self, explainer, kind):
        images = IMAGES.clone().requires_grad_()
        maps = explainer.explain(MODELS[kind](), LAYER[kind], images, TARGETS)
        assert images.grad is None
        assert not maps.requires_grad

    def test_float64_agrees_with_float32(self, explainer, kind):
        wide = explainer.explain(MODELS[kind]().double(), LAYER[kind], IMAGES.double(), TARGETS)
        assert wide.dtype == torch.float64
        narrow = explainer.explain(MODELS[kind](), LAYER[kind], IMAGES, TARGETS)
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_agrees_with_float32(self, explainer, kind, dtype):
        expected = explainer.explain(MODELS[kind](), LAYER[kind], IMAGES, TARGETS)
        maps = explainer.explain(MODELS[kind]().to(dtype), LAYER[kind], IMAGES.to(dtype), TARGETS)
        assert maps.dtype == (torch.float32 if kind == "cape" else dtype)
        gap = (maps.float() - expected).abs().max() / expected.abs().max()
        assert gap < (0.1 if dtype == torch.bfloat16 else 0.02)

    def test_autocast_agrees_with_float32(self, explainer, kind):
        expected = explainer.explain(MODELS[kind](), LAYER[kind], IMAGES, TARGETS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps = explainer.explain(MODELS[kind](), LAYER[kind], IMAGES, TARGETS)
        assert (maps.float() - expected).abs().max() / expected.abs().max() < 0.1

    def test_channels_last_changes_nothing(self, explainer, kind):
        expected = explainer.explain(MODELS[kind](), LAYER[kind], IMAGES, TARGETS)
        model = MODELS[kind]().to(memory_format=torch.channels_last)
        images = IMAGES.to(memory_format=torch.channels_last)
        maps = explainer.explain(model, LAYER[kind], images, TARGETS)
        assert maps.is_contiguous()
        torch.testing.assert_close(maps, expected)

    def test_a_map_that_is_not_finite_is_refused(self, explainer, kind):
        images = IMAGES.clone()
        images[1] = float("nan")
        model = MODELS[kind]()
        before = State.of(model)
        with pytest.raises(ValueError, match=r"holds NaN or infinite values: check the"):
            explainer.explain(model, LAYER[kind], images, TARGETS)
        before.assert_unchanged(model)

    def test_survives_a_deep_copy_of_the_model(self, explainer, kind):
        model = MODELS[kind]()
        expected = explainer.explain(model, LAYER[kind], IMAGES, TARGETS)
        assert torch.equal(
            explainer.explain(copy.deepcopy(model), LAYER[kind], IMAGES, TARGETS), expected
        )


@each_explainer
class TestTrouble:
    """One model is enough: errors do not depend on the similarity."""

    def fails(self, explainer, model, layer, images, targets, error, message):
        before = State.of(model)
        with pytest.raises(error, match=message):
            explainer.explain(model, layer, images, targets)
        before.assert_unchanged(model)

    def test_a_layer_name_with_a_typo(self, explainer):
        model = MODELS["cosine"]()
        self.fails(
            explainer, model, "featurs", IMAGES, TARGETS, ValueError, "did you mean .*features'"
        )
        assert network(model).calls == 0

    def test_a_layer_of_another_model(self, explainer):
        other = nn.ReLU()
        self.fails(
            explainer, MODELS["cosine"](), other, IMAGES, TARGETS, AssertionError,
            "'ReLU' did not run.*choose a layer that the model calls",
        )  # fmt: skip

    def test_a_layer_that_runs_twice(self, explainer):
        model = MODELS["classifier"]()
        model.last = model.relu
        self.fails(
            explainer, model, "relu", IMAGES, TARGETS, RuntimeError,
            "ran twice.*embed references once",
        )  # fmt: skip

    def test_a_layer_that_gives_no_tensor(self, explainer):
        model = MODELS["classifier"]()
        pack = nn.Module()
        pack.forward = lambda x: {"maps": x}
        unpack = nn.Module()
        unpack.forward = lambda x: x["maps"]
        model.last = nn.Sequential(pack, unpack)
        self.fails(
            explainer, model, pack, IMAGES, TARGETS, TypeError, "gives dict.*choose the layer"
        )

    def test_a_tail_that_is_cut_off(self, explainer):
        model = MODELS["classifier"]()
        cut = nn.Module()
        cut.forward = torch.Tensor.detach
        model.head = nn.Sequential(cut, model.head)
        message = "does not depend on layer 'last'.*remove torch.no_grad"
        for trainable in (True, False):
            model.requires_grad_(trainable)
            self.fails(explainer, model, "last", IMAGES, TARGETS, RuntimeError, message)

    def test_an_exception_inside_the_model(self, explainer):
        class Broken(nn.Module):
            def forward(self, _x):
                raise IndexError("a bug of the user's")

        for mode in (True, False):
            model = MODELS["classifier"]().train(mode)
            # Batch statistics are the model's own business when it runs in training mode.
            model.norm = nn.Identity()
            model.head = Broken()
            self.fails(explainer, model, "last", IMAGES, TARGETS, IndexError, "a bug of the user")

    def test_an_empty_batch(self, explainer):
        model = MODELS["cosine"]()
        self.fails(explainer, model, "last", IMAGES[:0], [], ValueError, "batch is empty")
        assert network(model).calls == 0

    def test_training_mode_is_kept(self, explainer):
        model = MODELS["cosine"]()
        model.encoder.norm = nn.Dropout(0.0)
        model.train()
        before = State.of(model)
        seen = []
        handle = model.encoder.head.register_forward_hook(lambda m, *_: seen.append(m.training))
        explainer.explain(model, "last", IMAGES, TARGETS)
        handle.remove()
        assert seen == [explainer.keeps_mode]
        before.assert_unchanged(model)

    def test_a_model_without_parameters(self, explainer):
        from fam_plugins import SimilarityModel
        from tests.networks import pooled

        model = SimilarityModel(pooled(), torch.eye(3))
        maps = explainer.explain(model, "encoder.0", IMAGES.abs(), [0, 1, 2])
        assert maps.shape == (3, 1, 8, 10)
