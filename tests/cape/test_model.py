import copy
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from fam_plugins.cape import CapeHead, with_cape_head

from .conftest import small_network

# name -> (layer that must be found, probe size): small images keep the suite quick.
TORCHVISION = {
    "resnet18": ("layer4", 64),
    "resnext50_32x4d": ("layer4", 64),
    "regnet_y_400mf": ("trunk_output", 64),
    "densenet121": ("features", 64),
    "mobilenet_v2": ("features", 64),
    "efficientnet_b0": ("features", 64),
    "swin_t": ("permute", 64),
}
TIMM = {
    "resnet18": ("layer4", 64),
    "regnety_002": ("final_conv", 64),
    "densenet121": ("features", 64),
    "efficientnet_lite0": ("bn2", 64),
    "swin_tiny_patch4_window7_224": ("norm", 224),  # takes one size only; channels last
}


def build(library, name):
    torch.manual_seed(0)
    if library == "timm":
        timm = pytest.importorskip("timm", reason="timm models are supported, but timm is optional")
        return timm.create_model(name, pretrained=False, num_classes=7)
    models = pytest.importorskip("torchvision.models")
    return getattr(models, name)(weights=None, num_classes=7)


CASES = [("torchvision", n, *v) for n, v in TORCHVISION.items()]
CASES += [("timm", n, *v) for n, v in TIMM.items()]


@pytest.mark.parametrize(("library", "name", "layer", "size"), CASES)
def test_families(library, name, layer, size):
    network = build(library, name)
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
    assert features.ndim == 4
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


REFUSED = [
    ("torchvision", "vgg11", 64, r"VGG .*hidden layers .*'classifier\.0'"),
    ("torchvision", "mobilenet_v3_small", 64, r"MobileNetV3 .*hidden layers .*'classifier\.0'"),
    ("torchvision", "convnext_tiny", 64, r"ConvNeXt .*norm .*'classifier\.0'"),
    ("torchvision", "vit_b_32", 224, r"VisionTransformer .*class token"),
    ("torchvision", "squeezenet1_0", 64, r"SqueezeNet .*no nn\.Linear"),
    ("timm", "vit_tiny_patch16_224", 224, r"VisionTransformer .*class token"),
    ("timm", "convnext_atto", 64, r"ConvNeXt .*norm .*'head\.norm'"),
    ("timm", "mobilenetv3_small_050", 64, r"MobileNetV3 .*hidden layers .*'conv_head'"),
]


@pytest.mark.parametrize(("library", "name", "size", "message"), REFUSED)
def test_architectures_that_do_not_fit_are_refused_by_name(library, name, size, message):
    network = build(library, name)
    with pytest.raises(ValueError, match=message):
        with_cape_head(network, example_input=torch.randn(2, 3, size, size))
    assert all(module.training for module in network.modules())
    assert not any(module._forward_hooks for module in network.modules())


def test_the_probe_makes_up_its_own_input_and_leaves_the_random_state(network):
    state = torch.get_rng_state()
    reference = CapeHead.from_linear(network[-1])
    torch.set_rng_state(state)
    model = with_cape_head(network)
    assert (model.site.layer, model.site.classifier) == ("2", "6")
    assert not model.site.relu
    # Only the head's own initialisation draws numbers.
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    CapeHead(reference.in_channels, reference.num_classes)
    assert torch.equal(after, torch.get_rng_state())


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


def test_one_pass_serves_both_heads(network):
    model = with_cape_head(network).eval()
    calls = []
    network[0].register_forward_hook(lambda *_: calls.append(1))
    images = torch.randn(2, 1, 6, 6)
    log_p, logits = model.both(images)
    assert len(calls) == 1
    torch.testing.assert_close(log_p, model(images))
    torch.testing.assert_close(logits, model.vanilla(images))
    assert len(calls) == 3


