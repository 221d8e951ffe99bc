"""Plots: what is drawn, on which scale, and that nothing global is touched."""

from __future__ import annotations

import io
import subprocess
import sys

import matplotlib
import matplotlib.image
import matplotlib.style
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.patches import ConnectionPatch

from fam_plugins import Rule, explain_pair, plots
from fam_plugins.core.rules import RULES
from fam_plugins.plots import plot_episode, plot_map, plot_matches, plot_pair, plot_retrieval
from tests.networks import encoder

GENERATOR = torch.Generator().manual_seed(0)

A, M = torch.rand(3, 8, 8), torch.randn(1, 2, 2)
TWO, MM = torch.rand(2, 3, 8, 8), torch.randn(2, 1, 2, 2)
BAD = A.clone()
BAD[0, 0, 0] = torch.nan


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=GENERATOR)


def maps(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def layers(axis):
    """The arrays on an axis, from the lowest up."""
    return [np.asarray(drawn.get_array()) for drawn in axis.get_images()]


def over(image, attribution, most):
    """The colours of a map over an image ``[3 or 1, H, W]``, worked out pixel by pixel."""
    values = F.interpolate(attribution.reshape(1, 1, *attribution.shape[-2:]), image.shape[-2:],
                           mode="bilinear")[0, 0]  # fmt: skip
    green, red = ([0, 160 / 255, 48 / 255], [240 / 255, 32 / 255, 32 / 255])
    found = np.zeros((*values.shape, 3))
    for y, x in np.ndindex(*values.shape):
        share = float(values[y, x]) / most
        grey = 0.3 + 0.65 * float(image.reshape(-1, *image.shape[-2:])[:, y, x].mean())
        for channel in range(3):
            colour = (red if share < 0 else green)[channel]
            found[y, x, channel] = grey + 0.75 * abs(share) * (colour - grey)
    return found


def scale(figure):
    return figure.axes[-1].get_ylim()


def test_a_pair_shows_both_images_and_both_maps_on_one_scale():
    a, b = images(3, 12, 16), images(1, 20, 10)
    map_a, map_b = maps(1, 3, 4), 5 * maps(1, 1, 5, 5)
    figure = plot_pair(a, b, map_a, map_b, score=torch.tensor(0.25), titles=("left", "right"))
    top_a, top_b, low_a, low_b, bar = figure.axes
    np.testing.assert_allclose(layers(top_a)[0], a.permute(1, 2, 0))
    for channel in range(3):
        np.testing.assert_allclose(layers(top_b)[0][..., channel], b[0])
    assert (top_a.get_title(), top_b.get_title()) == ("left", "right")
    most = float(max(map_a.abs().max(), map_b.abs().max()))
    for axis, image, drawn in ((low_a, a, map_a), (low_b, b, map_b)):
        np.testing.assert_allclose(layers(axis)[0], over(image, drawn, most), atol=1e-6)
        assert axis.get_aspect() == 1
    assert scale(figure) == (-most, most)
    assert bar.get_ylabel() == "attribution"
    assert figure.get_suptitle() == "score 0.250"


def test_maps_without_negative_values_start_at_zero():
    figure = plot_pair(images(4, 4), images(4, 4), maps(1, 2, 2).abs(), torch.zeros(1, 2, 2))
    assert scale(figure)[0] == 0
    zeros = plot_pair(images(4, 4), images(4, 4), torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))
    assert scale(zeros) == (0, 1)
    np.testing.assert_allclose(np.ptp(layers(zeros.axes[2])[0], axis=-1), 0)  # greys


def test_one_negative_map_makes_the_scale_signed_for_both():
    figure = plot_pair(images(4, 4), images(4, 4), maps(1, 2, 2).abs(), -maps(1, 2, 2).abs())
    assert scale(figure)[0] == -scale(figure)[1] < 0


