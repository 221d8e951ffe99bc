"""plot_pair, plot_matches, plot_episode and plot_retrieval, drawn to the end."""

from __future__ import annotations

import io

import matplotlib.figure
import numpy as np
import pytest
import torch
from PIL import Image

from fam_plugins.plots import plot_episode, plot_matches, plot_pair, plot_retrieval
from tests.hostile.table import MODES, refused, under, works

G = torch.Generator().manual_seed(0)
A, M = torch.rand(3, 8, 8, generator=G), torch.randn(1, 2, 2, generator=G)
BATCH, MAPS = torch.rand(2, 3, 8, 8, generator=G), torch.randn(2, 1, 2, 2, generator=G)
GRID = torch.randn(2, 2, 1, 2, 2, generator=G)
DEFAULTS = {name: MODES[name] for name in ("default device meta", "default dtype float64")}
PICTURE = Image.new("RGB", (8, 8))
BYTES = (255 * A).byte()


def drawn(figure):
    """Whether the figure can be drawn: titles and labels are read only then."""
    figure.set_dpi(20)
    figure.savefig(io.BytesIO(), dpi=20)
    return True


def never(figure):
    return isinstance(figure, matplotlib.figure.Figure)


def pair(a=A, b=A, map_a=M, map_b=M, finish=never, **options):
    return lambda _model: finish(plot_pair(a, b, map_a, map_b, **options))


def read_only(array):
    array = np.array(array)
    array.flags.writeable = False
    return array


PAIR = [
    works("tensors", pair(finish=drawn)),
    works("arrays", pair(A.numpy(), A.numpy(), M.numpy(), M.numpy())),
    works("float64", pair(A.double().numpy(), map_a=M.double())),
    works("read only", pair(read_only(A), map_a=read_only(M))),
    works("lists", pair(A.tolist(), map_a=M.tolist())),
    works("grey", pair(A[0], A[:1])),
    works("black bytes", pair(0 * BYTES)),
    works("a mask", pair(A > 0.5)),
    works("with gradient", pair(A.clone().requires_grad_(), map_a=M.clone().requires_grad_())),
    works("half precision", pair(A.half(), map_a=M.bfloat16())),
    works("expanded", pair(A[:1].expand(3, -1, -1))),
    works("zeros for maps", pair(map_a=0 * M, map_b=0 * M)),
    works("huge maps", pair(map_a=1e30 * M)),
    works("a map of one region", pair(map_a=M[:, :1, :1])),
    works("a map in a batch of one", pair(map_a=M[None])),
    works("a score", pair(score=0.5)),
    works("a score of a batch of one", pair(score=torch.tensor([0.5]))),
    works("a score of numpy", pair(score=np.float64(0.5))),
    works("a whole score", pair(score=1)),
    works("titles of any kind", pair(titles=[1, None], finish=drawn)),
    works("dollars", pair(titles=("$\\frac", "5$ and $"), finish=drawn)),
    works("no label", pair(label="")),
    *(works(name, under(context, pair(score=0.5))) for name, context in DEFAULTS.items()),
    works("a picture", pair(PICTURE, finish=drawn)),
    works("bytes", pair(BYTES)),
    works("bytes in numpy", pair(BYTES.numpy())),
    works("channels last", pair(A.permute(1, 2, 0))),
    works("normalised", pair(2 * A - 1, mean=0.5, std=[0.5] * 3)),
    works("in a batch of one", pair(A[None])),
    works("a flat map", pair(map_a=M[0])),
    refused("a path", pair("a.png"), FileNotFoundError, "image_a: there is no file 'a.png'"),
    refused("None", pair(b=None), TypeError, "image_b must be a tensor"),
    refused("normalised by nobody knows", pair(A - 0.5), ValueError, "pass mean= and std="),
    refused("another option", pair(normalize=True), TypeError, "normalize"),
    refused("a mean alone", pair(mean=0.5), ValueError, "takes mean= and std="),
    refused("mean in words", pair(mean="a", std="b"), TypeError, "image_a must be"),
    refused("four channels", pair(torch.rand(4, 8, 8, generator=G)), ValueError, "1 or 3 channels"),
    refused("a batch", pair(BATCH), ValueError, "images[i]"),
    refused("a row", pair(A[0, 0]), ValueError, "pass [C, H, W]"),
    refused("empty", pair(A[:, :0]), ValueError, "pass [C, H, W]"),
    refused("NaN", pair(A * torch.nan), ValueError, "image_a holds NaN"),
    refused("complex", pair(A * 1j), TypeError, "pass real values"),
    refused("masked", pair(np.ma.ones((8, 8))), TypeError, "masked array"),
    refused("a map None", pair(map_a=None), TypeError, "map_a must be a tensor"),
    refused("a picture for a map", pair(map_a=PICTURE), TypeError, "map_a must be a tensor"),
    refused("maps of a batch", pair(map_a=MAPS), ValueError, "not [1, h, w]"),
    refused("maps of channels", pair(map_a=A), ValueError, "not [1, h, w]"),
    refused("an empty map", pair(map_a=M[..., :0]), ValueError, "not [1, h, w]"),
    refused("a map of NaN", pair(map_b=M * torch.nan), ValueError, "map_b holds NaN"),
    refused("a complex map", pair(map_b=M * 1j), TypeError, "pass real values"),
    refused("two scores", pair(score=[0.1, 0.2]), ValueError, "score[i]"),
    refused("a score in words", pair(score="0.5"), TypeError, "scores must be a tensor"),
    refused("no score", pair(score=[]), ValueError, "score[i]"),
    refused("a score of NaN", pair(score=float("nan")), ValueError, "NaN"),
    refused("titles None", pair(titles=None), ValueError, "pass two"),
    refused("one title", pair(titles="ab"), ValueError, "pass two"),
    refused("three titles", pair(titles=("a", "b", "c")), ValueError, "pass two"),
]


