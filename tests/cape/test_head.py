import copy
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fam_plugins.cape import CapeHead

from .conftest import default_device
from .direct_formula import direct_logits, direct_maps, direct_relative

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parents[1] / "data" / "cape_reference.npz") as file:
        return {k: torch.from_numpy(file[k]) for k in file.files if file[k].dtype.kind == "f"}


@pytest.fixture
def reference_head(reference):
    head = CapeHead(16, 5, dtype=torch.float64)
    names = ("weight", "bias", "t1", "t2", "t3")
    head.load_state_dict({name: reference[name] for name in names})
    return head


def random_head(channels=6, classes=4, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    head = CapeHead(channels, classes, dtype=dtype)
    with torch.no_grad():
        head.weight.mul_(4)
        for parameter, value in zip((head.t1, head.t2, head.t3), (0.3, -0.5, 0.7), strict=True):
            parameter.fill_(value)
    return head


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("class_maps", "cls_map"),
        ("probability_maps", "weighted_contribution"),
        ("relative_maps", "logcampe_clip0"),
    ],
)
def test_maps_equal_the_released_code(reference_head, reference, method, name):
    with torch.no_grad():
        ours = getattr(reference_head, method)(reference["features"])
    torch.testing.assert_close(ours, reference[name], rtol=0, atol=1e-12)


def test_probabilities_equal_the_released_code(reference_head, reference):
    with torch.no_grad():
        p = reference_head(reference["features"]).exp()
        soft = reference_head.soft_log_probs(reference["features"]).exp()
    torch.testing.assert_close(p, reference["outcome"], rtol=0, atol=1e-12)
    torch.testing.assert_close(soft, reference["outcome_soft"], rtol=0, atol=1e-12)


def test_the_vanilla_head_of_the_released_code_is_pooling_and_linear(reference):
    linear = nn.Linear(16, 5, dtype=torch.float64)
    linear.load_state_dict({"weight": reference["weight_orig"], "bias": reference["bias_orig"]})
    head = CapeHead.from_linear(linear)
    with torch.no_grad():
        class_maps = head.class_maps(reference["features"])
    # The released code averages with torch.ones(...) / 49, which stays float32 in a float64 run.
    share = (torch.ones(()) / 49).double()
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(class_maps * share, reference["orig_weighted_contribution"], **close)
    logits = (class_maps * share).sum(dim=(2, 3))
    torch.testing.assert_close(logits, reference["orig_outcome"], **close)
    torch.testing.assert_close(logits.softmax(1), reference["orig_outcome_soft"], **close)


@pytest.mark.parametrize("spatial", [(7, 7), (3, 5), (2, 3, 4)])
def test_agrees_with_the_direct_formula(spatial):
    head = random_head()
    features = torch.randn(3, 6, *spatial, dtype=torch.float64)
    logits = direct_logits(features, head.weight, head.bias)
    maps = direct_maps(logits, head.t1, head.t2)
    soft = direct_maps(logits, head.t1, head.t2, head.t3)
    close = {"rtol": 0, "atol": 1e-13}
    torch.testing.assert_close(head.class_maps(features), logits, **close)
    torch.testing.assert_close(head.probability_maps(features), maps, **close)
    torch.testing.assert_close(
        head.relative_maps(features), direct_relative(logits, head.t1, head.t2), **close
    )
    torch.testing.assert_close(head(features).exp(), maps.flatten(2).sum(2), **close)
    torch.testing.assert_close(head.soft_log_probs(features).exp(), soft.flatten(2).sum(2), **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [5, 1000])
def test_the_maps_add_up_in_every_dtype(dtype, classes):
    head = random_head(channels=16, classes=classes, dtype=dtype)
    features = torch.randn(2, 16, 14, 14).relu().to(dtype)
    with torch.no_grad():
        maps, log_p = head.probability_maps(features), head(features)
    expected = torch.promote_types(dtype, torch.float32)
    assert maps.dtype == log_p.dtype == expected
    rounding = 16 * torch.finfo(expected).eps
    total = maps.double().sum(dim=(1, 2, 3))
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=rounding)
    torch.testing.assert_close(
        maps.double().sum(dim=(2, 3)), log_p.double().exp(), rtol=100 * rounding, atol=rounding
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [300.0, -300.0])
def test_finite_for_large_logit_gaps(dtype, gap):
    """300 logits between classes and between regions; the released code gives inf here."""
    head = CapeHead(2, 3, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[gap, 0.0], [0.0, gap], [0.0, 0.0]]))
        head.bias.zero_()
    features = torch.zeros(1, 2, 2, 2, dtype=dtype)
    features[0, 0] = 1  # every region: class 0 is 300 ahead, or behind
    features[0, 1, 1, 1] = 1  # one region: class 1 as well, and another weight
    log_p, soft = head(features), head.soft_log_probs(features)
    maps = head.probability_maps(features)
    (log_p.sum() + soft.sum() + maps[0, 0].sum()).backward()
    found = [log_p, soft, maps, head.relative_maps(features)]
    found += [p.grad for p in head.parameters()]
    assert all(torch.isfinite(tensor).all() for tensor in found)
    torch.testing.assert_close(log_p.min().item(), -300.0, rtol=0, atol=2)
    torch.testing.assert_close(maps.double().sum().item(), 1.0, rtol=0, atol=1e-6)