def test_every_colour_of_a_map_is_on_the_bar():
    image = torch.arange(64).reshape(8, 8) / 63
    figure = plot_map(image, maps(4, 4))
    bar, low, high = layers(figure.axes[-1])[-1], *scale(figure)
    drawn = figure.axes[-1].get_images()[-1]
    assert (drawn.get_extent()[2:], drawn.origin) == ([low, high], "lower")
    colours = layers(figure.axes[1])[0].reshape(-1, 3)
    gaps = np.abs(colours[:, None] - bar.reshape(1, -1, 3)).max(axis=-1).min(axis=1)
    assert gaps.max() < 0.015  # the steps of the bar
    # Upwards along the bar: from red over the greys themselves to green.
    assert (bar[0, :, 0] > bar[0, :, 1] + 0.3).all()
    assert (bar[-1, :, 1] > bar[-1, :, 0] + 0.3).all()
    np.testing.assert_allclose(np.ptp(bar[127:129], axis=-1), 0, atol=0.01)
    assert (np.diff(bar[128, :, 0]) > 0).all()


def test_one_image_and_its_map():
    figure = plot_map(images(3, 6, 9), maps(2, 3), score=torch.tensor([[0.5]]), title="cat")
    image, drawn, bar = figure.axes
    assert (image.get_title(), drawn.get_title()) == ("cat", "score 0.500")
    assert bar.get_ylabel() == "attribution"
    assert plot_map(images(4, 4), maps(1, 1, 2, 2)).axes[1].get_title() == ""


def test_an_episode_is_a_grid_with_the_nearest_reference_framed():
    queries, references = images(2, 3, 8, 8), images(3, 3, 6, 6)
    drawn = maps(2, 3, 1, 2, 2)
    scores = [[0.1, 0.3, 0.2], [0.9, 0.5, 0.4]]
    figure = plot_episode(queries, references, drawn, scores=scores, labels=["x", "y", "z"])
    grid = np.array(figure.axes[:12]).reshape(3, 4)
    assert len(figure.axes) == 13
    assert not layers(grid[0, 0])
    for j in range(3):
        np.testing.assert_allclose(layers(grid[0, j + 1])[0], references[j].permute(1, 2, 0))
        assert grid[0, j + 1].get_title() == "xyz"[j]
    for i in range(2):
        np.testing.assert_allclose(layers(grid[i + 1, 0])[0], queries[i].permute(1, 2, 0))
        assert grid[i + 1, 0].get_title() == f"query {i}"
        for j in range(3):
            expected = over(queries[i], drawn[i, j], float(drawn.abs().max()))
            np.testing.assert_allclose(layers(grid[i + 1, j + 1])[0], expected, atol=1e-6)
            assert grid[i + 1, j + 1].get_title() == f"{scores[i][j]:.3f}"
            wide = grid[i + 1, j + 1].spines["top"].get_linewidth() > 2
            assert wide == (j == [1, 0][i])
    assert scale(figure) == (-float(drawn.abs().max()), float(drawn.abs().max()))


def test_captions_stand_where_references_have_no_images():
    figure = plot_episode(TWO, None, torch.randn(2, 2, 1, 2, 2), labels=["a $cat", "a dog"])
    grid = np.array(figure.axes[:9]).reshape(3, 3)
    assert [axis.texts[0].get_text() for axis in grid[0, 1:]] == ["a $cat", "a dog"]
    assert not any(layers(axis) for axis in grid[0])
    figure.savefig(io.BytesIO(), format="png")  # a dollar starts no formula
    words, query = (grid[row, 1].get_position().height for row in (0, 1))
    assert words < 0.3 * query
    with pytest.raises(ValueError, match=r"labels=\[\.\.\.\]"):
        plot_episode(TWO, None, torch.randn(2, 2, 1, 2, 2))