J = torch.rand(5, 10, generator=G)


def matches(a=A, b=A, joint=J, finish=never, **options):
    return lambda _model: finish(plot_matches(a, b, joint, **options))


MATCHES = [
    works("tensors", matches(finish=drawn)),
    works("arrays", matches(A.numpy(), A.numpy(), J.numpy(), finish=drawn)),
    works("read only", matches(read_only(A), joint=read_only(J))),
    works("a list", matches(joint=J.tolist())),
    works("half precision", matches(A.half(), joint=J.bfloat16(), finish=drawn)),
    works("with gradient", matches(joint=J.clone().requires_grad_(), finish=drawn)),
    works("in a batch of one", matches(joint=J[None])),
    works("grids as tensors", matches(grid_a=torch.tensor([1, 4]), grid_b=np.array([1, 9]),
                                      finish=drawn)),
    works("one region each", matches(joint=torch.ones(2, 2), finish=drawn)),
    works("zeros", matches(joint=0 * J, finish=drawn)),
    works("negative", matches(joint=-J, finish=drawn)),
    works("all alike", matches(joint=torch.ones(5, 5), finish=drawn)),
    works("huge", matches(joint=1e30 * J, finish=drawn)),
    works("tiny", matches(joint=1e-30 * J, finish=drawn)),
    works("more than there are", matches(top=1000)),
    works("of two sizes", matches(b=A[:1, :4, :], finish=drawn)),
    works("dollars", matches(titles=("$\\frac", "5$ and $"), finish=drawn)),
    *(works(name, under(context, matches())) for name, context in DEFAULTS.items()),
    refused("None", matches(joint=None), TypeError, "joint must be a tensor"),
    works("a picture", matches(PICTURE)),
    works("bytes", matches(BYTES)),
    refused("maps", matches(joint=A), ValueError, "joint[i]"),
    refused("a batch", matches(joint=torch.stack([J, J])), ValueError, "joint[i]"),
    refused("constants only", matches(joint=J[:1]), ValueError, "[Ra + 1, Rb + 1]"),
    refused("NaN", matches(joint=J * torch.nan), ValueError, "or holds NaN"),
    refused("complex", matches(joint=J * 1j), TypeError, "pass real values"),
    refused("no square", matches(joint=J[:4]), ValueError, "grid_a=pair.map_a.shape[2:]"),
    refused("no grid of b", matches(grid_b=(2, 4)), ValueError, "grid_b=pair.map_b.shape[2:]"),
    refused("the shape of a map", matches(grid_a=(1, 1, 2, 2)), ValueError, "shape[2:]"),
    refused("one number", matches(grid_a=4), ValueError, "shape[2:]"),
    refused("negative sides", matches(grid_a=(-2, -2)), ValueError, "shape[2:]"),
    refused("halves", matches(grid_a=(8, 0.5)), ValueError, "shape[2:]"),
    refused("top None", matches(top=None), ValueError, "int of at least 1"),
    refused("top 0", matches(top=0), ValueError, "int of at least 1"),
    refused("top 2.5", matches(top=2.5), ValueError, "int of at least 1"),
    refused("one title", matches(titles="ab"), ValueError, "pass two"),
]  # fmt: skip


