"""The map-quality benchmark: each metric against a hand computation, and the whole in miniature."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from fam_plugins import prototypes
from fam_plugins.core.scores import score
from tests.benchmarks import map_quality
from tests.benchmarks.quality import cape_metrics, verdict
from tests.benchmarks.quality import similarity_metrics as metrics
from tests.benchmarks.quality.intervals import estimate, paired
from tests.benchmarks.quality.path_rule import path_gradient, path_map
from tests.benchmarks.quality.problems import digits_data, folder_problem, last_map
from tests.benchmarks.quality.randomise import randomised, stages
from tests.networks import TinyNet, encoder

RANDOM = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _threads():
    """The benchmark computes on one thread; the other tests need not."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_pointing_agrees_with_the_examples_loops():
    maps = torch.randn(20, 8, 8, generator=RANDOM)
    cells = torch.randint(0, 4, (20,), generator=RANDOM)
    energy, point = metrics.energy_share(maps, cells), metrics.brightest_in_cell(maps, cells)
    for i in range(20):
        wanted = digits_data.energy_and_pointing(maps[i], int(cells[i]))
        assert (energy[i].item(), point[i].item()) == pytest.approx(wanted, abs=1e-6)


def test_pointing_of_maps_without_a_preference():
    cells = torch.arange(4)
    for cell in cells:
        assert metrics.brightest_in_cell(torch.ones(1, 4, 4), cell[None]).item() == 0.25
        assert metrics.energy_share(torch.ones(1, 4, 4), cell[None]).item() == 0.25
        assert metrics.energy_share(-torch.ones(1, 4, 4), cell[None]).item() == 0


def test_patch_order_ranks_patch_means_and_breaks_ties_at_random():
    maps = torch.tensor([[[1.0, 1, 4, 4], [1, 1, 4, 0], [9, 0, 2, 2], [0, 0, 2, 2]]])
    # Means of the 2 x 2 patches: 1, 3, 2.25, 2.
    assert metrics.patch_order(maps, 2, RANDOM).tolist() == [[1, 2, 3, 0]]
    flat = metrics.patch_order(torch.zeros(400, 4, 4), 2, RANDOM)
    assert all(set(row) == {0, 1, 2, 3} for row in flat.tolist())
    firsts = torch.bincount(flat[:, 0], minlength=4)
    assert firsts.min() > 60


