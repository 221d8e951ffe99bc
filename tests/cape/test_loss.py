from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fam_plugins.cape import CapeHead, cape_loss

from .direct_formula import direct_distillation_loss, direct_logits, direct_maps


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    head = CapeHead(6, 4, dtype=dtype)
    with torch.no_grad():
        for parameter, value in zip((head.t1, head.t2, head.t3), (0.3, -0.5, 0.7), strict=True):
            parameter.fill_(value)
    features = torch.randn(3, 6, 5, 4, dtype=dtype, requires_grad=True)
    logits = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    return head, features, logits, torch.tensor([0, 3, 1])


def test_distillation_equals_the_released_code():
    with np.load(Path(__file__).parents[1] / "data" / "cape_reference.npz") as file:
        data = {k: torch.from_numpy(file[k]) for k in file.files if file[k].dtype.kind == "f"}
    head = CapeHead(16, 5, dtype=torch.float64)
    head.load_state_dict({name: data[name] for name in ("weight", "bias", "t1", "t2", "t3")})
    loss = cape_loss(head, data["features"], data["orig_outcome"], alpha=0)
    torch.testing.assert_close(loss[None], data["kl_T2"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_gradients_equal_the_direct_formula(temperature):
    head, features, logits, _ = problem()
    parameters = list(head.parameters())
    loss = cape_loss(head, features, logits, alpha=0, temperature=temperature)
    maps = direct_maps(
        direct_logits(features.detach(), head.weight, head.bias), head.t1, head.t2, head.t3
    )
    direct = direct_distillation_loss(maps.sum(dim=(2, 3)), logits.detach(), temperature)
    torch.testing.assert_close(loss, direct, rtol=0, atol=1e-12)
    ours = torch.autograd.grad(loss, parameters)
    for a, b in zip(ours, torch.autograd.grad(direct, parameters), strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_joint_loss_trains_the_model_by_cross_entropy_alone():
    head, features, logits, labels = problem()
    cape_loss(head, features, logits, labels, alpha=0.5, beta=3).backward()
    expected = torch.autograd.grad(0.5 * F.cross_entropy(logits, labels), logits)[0]
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-15)
    assert features.grad is None
    assert head.weight.grad.abs().sum() > 0


def test_weights_are_weights():
    head, features, logits, labels = problem()
    entropy = cape_loss(head, features, logits, labels, beta=0)
    distillation = cape_loss(head, features, logits, alpha=0)
    both = cape_loss(head, features, logits, labels, alpha=0.5, beta=3)
    torch.testing.assert_close(both, 0.5 * entropy + 3 * distillation)
    torch.testing.assert_close(entropy, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [{}, {"beta": 0.0}, {"alpha": 0.0}])
def test_half_precision_logits_give_a_float32_loss(dtype, weights):
    """Widened before anything is computed: equal to the loss of the widened numbers."""
    head, features, logits, labels = problem(torch.float32)
    features, logits = features.detach().to(dtype), logits.detach().to(dtype)
    loss = cape_loss(head, features, logits, labels, **weights)
    assert loss.dtype == torch.float32
    expected = cape_loss(head, features.float(), logits.float(), labels, **weights)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": None}, ValueError, "alpha=0"),
        ({"labels": torch.tensor([0, 4, 1])}, ValueError, "label 4 is out of range"),
        ({"labels": torch.tensor([0, -1, 1])}, ValueError, "label -1 is out of range"),
        ({"labels": torch.tensor([0, 1])}, ValueError, "each of the 3 images"),
        ({"labels": F.one_hot(torch.tensor([0, 3, 1]), 4)}, ValueError, "one class index"),
        ({"labels": torch.rand(3, 4)}, TypeError, "argmax"),
        ({"labels": torch.tensor([True, False, True])}, TypeError, "int64 tensor, not torch.bool"),
        ({"logits": torch.randn(3, 5)}, ValueError, r"\[3, 4\]"),
        ({"logits": torch.randn(2, 4)}, ValueError, r"\[3, 4\]"),
        ({"features": torch.randn(3, 6, 5)}, ValueError, "unsqueeze"),
        ({"alpha": -1.0}, ValueError, "floats from 0 and not both 0.* not -1.0, 1.0 and 2.0"),
        ({"alpha": 0.0, "beta": 0.0}, ValueError, "not both 0"),
        ({"beta": float("nan")}, ValueError, "floats from 0 and not both 0.* not 1.0, nan and"),
        ({"temperature": 0.0}, ValueError, "temperature above 0, not 1.0, 1.0 and 0.0"),
        ({"temperature": float("inf")}, ValueError, "temperature above 0, not 1.0, 1.0 and inf"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    head, features, logits, labels = problem(torch.float32)
    arguments = {"features": features, "logits": logits, "labels": labels, **change}
    with pytest.raises(error, match=message):
        cape_loss(head, **arguments)