def test_gradients_of_probabilities_and_maps_equal_the_direct_formula():
    head = random_head()
    features = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    chosen = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    inputs = [features, head.weight, head.bias, head.t1, head.t2]
    ours = torch.autograd.grad((head.probability_maps(features) * chosen).sum(), inputs)
    logits = direct_logits(features, head.weight, head.bias)
    direct = torch.autograd.grad((direct_maps(logits, head.t1, head.t2) * chosen).sum(), inputs)
    for a, b in zip(ours, direct, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_no_intermediate_is_larger_than_the_maps():
    """[B, K, h, w], or a copy of the features; forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.untyped_storage().nbytes() // 4)
            return out

    head = CapeHead(8, 50)
    features = torch.randn(3, 8, 9, 9, requires_grad=True)
    with Largest() as seen:
        (head(features).sum() + head.probability_maps(features)[:, 0].sum()).backward()
    assert seen.numel == 3 * 50 * 9 * 9


def test_a_batch_equals_its_images_and_memory_format_does_not_matter():
    head = random_head()
    features = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    together = head.probability_maps(features)
    one_by_one = torch.cat([head.probability_maps(f[None]) for f in features])
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-14)
    last = head.probability_maps(features.to(memory_format=torch.channels_last))
    torch.testing.assert_close(together, last, rtol=0, atol=1e-14)
    assert together.is_contiguous()


def test_a_constant_on_all_logits_changes_only_the_relative_map():
    head = random_head()
    features = torch.randn(1, 6, 4, 4, dtype=torch.float64)
    maps, relative = head.probability_maps(features), head.relative_maps(features)
    with torch.no_grad():
        head.bias.add_(1.5)
    torch.testing.assert_close(head.probability_maps(features), maps, rtol=0, atol=1e-13)
    assert (head.relative_maps(features) - relative).abs().max() > 1


def test_temperatures_split_is_a_convention_of_the_soft_probabilities():
    head = random_head()
    features = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    soft, log_p = head.soft_log_probs(features), head(features)
    with torch.no_grad():
        head.t1.add_(0.4)
        head.t2.add_(0.4)
        head.t3.sub_(0.4)
    torch.testing.assert_close(head.soft_log_probs(features), soft, rtol=0, atol=1e-13)
    assert (head(features) - log_p).abs().max() > 0.05


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_copies(bias):
    linear = nn.Linear(6, 4, bias=bias, dtype=torch.float64)
    head = CapeHead.from_linear(linear)
    features = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    expected = linear(features.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(head.class_maps(features), expected)
    assert (head.bias is None) is not bias
    assert head.t1 == head.t2 == head.t3 == 0
    with torch.no_grad():
        head.weight.zero_()
    assert linear.weight.abs().sum() > 0


def test_a_new_head_draws_as_a_linear_layer_does():
    torch.manual_seed(0)
    linear, after = nn.Linear(256, 50), torch.get_rng_state()
    torch.manual_seed(0)
    head = CapeHead(256, 50)
    assert torch.equal(after, torch.get_rng_state())
    torch.testing.assert_close(head.weight, linear.weight)
    torch.testing.assert_close(head.bias, linear.bias)


def test_drawing_anew_sets_every_temperature_back():
    head = random_head()
    before = head.weight.clone()
    head.reset_parameters()
    assert not torch.equal(head.weight, before)
    assert head.t1 == head.t2 == head.t3 == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copied_classifier_moves_no_random_state(bias, dtype):
    linear, state = nn.Linear(6, 4, bias=bias, dtype=dtype), torch.get_rng_state()
    head = CapeHead.from_linear(linear)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(head.weight, linear.weight)
    assert (head.bias is None) is not bias
    assert not bias or torch.equal(head.bias, linear.bias)
    assert {(p.dtype, p.device) for p in head.parameters()} == {(dtype, linear.weight.device)}
    assert all(p.requires_grad and p.is_leaf for p in head.parameters())


def test_a_head_is_where_its_classifier_is():
    """The meta device stands for another one: no GPU is needed to see that it is followed."""
    head = CapeHead.from_linear(nn.Linear(6, 4, device="meta"))
    assert all(p.is_meta for p in head.parameters())
    linear = nn.Linear(6, 4)
    with default_device("meta"):
        head = CapeHead.from_linear(linear)
    assert not any(p.is_meta for p in head.parameters())


class Calls(nn.Module):
    """A method of a module as a module, which is what can be traced."""

    def __init__(self, module, name):
        super().__init__()
        self.module, self.name = module, name

    def forward(self, features):
        return getattr(self.module, self.name)(features)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*trace.* is deprecated")
@pytest.mark.parametrize("spatial", [(3, 4), (2, 3, 4)])
def test_older_exporters_find_every_operator(spatial, tmp_path):
    """ONNX export by tracing, the default up to torch 2.8, has no form of aten::mT."""
    head, features = random_head(dtype=torch.float32).eval(), torch.randn(2, 6, *spatial)
    for name in ("forward", "probability_maps", "relative_maps", "class_maps"):
        call = Calls(head, name)
        traced = torch.jit.trace(call, features, check_trace=False)
        assert "aten::mT" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(features), call(features))
        torch.testing.assert_close(traced(features[:1]), call(features[:1]))
    try:
        import onnx
    except ImportError:
        return  # the graphs above hold what its exporter would stumble over
    path = tmp_path / "head.onnx"
    options = (
        {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    )
    torch.onnx.export(head, (features,), str(path), **options)
    onnx.checker.check_model(str(path))


def test_state_dict_deepcopy_and_casts():
    head = random_head(dtype=torch.float32)
    assert [name for name, _ in head.named_parameters()] == ["weight", "bias", "t1", "t2", "t3"]
    features = torch.randn(2, 6, 3, 3)
    twin = CapeHead(6, 4)
    twin.load_state_dict(head.state_dict())
    for other in (twin, copy.deepcopy(head)):
        torch.testing.assert_close(other(features), head(features), rtol=0, atol=0)
    wide = copy.deepcopy(head).double()
    torch.testing.assert_close(wide(features).float(), head(features))  # float32 is widened


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_head_reads_half_precision_features(dtype):
    head = random_head(dtype=torch.float32)
    features = torch.randn(2, 6, 3, 3).to(dtype)
    torch.testing.assert_close(head(features), head(features.float()), rtol=0, atol=0)


def test_autocast():
    head = random_head(dtype=torch.float32)
    features = torch.randn(2, 6, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_p = head(features)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p, head(features), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.randn(6, 3, 3), ValueError, r"unsqueeze\(0\)"),
        (torch.randn(2, 6), ValueError, r"not \(2, 6\)"),
        (torch.randn(2, 5, 3, 3), ValueError, "takes 6 channels, not 5"),
        (torch.randn(2, 3, 3, 6), ValueError, r"movedim\(-1, 1\)"),
        (torch.randn(0, 6, 3, 3), ValueError, "empty"),
        (torch.randn(2, 6, 0, 3), ValueError, "empty"),
        (torch.ones(2, 6, 3, 3, dtype=torch.int64), TypeError, r"as_tensor\(features\)\.float\(\)"),
        (torch.randn(2, 6, 3, 3, dtype=torch.float64), TypeError, "head is torch.float32"),
    ],
)
@pytest.mark.parametrize(
    "method", ["forward", "probability_maps", "relative_maps", "soft_log_probs"]
)
def test_bad_features_are_refused(method, features, error, message):
    with pytest.raises(error, match=message):
        getattr(CapeHead(6, 4), method)(features)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="num_classes must be an int from 2, not 1.*two outputs"):
        CapeHead(6, 1)
    with pytest.raises(ValueError, match="in_channels must be an int from 1, not 0"):
        CapeHead(0, 4)
    with pytest.raises(TypeError, match=r"model\.fc"):
        CapeHead.from_linear(nn.Conv2d(6, 4, 1))
    with pytest.raises(RuntimeError, match="size mismatch"):
        CapeHead(6, 4).load_state_dict(CapeHead(6, 5).state_dict())
