import copy
import inspect

import pytest
import torch

from fam_plugins.cape import (
    CapeHead,
    CapeModel,
    calibrate_temperature,
    cape_loss,
    fit_cape_head,
    with_cape_head,
)

from .conftest import QUIET, assert_unchanged, state_of


def test_only_the_head_learns_and_everything_is_given_back(model, batches):
    model.train()
    model.model[1].eval()  # frozen on purpose
    model.head.t1.requires_grad_(False)
    model.model[0].weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for parameter in (model.head.weight, model.model[6].weight):
        parameter.grad = torch.ones_like(parameter)
    modes = {name: module.training for name, module in model.named_modules()}
    state = state_of(model)
    history = fit_cape_head(model, batches, epochs=3, lr=0.05, **QUIET)

    assert_unchanged(model, state, but_head=True)  # batch norm statistics included
    for name in ("weight", "bias", "t1", "t2", "t3"):
        assert not torch.equal(model.state_dict()[f"head.{name}"], state[f"head.{name}"])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert torch.equal(model.model[6].weight.grad, torch.ones_like(model.model[6].weight))
    assert model.head.bias.grad is None
    assert not any(module._forward_hooks for module in model.modules())
    assert history.loss[-1] < history.loss[0]
    assert len(history.agreement) == len(history.confidence) == 3
    assert not history.interrupted


