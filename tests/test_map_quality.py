"""The map-quality benchmark: its rule, its intervals, CAPE's metrics, the whole in miniature."""

from __future__ import annotations

import copy
import json
import math
import re
from contextlib import nullcontext
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn
from torchvision.models import resnet18

from tests.benchmarks import map_quality
from tests.benchmarks.quality import cape_metrics, verdict
from tests.benchmarks.quality.intervals import over_networks
from tests.benchmarks.quality.problems import digits_data, folder_problem, last_map
from tests.benchmarks.quality.randomise import randomised, stages


@pytest.fixture(autouse=True)
def _threads():
    """The benchmark computes on one thread; the other tests need not."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_protocol_of_the_cape_paper_by_hand():
    whole, masked = torch.tensor([0.8, 0.5]), torch.tensor([0.2, 0.6])
    torch.testing.assert_close(cape_metrics.average_drop(whole, masked), torch.tensor([0.75, 0]))
    assert cape_metrics.increase_in_confidence(whole, masked).tolist() == [0, 1]
    torch.testing.assert_close(
        cape_metrics.drop_in_deletion(whole, masked), torch.tensor([0.75, -0.2])
    )
    maps = torch.tensor([[[0.0, 1], [0.5, 0.5]], [[3.0, 3], [3, 3]]])
    torch.testing.assert_close(cape_metrics.complexity(maps[:1]), torch.tensor([0.5]))
    assert cape_metrics.scaled(2 * maps - 1)[0].tolist() == [[0, 1], [0.5, 0.5]]
    assert cape_metrics.scaled(maps)[1].eq(0).all()
    coherent = cape_metrics.coherency(maps, torch.tensor([[[1.0, 0], [0.5, 0.5]]] * 2))
    assert coherent.tolist() == pytest.approx([0, 0], abs=1e-6)  # opposite; constant
    assert cape_metrics.coherency(maps[:1], 5 * maps[:1] + 2).item() == pytest.approx(1)
    found = cape_metrics.adcc(*(torch.tensor([v]) for v in (0.75, 0.9, 0.4)))
    assert found[0] == pytest.approx(3 / (1 / 0.9 + 1 / 0.6 + 1 / 0.25))
    assert cape_metrics.adcc(*(torch.tensor([v]) for v in (1.0, 0.9, 0.4)))[0] == 0
    other = torch.tensor([[[1.0, 1], [0, 0.25]]])
    assert cape_metrics.overlap(maps[:1], other)[0] == pytest.approx((0 + 1 + 0 + 0.25) / 3)
    assert math.isnan(cape_metrics.overlap(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))[0])


def test_randomisation_goes_down_from_the_output_and_leaves_the_network():
    net = digits_data.Encoder().eval()
    parts = stages(net)
    assert parts[0] == ["head"]
    assert parts[1] == ["features.11", "features.12"]  # the last convolution and its norm
    assert len(parts) == 5
    before = {name: value.clone() for name, value in net.state_dict().items()}
    copied = randomised(net, parts[0] + parts[1], seed=0)
    changed = {n for n, v in copied.state_dict().items() if not torch.equal(v, before[n])}
    assert {name.rsplit(".", 1)[0] for name in changed} <= {"head", "features.11", "features.12"}
    assert {"head.weight", "features.11.weight"} <= changed
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_an_interval_over_networks_is_students():
    values = [0.1, 0.3, 0.2, 0.25, 0.4]
    found = over_networks(values)
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert (found.value, found.count, found.sign) == (pytest.approx(0.25), 5, 1)
    assert (found.value - found.half, found.value + found.half) == pytest.approx((low, high))
    # Five intervals of which 95 % hold together are those of 99 % each.
    low, high = stats.t.interval(0.99, 4, np.mean(values), stats.sem(values))
    assert over_networks(values, 5).half == pytest.approx((high - low) / 2)
    assert over_networks([-v for v in values]).sign == -1
    assert over_networks([-0.1, 0.3, 0.0]).sign == 0
    assert over_networks([5.0, np.nan]).sign == 0  # one network has no interval
    assert over_networks([]).count == 0


@pytest.fixture
def summary():
    return json.loads(map_quality.SUMMARY.read_text(encoding="utf-8"))


def test_the_published_summary_is_over_networks(summary):
    assert summary["networks"] >= 5
    assert list(summary["kinds"]) == list(map_quality.KINDS)
    for measured in summary["kinds"].values():
        assert len(measured["accuracy"]) == summary["networks"]
        assert list(measured["rows"]) == verdict.SHOWN
        for columns in measured["rows"].values():
            assert list(columns) == list(verdict.JUDGED)
            assert all(len(values) == summary["networks"] for values in columns.values())


@pytest.mark.parametrize("page", map_quality.PAGES, ids=lambda page: page.parent.name)
def test_the_readmes_say_what_the_rule_makes_of_the_numbers(page, summary):
    text, rule = page.read_text(encoding="utf-8"), map_quality.PAGES[page]
    assert verdict.insert(text, rule(summary)) == text
    assert verdict.insert(text, "other") != text
    with pytest.raises(ValueError, match="markers"):
        verdict.insert("a page", "block")


def exchanged(summary, first, second):
    """The same numbers, of two rows the other way round."""
    other = copy.deepcopy(summary)
    for measured in other["kinds"].values():
        rows = measured["rows"]
        rows[first], rows[second] = rows[second], rows[first]
    return other


@pytest.mark.parametrize("title", verdict.PAIRS)
def test_opposite_numbers_turn_the_sentences_round(title, summary):
    said = verdict.sentence(summary, title)
    turned = verdict.sentence(exchanged(summary, *verdict.PAIRS[title]), title)
    words = [re.findall(r"(ahead|behind|no difference)", text) for text in (said, turned)]
    opposite = {"ahead": "behind", "behind": "ahead", "no difference": "no difference"}
    assert sorted(words[0]) == sorted(opposite[word] for word in words[1])
    assert said != turned or set(words[0]) == {"no difference"}


def kinds_of(first, second):
    """A summary of one kind, whose measures are all the same, for the first pair."""
    one, other = next(iter(verdict.PAIRS.values()))
    rows = {
        one: dict.fromkeys(verdict.JUDGED, first),
        other: dict.fromkeys(verdict.JUDGED, second),
    }
    return {"kinds": {"linear head": {"rows": rows}}}


def test_the_rule_on_numbers_by_hand():
    title = next(iter(verdict.PAIRS))
    noise = [0.50, 0.52, 0.49, 0.51, 0.48]
    better = [value + 0.1 + 0.001 * k for k, value in enumerate(noise)]
    said = verdict.sentence(kinds_of(better, noise), title)
    # Of all but the correlation, more is better.
    assert "ahead in energy, point, AUC, faithfulness on mosaics, faithfulness on single" in said
    assert "behind in dependence on the reference." in said
    assert "no difference" not in said
    said = verdict.sentence(kinds_of(noise, noise[::-1]), title)
    assert said.count("no difference could be shown in any of the six.") == 1
    assert "ahead" not in said
    # Ahead on average, on the mosaics of one network by far, is not enough.
    lucky = [value + gain for value, gain in zip(noise, [0.3, 0, 0.01, -0.01, 0], strict=True)]
    assert "ahead" not in verdict.sentence(kinds_of(lucky, noise), title)


def test_the_rule_on_cape():
    low, high = [0.1, 0.12, 0.11, 0.13, 0.1], [0.4, 0.43, 0.41, 0.44, 0.4]
    rows = {
        "CAPE": {"average drop": high, "top-2 overlap": low},
        "random": {"average drop": low},
        "Grad-CAM": {"top-2 overlap": high},
    }
    said = verdict.cape_sentence({"cape": rows})
    assert re.findall("ahead|behind|no difference", said) == ["behind", "ahead"]
    rows["CAPE"] = {"average drop": low, "top-2 overlap": high}
    rows["random"], rows["Grad-CAM"] = {"average drop": high}, {"top-2 overlap": low}
    said = verdict.cape_sentence({"cape": rows})
    assert re.findall("ahead|behind|no difference", said) == ["ahead", "behind"]


@pytest.mark.parametrize("fault", ["", "energy", "mosaic deletion", "top-2 overlap"])
def test_the_quick_check_finds_a_map_that_is_none(fault):
    def value(name, good, bad):
        return {name: bad if fault == name else good}

    deletion = "mosaic deletion"
    similarity = {
        "fam": {"energy": 0.28},
        "centred, contrast others": {**value("energy", 0.7, 0.1), **value(deletion, -0.1, 0.2)},
        "random": {deletion: 0.1},
    }
    cape = {
        "CAPE": {**value("top-2 overlap", 0.1, 0.6), "complexity": 0.4},
        "Grad-CAM": {"top-2 overlap": 0.3},
    }
    found = {"digits": {0: (similarity, 0.9)}}, {0: ("", cape, cape)}
    with pytest.raises(AssertionError) if fault else nullcontext():
        map_quality._check(*found)


def test_image_folder(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in "abcd":
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(7):
            pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{i}.png")
    weights = tmp_path / "weights.pt"
    torch.manual_seed(0)
    torch.save(resnet18(weights=None).state_dict(), weights)
    folder = str(tmp_path / "set")
    assert folder_problem(folder, "resnet18", str(weights), size=32).layer == "layer4"
    given = f"--arch resnet18 --weights {weights} --size 32 --mosaics 2 --singles 2 --steps 1"
    out = ["--out", str(tmp_path / "out")]
    map_quality.main(["--image-folder", folder, *given.split(), *out])
    text = (tmp_path / "out" / "map_quality.md").read_text(encoding="utf-8")
    assert text.startswith("# resnet18 on set")
    assert "| GradCAM, contrast others, smoothed |" in text
    assert capsys.readouterr().out == text + "\n"
    assert (tmp_path / "out" / "map_quality.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="ConvNet"):
        last_map(nn.Flatten(), torch.zeros(1, 3, 4, 4))


def test_weights_that_cannot_be_downloaded_are_one_sentence(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    arguments = ["--image-folder", str(tmp_path), "--arch", "resnet18", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"resnet18 .* \(Name or .*\): pass a state dict") as exit:
        map_quality.main(arguments)
    assert exit.value.__suppress_context__


def test_the_whole_benchmark_in_miniature(tmp_path, capsys):
    counts = "--mosaics 2 --singles 2 --steps 1 --randomised 1 --train-steps 2 --epochs 1"
    base = ["--out", str(tmp_path), "--seeds", "0", *counts.split(), "--jobs", "1"]
    map_quality.main([*base, "--kinds", "linear head"])
    text = (tmp_path / "map_quality.md").read_text(encoding="utf-8")
    assert "wrote" in capsys.readouterr().out
    assert re.findall("^## .*", text, re.MULTILINE) == [
        "## linear head",
        "## CAPE and CAM on a digits classifier",
        "## In words, by rule",
    ]
    rows = [line.split(" | ")[0][2:] for line in text.splitlines() if line.startswith("| ")]
    for label in (*verdict.SHOWN, "EigenCAM", "uniform", "mu-CAPE"):
        assert label in rows
    summary = json.loads((tmp_path / "map_quality.json").read_text(encoding="utf-8"))
    assert len(summary["kinds"]["linear head"]["rows"]["fam"]["energy"]) == 1
    assert verdict.benchmarks_page(summary) in text
    assert (tmp_path / "map_quality.png").stat().st_size > 10_000
    (tmp_path / "map_quality.md").unlink()
    map_quality.main([*base, "--redraw"])
    assert (tmp_path / "map_quality.md").read_text(encoding="utf-8") == text