@pytest.mark.parametrize("insert", [False, True])
def test_perturbation_by_hand(insert):
    images = torch.arange(1.0, 17).reshape(1, 1, 4, 4)
    baseline = torch.full((1, 1, 4, 4), 100.0)
    order = torch.tensor([[2, 0, 3, 1]])
    curve = metrics.perturbation_curve(
        lambda x: torch.stack([x.sum(dim=(1, 2, 3)), x[:, 0, 0, 0]], dim=1),
        images,
        baseline,
        order,
        2,
        4,
        insert=insert,
        chunk=3,
    )
    now, source = (baseline.clone(), images) if insert else (images.clone(), baseline)
    wanted = [[now.sum().item(), now[0, 0, 0, 0].item()]]
    for patch in order[0].tolist():
        row, column = 2 * (patch // 2), 2 * (patch % 2)
        for i in range(row, row + 2):
            for j in range(column, column + 2):
                now[0, 0, i, j] = source[0, 0, i, j]
        wanted.append([now.sum().item(), now[0, 0, 0, 0].item()])
    assert curve[0].tolist() == wanted


def test_area_is_that_of_the_trapezoids():
    curve = torch.tensor([[[0.0, 2], [1, 2], [4, 2]]])
    assert metrics.area(curve).tolist() == [[0.5 * (0.5 + 2.5), 2.0]]


def test_rank_correlation_agrees_with_scipy_also_on_ties():
    first = torch.randn(5, 3, 4, generator=RANDOM)
    second = torch.randn(5, 3, 4, generator=RANDOM).clamp_min(0)
    found = metrics.rank_correlation(first, second)
    for i in range(5):
        assert found[i] == pytest.approx(
            spearmanr(first[i].flatten().numpy(), second[i].flatten().numpy()).statistic
        )
    assert np.isnan(metrics.rank_correlation(first, torch.ones(5, 3, 4))).all()


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


@pytest.mark.parametrize("similarity", ["cosine", "dot", "sqeuclidean"])
@pytest.mark.parametrize(
    "head", [nn.Identity(), nn.Linear(6, 4), nn.Sequential(nn.Linear(6, 4), nn.Tanh())]
)
@pytest.mark.parametrize("contrast", [None, "others"])
def test_path_maps_add_up_to_the_difference_of_the_scores(similarity, head, contrast):
    torch.manual_seed(1)
    net = TinyNet(head=head).eval().double()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    embeddings = net(images).detach()
    references, baseline = torch.randn_like(embeddings), embeddings.mean(dim=0) + 0.1

    def first(z):
        return score(similarity, z, references, contrast)[:, 0]

    maps = path_map(net, net.last, first, images, baseline)
    wanted = first(embeddings) - first(baseline[None])
    torch.testing.assert_close(maps.sum(dim=(1, 2)), wanted, rtol=0, atol=1e-9)


def test_path_gradient_by_a_fine_sum():
    torch.manual_seed(2)
    q, b, t = torch.randn(3, 1, 5, dtype=torch.float64)
    found = path_gradient(lambda z: score("cosine", z, t)[:, 0], q, b[0])
    total = torch.zeros_like(q)
    for k in range(4000):
        z = (b + (k + 0.5) / 4000 * (q - b)).requires_grad_()
        total += torch.autograd.grad(score("cosine", z, t).sum(), z)[0] / 4000
    torch.testing.assert_close(found, total, rtol=0, atol=1e-6)


def test_path_map_of_a_pooled_layer_is_the_formula():
    torch.manual_seed(3)
    net = encoder().double()
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    reference, baseline = torch.rand(1, 6).double(), torch.rand(6).double()
    caught = []
    handle = net.last.register_forward_hook(lambda _m, _i, out: caught.append(out.clone()))
    q = net(images).detach()
    handle.remove()

    def cosine(z):
        return score("cosine", z, reference)[:, 0]

    g = path_gradient(cosine, q, baseline)[0]
    a = caught[0][0].detach()
    wanted = torch.zeros(a.shape[1:], dtype=torch.float64)
    for i in range(a.shape[1]):
        for j in range(a.shape[2]):
            wanted[i, j] = (g * (a[:, i, j] - baseline)).sum() / wanted.numel()
    torch.testing.assert_close(path_map(net, net.last, cosine, images, baseline)[0], wanted)


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


def test_intervals():
    values = np.array([1.0, 2, 3, 4, np.nan])
    found = estimate(values)
    assert (found.value, found.count) == (2.5, 4)
    assert 1 <= found.low < 2.5 < found.high <= 4
    assert estimate(np.array([np.nan])).count == 0
    assert estimate(np.array([1.0, 1, 10]), median=True).value == 1
    better = paired(np.arange(20) + 1.0, np.arange(20))
    assert better.above_zero()
    assert (better.value, better.low, better.high) == (1, 1, 1)
    assert not paired(values, values).above_zero()


def test_verdict_says_no_when_nothing_wins():
    noise = np.random.default_rng(0).random(50)
    rows = {
        "rule centred": dict.fromkeys(verdict.JUDGED, noise),
        "GradCAM": dict.fromkeys(verdict.JUDGED, noise),
    }
    assert verdict.statement(rows).startswith("No: ")
    rows["rule centred"] = {
        metric: noise + (1 if more else -1) for metric, more in verdict.JUDGED.items()
    }
    assert verdict.statement(rows).startswith("Yes: outside the paired intervals, rule centred")
    assert verdict.compare(rows, "GradCAM", "rule centred", "energy").word == "worse"


@pytest.mark.parametrize("fault", ["", "energy", "mosaic contrastive deletion", "top-2 overlap"])
def test_the_quick_check_finds_a_map_that_is_none(fault):
    def column(name, good, bad):
        return {name: np.full(4, bad if fault == name else good)}

    deletion = "mosaic contrastive deletion"
    similarity = {
        "rule fam": {"energy": np.full(4, 0.28)},
        "rule centred, contrast others": {
            **column("energy", 0.7, 0.1),
            **column(deletion, -0.1, 0.2),
        },
        "random": {deletion: np.full(4, 0.1)},
    }
    cape = {
        "CAPE": {**column("top-2 overlap", 0.1, 0.6), "complexity": np.full(4, 0.4)},
        "Grad-CAM": {"top-2 overlap": np.full(4, 0.3)},
    }
    found = {"digits": {0: ("", similarity)}}, {0: ("", cape, cape)}
    with pytest.raises(AssertionError) if fault else nullcontext():
        map_quality._check(*found)


def test_image_folder(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in "abcd":
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    drawn = {"seed": 0, "mosaics": 2, "singles": 3, "size": 32}
    problem = folder_problem(str(tmp_path), "resnet18", None, shots=2, **drawn)
    assert problem.layer == "layer4"
    assert problem.mosaics.shape == (2, 3, 64, 64)
    assert problem.references.shape == (4, 512)
    torch.testing.assert_close(
        problem.references,
        prototypes(
            problem.encoder(problem.supports).detach(), problem.support_labels.tolist(), "cosine"
        ),
        atol=1e-5,
        rtol=1e-4,
    )
    with pytest.raises(ValueError, match="at least 4 classes of more than 3 images"):
        folder_problem(str(tmp_path), "resnet18", None, shots=3, **drawn)
    with pytest.raises(ValueError, match="ConvNet"):
        last_map(nn.Flatten(), torch.zeros(1, 3, 4, 4))


def test_the_whole_benchmark_in_miniature(tmp_path, capsys):
    counts = "--mosaics 2 --singles 2 --steps 2 --randomised 1 --timed 1 --train-steps 2 --epochs 1"
    base = ["--out", str(tmp_path), "--seeds", "0", *counts.split(), "--jobs", "1"]
    map_quality.main(base)
    text = (tmp_path / "map_quality.md").read_text(encoding="utf-8")
    assert "wrote" in capsys.readouterr().out
    assert re.findall("^## .*", text, re.MULTILINE) == [
        "## digits, linear head",
        "## digits, pooled ReLU features",
        "## CAPE and CAM on a digits classifier",
    ]
    rows = [line.split(" | ")[0][2:] for line in text.splitlines() if line.startswith("| ")]
    for label in ("rule centred, contrast others", "path rule", "ScoreCAM", "uniform", "mu-CAPE"):
        assert label in rows
    assert len(re.findall("few-shot accuracy|accuracy .* agree on", text)) == 3
    assert (tmp_path / "map_quality.png").stat().st_size > 10_000
    (tmp_path / "map_quality.md").unlink()
    map_quality.main([*base, "--redraw"])
    assert (tmp_path / "map_quality.md").read_text(encoding="utf-8") == text
