import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import Bottleneck

from fam_plugins.cape import with_cape_head
from fam_plugins.cape.locate import _made_up_input, _probe

from .conftest import default_device, small_network

# name -> (layer that must be found, size of the images, options that make the network small).
DENSENET = {"growth_rate": 8, "block_config": (2, 2)}
SWIN = {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)}
TORCHVISION = {
    "resnet18": ("layer4", 64, {}),
    "ResNet": (
        "layer4",
        64,
        {"block": Bottleneck, "layers": [1] * 4, "groups": 4, "width_per_group": 4},  # ResNeXt
    ),
    "regnet_y_400mf": ("trunk_output", 64, {}),
    "DenseNet": ("features", 64, {**DENSENET, "num_init_features": 16}),
    "mobilenet_v2": ("features", 64, {"width_mult": 0.25}),
    "efficientnet_b0": ("features", 64, {}),
    "SwinTransformer": ("permute", 64, {**SWIN, "patch_size": [4, 4], "window_size": [4, 4]}),
}
TIMM = {
    "resnet10t": ("layer4", 64, {}),
    "regnety_002": ("final_conv", 64, {}),
    "densenet121": ("features", 64, DENSENET),
    "efficientnet_lite0": ("bn2", 64, {}),
    "swin_tiny_patch4_window7_224": ("norm", 56, {**SWIN, "img_size": 56}),  # channels last
}


def build(library, name, options):
    torch.manual_seed(0)
    if library == "timm":
        timm = pytest.importorskip("timm", reason="timm models are supported, but timm is optional")
        return timm.create_model(name, pretrained=False, num_classes=7, **options)
    return getattr(models, name)(num_classes=7, **options)


CASES = [("torchvision", name, *row) for name, row in TORCHVISION.items()]
CASES += [("timm", name, *row) for name, row in TIMM.items()]


@pytest.mark.parametrize(
    ("library", "name", "layer", "size", "options"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)
def test_families(library, name, layer, size, options):
    network = build(library, name, options)
    images = torch.randn(2, 3, size, size)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network.train()
    model = with_cape_head(network, example_input=images)
    assert model.site.layer == layer
    assert all(module.training for module in network.modules())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())

    model.eval()
    features, logits = model.features_and_logits(images)
    with torch.no_grad():
        expected = network(images)
    assert torch.equal(logits, expected)
    linear = model.classifier
    assert features.shape[:2] == (2, linear.in_features)
    assert features.dim() == 4
    # What CAPE rests on: the classifier sees the mean of this map, and nothing else.
    torch.testing.assert_close(linear(features.mean(dim=(2, 3))), logits, rtol=1e-4, atol=1e-5)
    # The map lies upstream of the model's own logits as well. (DenseNet's ReLU runs after it once
    # more, with gradient 0 at 0.)
    slope = torch.autograd.grad(logits[:, 1].sum(), features, retain_graph=True)[0]
    expected = linear.weight[1, :, None, None] / features.shape[2:].numel()
    expected = expected.expand_as(slope)
    live = features > 0 if model.site.relu else torch.ones_like(features, dtype=torch.bool)
    torch.testing.assert_close(slope[live], expected[live])
    log_p = model(images)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(2))
    torch.testing.assert_close(log_p, model.head(features))
    # Gradients reach the backbone through either head.
    for output in (log_p, model.vanilla(images)):
        network.zero_grad()
        output[:, 1].sum().backward()
        assert all(p.grad is not None for p in linear.parameters()) == (output is not log_p)
        assert sum(float(p.grad.abs().sum()) for p in network.parameters() if p.grad is not None)


SMALL_VIT = {"image_size": 64, "patch_size": 32, "num_layers": 1, "num_heads": 1}
SMALL_CONVNEXT = {"block_setting": [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)]}
REFUSED = [
    ("torchvision", "vgg11", {"init_weights": False}, r"VGG .*hidden layers .*'classifier\.0'"),
    ("torchvision", "mobilenet_v3_small", {}, r"MobileNetV3 .*hidden layers .*'classifier\.0'"),
    ("torchvision", "ConvNeXt", SMALL_CONVNEXT, r"ConvNeXt .*norm .*'classifier\.0'"),
    (
        "torchvision",
        "VisionTransformer",
        {**SMALL_VIT, "hidden_dim": 16, "mlp_dim": 16},
        r"VisionTransformer .*class token",
    ),
    ("torchvision", "squeezenet1_0", {}, r"SqueezeNet .*no nn\.Linear computes its output"),
    (
        "timm",
        "vit_tiny_patch16_224",
        {"img_size": 64, "depth": 1},
        r"VisionTransformer .*class token",
    ),
    ("timm", "convnext_atto", {}, r"ConvNeXt .*norm .*'head\.norm'"),
    ("timm", "mobilenetv3_small_050", {}, r"MobileNetV3 .*hidden layers .*'conv_head'"),
]


