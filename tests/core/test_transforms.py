"""Transforms: each against loops; what cannot be told is refused with the fix."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer

from fam_plugins import (
    FAM,
    LayerFam,
    SimilarityModel,
    channels_last_to_map,
    infer_transform,
    tokens_to_map,
)
from fam_plugins.core.transforms import transform_for
from tests.networks import State, encoder

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    net = VisionTransformer(
        32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=5
    ).eval()
    # torchvision starts its classifier at zero.
    nn.init.normal_(net.heads.head.weight)
    return net


def swin() -> SwinTransformer:
    torch.manual_seed(0)
    return SwinTransformer([4, 4], 24, [1, 1], [2, 2], [2, 2], num_classes=5).eval()


@pytest.mark.parametrize("skip", [0, 1, 5])
def test_tokens_land_where_a_loop_puts_them(skip):
    tokens = torch.randn(2, skip + 6, 4)
    laid_out = tokens_to_map(2, 3, skip=skip)(tokens)
    assert laid_out.shape == (2, 4, 2, 3)
    for image in range(2):
        for row in range(2):
            for column in range(3):
                expected = tokens[image, skip + 3 * row + column]
                assert torch.equal(laid_out[image, :, row, column], expected)


def test_channels_last_lands_where_a_loop_puts_it():
    given = torch.randn(2, 2, 3, 4)
    laid_out = channels_last_to_map(given)
    assert laid_out.shape == (2, 4, 2, 3)
    for channel in range(4):
        assert torch.equal(laid_out[:, channel], given[..., channel])


def test_tokens_to_map_is_a_value():
    assert tokens_to_map(2, 3) == tokens_to_map(2, 3, skip=1) != tokens_to_map(3, 2)
    assert pickle.loads(pickle.dumps(tokens_to_map(2, 3, 5))) == tokens_to_map(2, 3, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tokens_to_map(7, 7)(torch.ones(1, 197, 8)), r"197 = 1 \+ 14 x 14.*14, skip=1\)"),
        (lambda: tokens_to_map(7, 7)(torch.ones(1, 49, 8)), r"tokens_to_map\(7, 7, skip=0\)"),
        (lambda: tokens_to_map(7, 7)(torch.ones(1, 261, 8)), r"\(16, 16, skip=5\)"),
        (lambda: tokens_to_map(7, 7)(torch.ones(1, 7, 8)), "pass tokens_to_map.h, w"),
        (lambda: tokens_to_map(7, 7)(torch.ones(1, 7, 7, 8)), "channels_last_to_map is for"),
        (lambda: tokens_to_map(0, 7), "no grid of patches"),
        (lambda: tokens_to_map(7, 7, skip=-1), "no grid of patches"),
        (lambda: channels_last_to_map(torch.ones(1, 49, 8)), "tokens_to_map.h, w, skip=1"),
    ],
)
def test_wrong_sizes_name_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("build", "layer", "expected"),
    [
        (vit, "encoder.layers.encoder_layer_1.ln_1", tokens_to_map(4, 4, skip=1)),
        (vit, "conv_proj", None),
        (swin, "features", channels_last_to_map),
        (swin, "permute", None),
        (encoder, "last", None),
        (encoder, "pool", None),
    ],
)
def test_torchvision_is_inferred_without_a_trace(build, layer, expected):
    net = build().train()
    before = State.of(net)
    assert infer_transform(net, layer, IMAGES) == expected
    assert infer_transform(net, net.get_submodule(layer), IMAGES) == expected
    before.assert_unchanged(net)


@pytest.mark.parametrize(
    ("name", "settings", "size", "layer", "expected"),
    [
        ("vit_tiny_patch16_224", {"img_size": 48}, (48, 48), "norm", tokens_to_map(3, 3)),
        ("vit_tiny_patch16_224", {"img_size": 48}, (48, 48), "patch_embed", tokens_to_map(3, 3, 0)),
        ("vit_tiny_patch16_224", {"img_size": (32, 64)}, (32, 64), "norm", tokens_to_map(2, 4)),
        (
            "vit_tiny_patch16_224",
            {"img_size": 64, "dynamic_img_size": True},
            (32, 128),  # as many patches as the 4 x 4 that the model was made for
            "norm",
            tokens_to_map(2, 8),
        ),
        (
            "vit_tiny_patch16_224",
            {"img_size": 64, "dynamic_img_size": True, "dynamic_img_pad": True},
            (40, 64),
            "norm",
            tokens_to_map(3, 4),
        ),
        (
            "vit_small_patch14_reg4_dinov2",
            {"img_size": 28},
            (28, 28),
            "norm",
            tokens_to_map(2, 2, 5),
        ),
        (
            "deit_tiny_distilled_patch16_224",
            {"img_size": 32},
            (32, 32),
            "norm",
            tokens_to_map(2, 2, 2),
        ),
        (
            "eva02_tiny_patch14_224",
            {"img_size": 28},
            (28, 28),
            "blocks.11.norm1",
            tokens_to_map(2, 2),
        ),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "window_size": 2},
            (64, 64),
            "norm",
            channels_last_to_map,
        ),
    ],
)
def test_timm_is_inferred(name, settings, size, layer, expected):
    timm = pytest.importorskip("timm", reason="these are timm's models")
    net = timm.create_model(name, num_classes=0, **settings).eval()
    assert infer_transform(net, layer, torch.randn(1, 3, *size)) == expected


@pytest.mark.parametrize(
    ("given", "images", "message"),
    [
        ((2, 3, 197, 64), (2, 3, 224, 224), "no end of it looks like their grid"),
        ((2, 16, 9, 7), (2, 3, 32, 32), "no end of it looks like their grid"),
        ((2, 197, 64), (2, 3, 224, 224), r"197 = 1 \+ 14 x 14"),
        ((2, 13, 64), (2, 3, 224, 224), "gives 13 tokens, and no module around it states their"),
    ],
)
def test_a_doubt_is_refused(given, images, message):
    net = nn.Identity()
    with pytest.raises(ValueError, match=message + ".*pass"):
        transform_for(net, net, "layer", given, images)


@pytest.mark.parametrize(
    ("given", "images", "expected"),
    [
        ((2, 64), (2, 3, 8, 8), None),
        ((2, 8, 8, 8), (2, 3, 32, 32), None),  # both ends fit: taken as it is
        ((2, 8, 8, 96), None, None),  # not of images
        ((2, 8, 8, 96), (2, 100), None),
        ((2, 4, 3, 3, 3), (2, 3, 8, 8, 8), None),
        ((2, 512, 7, 10), (2, 3, 224, 320), None),
        ((2, 7, 10, 512), (2, 3, 224, 320), channels_last_to_map),
        ((2, 64, 224, 224), (2, 3, 224, 224), None),
        ((2, 7, 7, 224), (2, 3, 224, 224), channels_last_to_map),
        ((2, 16, 8, 7), (2, 3, 32, 32), None),  # a row off, as strides and padding leave it
        ((2, 7, 8, 16), (2, 3, 32, 32), channels_last_to_map),
    ],
)
def test_shapes_tell_where_the_channels_are(given, images, expected):
    assert transform_for(None, nn.Identity(), "layer", given, images) is expected


class Owner(nn.Module):
    """A model that states what the test tells it to."""

    def __init__(self, **stated) -> None:
        super().__init__()
        self.layer = nn.Identity()
        for name, value in stated.items():
            setattr(self, name, value)

    def transform(self, tokens: int, size: tuple[int, int]):
        return transform_for(self, self.layer, "layer", (2, tokens, 8), (2, 3, *size))


class Embed(nn.Module):
    def __init__(self, grid, patch) -> None:
        super().__init__()
        self.grid_size, self.patch_size = grid, patch


def test_a_model_without_a_class_token_has_none_to_skip():
    owner = Owner(patch_size=8, image_size=32)
    assert owner.transform(16, (32, 32)) == tokens_to_map(4, 4, skip=0)
    with pytest.raises(ValueError, match="17 tokens, and no module around it"):
        owner.transform(17, (32, 32))
    owner = Owner(patch_size=8, image_size=32, class_token=nn.Parameter(torch.zeros(1, 1, 8)))
    assert owner.transform(17, (32, 32)) == tokens_to_map(4, 4, skip=1)


@pytest.mark.parametrize("patch", [0, -1, "16", (None, None), (8,), 1.5])
def test_what_states_no_size_is_no_grid(patch):
    """Names such as patch_size mean something else elsewhere, and that is no reason to crash."""
    for owner in (
        Owner(patch_size=patch, image_size=32),
        Owner(patch_size=8, image_size=patch),
        Owner(patch_embed=Embed(patch, patch), num_prefix_tokens=None),
    ):
        with pytest.raises(ValueError, match=r"pass tokens_to_map\(4, 4, skip=1\)"):
            owner.transform(17, (32, 32))
    owner = Owner(patch_embed=Embed(patch, 8), num_prefix_tokens=None)
    assert owner.transform(16, (32, 32)) == tokens_to_map(4, 4, skip=0)


def test_a_model_of_fixed_size_knows_its_grid_and_one_of_any_size_that_of_the_image():
    """As many patches either way: a wrapper resizes 16 x 64 pixels to the 32 x 32 of the model."""
    for dynamic, expected in ((False, (4, 4)), (True, (2, 8))):
        owner = Owner(
            patch_embed=Embed((4, 4), (8, 8)), num_prefix_tokens=1, dynamic_img_size=dynamic
        )
        assert owner.transform(17, (16, 64)) == tokens_to_map(*expected, skip=1)
    owner = Owner(patch_embed=Embed((4, 4), (8, 8)), num_prefix_tokens=1)
    assert owner.transform(19, (16, 72)) == tokens_to_map(2, 9, skip=1)


LAYERS = [
    (vit, "encoder.layers.encoder_layer_1.ln_1", tokens_to_map(4, 4)),
    (swin, "features", channels_last_to_map),
]


@pytest.mark.parametrize(("build", "layer", "transform"), LAYERS)
@pytest.mark.parametrize("wrap", ["model", "similarity", "method"])
def test_auto_is_the_transform_given_by_hand(build, layer, transform, wrap):
    model = net = build()
    if wrap == "similarity":
        model = SimilarityModel(net, torch.randn(3, 5))
    elif wrap == "method":
        model = net.forward
    module = net.get_submodule(layer)
    expected = LayerFam(model, module, reshape_transform=transform).attribute(IMAGES, 1)
    auto = LayerFam(model, module, reshape_transform="auto")
    assert torch.equal(auto.attribute(IMAGES, 1), expected)
    if wrap == "method":
        return
    targets = [ClassifierOutputTarget(1)] * 2
    ours = FAM(model, [module], "auto")(IMAGES, targets)
    np.testing.assert_array_equal(ours, FAM(model, [module], transform)(IMAGES, targets))


def test_auto_looks_for_the_images_among_several_inputs():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = vit()

        def forward(self, scale, images):
            return self.net(scale[:, :, None, None] * images)

    layer = "net.encoder.layers.encoder_layer_1.ln_1"
    maps = LayerFam(Scaled(), layer).attribute((torch.ones(2, 1), IMAGES), 1)
    assert torch.equal(maps, LayerFam(vit(), layer[4:]).attribute(IMAGES, 1))


def test_auto_takes_no_further_forward_pass_and_tells_layers_apart():
    net = encoder()
    LayerFam(net, "last", reshape_transform="auto").attribute(IMAGES, 1)
    assert net.calls == 1
    net = vit()
    cam = FAM(net, ["conv_proj", "encoder.layers.encoder_layer_1.ln_1"], "auto")
    cam(IMAGES, [ClassifierOutputTarget(1)] * 2)
    assert [m.shape for m in cam.attributions] == [(2, 1, 4, 4)] * 2


@pytest.mark.parametrize(("build", "layer", "transform"), LAYERS)
def test_transforms_serve_the_partners(build, layer, transform):
    net = build()
    module = net.get_submodule(layer)
    targets = [ClassifierOutputTarget(1)] * 2
    theirs = GradCAM(net, [module], reshape_transform=transform)(IMAGES, targets)
    ours = FAM(net, [module], transform, rule="gradcam")(IMAGES, targets)
    np.testing.assert_allclose(ours, theirs, atol=5e-6)
    assert ours.max() > 0.9


@pytest.mark.parametrize("transform", [tokens_to_map(4, 4), "auto"])
def test_patches_that_the_score_does_not_read_are_refused(transform):
    """Behind the last block only the class token bears the score."""
    net = vit()
    with pytest.raises(ValueError, match=r"'encoder'.*class token.*encoder.layers\[-1\].ln_1"):
        LayerFam(net, net.encoder, reshape_transform=transform).attribute(IMAGES, 1)
    with pytest.raises(ValueError, match=r"class token.*blocks\[-1\].norm1"):
        FAM(net, [net.encoder], transform)(IMAGES, [ClassifierOutputTarget(1)] * 2)
    LayerFam(net, net.encoder, reshape_transform=None).attribute(IMAGES, 1)


def test_a_score_that_nothing_reaches_has_maps_of_zeros():
    """No gradient at all is no sign of a class token."""
    net = vit()
    maps = LayerFam(
        lambda x: 0 * net(x), net.encoder, rule="gradcam", reshape_transform=tokens_to_map(4, 4)
    ).attribute(IMAGES, 1)
    assert torch.equal(maps, torch.zeros(2, 1, 4, 4))


def test_modules_of_known_layout_are_believed():
    """A spectrogram's map of another shape than the image, and a Swin as wide as it is high."""
    strided = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
    assert transform_for(strided, strided, "0", (2, 16, 32, 64), (2, 3, 128, 512)) is None
    # Eight channels of 8 x 4, which look like a map of 8 x 8 with its channels last.
    wide = nn.Conv2d(3, 8, 3, stride=(4, 8))
    assert transform_for(wide, wide, "0", (2, 8, 8, 4), (2, 3, 32, 32)) is None
    norm = nn.LayerNorm(8)
    found = transform_for(norm, norm, "norm", (2, 8, 8, 8), (2, 3, 32, 32))
    assert found is channels_last_to_map


