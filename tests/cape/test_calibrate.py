import math

import pytest
import torch
import torch.nn.functional as F

from fam_plugins.cape import calibrate_temperature, cape_loss, fit_cape_head, with_cape_head
from fam_plugins.cape.calibrate import _best_shift

from .conftest import small_network


@pytest.fixture
def model(network):
    model = with_cape_head(network)
    with torch.no_grad():
        model.head.weight.mul_(6)
    return model


@pytest.fixture
def labelled(model, batches):
    """Labels that follow the CAPE head's own probabilities, sharpened: a shift below 0 is right."""
    torch.manual_seed(3)
    found = []
    with torch.no_grad():
        for images, _ in batches * 6:
            images = torch.randn_like(images)
            model.eval()
            p = (3 * model(images)).softmax(1)
            found.append((images, torch.multinomial(p, 1).squeeze(1)))
    model.train()
    return found


def collect(model, labelled):
    model.eval()
    with torch.no_grad():
        pairs = [model.both(images) for images, _ in labelled]
    log_p, logits = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
    return log_p, logits, torch.cat([labels for _, labels in labelled])


def plain_ece(p, labels, bins=15):
    """Expected calibration error by a plain loop."""
    hits = (p.argmax(1) == labels).tolist()
    rows = list(zip(p.amax(1).tolist(), hits, strict=True))
    total = 0.0
    for i in range(bins):
        inside = [
            r for r in rows if i / bins <= r[0] < (i + 1) / bins or (r[0] == 1 == (i + 1) / bins)
        ]
        if inside:
            accuracy = sum(hit for _, hit in inside) / len(inside)
            confidence = sum(c for c, _ in inside) / len(inside)
            total += len(inside) / len(rows) * abs(accuracy - confidence)
    return total


def test_the_report_is_what_a_plain_evaluation_says(model, labelled):
    log_p, logits, labels = collect(model, labelled)
    report = calibrate_temperature(model, labelled)
    after, _, _ = collect(model, labelled)
    assert report.images == len(labels)
    assert report.nll_before == pytest.approx(F.nll_loss(log_p, labels).item(), abs=1e-9)
    assert report.nll_after == pytest.approx(F.nll_loss(after, labels).item(), abs=1e-6)
    assert report.nll_vanilla == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-9)
    assert report.ece_before == pytest.approx(plain_ece(log_p.exp(), labels), abs=1e-9)
    assert report.ece_after == pytest.approx(plain_ece(after.exp(), labels), abs=1e-6)
    assert report.ece_vanilla == pytest.approx(plain_ece(logits.softmax(1), labels), abs=1e-9)


def test_the_shift_is_the_best_one_and_moves_temperatures_only(model, labelled):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, _, labels = collect(model, labelled)
    report = calibrate_temperature(model, labelled)
    assert report.nll_after < report.nll_before - 0.01
    assert report.shift < -0.1
    for name, tensor in model.state_dict().items():
        sign = {"head.t1": 1, "head.t2": 1, "head.t3": -1}.get(name, 0)
        moved = state[name] + sign * report.shift if sign else state[name]
        torch.testing.assert_close(tensor, moved)
    # No other shift does better, by a plain scan.
    for extra in (*(i / 20 for i in range(-40, 41)), -0.02, -0.01, 0.01, 0.02):
        with torch.no_grad():
            model.head.t1.add_(extra)
            model.head.t2.add_(extra)
        log_p, _, _ = collect(model, labelled)
        assert F.nll_loss(log_p, labels) > report.nll_after - 1e-7
        with torch.no_grad():
            model.head.t1.sub_(extra)
            model.head.t2.sub_(extra)


def test_the_distillation_loss_does_not_notice(model, labelled, batches):
    fit_cape_head(model, batches, epochs=2, lr=0.05, progress=False)
    model.double().eval()
    with torch.no_grad():
        features, logits = model.features_and_logits(labelled[0][0].double())
    before = cape_loss(model.head, features, logits, alpha=0)
    report = calibrate_temperature(model, labelled)
    assert abs(report.shift) > 0.05
    after = cape_loss(model.head, features, logits, alpha=0)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore:the best temperature shift")  # nothing to learn from noise