@pytest.mark.parametrize(
    ("library", "name", "options", "message"), REFUSED, ids=[f"{c[0]}-{c[1]}" for c in REFUSED]
)
def test_architectures_that_do_not_fit_are_refused_by_name(library, name, options, message):
    network = build(library, name, options)
    with pytest.raises(ValueError, match=message):
        with_cape_head(network, example_input=torch.randn(2, 3, 64, 64))
    assert all(module.training for module in network.modules())
    assert not any(module._forward_hooks for module in network.modules())


def test_the_probe_makes_up_its_own_input_and_leaves_the_random_state(network):
    state = torch.get_rng_state()
    model = with_cape_head(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.site.layer, model.site.classifier) == ("2", "6")
    assert not model.site.relu


def test_the_probe_keeps_no_graph(network):
    output, calls = _probe(network, None)
    tensors = [output]
    for call in calls:
        tensors += [*call.means.values(), *call.linear, *([call.token] if call.token else [])]
    assert len(tensors) > 10
    assert not any(tensor.requires_grad for tensor in tensors)


def test_the_probe_makes_up_the_same_input_under_another_default_device(network):
    expected = _made_up_input(network)
    with default_device("meta"):
        found = _made_up_input(network)
    assert torch.equal(found, expected)


def test_a_functional_relu_before_pooling_is_found_even_in_place():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(1, 8, 3)
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(nn.functional.relu(self.body(x), inplace=True).mean(dim=(2, 3)))

    network = Net()
    model = with_cape_head(network)
    assert model.site.relu
    images = torch.randn(2, 1, 9, 9)
    features, logits = model.features_and_logits(images)
    assert features.min() == 0
    torch.testing.assert_close(logits, network(images), rtol=0, atol=0)
    torch.testing.assert_close(features, network.body(images).relu())


def test_volumes_fit_too():
    network = nn.Sequential(
        nn.Conv3d(1, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()
    )
    network.append(nn.Linear(6, 4))
    images = torch.randn(2, 1, 8, 9, 10)
    model = with_cape_head(network, example_input=images)
    assert model.head.probability_maps(model.features(images)).shape == (2, 4, 3, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_another_dtype_are_recognised(dtype):
    model = with_cape_head(small_network().to(dtype))
    assert model.head.weight.dtype == dtype
    assert model.site.layer == "2"


def test_layer_and_classifier_can_be_named_or_given(network):
    for layer, classifier in (("1", "6"), (network[2], network[6])):
        if layer == "1":  # batch norm, followed by the network's ReLU: the same map
            assert with_cape_head(network, layer, classifier).site.relu
        else:
            assert with_cape_head(network, layer, classifier).site.layer == "2"


def test_bad_arguments_are_refused(network):
    other = small_network()
    cases = [
        ((torch.relu,), {}, TypeError, "nn.Module"),
        ((network, "layer4"), {}, ValueError, "unknown layer 'layer4'.*There are '0', '1'"),
        ((network, other[2]), {}, ValueError, "not part of this Sequential"),
        ((network, "0"), {}, ValueError, "mean of layer '0' over regions is not the input"),
        ((network, None, "0"), {}, TypeError, "nn.Linear"),
        ((network, None, other[6]), {}, ValueError, "not part of"),
        ((network,), {"example_input": torch.randn(2, 3, 6, 6)}, ValueError, "did not accept"),
        ((network,), {"example_input": torch.randn(2, 1, 1, 1)}, ValueError, "larger images"),
        ((nn.Sequential(small_network(), nn.Softmax(1)),), {}, ValueError, "remove a softmax"),
    ]
    for arguments, keywords, error, message in cases:
        with pytest.raises(error, match=message):
            with_cape_head(*arguments, **keywords)
        assert not any(module._forward_hooks for module in network.modules())
        assert all(module.training for module in network.modules())


def test_more_architectures_that_do_not_fit():
    """Maximum pooling, flattening, two outputs, no convolution, nothing to verify."""

    class TwoOutputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_network()

        def forward(self, x):
            return self.net(x), x

    dead = small_network(norm=False)
    with torch.no_grad():
        dead[0].weight.zero_()
        dead[0].bias.zero_()
    maximum = small_network()
    maximum[3] = nn.AdaptiveMaxPool2d(1)
    cases = [
        (maximum, "not the mean over regions"),
        (TwoOutputs(), "returns a tuple"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "no convolution found"),
        (dead, "zeros or non-finite"),
    ]
    for network, message in cases:
        with pytest.raises(ValueError, match=message):
            with_cape_head(network)


def test_a_layer_that_runs_twice_is_not_taken():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU())
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            self.body(x.flip(0))
            return self.fc(self.body(x).mean(dim=(2, 3)))

    with pytest.raises(ValueError, match="does not fit CAPE"):
        with_cape_head(Twice())
