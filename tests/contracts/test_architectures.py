"""The ``gradcam`` rule equals both partners on real architectures, under every similarity."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from fam_plugins import FAM, LayerFam, SimilarityModel
from tests.networks import narrow_convnext, narrow_vgg

CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet18": (torchvision.models.resnet18, "layer4"),
    "vgg": (narrow_vgg, "features"),
    "densenet121": (torchvision.models.densenet121, "features"),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, "features"),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, "features"),
    "efficientnet_b0": (torchvision.models.efficientnet_b0, "features"),
    "convnext": (narrow_convnext, "features"),
    "regnet_y_400mf": (torchvision.models.regnet_y_400mf, "trunk_output"),
    "googlenet": (
        partial(torchvision.models.googlenet, init_weights=False, aux_logits=False),
        "inception5b",
    ),
}
LINEAR_TAILS = {
    "resnet18",
    "densenet121",
    "mobilenet_v2",
    "efficientnet_b0",
    "regnet_y_400mf",
    "googlenet",
}


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request):
    torch.manual_seed(0)
    build, layer = CASES[request.param]
    net = build(num_classes=16).eval().double()
    return request.param, net, layer, torch.randn(2, 3, 64, 64).double()


@pytest.mark.parametrize("similarity", ["cosine", "dot", "sqeuclidean", "classifier"])
def test_equals_captum_and_pytorch_grad_cam(case, similarity):
    _, net, layer, images = case
    model = net
    if similarity != "classifier":
        torch.manual_seed(1)
        model = SimilarityModel(net, torch.randn(3, 16), similarity=similarity)
    module = net.get_submodule(layer)

    expected = LayerGradCam(model, module).attribute(images, target=1).detach()
    maps = LayerFam(model, layer, rule="gradcam").attribute(images, target=1)
    torch.testing.assert_close(maps, expected, rtol=1e-9, atol=1e-12)

    targets = [ClassifierOutputTarget(1)] * 2
    with GradCAM(model, [module]) as cam:
        # BaseCAM keeps no copy on the CPU: an in-place ReLU behind the layer (DenseNet) would
        # overwrite what it stored. A copy handed on keeps its map what it is meant to be.
        handle = module.register_forward_hook(lambda _m, _i, output: output.clone())
        theirs = cam(images, targets)
        handle.remove()
    ours = FAM(model, [layer], rule="gradcam")(images, targets)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.true_gradient
def test_additive_adds_up_and_says_where_a_true_gradient_does_not(case):
    name, net, layer, images = case
    model = SimilarityModel(net, torch.randn(3, 16), similarity="dot")
    (maps, frozen), (_, delta) = (
        LayerFam(model, layer, rule="additive", tail=tail).attribute(
            images, target=1, return_convergence_delta=True
        )
        for tail in ("frozen", "true")
    )
    scale = maps.abs().sum() + model(images)[:, 1].abs().max()
    assert frozen.abs().max() < 1e-12 * scale
    if name in LINEAR_TAILS:
        assert delta.abs().max() < 1e-12 * scale
    else:
        assert delta.abs().max() > 1e-10 * scale