def test_feature_map_is_a_layer_for_hook_based_explainers(network):
    attr = pytest.importorskip("captum.attr")
    model = with_cape_head(network).eval()
    images = torch.randn(2, 1, 6, 6)
    vanilla = attr.LayerGradCam(model.vanilla, model.feature_map).attribute(images, target=1)
    expected = attr.LayerGradCam(network, network[2]).attribute(images, target=1)
    torch.testing.assert_close(vanilla, expected)
    cape = attr.LayerGradCam(model, model.feature_map).attribute(images, target=1)
    features = model.features(images).detach().requires_grad_()
    grad = torch.autograd.grad(model.head(features)[:, 1].sum(), features)[0]
    by_hand = (grad.mean(dim=(2, 3), keepdim=True) * features).sum(1, keepdim=True)
    torch.testing.assert_close(cape, by_hand)
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_deepcopy_state_dict_and_casts(network):
    model = with_cape_head(network).eval()
    images = torch.randn(2, 1, 6, 6)
    expected = model(images)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.head.weight.zero_()
        network[0].weight.zero_()
    torch.testing.assert_close(twin(images), expected, rtol=0, atol=0)

    fresh = with_cape_head(small_network(), example_input=images)
    fresh.load_state_dict(twin.state_dict())
    torch.testing.assert_close(fresh.eval()(images), expected, rtol=0, atol=0)
    wide = twin.double()
    assert wide(images.double()).dtype == torch.float64
    torch.testing.assert_close(wide(images.double()).float(), expected)
    half = copy.deepcopy(twin).bfloat16()
    torch.testing.assert_close(half(images.bfloat16()), expected, rtol=0.1, atol=0.1)
    last = copy.deepcopy(twin).float().to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(images.to(memory_format=torch.channels_last)), expected)
    assert fresh.train().model[1].training
    assert not fresh.eval().model[1].training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_another_dtype_are_recognised(dtype):
    model = with_cape_head(small_network().to(dtype))
    assert model.head.weight.dtype == dtype
    assert model.site.layer == "2"


def test_a_classifier_without_bias(network):
    network[-1] = nn.Linear(8, 3, bias=False)
    model = with_cape_head(network)
    assert model.head.bias is None
    assert model(torch.randn(2, 1, 6, 6)).shape == (2, 3)


def test_layer_and_classifier_can_be_named_or_given(network):
    for layer, classifier in (("1", "6"), (network[2], network[6])):
        if layer == "1":  # batch norm, followed by the network's ReLU: the same map
            assert with_cape_head(network, layer, classifier).site.relu
        else:
            assert with_cape_head(network, layer, classifier).site.layer == "2"


def test_parallel_threads_do_not_mix_their_features(network):
    """As in DataParallel, whose replicas share hook tables."""
    model = with_cape_head(network).eval()
    images = [torch.randn(4, 1, 24, 24) for _ in range(4)]
    expected = [model(x) for x in images]
    found = [[] for _ in images]

    def work(i):
        found[i].extend(model(images[i]) for _ in range(20))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, reference in zip(found, expected, strict=True):
        assert len(results) == 20
        for result in results:
            torch.testing.assert_close(result, reference)


def test_a_fitted_head_can_be_attached(network):
    head = CapeHead(8, 3)
    assert with_cape_head(network, head=head).head is head
    for other in (CapeHead(9, 3), CapeHead(8, 4)):
        with pytest.raises(ValueError, match="attach it to the model it was fitted for"):
            with_cape_head(network, head=other)
    with pytest.raises(TypeError, match="CapeHead"):
        with_cape_head(network, head=nn.Linear(8, 3))


def test_bad_arguments_are_refused(network):
    other = small_network()
    cases = [
        ((torch.relu,), {}, TypeError, "nn.Module"),
        ((with_cape_head(network),), {}, TypeError, "already has"),
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


def test_a_failing_forward_leaves_no_hook(network):
    model = with_cape_head(network)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 6, 6))
    assert not any(module._forward_hooks for module in model.modules())


def test_importing_cape_imports_torch_only():
    """Everything else is loaded when it is used."""
    code = (
        "import sys, torch; before = set(sys.modules); import fam_plugins.cape; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new & {'torchvision', 'captum', 'pytorch_grad_cam', 'tqdm', 'sklearn', "
        "'matplotlib', 'timm', 'cv2', 'scipy', 'PIL'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_layer_that_is_not_reached_is_reported(network):
    model = with_cape_head(network)
    network.forward = lambda x: network[6](x.mean(dim=(2, 3)).expand(-1, 8))
    with pytest.raises(RuntimeError, match="ran 0 times"):
        model(torch.randn(2, 1, 6, 6))