@pytest.mark.parametrize("row", MATCHES)
def test_plot_matches(row):
    row.check()


def episode(queries=BATCH, references=BATCH, maps=GRID, finish=never, **options):
    return lambda _model: finish(plot_episode(queries, references, maps, **options))


SCORES = [[0.1, 0.2], [0.3, 0.4]]

EPISODE = [
    works("tensors", episode()),
    works("lists of images", episode(list(BATCH), tuple(BATCH))),
    works("a generator", lambda m: episode((x for x in BATCH[:1]), maps=GRID[:1])(m)),
    works("arrays", episode(BATCH.numpy(), BATCH.numpy(), GRID.numpy())),
    works("several sizes", episode([A, A[:, :4]])),
    works("scores", episode(scores=SCORES)),
    works("an array of scores", episode(scores=np.array(SCORES))),
    works("infinite scores", episode(scores=[[0.1, -np.inf], [0.3, 0.4]])),
    works("labels", episode(labels=("cat", "dog"))),
    works("a tensor of labels", episode(labels=torch.tensor([4, 9]))),
    works("an array of labels", episode(labels=np.array(["a", "b"]))),
    works("a generator of labels", lambda m: episode(labels=(c for c in "ab"))(m)),
    works("dollars", episode(labels=("$\\frac", "$"), finish=drawn)),
    *(works(name, under(context, episode(scores=SCORES))) for name, context in DEFAULTS.items()),
    works("one image", episode(A, maps=GRID[:1])),
    works("one image in numpy", episode(A.numpy(), maps=GRID[:1])),
    works("a picture", episode(PICTURE, maps=GRID[:1])),
    works("pictures", episode([PICTURE] * 2, [PICTURE] * 2)),
    works("bytes", episode([BYTES] * 2)),
    works("maps without a channel", episode(maps=GRID[:, :, 0])),
    works("captions", episode(references=None, labels=["a $", "b"], finish=drawn)),
    refused("None", episode(None), TypeError, "queries must be a tensor"),
    refused("a path", episode("ab"), FileNotFoundError, "no file 'ab'"),
    refused("one image of two", episode(A), ValueError, "not [1, 2, 1, h, w]"),
    refused("an episode of episodes", episode(BATCH[None]), ValueError, "pass [C, H, W]"),
    refused("no labels", episode(references=None), ValueError, "labels=[...]"),
    refused("no queries", episode([]), ValueError, "pass at least one image"),
    refused("no references", episode(references=BATCH[:0]), ValueError, "no references"),
    refused("maps of one query", episode(maps=GRID[0]), ValueError, "not [2, 2, 1, h, w]"),
    refused("too few maps", episode(maps=GRID[:1]), ValueError, "not [2, 2, 1, h, w]"),
    refused("maps None", episode(maps=None), TypeError, "maps must be a tensor"),
    refused("a list of maps", episode(maps=list(GRID)), TypeError, "torch.stack"),
    refused("maps of NaN", episode(maps=GRID * torch.nan), ValueError, "maps holds NaN"),
    refused("scores of one query", episode(scores=SCORES[0]), ValueError, "not [2, 2]"),
    refused("one score", episode(scores=0.5), ValueError, "not [2, 2]"),
    refused("scores flat", episode(scores=[1, 2, 3, 4]), ValueError, "not [2, 2]"),
    refused("ragged scores", episode(scores=[[1], [1, 2]]), TypeError, "scores must be a tensor"),
    refused("scores of NaN", episode(scores=[[np.nan, 1], [1, 2]]), ValueError, "or holds NaN"),
    refused("scores in words", episode(scores="high"), TypeError, "scores must be a tensor"),
    refused("too few labels", episode(labels=["a"]), ValueError, "1 labels for 2 references"),
    refused("a number of labels", episode(labels=2), ValueError, "1 labels for 2 references"),
    refused("labels one-hot", episode(labels=torch.eye(2)), ValueError, "labels.argmax(1)"),
]