def test_the_likelihood_never_falls(dtype, seed):
    """Random labels too, and temperatures that a narrow type has to round."""
    torch.manual_seed(seed)
    model = with_cape_head(small_network().to(dtype))
    loader = [(torch.randn(16, 1, 6, 6), torch.randint(0, 3, (16,))) for _ in range(3)]
    report = calibrate_temperature(model, loader)
    assert report.nll_after <= report.nll_before
    log_p, _, labels = collect(model, [(x.to(dtype), y) for x, y in loader])
    assert F.nll_loss(log_p, labels).item() == pytest.approx(report.nll_after, abs=1e-6)


def test_the_deeper_of_two_valleys_is_found():
    """A mixture's likelihood may have several; three points would see the shallow one alone."""

    def nll(d):
        return 2 - math.exp(-((d + 1.2) ** 2)) - 1.5 * math.exp(-20 * (d - 2.6) ** 2)

    assert _best_shift(nll, -5.0, 5.0) == pytest.approx(2.6, abs=1e-3)


def test_no_shift_is_tried_too():
    """A grid of its own need not hold 0, and the likelihood must not fall."""
    tried = []
    assert _best_shift(lambda d: tried.append(d) or float(d != 0), -1.0, 7.0) == 0
    assert 0.0 in tried


def test_a_likelihood_that_rises_to_the_bound_reaches_it():
    for low, high, best in ((-5.0, 5.0, 5.0), (-5.0, 5.0, -5.0), (-1.0, 7.0, 7.0)):
        with pytest.warns(UserWarning, match=rf"\{best:+.3f}, lies at the bound"):
            assert _best_shift(lambda d, best=best: abs(d - best), low, high) == best


def test_a_second_calibration_changes_nothing(model, labelled):
    calibrate_temperature(model, labelled)
    again = calibrate_temperature(model, labelled)
    assert abs(again.shift) < 1e-2
    assert again.nll_after <= again.nll_before


def test_separable_images_hit_the_bound_and_say_so(model, labelled):
    with torch.no_grad():
        model.head.weight.mul_(10)  # one region decides
        easy = [(x, model.eval()(x).argmax(1)) for x, _ in labelled[:1]]
    with pytest.warns(UserWarning, match="at the bound"):
        report = calibrate_temperature(model, easy)
    assert report.shift == pytest.approx(-5, abs=1e-3)


def test_modes_flags_and_gradients_stay(model, labelled):
    model.model[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    calibrate_temperature(model, iter(labelled))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_report_reads_well(model, labelled):
    report = calibrate_temperature(model, labelled)
    first, names, *rows = str(report).splitlines()
    count = sum(len(labels) for _, labels in labelled)
    assert first == f"temperature shift {report.shift:+.4f}, fitted on {count} held-out images"
    assert report.images == count
    assert names.split() == ["NLL", "ECE"]
    expected = [
        ("CAPE before", report.nll_before, report.ece_before),
        ("CAPE after", report.nll_after, report.ece_after),
        ("vanilla head", report.nll_vanilla, report.ece_vanilla),
    ]
    for row, (name, nll, ece) in zip(rows, expected, strict=True):
        assert row.startswith(name)
        assert [float(word) for word in row.split()[-2:]] == pytest.approx([nll, ece], abs=6e-5)


images, labels = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "loader is empty"),
        ([images], ValueError, r"no tensor of labels: yield \(images, labels\)"),
        ([(images, None)], ValueError, "no tensor of labels"),
        ([(images, labels + 1)], ValueError, "label 3 is out of range"),
        ([(images, labels - 1)], ValueError, "label -1 is out of range"),
        ([(images, labels.float())], TypeError, "int64"),
        ([(images, labels[:2])], ValueError, "each of the 4 images"),
        ([(images, F.one_hot(labels))], ValueError, "one class index"),
        ([(images * float("nan"), labels)], ValueError, "NaN"),
        ([(images[:, :, 0], labels)], ValueError, "batch"),
    ],
)
def test_bad_loaders_are_refused(model, loader, error, message):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        calibrate_temperature(model, loader)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_other_arguments_are_refused(model, network):
    with pytest.raises(TypeError, match="with_cape_head"):
        calibrate_temperature(network, [(images, labels)])
    for bounds in ((0.5, 2.0), (-2.0, 0.0), (-100.0, 1.0)):
        with pytest.raises(ValueError, match="around 0"):
            calibrate_temperature(model, [(images, labels)], bounds=bounds)