def test_one_epoch_equals_a_plain_loop(model, batches):
    """SGD on the distillation loss, recomputed without the fitting code."""
    head = copy.deepcopy(model.head)
    model.eval()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    losses, same, sure, count = 0.0, 0, 0.0, 0
    for epoch in range(2):
        if epoch == 1:
            optimizer.param_groups[0]["lr"] = 0.005
            losses, same, sure, count = 0.0, 0, 0.0, 0
        for images, _ in batches:
            with torch.no_grad():
                features, logits = model.features_and_logits(images)
                log_p = head(features)
            same += int((log_p.argmax(1) == logits.argmax(1)).sum())
            sure += float(log_p.exp().amax(1).sum())
            count += len(images)
            loss = cape_loss(head, features, logits, alpha=0, temperature=3.0)
            losses += float(loss.detach()) * len(images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    history = fit_cape_head(
        model, batches, epochs=2, lr=0.01, step_size=1, gamma=0.5, temperature=3.0, **QUIET
    )
    for ours, plain in zip(model.head.parameters(), head.parameters(), strict=True):
        torch.testing.assert_close(ours, plain)
    assert history.loss[1] == pytest.approx(losses / count, rel=1e-5)
    assert history.agreement[1] == same / count
    assert history.confidence[1] == pytest.approx(sure / count, rel=1e-5)


def test_t3_stays_the_sum_of_t1_and_t2(model, batches):
    """A property of SGD from zeros; see the calibration for what it means."""
    model.double()
    fit_cape_head(model, batches, epochs=5, lr=0.1, **QUIET)
    head = model.head
    assert head.t3.abs() > 1e-4
    torch.testing.assert_close(head.t3, head.t1 + head.t2, rtol=1e-9, atol=1e-12)


def test_a_cached_fit_runs_the_backbone_once(model, batches):
    """What that saves in time is measured in tests/benchmarks/cape_fit.py."""
    calls = []
    handle = model.model[0].register_forward_hook(lambda *_: calls.append(1))
    fit_cape_head(model, batches, **QUIET, epochs=20, cache=True)
    assert len(calls) == len(batches)
    fit_cape_head(model, batches, **QUIET, epochs=2)
    assert len(calls) == 3 * len(batches)
    handle.remove()


class StopsAt:
    """A loader that raises in its n-th epoch, after two good batches."""

    def __init__(self, batches, epoch, error):
        self.batches, self.epoch, self.error = batches, epoch, error

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.epoch -= 1
        for i, batch in enumerate(self.batches):
            if self.epoch == 0 and i == 2:
                raise self.error
            yield batch


def test_ctrl_c_leaves_a_usable_head(model, batches, tmp_path):
    path = tmp_path / "head.pt"
    loader = StopsAt(batches, 3, KeyboardInterrupt())
    with pytest.warns(UserWarning, match="stopped after 2 of 9 epochs"):
        history = fit_cape_head(model, loader, epochs=9, lr=0.05, checkpoint=path, **QUIET)
    assert history.interrupted
    assert len(history.loss) == 2
    assert torch.isfinite(model(batches[0][0])).all()
    assert all(module.training for module in model.modules())
    history = fit_cape_head(model, batches, epochs=3, lr=0.05, checkpoint=path, **QUIET)
    assert len(history.loss) == 3
    assert not history.interrupted


def test_an_error_takes_the_head_back_to_the_last_complete_epoch(network, batches):
    model, other = with_cape_head(network), with_cape_head(network)
    fit_cape_head(other, batches, epochs=2, lr=0.05, **QUIET)
    with pytest.raises(OSError, match="disk"):
        fit_cape_head(model, StopsAt(batches, 3, OSError("disk")), epochs=9, lr=0.05, **QUIET)
    assert torch.equal(model.head.weight, other.head.weight)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("lr", [1e30, 1e38])
def test_a_diverging_fit_is_stopped(model, batches, lr):
    state = state_of(model)
    with pytest.raises(FloatingPointError, match="lower lr"):
        fit_cape_head(model, batches * 20, epochs=2, lr=lr, **QUIET)
    assert_unchanged(model, state)
    # One batch: its loss is finite, what the step makes of the head is not.
    with pytest.raises(FloatingPointError, match="epoch 1: lower lr"):
        fit_cape_head(model, [100 * batches[0][0]], epochs=1, lr=1e38, **QUIET)
    assert_unchanged(model, state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight", "bias", "t1", "t2", "t3"])
def test_a_spoilt_head_is_refused_before_any_work(model, batches, name, value):
    with torch.no_grad():
        getattr(model.head, name).view(-1)[0] = value
    calls = []
    model.model[0].register_forward_hook(lambda *_: calls.append(1))
    for use in (fit_cape_head, calibrate_temperature):
        with pytest.raises(ValueError, match=r"NaN or inf: re-create it with with_cape_head"):
            use(model, batches)
    assert not calls


def test_the_defaults_are_the_released_settings():
    parameters = inspect.signature(fit_cape_head).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    released = {"epochs": 30, "lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
    released |= {"step_size": 30, "gamma": 0.1, "temperature": 2.0}
    assert defaults == released | {"cache": False, "checkpoint": None, "progress": True}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("cache", [False, True])
def test_a_fit_learns_wherever_it_is_called(network, batches, mode, cache):
    expected, model = with_cape_head(network), with_cape_head(network)
    history = fit_cape_head(expected, batches, epochs=2, lr=0.05, cache=cache, **QUIET)
    with mode():
        assert fit_cape_head(model, batches, epochs=2, lr=0.05, cache=cache, **QUIET) == history
    assert torch.equal(model.head.weight, expected.head.weight)
    assert model.head.weight.requires_grad


def test_an_iterator_is_refused_before_its_first_epoch(model, batches):
    state = state_of(model)
    loader = iter(batches)
    with pytest.raises(TypeError, match="cache=True"):
        fit_cape_head(model, loader, epochs=2, **QUIET)
    assert len(list(loader)) == len(batches)
    assert_unchanged(model, state)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs must be an int, at least 1, not 0"),
        ({"epochs": 1.5}, "an int"),
        ({"lr": 0.0}, r"lr must be a float above 0, not 0\.0"),
        ({"lr": float("nan")}, "lr must be a float above 0, not nan"),
        ({"momentum": 1.0}, r"momentum must be a float in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay must be a float, at least 0"),
        ({"step_size": 0}, "step_size must be an int"),
        ({"gamma": 0.0}, r"gamma must be a float in \(0, 1\]"),
        ({"temperature": 0.0}, "temperature must be a float above 0"),
    ],
)
def test_bad_settings_are_refused(model, batches, setting, message):
    with pytest.raises(ValueError, match=message):
        fit_cape_head(model, batches, **{"epochs": 1, **setting}, **QUIET)


def test_models_without_a_cape_head_are_refused(network, batches):
    for other in (network, CapeHead(8, 3)):
        with pytest.raises(TypeError, match="with_cape_head"):
            fit_cape_head(other, batches, epochs=1, **QUIET)
    assert isinstance(with_cape_head(network), CapeModel)


def test_a_progress_bar_is_shown_unless_unwanted(model, batches, capsys):
    fit_cape_head(model, batches, epochs=2)
    assert "CAPE head 2/2" in capsys.readouterr().err
    fit_cape_head(model, batches, epochs=2, progress=False)
    assert capsys.readouterr().err == ""