def retrieval(query=A, hits=BATCH, ours=MAPS, theirs=MAPS, scores=(0.9, 0.8), finish=never):
    return lambda _model: finish(plot_retrieval(query, hits, ours, theirs, scores))


RETRIEVAL = [
    works("tensors", retrieval()),
    works("arrays", retrieval(A.numpy(), BATCH.numpy(), MAPS.numpy(), MAPS.numpy())),
    works("lists of images", retrieval(hits=list(BATCH))),
    works("other maps", retrieval(theirs=torch.randn(2, 1, 5, 3, generator=G))),
    works("one hit", retrieval(hits=BATCH[:1], ours=MAPS[:1], theirs=MAPS[:1], scores=[0.9])),
    works("a tensor of scores", retrieval(scores=torch.tensor([1, 2]))),
    *(works(name, under(context, retrieval())) for name, context in DEFAULTS.items()),
    works("a query in a batch of one", retrieval(A[None])),
    works("a picture", retrieval(PICTURE)),
    works("a text", retrieval("a $car", ours=None, finish=drawn)),
    works("bytes", retrieval(hits=255 * BATCH)),
    works("channels last", retrieval(hits=BATCH.permute(0, 2, 3, 1))),
    works("maps None", retrieval(ours=None)),
    works("no hit maps", retrieval(theirs=None)),
    works("no maps", retrieval(ours=None, theirs=None, finish=drawn)),
    works("scores None", retrieval(scores=None)),
    works("scores [1, k]", retrieval(scores=[[0.9, 0.8]])),
    works("scores one by one", retrieval(scores=[torch.tensor(0.9), torch.tensor(0.8)])),
    refused("a batch of queries", retrieval(BATCH), ValueError, "query holds 2 images"),
    refused("query None", retrieval(None), TypeError, "query must be a tensor"),
    refused("a misspelt file", retrieval("qery.jpg", ours=None), FileNotFoundError, "no file"),
    refused("maps of a text", retrieval("a red car"), FileNotFoundError, "no file 'a red car'"),
    refused("hits None", retrieval(hits=None), TypeError, "hits must be a tensor"),
    refused("one hit alone", retrieval(hits=A), ValueError, "query_maps has shape"),
    refused("no hits", retrieval(hits=[]), ValueError, "there are no hits"),
    refused("paths", retrieval(hits=["a.png", "b.png"]), FileNotFoundError, "hits[0]: there is no"),
    refused("one map", retrieval(ours=M), ValueError, "query_maps has shape"),
    refused("too few maps", retrieval(theirs=MAPS[:1]), ValueError, "hit_maps has shape"),
    refused("maps of many", retrieval(ours=MAPS[None]), ValueError, "query_maps has shape"),
    refused("maps of infinity", retrieval(theirs=MAPS / 0), ValueError, "hit_maps holds NaN"),
    refused("one score", retrieval(scores=0.9), ValueError, "not [2]"),
    refused("too many scores", retrieval(scores=[1, 2, 3]), ValueError, "not [2]"),
    refused("scores of NaN", retrieval(scores=[0.9, np.nan]), ValueError, "or holds NaN"),
    refused("scores in words", retrieval(scores=["a", "b"]), TypeError, "scores must be a tensor"),
]


def without_a_network():
    return torch.nn.Identity()


@pytest.mark.parametrize("row", PAIR)
def test_plot_pair(row):
    row.on(without_a_network).check()


@pytest.mark.parametrize("row", EPISODE)
def test_plot_episode(row):
    row.on(without_a_network).check()


@pytest.mark.parametrize("row", RETRIEVAL)
def test_plot_retrieval(row):
    row.on(without_a_network).check()
