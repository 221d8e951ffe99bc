"""The bench of layers and tails on transformers: its rule, its peers, the whole in miniature."""

from __future__ import annotations

import copy
import json
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("timm", reason="the networks are timm's")
pytest.importorskip("torchcam", reason="LeGrad is torchcam's")

from fam_plugins import SimilarityModel
from tests.benchmarks import vit_quality
from tests.benchmarks.quality import verdict, vit_methods, vit_verdict, vits


@pytest.fixture(autouse=True)
def _threads():
    """The benchmark computes on one thread; the other tests need not."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def summary():
    return json.loads(vit_quality.SUMMARY.read_text(encoding="utf-8"))


def test_the_published_summary_holds_every_row_of_five_networks(summary):
    assert summary["networks"] >= 5
    assert list(summary["kinds"]) == list(vits.KINDS)
    for kind, measured in summary["kinds"].items():
        assert len(measured["accuracy"]) == len(measured["found"]) == summary["networks"]
        assert list(measured["rows"]) == [*vit_methods.explainers(kind), "random"]
        for columns in measured["rows"].values():
            assert all(len(values) == summary["networks"] for values in columns.values())


def test_the_readme_says_what_the_rule_makes_of_the_numbers(summary):
    text = vit_quality.README.read_text(encoding="utf-8")
    assert verdict.insert(text, vit_verdict.page(summary), vit_verdict.SOURCE) == text
    other = copy.deepcopy(summary)
    for measured in other["kinds"].values():
        measured["rows"]["random"]["energy"] = [0.9] * summary["networks"]
    assert verdict.insert(text, vit_verdict.page(other), vit_verdict.SOURCE) != text


NOISE = np.array([0.5, 0.52, 0.49, 0.51, 0.48])


def rows_of(kind, **energies):
    """Rows whose values are all noise, but for the energies of some of layer and tail."""
    noise = {"energy": NOISE, "faithfulness": NOISE[::-1]}
    rows = {label: dict(noise) for label in vit_methods.explainers(kind)}
    for name, value in energies.items():
        layer, tail = name.rsplit("_", 1)
        label = vit_methods.fam_row("additive", layer.replace("_", " "), tail)
        rows[label] = noise | {"energy": value}
    return rows


def test_the_rule_takes_the_layer_and_the_tail_of_the_highest_mean():
    kind, high = "class token", NOISE + 0.2
    found = vit_verdict.recommended(rows_of(kind, patches_true=high), kind)
    assert found == ("patches", "true")
    rows = rows_of(kind, block_0_norms=high, block_0_frozen=high)
    assert vit_verdict.recommended(rows, kind) == ("block 0", "frozen")
    rows["additive, block 0, norms"] = {"energy": high + 0.01, "faithfulness": NOISE}
    summary = {"kinds": {kind: {"rows": rows}}}
    said = vit_verdict.sentence(summary, kind)
    assert said.startswith("* **Class token: block 0, `norms`.** `additive` there, against GradCAM")
    assert "(last norm1) +.210 ± .000 energy (ahead)" in said
    assert "`frozen` against `norms`, in energy: behind at block 0; no difference" in said


def test_opposite_numbers_turn_the_words_round():
    rows = rows_of("mean + norm", patches_frozen=NOISE + 0.2)
    said = vit_verdict.by_layer(rows, "mean + norm", "frozen", "true")
    assert re.match("ahead at patches; no difference could be shown at block 0, ", said)
    said = vit_verdict.by_layer(rows, "mean + norm", "true", "frozen")
    assert said.startswith("behind at patches; no difference")


@pytest.mark.parametrize("fault", ["", "captum", "block 0", "last block"])
def test_the_quick_check_finds_a_tail_that_is_not_frozen(fault):
    def value(name, good, bad):
        return bad if fault == name else good

    rows = {
        "additive, patches, frozen": {"energy": 0.5},
        "LayerGradientXActivation, patches, inside ()": {"energy": value("captum", 0.5, 0.4)},
        "additive, block 0, frozen": {"energy": value("block 0", 0.5, 0.3)},
        "additive, block 0, norms": {"energy": 0.3},
        "additive, block 0, true": {"energy": 0.3 + 0.01},
        "additive, last block, true": {"coverage": value("last block", 0.0, 0.4)},
    }
    with pytest.raises(AssertionError) if fault else nullcontext():
        vit_quality.check(rows)


@pytest.fixture(params=["class token", "attention pooling", "mean + norm"])
def asked(request):
    """A model with random weights, two canvases and what is explained of them."""
    torch.manual_seed(0)
    network = vits.build(request.param).eval()
    model = SimilarityModel(network, torch.randn(10, 64), contrast="others")
    return model, None, torch.rand(2, 1, 40, 40), torch.tensor([1, 7])


def test_legrad_explains_the_same_network(asked):
    model, _, images, targets = asked
    block = model.encoder.blocks[1]
    prefix = model.encoder.num_prefix_tokens
    tokens, bias = torch.randn(2, 64 + prefix, 64), vits.near(8, 8, prefix)
    torch.testing.assert_close(
        vit_methods.Copied(block)(tokens, bias), block(tokens, attn_mask=bias)
    )
    maps = vit_methods.legrad(*asked)
    assert maps.shape == (2, 8, 8)
    assert 0 <= maps.min() < maps.max()
    assert not torch.equal(maps, vit_methods.legrad(model, None, images, targets.flip(0)))


def test_rollout_passes_on_all_attention(asked):
    maps = vit_methods.rollout(*asked)
    token = asked[0].encoder.num_prefix_tokens
    assert maps.shape == (2, 8, 8)
    assert maps.min() > 0
    total = maps.sum(dim=(1, 2))
    if token:
        assert (total < 1).all()  # the rest is the class token's own
    else:
        torch.testing.assert_close(total, torch.ones(2))


def test_grad_eclip_by_the_formula():
    torch.manual_seed(0)
    network = vits.build("class token").eval()
    model = SimilarityModel(network, torch.randn(10, 64), contrast="others")
    images, target = torch.rand(1, 1, 40, 40), torch.tensor([3])
    seen = {}
    attention = network.blocks[-1].attn
    handles = [
        attention.qkv.register_forward_hook(lambda _m, _i, out: seen.update(qkv=out)),
        attention.norm.register_forward_hook(lambda _m, _i, out: seen.update(out=out)),
    ]
    score = model(images)[0, 3]
    (gradient,) = torch.autograd.grad(score, seen["out"])
    for handle in handles:
        handle.remove()
    q, k, v = seen["qkv"][0].detach().chunk(3, dim=-1)
    close = [F.cosine_similarity(q[0], k[j], dim=0) for j in range(1, 65)]
    low, high = min(close), max(close)
    expected = [
        max(0.0, float((gradient[0, 0] * v[j]).sum() * (close[j - 1] - low) / (high - low)))
        for j in range(1, 65)
    ]
    found = vit_methods.grad_eclip(model, None, images, target)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected), rtol=1e-4, atol=1e-7)


def test_canvases_show_as_many_digits_as_they_say():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 10
    fields = torch.ones(40, 1, 20, 20) * (labels + 1)[:, None, None, None]
    images, drawn, shown = vits.canvases(fields, labels, 50, 3, generator)
    assert images.shape == (50, 1, 40, 40)
    assert set(shown.sum(1).tolist()) == {1, 2, 3}
    for field in range(4):
        top, left = 20 * (field // 2), 20 * (field % 2)
        value = images[:, 0, top : top + 20, left : left + 20].mean(dim=(1, 2))
        torch.testing.assert_close(value, (drawn[:, field] + 1.0) * shown[:, field])


def test_the_whole_benchmark_in_miniature(tmp_path, capsys):
    counts = "--mosaics 2 --singles 2 --steps 1 --train-steps 2 --seeds 0 --jobs 1"
    kinds = ["conv-attention hybrid"]
    vit_quality.main(["--out", str(tmp_path), *counts.split(), "--kinds", *kinds])
    assert "conv-attention hybrid, seed 0: accuracy" in capsys.readouterr().out
    found = json.loads((tmp_path / "vit_quality.json").read_text(encoding="utf-8"))
    assert list(found["kinds"]) == kinds
    text = (tmp_path / "vit_quality.md").read_text(encoding="utf-8")
    assert text == vit_verdict.page(found) + "\n"
    for kind in kinds:
        assert f"\n| {kind} | `frozen` | `norms` | `true` |" in text
        for layer in vits.KINDS[kind].layers:
            assert f"\n| {kind}: {layer} | " in text
