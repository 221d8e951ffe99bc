"""Galleries on disk: the same scores and maps, and only the rows that are asked for."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from fam_plugins import LayerFam, SimilarityModel
from fam_plugins.core.gallery import Gallery
from tests.benchmarks.cost import peak_memory
from tests.networks import TinyNet, encoder

IMAGES = torch.randn(3, 3, 8, 10, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))


class Counting(np.memmap):
    """Counts the rows that are read."""

    read = 0

    def __getitem__(self, key):
        part = super().__getitem__(key)
        Counting.read += len(part) if np.ndim(part) == 2 else 1
        return part


def on_disk(tmp_path, rows, dtype=np.float32):
    path = tmp_path / "gallery.npy"
    np.save(path, np.asarray(rows, dtype=dtype))
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize("similarity", ["cosine", "dot", "sqeuclidean"])
@pytest.mark.parametrize("contrast", [None, "others", ROWS[:2]], ids=["none", "others", "rows"])
def test_scores_and_maps_are_those_of_references_in_memory(tmp_path, similarity, contrast):
    options = {"similarity": similarity, "contrast": contrast}
    model = SimilarityModel(encoder(), on_disk(tmp_path, ROWS), **options)
    model.references.values_per_part = 6 * 7  # several parts
    usual = SimilarityModel(encoder(), ROWS, **options)
    torch.testing.assert_close(model(IMAGES), usual(IMAGES))
    indices = [[3, 49], [0, 1], [7, 3]]
    torch.testing.assert_close(
        LayerFam(model, "last", rule="additive").attribute_references(IMAGES, indices),
        LayerFam(usual, "last", rule="additive").attribute_references(IMAGES, indices),
    )
    for target in (4, [1, 49, 3], torch.tensor([1, 49, 3])):
        torch.testing.assert_close(
            LayerFam(model, "last", rule="centred").attribute(IMAGES, target),
            LayerFam(usual, "last", rule="centred").attribute(IMAGES, target),
        )
    maps, delta = LayerFam(model, "last", rule="additive").attribute(
        IMAGES, 4, return_convergence_delta=True
    )
    expected, gap = LayerFam(usual, "last", rule="additive").attribute(
        IMAGES, 4, return_convergence_delta=True
    )
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(delta, gap, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_rows_take_the_dtype_of_the_embeddings(tmp_path, dtype):
    model = SimilarityModel(encoder(), on_disk(tmp_path, ROWS, dtype))
    assert model(IMAGES).dtype == torch.float32
    rounded = torch.from_numpy(ROWS.numpy().astype(dtype).astype(np.float32))
    torch.testing.assert_close(model(IMAGES), SimilarityModel(encoder(), rounded)(IMAGES))


def test_parts_are_as_many_rows_as_fit(tmp_path):
    gallery = Gallery(on_disk(tmp_path, ROWS))
    gallery.values_per_part = 6 * 7 + 5
    parts = list(gallery.chunks(like=ROWS))
    assert [len(part) for part in parts] == [7] * 7 + [1]
    assert torch.equal(torch.cat(parts), ROWS)
    gallery.values_per_part = 1
    assert [len(part) for part in gallery.chunks(like=ROWS)] == [1] * 50


@pytest.mark.parametrize("contrast", [None, "others"])
def test_targets_count_from_the_end_as_in_memory(tmp_path, contrast):
    model = SimilarityModel(encoder(), on_disk(tmp_path, ROWS), contrast=contrast)
    usual = SimilarityModel(encoder(), ROWS, contrast=contrast)
    torch.testing.assert_close(
        LayerFam(model, "last", rule="additive").attribute(IMAGES, -1),
        LayerFam(usual, "last", rule="additive").attribute(IMAGES, 49),
    )


def test_a_million_rows_of_which_ten_are_read(tmp_path):
    shape = (1_000_000, 512)
    np.lib.format.open_memmap(
        tmp_path / "sparse.npy", mode="w+", dtype=np.float32, shape=shape
    )  # a sparse file: nothing but its header is written
    offset = np.load(tmp_path / "sparse.npy", mmap_mode="r").offset
    array = Counting(
        tmp_path / "sparse.npy", dtype=np.float32, mode="r+", offset=offset, shape=shape
    )
    hits = torch.randperm(1_000_000)[:10]
    array[hits.numpy()] = np.random.default_rng(0).normal(size=(10, 512))
    torch.manual_seed(0)
    net = TinyNet(channels=512, head=torch.nn.Identity()).eval()
    model = SimilarityModel(net, array)
    explainer = LayerFam(model, "last", rule="centred")

    def bare():
        with torch.no_grad():
            net(IMAGES[:1])

    Counting.read = 0
    maps = explainer.attribute_references(IMAGES[:1], hits[None])
    assert Counting.read == 10
    assert maps.shape == (1, 10, 1, 4, 5)
    usual = LayerFam(SimilarityModel(net, np.array(array[hits.numpy()])), "last", rule="centred")
    torch.testing.assert_close(maps, usual.attribute_references(IMAGES[:1]))

    Counting.read = 0
    one = explainer.attribute(IMAGES[:1], target=int(hits[3]))
    assert Counting.read == 1
    torch.testing.assert_close(one, maps[:, 3])

    needed = peak_memory(lambda: explainer.attribute_references(IMAGES[:1], hits[None]), "cpu")
    assert needed - peak_memory(bare, "cpu") < 200 * 2**20


def test_is_neither_copied_nor_saved(tmp_path):
    array = on_disk(tmp_path, ROWS)
    model = SimilarityModel(encoder(), array)
    assert model.references.array is array
    assert copy.deepcopy(model).references.array is array
    assert "references" not in model.state_dict()
    assert len(model.references) == 50
    assert "references=50x6" in repr(model)
    assert model.double()(IMAGES.double()).dtype == torch.float64


def test_bad_galleries_are_refused(tmp_path):
    net = encoder()
    with pytest.raises(TypeError, match="dtype int8.*float16, float32 or float64"):
        SimilarityModel(net, on_disk(tmp_path, np.ones((2, 6)), np.int8))
    if np.dtype(np.longdouble).itemsize > 8:
        with pytest.raises(TypeError, match="float16, float32 or float64"):
            SimilarityModel(net, on_disk(tmp_path, np.ones((2, 6)), np.longdouble))
    with pytest.raises(ValueError, match=r"shape \(6,\).*shape=\(N, D\)"):
        SimilarityModel(net, on_disk(tmp_path, np.ones(6)))
    with pytest.raises(ValueError, match="at least one row"):
        SimilarityModel(net, on_disk(tmp_path, np.ones((0, 6))))
    narrow = SimilarityModel(net, on_disk(tmp_path, np.ones((2, 5))))
    with pytest.raises(ValueError, match="6 values and the references have 5"):
        narrow(IMAGES)
    with pytest.raises(ValueError, match="6 values and the references have 5"):
        LayerFam(narrow, "last").attribute_references(IMAGES)
    rows = ROWS.clone()
    rows[7], rows[8] = 0, float("nan")
    model = SimilarityModel(net, on_disk(tmp_path, rows))
    assert model.score(net(IMAGES), torch.tensor([1, 7]))[:, 1].eq(0).all()
    for values in (2**22, 6 * 5):  # in the first part, and in the second
        model.references.values_per_part = values
        with pytest.raises(ValueError, match="gallery row 8 holds NaN"):
            model(IMAGES)
    with pytest.raises(ValueError, match="gallery row 8 holds NaN"):
        LayerFam(model, "last").attribute(IMAGES, 8)
