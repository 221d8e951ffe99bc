"""A query and its hits, against pairs of it with each; pairs from files; thresholds of scores."""

from __future__ import annotations

import matplotlib.figure
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms as T

from fam_plugins import calibrate_threshold, explain_hits, explain_pair, gallery_mean
from fam_plugins.core.rules import RULES
from tests.networks import State, TinyNet, encoder

A = torch.randn(1, 3, 8, 10, generator=torch.Generator().manual_seed(0))
HITS = torch.randn(4, 3, 12, 6, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
TO_TENSOR = T.Compose([T.ToTensor(), T.Normalize(0.5, 0.5)])

pytestmark = pytest.mark.filterwarnings('ignore:rule "fam" rescales')


def deep_head() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet(head=nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))).eval()


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "sqeuclidean", lambda z, t: z @ t.T])
@pytest.mark.parametrize(
    "contrast", [None, ROWS, "mean", HITS], ids=["none", "rows", "mean", "images"]
)
@pytest.mark.parametrize("rule", RULES)
def test_each_hit_is_a_pair_with_the_query(rule, contrast, similarity, smooth):
    if isinstance(contrast, str):
        linear = isinstance(similarity, str)  # a function of one's own has no such mean
        contrast = gallery_mean(ROWS, similarity=similarity) if linear else ROWS
    for net in (encoder(), deep_head()):
        options = {
            "rule": rule, "contrast": contrast, "similarity": similarity, "smooth": smooth
        }  # fmt: skip
        found = explain_hits(net, "last", A, HITS, **options)
        for j, hit in enumerate(HITS):
            pair = explain_pair(net, "last", A, hit[None], **options)
            for ours, theirs in (
                (found.query_maps[j], pair.map_a[0]),
                (found.hit_maps[j], pair.map_b[0]),
                (found.scores[j], pair.score[0]),
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_one_forward_pass_of_each_image_and_nothing_left_behind():
    net = encoder().train()
    net(A).sum().backward()
    before, seen = State.of(net), []
    with_hook = net.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    explain_hits(net, "last", A, HITS)
    with_hook.remove()
    assert sum(seen) == 1 + len(HITS)
    before.assert_unchanged(net)


def test_bad_input_is_refused_before_any_work():
    net = encoder()
    net.calls = 0
    for query, hits, message in (
        (HITS, HITS, r"4 queries: explain_hits takes one, queries\[i\]"),
        (A, HITS[:0], "hits has shape"),
        (A[:0], HITS, "query has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            explain_hits(net, "last", query, hits)
    with pytest.raises(TypeError, match=r"hits \(list\).*pass transform="):
        explain_hits(net, "last", A, ["x.jpg"])
    assert net.calls == 0


@pytest.fixture
def files(tmp_path):
    paths = []
    for name, seed in (("q.png", 0), ("x.png", 1), ("y.png", 2)):
        pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        paths.append(tmp_path / name)
    return paths


def test_files_become_a_picture_in_one_line(files):
    query, *hits = files
    found = explain_hits(encoder(), "last", query, hits, transform=TO_TENSOR, rule="centred")
    figure = found.plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[1].startswith("x.png: ")
    assert titles[2] == f"y.png: {found.scores[1]:.3f}"
    assert "above the image's mean" in figure.axes[-1].get_ylabel().replace("\n", " ")
    shown = np.asarray(figure.axes[1].get_images()[0].get_array())
    np.testing.assert_allclose(shown, np.asarray(Image.open(hits[0])) / 255, atol=1e-6)
    assert found.plot(captions=["one", "two"]).axes[1].get_title().startswith("one: ")


def test_a_pair_of_files_becomes_a_picture_in_one_line(files):
    a, b, c = files
    net, options = encoder(), {"transform": TO_TENSOR, "rule": "centred", "contrast": [c]}
    pair = explain_pair(net, "last", str(a), b, joint=True, **options)
    expected = explain_pair(
        net, "last", *(TO_TENSOR(Image.open(path))[None] for path in (a, b)),
        rule="centred", contrast=TO_TENSOR(Image.open(c))[None],
    )  # fmt: skip
    torch.testing.assert_close(pair.map_a, expected.map_a)
    opened = explain_pair(net, "last", a, b, **options | {"contrast": [Image.open(c)]})
    assert torch.equal(opened.map_a, pair.map_a)
    figure = pair.plot()
    assert [axis.get_title() for axis in figure.axes[:2]] == ["q.png", "x.png"]
    assert figure.get_suptitle() == f"score {float(pair.score):.3f}"
    shown = np.asarray(figure.axes[1].get_images()[0].get_array())
    np.testing.assert_allclose(shown, np.asarray(Image.open(b)) / 255, atol=1e-6)
    assert pair.plot_matches(top=2).axes[0].get_title() == "q.png"
    both = explain_pair(net, "last", [a, b], [b, c], transform=TO_TENSOR, joint=True)
    assert both.plot(1).axes[0].get_title() == "x.png"
    assert both.plot_matches(1).axes[1].get_title() == "y.png"
    for plot in (both.plot, both.plot_matches):
        with pytest.raises(ValueError, match=r"2 pairs: say which, plot\(0\)"):
            plot()
    with pytest.raises(ValueError, match="joint=True"):
        expected.plot_matches()
    with pytest.raises(ValueError, match="mean= and std="):
        expected.plot()  # a tensor, and nobody said how it was normalised
    undone = expected.plot(mean=0.5, std=0.5, titles=("left", "right"))
    shown = np.asarray(undone.axes[0].get_images()[0].get_array())
    np.testing.assert_allclose(shown, np.asarray(Image.open(a)) / 255, atol=1e-6)
    assert undone.axes[0].get_title() == "left"


@pytest.mark.parametrize("make", [encoder, deep_head])
@pytest.mark.parametrize("rule", ["additive", "centred"])
@pytest.mark.parametrize("contrast", [None, ROWS], ids=["none", "rows"])
def test_the_maps_of_a_margin_sum_to_it(rule, contrast, make):
    b = A.flip(3)
    pair = explain_pair(make(), "last", A, b, rule=rule, contrast=contrast)
    margin = pair.margin(0.25)
    torch.testing.assert_close(margin.score, pair.score - 0.25)
    for ours, theirs in ((margin.map_a, pair.map_a), (margin.map_b, pair.map_b)):
        torch.testing.assert_close(ours.sum((1, 2, 3)), margin.score, rtol=1e-4, atol=1e-5)
        shift = ours - theirs
        torch.testing.assert_close(shift, shift.mean().expand_as(shift))
    figure = margin.plot(mean=0.5, std=0.05)
    assert figure.axes[-1].get_ylabel().replace("\n", " ") == "share of the margin"
    assert figure.get_suptitle() == f"margin {float(margin.score):.3f}"


def test_the_margin_of_each_pair_is_its_own():
    pair = explain_pair(encoder(), "last", HITS, HITS.flip(0), rule="additive")
    margin = pair.margin(0.5)
    torch.testing.assert_close(margin.map_a.sum((1, 2, 3)), pair.score - 0.5, rtol=1e-4, atol=1e-5)
    assert torch.equal(pair.same(float(pair.score[1])), pair.score >= pair.score[1])
    with pytest.raises(ValueError, match=r'rule "fam" are no shares.*rule="additive"'):
        explain_pair(encoder(), "last", A, A, rule="fam").margin(0.5)


def test_a_threshold_from_known_pairs_against_every_threshold():
    generator = np.random.default_rng(0)
    for _ in range(20):
        same = generator.random(60) < 0.4
        scores = (generator.normal(size=60) + same).round(1)  # ties
        found = calibrate_threshold(scores, same)
        rates = {}
        for cut in [*np.unique(scores), np.inf]:
            accepted = scores >= cut
            rates[cut] = (
                (accepted & ~same).sum() / (~same).sum(),
                (~accepted & same).sum() / same.sum(),
            )
        gap = min(abs(a - r) for a, r in rates.values())
        assert abs(found.false_accept_rate - found.false_reject_rate) == pytest.approx(gap)
        again = scores >= found.threshold
        assert (again & ~same).sum() / (~same).sum() == pytest.approx(found.false_accept_rate)
        assert (~again & same).sum() / same.sum() == pytest.approx(found.false_reject_rate)
        strict = calibrate_threshold(
            torch.tensor(scores), torch.tensor(same), false_accept_rate=0.1
        )
        best = min(r for a, r in rates.values() if a <= 0.1)
        assert strict.false_accept_rate <= 0.1
        assert strict.false_reject_rate == pytest.approx(best)
        assert strict.equal_error_rate == found.equal_error_rate
        never = calibrate_threshold(scores, same, false_accept_rate=0)
        assert not (scores[~same] >= never.threshold).any()


def test_a_perfect_score_has_no_error_and_a_threshold_halfway():
    found = calibrate_threshold([0.2, 0.9, 0.8, 0.1], [0, 1, 1, 0])
    assert found == (pytest.approx(0.5), 0, 0, 0)
    assert calibrate_threshold([0.9, 0.1], [0, 1], false_accept_rate=0).threshold > 0.9


@pytest.mark.parametrize(
    ("scores", "same", "options", "message"),
    [
        ([1.0, 2.0], [True, True], {}, "pairs of both kinds"),
        ([1.0, 2.0], [1, -1], {}, "true or false"),
        ([1.0, 2.0], [1, 0, 1], {}, r"\(2,\) and labels of shape \(3,\)"),
        ([1.0, np.nan], [1, 0], {}, "finite"),
        ([[1.0, 2.0]], [[1, 0]], {}, "one finite score"),
        ([1.0, 2.0], [1, 0], {"false_accept_rate": 2}, r"in \[0, 1\], not 2"),
    ],
)
def test_bad_pairs_are_named(scores, same, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate_threshold(scores, same, **options)