@pytest.mark.parametrize(
    ("transform", "kind", "message"),
    [
        ("tokens", ValueError, 'must be "auto"'),
        (7, TypeError, 'must be "auto", a callable or None, not 7'),
    ],
)
def test_what_is_no_transform_is_refused_at_once(transform, kind, message):
    net = encoder()
    with pytest.raises(kind, match="reshape_transform " + message):
        LayerFam(net, "last", reshape_transform=transform)
    with pytest.raises(kind, match="reshape_transform " + message):
        FAM(net, ["last"], transform)


def test_auto_asks_for_a_transform_where_a_function_hides_the_model():
    net = vit()
    explainer = LayerFam(lambda x: net(x), net.encoder.layers[0].ln_1, reshape_transform="auto")
    with pytest.raises(ValueError, match=r"17 = 1 \+ 4 x 4.*tokens_to_map\(4, 4, skip=1\)"):
        explainer.attribute(IMAGES, 1)


class Pair(nn.Module):
    """A network whose first layer gives two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.two = TwoMaps()

    def forward(self, images):
        a, b = self.two(images)
        return (a + b).mean(dim=(2, 3))


class TwoMaps(nn.Module):
    def forward(self, images):
        return images * 2, images * 3


def test_auto_with_a_layer_that_gives_two_tensors():
    net = Pair()
    maps = LayerFam(net, "two", reshape_transform="auto").attribute(IMAGES, 1)
    assert [part.shape for part in maps] == [(2, 1, 32, 32)] * 2
    with pytest.raises(TypeError, match="'two' gives 2 tensors: choose a layer inside"):
        infer_transform(net, "two", IMAGES)
    with pytest.raises(ValueError, match="'two' gives 2 tensors: pass a reshape_transform"):
        FAM(net, ["two"], "auto")(IMAGES, [ClassifierOutputTarget(1)] * 2)


def test_the_innermost_module_that_tells_its_grid_is_believed():
    class Outer(nn.Module):
        patch_size, image_size = 4, (8, 32)

        def __init__(self) -> None:
            super().__init__()
            self.inner = vit()
            self.class_token = torch.zeros(1)

        def forward(self, images):
            return self.inner(images)

    assert infer_transform(Outer(), "inner.encoder", IMAGES) == tokens_to_map(4, 4)
