"""The mean of a gallery against all its embeddings: scores, maps, every way to give it."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fam_plugins import (
    FAM,
    LayerFam,
    Similarity,
    SimilarityModel,
    SimilarityTarget,
    explain_pair,
    gallery_mean,
)
from fam_plugins.core.contrast import GalleryMean, mean_of
from fam_plugins.core.scores import frozen_scores, score
from fam_plugins.core.similarity import find_similarity, on_unit_length
from tests.networks import State, encoder

IMAGES = torch.randn(11, 3, 8, 8, generator=torch.Generator().manual_seed(0))
REDUCED = ["cosine", "dot", "sqeuclidean"]
SIMILARITIES = [
    *map(find_similarity, REDUCED),
    on_unit_length(find_similarity("sqeuclidean")),
]
KEPT = [
    find_similarity("euclidean"),
    on_unit_length(find_similarity("euclidean")),
    on_unit_length(find_similarity("sqeuclidean"), references_too=False),
    Similarity("cubed", lambda z, t: (z @ t.T) ** 3),
]


def rows(count: int, seed: int, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + torch.randn(count, width, generator=generator, dtype=torch.float64)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("similarity", SIMILARITIES, ids=lambda s: s.name)
def test_one_row_scores_as_the_loop_over_all(similarity):
    z, t, gallery = rows(3, 0), rows(2, 1), rows(50, 2)
    mean = mean_of(similarity, gallery.split(7))
    assert mean.row.shape == (1, 6)
    for i in range(3):
        for j in range(2):
            alike = similarity.compare(z[i : i + 1], t[j : j + 1]).item()
            others = [similarity.compare(z[i : i + 1], g[None]).item() for g in gallery]
            found = score(similarity, z[i : i + 1], t[j : j + 1], mean).item()
            assert abs(found - (alike - sum(others) / len(others))) < 1e-12

    def direction(contrast):
        leaf = z.clone().requires_grad_()
        with frozen_scores():
            values = score(similarity, leaf, t, contrast)
        return torch.autograd.grad(values.sum(), leaf)[0]

    close(direction(mean), direction(gallery))


@pytest.mark.parametrize("similarity", REDUCED)
def test_the_mean_is_all_embeddings_everywhere(similarity):
    net = encoder().double()
    images = IMAGES.double()
    z = net(images).detach()
    mean = gallery_mean(net, images.split(4), similarity=similarity)
    shown = {
        kind: SimilarityModel(net, z[:3], similarity=similarity, contrast=contrast)
        for kind, contrast in {"mean": mean, "all": z, "images": images}.items()
    }
    wanted = score(similarity, z, z[:3], z)
    wanted_maps = None
    for model in shown.values():
        assert model.contrast_embeddings.shape == (1, 6)
        close(model(images), wanted)
        explainer = LayerFam(model, "last", rule="additive")
        maps = explainer.attribute(images, target=1)
        wanted_maps = maps if wanted_maps is None else wanted_maps
        close(maps, wanted_maps)
        close(explainer.attribute_references(images, [[1]] * 11)[:, 0], maps)
    loop = 0.0
    for g in z:  # one contrast embedding at a time, each a model of its own
        one = SimilarityModel(net, z[:3], similarity=similarity, contrast=g[None])
        loop = loop + LayerFam(one, "last", rule="additive").attribute(images, target=1) / len(z)
    close(wanted_maps, loop)

    def of_target(contrast):
        target = SimilarityTarget(z[1], similarity, contrast)
        cam = FAM(net, ["last"], rule="additive")
        cam(images, [target] * 11)
        return target(z), cam.attributions[0]

    for found, all_of_them in zip(of_target(mean), of_target(z), strict=True):
        close(found, all_of_them)
    close(of_target(mean)[1], wanted_maps)
    pairs = [
        explain_pair(net, "last", images[:2], images[2:4], similarity=similarity, contrast=contrast)
        for contrast in (mean, z, images)
    ]
    for pair in pairs[1:]:
        close(pair.map_a, pairs[0].map_a)
        close(pair.map_b, pairs[0].map_b)


@pytest.mark.parametrize("similarity", KEPT, ids=lambda s: s.name)
def test_without_such_a_form_embeddings_are_kept_and_a_mean_is_refused(similarity):
    gallery = rows(9, 3)
    net = encoder().double()
    model = SimilarityModel(net, rows(3, 4), similarity=similarity, contrast=gallery)
    assert torch.equal(model.contrast_embeddings, gallery)
    z = rows(2, 5)
    all_scores = similarity.compare(z, gallery).mean(dim=1, keepdim=True)
    close(model.score(z), similarity.compare(z, rows(3, 4)) - all_scores)
    with pytest.raises(ValueError, match="no single row is exact: pass the embeddings"):
        gallery_mean(gallery, similarity=similarity)


@pytest.mark.parametrize("similarity", [*REDUCED, "euclidean"])
def test_others_are_all_but_the_one_itself(similarity, tmp_path):
    references, z = rows(5, 6), rows(3, 7)
    np.save(tmp_path / "rows.npy", references.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    net = nn.Flatten()
    plain = score(similarity, z, references)
    for given in (references, mapped):
        model = SimilarityModel(net, given, similarity=similarity, contrast="others")
        for j in range(5):
            rest = [k for k in range(5) if k != j]
            wanted = plain[:, j] - plain[:, rest].mean(dim=1)
            close(model.score(z)[:, j], wanted)
            close(model.score(z, torch.tensor([j]))[:, 0], wanted)


def test_others_are_read_once_from_a_gallery_on_disk(tmp_path, monkeypatch):
    np.save(tmp_path / "rows.npy", rows(64, 8).numpy())
    model = SimilarityModel(
        nn.Flatten(), np.load(tmp_path / "rows.npy", mmap_mode="r"), contrast="others"
    )
    monkeypatch.setattr(
        type(model.references), "chunks", lambda *_, **__: pytest.fail("read as a whole")
    )
    assert model.score(rows(2, 9), torch.tensor([3, 60])).shape == (2, 2)


def test_its_state_is_one_row_and_travels():
    net = encoder().double()
    model = SimilarityModel(net, rows(3, 0), similarity="sqeuclidean", contrast=rows(20, 1))
    state = model.state_dict()
    assert state["contrast_embeddings"].shape == (1, 6)
    other = SimilarityModel(net, rows(3, 2), similarity="sqeuclidean", contrast=rows(4, 3))
    other.load_state_dict(state)
    z = rows(2, 4)
    assert torch.equal(other.score(z), model.score(z))
    assert torch.equal(copy.deepcopy(model).score(z), model.score(z))
    mean = gallery_mean(rows(20, 1))
    file = io.BytesIO()
    torch.save(mean, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).row, mean.row)


@pytest.mark.parametrize("similarity", REDUCED)
def test_gallery_mean_takes_loaders_and_arrays(similarity, tmp_path):
    net = encoder().double().train()
    before = State.of(net)
    loader = DataLoader(TensorDataset(IMAGES, torch.arange(11)), batch_size=4)
    mean = gallery_mean(net, loader, similarity=similarity)
    before.assert_unchanged(net)
    assert not mean.row.requires_grad
    z = net.eval()(IMAGES.double()).detach()
    np.save(tmp_path / "z.npy", z.numpy())
    for given in (z, z.numpy(), np.load(tmp_path / "z.npy", mmap_mode="r")):
        for found in (
            gallery_mean(given, similarity=similarity),
            gallery_mean(net, given, similarity=similarity),
        ):
            close(found.row, mean.row)
            close(found.terms, mean.terms)


def test_a_gallery_on_disk_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("fam_plugins.core.references.embed_once", lambda *_: pytest.fail("read"))
    np.save(tmp_path / "rows.npy", rows(9, 0).numpy())
    mean = gallery_mean(np.load(tmp_path / "rows.npy", mmap_mode="r"), similarity="dot")
    close(mean.row[0], rows(9, 0).mean(dim=0))


def test_many_batches_lose_no_digits():
    batches = 1000 + torch.randn(1000, 100, 2, generator=torch.Generator().manual_seed(0))
    mean = gallery_mean(nn.Flatten(), list(batches), similarity="dot")
    assert torch.equal(mean.row, batches.double().mean(dim=(0, 1))[None].float())


def test_half_precision_keeps_the_mean_in_float32():
    mean = gallery_mean(encoder().bfloat16(), [IMAGES])
    assert mean.row.dtype == torch.float32
    wide = gallery_mean(encoder().double(), [IMAGES])
    torch.testing.assert_close(mean.row.double(), wide.row, atol=2e-2, rtol=0)
    model = SimilarityModel(encoder().bfloat16(), IMAGES[:2], contrast=mean)
    assert model(IMAGES[:3].bfloat16()).dtype == torch.bfloat16


def test_made_in_inference_mode_it_can_be_used_with_gradient():
    with torch.inference_mode():
        mean = gallery_mean(encoder(), [IMAGES])
    assert not mean.row.is_inference()
    assert not mean.terms.is_inference()


def test_a_mean_of_zeros_subtracts_nothing():
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    z, t = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    assert score("cosine", z, t, gallery_mean(opposite)).item() == pytest.approx(0.8)


def test_a_mean_for_another_similarity_is_refused():
    mean = gallery_mean(rows(4, 0))
    assert isinstance(mean, GalleryMean)
    fix = r"gallery_mean\(\.\.\., similarity='dot'\)"
    for use in (
        lambda: SimilarityModel(nn.Flatten(), rows(2, 1), similarity="dot", contrast=mean),
        lambda: SimilarityTarget(rows(1, 1), "dot", mean),
        lambda: score("dot", rows(2, 1), rows(2, 1), mean),
    ):
        with pytest.raises(ValueError, match=fix):
            use()
    with pytest.raises(ValueError, match="contrast has 6 values and the references have 4"):
        SimilarityModel(nn.Flatten(), rows(2, 1, width=4), contrast=mean)
    with pytest.raises(ValueError, match="contrast has 6 values"):
        SimilarityTarget(rows(1, 1, width=4), contrast=mean)


def test_trouble_leaves_nothing_behind():
    net = encoder().train()
    before = State.of(net)
    for loader, error, message in (
        ([], ValueError, "loader is empty"),
        ([{"x": IMAGES}], TypeError, "a dict of 'x': it must give .* one of .'image'"),
        ([{"image": IMAGES, "img": IMAGES}], TypeError, "a dict of 'image', 'img': it must"),
        ([IMAGES[:0]], ValueError, "batch is empty"),
        ([IMAGES * float("nan")], ValueError, "gallery embedding row 0"),
    ):
        with pytest.raises(error, match=message):
            gallery_mean(net, loader)
        before.assert_unchanged(net)
    with pytest.raises(ValueError, match="did you mean"):
        gallery_mean(net, [IMAGES], similarity="cosin")
