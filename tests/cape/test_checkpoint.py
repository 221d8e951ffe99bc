import copy

import pytest
import torch

from fam_plugins.cape import fit_cape_head, with_cape_head

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
        (write_other_class_count, r"head of another size: weight is \(4, 8\) there, \(3, 8\) here"),
        (write_other_classifier, "another classifier's weights"),
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