def test_a_ranked_list_without_maps_or_of_a_text(tmp_path):
    ours = plot_retrieval(A, TWO, MM, scores=[1, 2])
    assert len(ours.axes) == 2 * 3 + 1
    both = plot_retrieval(A, TWO, captions=["x.jpg", "y.jpg"])
    assert [axis.get_title() for axis in both.axes] == ["query", "x.jpg", "y.jpg"]
    text = plot_retrieval("a red car", TWO, None, MM, scores=torch.ones(2))
    assert [one.get_text() for one in text.axes[0].texts] == ["a red car"]
    assert text.axes[3].texts[0].get_text() == "in the hit"
    file = tmp_path / "query.png"
    matplotlib.image.imsave(file, np.zeros((4, 4, 3)))
    assert layers(plot_retrieval(str(file), TWO, None, MM).axes[0])[0].shape == (4, 4, 3)
    with pytest.raises(ValueError, match="1 captions for 2 hits"):
        plot_retrieval(A, TWO, captions=["x"])


@pytest.mark.parametrize(
    "scores",
    [[1, 2], (1.0, 2.0), np.array([1, 2]), torch.tensor([[1.0], [2.0]]), torch.ones(1, 2),
     [torch.tensor(1.0), torch.tensor([2.0]).squeeze()], torch.ones(2).half()],
    ids=["list", "tuple", "array", "column", "row", "tensors", "half"],
)  # fmt: skip
def test_scores_of_any_sensible_shape(scores):
    figure = plot_retrieval(A, TWO, MM, MM, scores)
    assert figure.axes[1].get_title() == "hit 1: 1.000"


