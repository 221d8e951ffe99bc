import copy
import math

import numpy as np
import pytest
import torch

from fam_plugins.cape import fit_cape_head, with_cape_head
from tests.networks import State

from .conftest import QUIET, assert_unchanged, small_network, state_of


@pytest.mark.parametrize("cache", [False, True])
def test_a_resumed_fit_equals_an_uninterrupted_one(network, batches, tmp_path, cache):
    settings = {"lr": 0.05, "step_size": 3, "gamma": 0.1, "cache": cache, **QUIET}
    start = with_cape_head(network)
    whole, parts = copy.deepcopy(start), copy.deepcopy(start)
    expected = fit_cape_head(whole, batches, epochs=5, **settings)
    path = tmp_path / "head.pt"
    fit_cape_head(parts, batches, epochs=2, checkpoint=path, **settings)
    continued = with_cape_head(network)  # as after a restart
    history = fit_cape_head(continued, batches, epochs=5, checkpoint=path, **settings)
    assert history == expected
    for ours, other in zip(continued.head.parameters(), whole.head.parameters(), strict=True):
        assert torch.equal(ours, other)
    assert [p.name for p in tmp_path.iterdir()] == ["head.pt"]
    # Finished: nothing left to do, the head comes from the file.
    again = with_cape_head(network)
    assert fit_cape_head(again, batches, epochs=5, checkpoint=path, **settings) == expected
    assert torch.equal(again.head.weight, whole.head.weight)


