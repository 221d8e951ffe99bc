import copy

import pytest
import torch

from fam_plugins.cape import CapeHead, CapeModel, cape_loss, fit_cape_head, with_cape_head
from fam_plugins.cape.batches import FeatureCache

from .conftest import small_network

QUIET = {"progress": False}


@pytest.fixture
def model(network):
    return with_cape_head(network)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, state, *, but_head=False):
    for name, tensor in model.state_dict().items():
        if not (but_head and name.startswith("head.")):
            assert torch.equal(tensor, state[name]), name


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


def test_a_cached_fit_runs_the_backbone_once(model, batches):
    """What that saves in time is measured in tests/benchmarks/cape_fit.py."""
    calls = []
    handle = model.model[0].register_forward_hook(lambda *_: calls.append(1))
    fit_cape_head(model, batches, **QUIET, epochs=20, cache=True)
    assert len(calls) == len(batches)
    fit_cape_head(model, batches, **QUIET, epochs=2)
    assert len(calls) == 3 * len(batches)
    handle.remove()


def test_the_cache_serves_every_image_once_per_epoch(model, batches):
    uncached = fit_cape_head(copy.deepcopy(model), batches, epochs=1, lr=1e-12, **QUIET)
    # A one-shot iterator will do, since it is read once.
    cached = fit_cape_head(model, iter(batches), epochs=2, lr=1e-12, cache=True, **QUIET)
    for name in ("loss", "agreement", "confidence"):
        assert getattr(cached, name) == pytest.approx(getattr(uncached, name) * 2, rel=1e-5)


def test_the_cache_is_shuffled_anew_every_epoch():
    features, logits = torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10.0)[:, None]
    cache = FeatureCache([(features[:4], logits[:4]), (features[4:], logits[4:])])
    orders = []
    for epoch in (0, 1, 1):
        batches = list(cache.shuffled(epoch))
        assert [len(f) for f, _ in batches] == [4, 4, 2]
        assert len(cache) == 3
        assert all(torch.equal(f.flatten(), t.flatten()) for f, t in batches)
        orders.append(torch.cat([f for f, _ in batches]).flatten().tolist())
        assert sorted(orders[-1]) == list(range(10))
    assert orders[0] != orders[1] == orders[2]


def test_loaders_of_images_alone_and_other_dtypes(model, batches):
    fit_cape_head(model, [images.double() for images, _ in batches], epochs=1, **QUIET)
    fit_cape_head(model, [[images, y, "name"] for images, y in batches], epochs=1, **QUIET)


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


def test_a_diverging_fit_is_stopped(model, batches):
    state = state_of(model)
    with pytest.raises(FloatingPointError, match="lower lr"):
        fit_cape_head(model, batches * 20, epochs=2, lr=1e30, **QUIET)
    assert_unchanged(model, state)


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


images = torch.randn(4, 1, 6, 6)
nan_images = images.clone()
nan_images[2, 0, 1, 1] = float("nan")


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "loader is empty"),
        ([images, nan_images], ValueError, "batch 1 of the loader: images hold NaN"),
        ([images / 0], ValueError, "NaN or infinity"),
        ([images[0]], ValueError, "DataLoader"),
        ([images[:0]], ValueError, "DataLoader"),
        ([images.expand(4, 3, 6, 6)], ValueError, "did not accept images of shape"),
        ([images.to(torch.uint8)], TypeError, r"images\.float\(\) / 255"),
        ([{"image": images}], TypeError, r"yield images or \(images, labels\)"),
        ([()], TypeError, "yield images"),
        ([images, torch.randn(4, 1, 8, 8)], ValueError, "cannot share a cache"),
    ],
)
@pytest.mark.parametrize("cache", [False, True])
def test_bad_loaders_are_refused(model, loader, error, message, cache):
    if "cache" in message and not cache:
        fit_cape_head(model, loader, epochs=1, **QUIET)  # sizes may vary without a cache
        return
    state = state_of(model)
    with pytest.raises(error, match=message):
        fit_cape_head(model, loader, epochs=2, cache=cache, **QUIET)
    assert_unchanged(model, state)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


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
        ({"epochs": 0}, "epochs must be a whole number, at least 1, not 0"),
        ({"epochs": 1.5}, "whole number"),
        ({"lr": 0.0}, r"lr must be above 0, not 0\.0"),
        ({"lr": float("nan")}, "lr must be above 0, not nan"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"step_size": 0}, "step_size must be a whole number"),
        ({"gamma": 0.0}, r"gamma must be in \(0, 1\]"),
        ({"temperature": 0.0}, "temperature must be above 0"),
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