def test_a_figure_shows_itself_without_pyplot():
    code = (
        "import sys, torch; from fam_plugins.plots import plot_map\n"
        "png = plot_map(torch.rand(8, 8), torch.randn(2, 2))._repr_png_()\n"
        "assert png.startswith(b'\\x89PNG') and len(png) > 1000\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_in_the_dark_text_and_frames_are_light():
    with matplotlib.style.context("dark_background"):
        figure = plot_episode(TWO, TWO, torch.randn(2, 2, 1, 2, 2), scores=torch.eye(2))
        dark = np.asarray(figure.axes[4].spines["top"].get_edgecolor()[:3])
        assert (dark > 0.9).all()
        assert figure.axes[4].title.get_color() == "white"
        file = io.BytesIO()
        figure.savefig(file)
    drawn = layers(figure.axes[4])[0]
    light = plot_episode(TWO, TWO, torch.ones(2, 2, 1, 2, 2))
    assert drawn.shape == layers(light.axes[4])[0].shape  # colours are mixed here, not by the style
    assert figure.get_facecolor()[:3] == (0, 0, 0)


def test_a_ranked_list_shows_both_sides():
    query, hits = images(8, 8), [images(3, 6, 9), images(1, 5, 5)]
    query_maps, hit_maps = maps(2, 1, 2, 2), 3 * maps(2, 1, 3, 3)
    figure = plot_retrieval(query, hits, query_maps, hit_maps, np.array([0.9, 0.8]))
    grid = np.array(figure.axes[:9]).reshape(3, 3)
    assert len(figure.axes) == 10
    np.testing.assert_allclose(layers(grid[0, 0])[0][..., 0], query)
    assert grid[0, 0].get_title() == "query"
    most = float(max(query_maps.abs().max(), hit_maps.abs().max()))
    names = [[text.get_text() for text in grid[row, 0].texts] for row in range(3)]
    assert names == [[], ["in the query"], ["in the hit"]]
    for j, hit in enumerate(hits):
        np.testing.assert_allclose(
            layers(grid[0, j + 1])[0], hit.expand(3, -1, -1).permute(1, 2, 0)
        )
        assert grid[0, j + 1].get_title() == f"hit {j + 1}: {[0.9, 0.8][j]:.3f}"
        for row, image, drawn in ((1, query, query_maps[j]), (2, hit, hit_maps[j])):
            expected = over(image, drawn, most)
            np.testing.assert_allclose(layers(grid[row, j + 1])[0], expected, atol=1e-6)
    assert scale(figure) == (-most, most)


@pytest.mark.parametrize(
    "plot",
    [
        lambda **options: plot_map(A, M, **options),
        lambda **options: plot_pair(A, A, M, M, **options),
        lambda **options: plot_episode(TWO, TWO, torch.randn(2, 2, 1, 2, 2), **options),
        lambda **options: plot_retrieval(A, TWO, MM, MM, [1, 2], **options),
    ],
    ids=["map", "pair", "episode", "retrieval"],
)
def test_the_colour_bar_names_the_unit(plot):
    def shown(**options):
        return plot(**options).axes[-1].get_ylabel()

    assert shown() == "attribution"
    assert shown(label="FAM") == "FAM"
    assert shown(rule="additive") == "share of the score"
    for name, rule in RULES.items():
        assert shown(rule=name).split() == shown(rule=rule).split() == rule.unit.split()
    assert max(map(len, shown(rule="centred").splitlines())) <= 18
    assert shown(rule=Rule("mine", lambda a, g: g)) == "attribution"
    assert shown(rule=Rule("mine", lambda a, g: g, unit="volts")) == "volts"
    assert shown(rule="centred", label="less its mean") == "less its mean"
    with pytest.raises(ValueError, match="did you mean 'centred'"):
        plot(rule="centered")


def lines(figure):
    """The ends of each line in pixels of its images, with its colour and width, strongest last."""
    return [
        (one.xy1, one.xy2, one.get_edgecolor(), one.get_linewidth())
        for one in figure.artists
        if isinstance(one, ConnectionPatch)
    ]


def boxes(axis):
    return [(one.get_xy(), one.get_width(), one.get_height()) for one in axis.patches]


def test_the_strongest_pairs_of_regions_are_joined():
    a, b = images(3, 12, 16), images(1, 20, 10)
    joint = torch.zeros(3 * 4 + 1, 5 * 2 + 1)
    joint[1 * 4 + 2, 3 * 2 + 1] = 0.5  # row 1, column 2 of a; row 3, column 1 of b
    joint[0, 9] = 0.25
    joint[11, 0] = 0.125
    joint[5, 5] = -0.9
    joint[-1, 0], joint[0, -1], joint[-1, -1] = 7, 8, 9  # constants are no regions
    figure = plot_matches(a, b, joint, grid_a=(3, 4), grid_b=(5, 2), titles=("left", "right"))
    left, right, bar = figure.axes
    np.testing.assert_allclose(layers(left)[0], a.permute(1, 2, 0))
    np.testing.assert_allclose(layers(right)[0][..., 1], b[0])
    assert (left.get_title(), right.get_title()) == ("left", "right")
    assert bar.get_ylabel() == "share of the score"
    # Regions are 4 x 4 pixels of a and 4 x 5 of b; the corner of the picture is at -.5.
    weak, middle, strong = lines(figure)
    assert strong[:2] == ((9.5, 5.5), (7, 13.5))
    assert middle[:2] == ((1.5, 1.5), (7, 17.5))
    assert weak[:2] == ((13.5, 9.5), (2, 1.5))
    assert boxes(left)[-1] == ((7.5, 3.5), 4, 4)
    assert boxes(right)[-1] == ((4.5, 11.5), 5, 4)
    assert weak[3] < middle[3] < strong[3]
    plasma = matplotlib.colormaps["plasma"]
    for (*_, colour, _), share in zip((weak, middle, strong), (0.0, 1 / 3, 1.0), strict=True):
        np.testing.assert_allclose(colour, plasma(share), atol=0.01)
    assert bar.get_ylim() == (0.125, 0.5)
    score = float(joint.sum())
    assert figure.get_suptitle() == f"score {score:.3f}, of which the lines 0.875"
    two = plot_matches(a, b, joint[None], grid_a=(3, 4), grid_b=torch.Size([5, 2]), top=2)
    assert [line[:2] for line in lines(two)] == [middle[:2], strong[:2]]
    none = plot_matches(a, b, -joint[:13, :11].abs(), grid_a=(3, 4), grid_b=(5, 2))
    assert lines(none) == []


def test_squares_are_told_without_a_grid_and_all_pairs_may_be_asked_for():
    figure = plot_matches(A, A, torch.ones(5, 10), top=99)
    assert len(lines(figure)) == 4 * 9
    assert len(boxes(figure.axes[0])) == 36
    assert boxes(figure.axes[0])[0][1] == 4
    assert boxes(figure.axes[1])[0][1] == pytest.approx(8 / 3)


def test_the_lines_of_a_pair_lie_where_its_matrix_is_largest():
    net, one = encoder(), images(1, 3, 16, 24)
    pair = explain_pair(net, "last", one, one, joint=True)
    grid = pair.map_a.shape[2:]
    figure = plot_matches(one[0], one[0], pair.joint, grid_a=grid, grid_b=grid, top=1)
    place = int(pair.map_a.argmax()) if pair.joint[0, :-1, :-1].diagonal().max() else -1
    strongest = int(pair.joint[0, :-1, :-1].argmax())
    ((xy_a, xy_b, _, _),) = lines(figure)
    for xy, region in zip((xy_a, xy_b), divmod(strongest, pair.joint.shape[2] - 1), strict=True):
        row, column = divmod(region, grid[1])
        assert xy == (2 * column + 0.5, 2 * row + 0.5)
    assert place >= 0


def test_references_are_numbered_where_they_have_no_labels():
    figure = plot_episode(TWO, TWO, torch.randn(2, 2, 1, 2, 2))
    assert [axis.get_title() for axis in figure.axes[1:3]] == ["reference 0", "reference 1"]


def test_rows_are_as_high_as_the_tallest_image_needs():
    wide, tall = images(10, 20), images(20, 10)
    drawn = maps(1, 2, 2)
    sizes = [
        plot_pair(a, b, drawn, drawn).get_size_inches().tolist()
        for a, b in ((wide, wide), (wide, tall), (tall, wide), (tall, tall))
    ]
    assert {width for width, _ in sizes} == {5.3}
    heights = [height for _, height in sizes]
    # Two rows of columns that are two inches wide: half as high as wide, or twice.
    assert heights[1:] == [heights[-1]] * 3
    assert heights[-1] - heights[0] == pytest.approx(2 * (2 * 2 - 2 * 0.5))


def test_the_saved_picture_shows_the_colours(tmp_path):
    blue = torch.tensor([0.0, 0.0, 1.0])[:, None, None].expand(3, 8, 8)
    against, in_favour = -torch.ones(1, 2, 2), torch.ones(1, 2, 2)
    plot_pair(blue, blue, against, in_favour).savefig(tmp_path / "pair.png")
    pixels = matplotlib.image.imread(tmp_path / "pair.png")[..., :3]

    def share(*colour):
        return np.isclose(pixels, colour, atol=0.01).all(axis=-1).mean()

    red, green = over(blue, against, 1)[0, 0], over(blue, in_favour, 1)[0, 0]
    shares = [share(0, 0, 1) / 2, share(*red), share(*green)]
    assert min(shares) > 0.1
    np.testing.assert_allclose(shares, shares[0], rtol=0.05)


def test_values_off_by_rounding_are_clamped():
    off = torch.full((4, 4), 1.0005)
    off[0] = -0.0005
    figure = plot_pair(off, off, M, M)
    drawn = layers(figure.axes[0])[0]
    assert (drawn[0].max(), drawn[1:].min(), drawn.max(), drawn.min()) == (0, 1, 1, 0)


def test_nothing_global_is_touched_and_the_figure_can_be_saved(tmp_path):
    code = (
        "import sys, torch\n"
        "from fam_plugins import plots\n"
        "a, m = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 2, 2)\n"
        "figure = plots.plot_pair(a[0], a[1], m[0], m[1])\n"
        "figure = plots.plot_episode(a, a, torch.randn(2, 2, 1, 2, 2))\n"
        "figure = plots.plot_retrieval(a[0], a, m, m, [1, 2])\n"
        "figure = plots.plot_matches(a[0], a[1], torch.rand(5, 5))\n"
        f"figure.savefig({str(tmp_path / 'plot.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "plot.png").stat().st_size > 1000
    before = dict(matplotlib.rcParams)
    plot_pair(images(8, 8), images(8, 8), maps(1, 2, 2), maps(1, 2, 2))
    assert dict(matplotlib.rcParams) == before
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


def test_without_matplotlib_the_fix_is_named():
    code = (
        "import sys, torch; sys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None\n"
        "try: from fam_plugins import plots\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install matplotlib" in done.stdout


def test_half_precision_and_maps_with_a_graph_are_drawn():
    drawn = maps(1, 2, 2).bfloat16().requires_grad_()
    image = images(8, 8).half()
    figure = plot_pair(image, images(8, 8), drawn, drawn)
    np.testing.assert_array_equal(layers(figure.axes[0])[0][..., 0], image.float())
    expected = over(image.float(), drawn.detach().float(), float(drawn.detach().abs().max()))
    np.testing.assert_allclose(layers(figure.axes[2])[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot_pair(TWO, A, M, M), r"image_a holds 2 images: pass one, images\[i\]"),
        (lambda: plot_pair(A - 0.5, A, M, M), "model's normalisation.*mean= and std="),
        (lambda: plot_pair(A * 0 + 1.05, A, M, M), "image_a has values from 1.05 to 1.05"),
        (lambda: plot_pair(A, A * 0 - 0.05, M, M), "image_b has values from -0.05 to -0.05"),
        (lambda: plot_pair(A, BAD, M, M), "image_b holds NaN"),
        (lambda: plot_pair(A, A, M * torch.nan, M), "map_a holds NaN"),
        (lambda: plot_pair(A, A, M, MM), r"map_b has shape \(2, 1, 2, 2\), not \[1, h, w\]"),
        (lambda: plot_pair(A, A, M, M, titles=("a",)), "pass two"),
        (lambda: plot_pair(A, A, M, M, score=[1.0, 2.0]), "scores has shape"),
        (lambda: plot_episode(TWO, TWO, MM), r"maps has shape .*not \[2, 2, 1, h, w\]"),
        (lambda: plot_episode([], TWO, MM), "there are no queries"),
        (
            lambda: plot_episode(TWO, TWO, torch.randn(2, 2, 1, 2, 2), scores=[1, 2]),
            r"scores has shape \(2,\), not \[2, 2\]",
        ),
        (
            lambda: plot_episode(TWO, TWO, torch.randn(2, 2, 1, 2, 2), labels="abc"),
            "3 labels for 2 references",
        ),
        (lambda: plot_retrieval(A, TWO, MM[:1], MM, [1, 2]), "query_maps has shape"),
        (lambda: plot_matches(A, A, torch.ones(7, 5)), "6 regions of a.*grid_a=pair.map_a.shape"),
        (lambda: plot_matches(A, A, torch.ones(5, 7), grid_b=(2, 4)), r"\(2, 4\): pass grid_b="),
        (lambda: plot_matches(A, A, torch.ones(2, 5, 5)), r"joint has shape .*joint\[i\]"),
        (lambda: plot_matches(A, A, torch.ones(5, 5) / 0), "or holds NaN"),
        (lambda: plot_matches(A, A, torch.ones(5, 5), top=0), "top must be an int"),
        (lambda: plot_matches(A, A, torch.ones(5, 5), titles="a"), "pass two"),
        (lambda: plot_retrieval(A, TWO, MM, MM[:1], [1, 2]), "hit_maps has shape"),
        (lambda: plot_retrieval(A, TWO, MM, MM, [1]), "scores has shape"),
    ],
)
def test_bad_input_names_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_plot_is_public():
    assert set(plots.__all__) == {
        "plot_map", "plot_pair", "plot_episode", "plot_matches", "plot_retrieval"
    }  # fmt: skip