def test_a_failed_write_leaves_the_old_checkpoint(model, batches, tmp_path, monkeypatch):
    path = tmp_path / "head.pt"
    fit_cape_head(model, batches, epochs=1, checkpoint=path, **QUIET)
    before = path.read_bytes()
    real = torch.save

    def full_disk(state, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        fit_cape_head(model, batches, epochs=2, checkpoint=path, **QUIET)
    monkeypatch.setattr(torch, "save", real)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["head.pt"]


def write_other_class_count(path, model, batches):
    other = with_cape_head(small_network(classes=4))
    fit_cape_head(other, batches, epochs=1, checkpoint=path, **QUIET)


def write_other_classifier(path, model, batches):
    fit_cape_head(with_cape_head(small_network()), batches, epochs=1, checkpoint=path, **QUIET)


def write_other_bias(path, model, batches):
    """The weights alone would not tell this classifier from the model's."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.classifier.bias.add_(1)
    fit_cape_head(other, batches, epochs=1, checkpoint=path, **QUIET)


def write_half(path, model, batches):
    fit_cape_head(copy.deepcopy(model), batches, epochs=1, checkpoint=path, **QUIET)
    path.write_bytes(path.read_bytes()[:700])


def write_other_settings(path, model, batches):
    fit_cape_head(copy.deepcopy(model), batches, epochs=1, lr=0.5, checkpoint=path, **QUIET)


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_other_class_count, r"another head: .*'weight', 4, 8.*, not .*'weight', 3, 8"),
        (write_other_classifier, "another classifier's weights"),
        (write_other_bias, "another classifier's weights"),
        (write_half, "half-written"),
        (write_other_settings, r"written with lr=0\.5 \(use the same settings"),
        (lambda path, *_: path.write_bytes(b""), "half-written"),
        (lambda path, *_: path.write_text("hello"), "half-written"),
        (lambda path, *_: torch.save(Malicious(), path), "cannot be read"),
        (lambda path, model, _: torch.save(model.head.state_dict(), path), "not written by"),
        (lambda path, *_: torch.save(torch.ones(2), path), "not written by"),
    ],
)
def test_foreign_and_damaged_checkpoints_are_refused(model, batches, tmp_path, write, message):
    path = tmp_path / "head.pt"
    write(path, model, batches)
    content = path.read_bytes()
    state = state_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        fit_cape_head(model, batches, epochs=3, checkpoint=path, **QUIET)
    assert "another path" in str(caught.value)
    assert_unchanged(model, state)
    assert path.read_bytes() == content
    assert all(module.training for module in model.modules())


def test_paths_that_cannot_be_written_are_refused_before_work(model, batches, tmp_path):
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "x.pt", "create it")):
        with pytest.raises(ValueError, match=message):
            fit_cape_head(model, batches, epochs=1, checkpoint=path, **QUIET)


def momentum(saved, index=0):
    return saved["optimizer"]["state"][index]["momentum_buffer"]


PARTS = ("format", "teacher", "settings", "head", "optimizer", "scheduler", "history")
DAMAGE = {
    **{f"no {name}": lambda d, name=name: d.pop(name) for name in PARTS},
    **{f"{name} is None": lambda d, name=name: d.update({name: None}) for name in PARTS},
    "one more part": lambda d: d.update(more=1),
    "one more tensor in the head": lambda d: d["head"].update(more=torch.ones(1)),
    "no t1": lambda d: d["head"].pop("t1"),
    "t1 is None": lambda d: d["head"].update(t1=None),
    "NaN": lambda d: d["head"]["weight"].view(-1)[3].fill_(math.nan),
    "infinity": lambda d: d["head"]["t3"].fill_(-math.inf),
    "another shape": lambda d: d["head"].update(weight=d["head"]["weight"].T),
    "no parameter groups": lambda d: d["optimizer"].update(param_groups=[]),
    "fewer parameters": lambda d: d["optimizer"]["param_groups"][0]["params"].pop(),
    "no momentum": lambda d: d["optimizer"]["state"].clear(),
    "no momentum of the bias": lambda d: d["optimizer"]["state"].pop(1),
    "momentum of another shape": lambda d: momentum(d).resize_(2),
    "momentum is NaN": lambda d: momentum(d).fill_(math.nan),
    "lr is text": lambda d: d["optimizer"]["param_groups"][0].update(lr="high"),
    "lr is NaN": lambda d: d["optimizer"]["param_groups"][0].update(lr=math.nan),
    "another epoch": lambda d: d["scheduler"].update(last_epoch=7),
    "no epoch": lambda d: d["scheduler"].update(last_epoch=0),
    "no loss": lambda d: d["history"].pop("loss"),
    "a shorter loss": lambda d: d["history"]["loss"].pop(),
    "loss is NaN": lambda d: d["history"].update(loss=[math.nan, 1.0]),
    "loss is text": lambda d: d["history"].update(loss=["low", "lower"]),
    "one more curve": lambda d: d["history"].update(more=[1.0, 1.0]),
    "no settings at all": lambda d: d["settings"].clear(),
    "no lr": lambda d: d["settings"].pop("lr"),
    "lr is a list": lambda d: d["settings"].update(lr=[]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_before_the_head_is_touched(
    model, batches, tmp_path, damage
):
    path = tmp_path / "head.pt"
    fit_cape_head(copy.deepcopy(model), batches, epochs=2, checkpoint=path, **QUIET)
    saved = torch.load(path, weights_only=True)
    damage(saved)
    torch.save(saved, path)
    model.head.t2.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = State.of(model)
    with pytest.raises(ValueError, match=r"head\.pt .*: pass another path, or delete it") as caught:
        fit_cape_head(model, batches, epochs=3, checkpoint=path, **QUIET)
    assert len(str(caught.value)) < 200 + len(str(path))
    before.assert_unchanged(model)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_numbers_of_numpy_and_no_momentum_can_be_resumed(model, batches, tmp_path, momentum):
    """Numpy's scalars are pickled as code, which no checkpoint is read with."""
    settings = {"lr": np.float64(0.05), "momentum": momentum, "gamma": np.float64(0.5), **QUIET}
    whole = copy.deepcopy(model)
    expected = fit_cape_head(whole, batches, epochs=3, step_size=2, **settings)
    path = tmp_path / "head.pt"
    fit_cape_head(copy.deepcopy(model), batches, epochs=1, step_size=2, checkpoint=path, **settings)
    history = fit_cape_head(model, batches, epochs=3, step_size=2, checkpoint=path, **settings)
    assert history == expected
    assert torch.equal(model.head.weight, whole.head.weight)
