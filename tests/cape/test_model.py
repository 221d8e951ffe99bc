import copy
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from fam_plugins.cape import CapeHead, with_cape_head
from fam_plugins.cape.model import find_head

from .conftest import small_network


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


def test_a_classifier_without_bias(network):
    network[-1] = nn.Linear(8, 3, bias=False)
    model = with_cape_head(network)
    assert model.head.bias is None
    assert model(torch.randn(2, 1, 6, 6)).shape == (2, 3)


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


def test_a_model_that_has_a_head_is_refused(network):
    model = with_cape_head(network)
    for other in (model, model.head, nn.Sequential(model), nn.DataParallel(model)):
        with pytest.raises(TypeError, match=r"already has a CAPE head: .* pass model\.model"):
            with_cape_head(other)


def test_a_failing_forward_leaves_no_hook(network):
    model = with_cape_head(network)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 6, 6))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_that_runs_twice_after_the_conversion_is_reported(network):
    model = with_cape_head(network)
    forward = network.forward
    network.forward = lambda x: forward(x) + forward(x)
    with pytest.raises(RuntimeError, match=r"ran 2 times in one forward pass; CAPE needs the one"):
        model(torch.randn(2, 1, 6, 6))


@pytest.mark.parametrize("training", [True, False])
def test_the_converted_model_is_in_the_mode_of_the_network(network, training):
    for head in (None, CapeHead(8, 3).train(not training)):
        model = with_cape_head(network.train(training), head=head)
        assert {module.training for module in model.modules()} == {training}


def test_what_a_hook_makes_of_the_feature_map_reaches_both_heads(network):
    """Interventions, and Captum's layer methods, replace what the layer gives."""
    model, images = with_cape_head(network).eval(), torch.randn(2, 1, 6, 6)
    handle = model.feature_map.register_forward_hook(lambda _, __, output: output * 0)
    log_p, logits = model.both(images)
    handle.remove()
    expected = model.head(torch.zeros(2, 8, 6, 6))
    torch.testing.assert_close(log_p, expected)
    torch.testing.assert_close(logits, model.classifier.bias.expand(2, -1))


def test_a_model_with_two_heads_names_their_number(network):
    model = nn.Sequential(with_cape_head(network), CapeHead(8, 3))
    with pytest.raises(ValueError, match="the model has 2 CAPE heads"):
        find_head(model)
    assert find_head(model, model[1]) == (model[1], "1")


def test_a_layer_that_is_not_reached_is_reported(network):
    model = with_cape_head(network)
    network.forward = lambda x: network[6](x.mean(dim=(2, 3)).expand(-1, 8))
    with pytest.raises(RuntimeError, match="ran 0 times"):
        model(torch.randn(2, 1, 6, 6))


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
