"""A trunk and an embedder, as pytorch-metric-learning keeps them, as the encoder."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from fam_plugins import FAM, LayerFam, SimilarityModel, explain_pair, gallery_mean
from fam_plugins.core.encoders import as_encoder
from fam_plugins.quality import evaluate
from tests.networks import State, encoder

IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SIMILARITIES = ["cosine", "dot", "sqeuclidean", "euclidean"]


def parts() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {"trunk": encoder(), "embedder": nn.Linear(6, 4).eval()}


def alike(normalize: bool = True, **models: nn.Module) -> SimpleNamespace:
    """As the library's, in what is read of one: the extra need not be there."""
    models.setdefault("embedder", nn.Identity())
    return SimpleNamespace(**models, normalize_embeddings=normalize, match_finder=None)


def theirs(normalize: bool = True, **models: nn.Module) -> object:
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
    options = {"knn_func": object(), "data_device": torch.device("cpu")}
    return inference.InferenceModel(**models, normalize_embeddings=normalize, **options)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_the_dict_of_a_trainer_scores_and_explains_as_the_two_in_a_row(similarity):
    models = parts()
    before = [State.of(part) for part in models.values()]
    model = SimilarityModel(models, IMAGES[:3], similarity=similarity)
    in_a_row = nn.Sequential(models["trunk"], models["embedder"])
    expected = SimilarityModel(in_a_row, IMAGES[:3], similarity=similarity)
    assert torch.equal(model(IMAGES), expected(IMAGES))
    names = [name for name, _ in model.encoder.named_children()]
    assert names == ["trunk", "embedder"]
    assert model.encoder.trunk is models["trunk"]
    maps = LayerFam(model, "encoder.trunk.last", rule="additive").attribute(IMAGES, 1)
    wanted = LayerFam(expected, models["trunk"].last, rule="additive").attribute(IMAGES, 1)
    assert torch.equal(maps, wanted)
    with FAM(model, [models["trunk"].last], rule="gradcam") as cam:
        assert cam(IMAGES).shape == (5, 8, 8)
    for part, state in zip(models.values(), before, strict=True):
        state.assert_unchanged(part)


@pytest.mark.parametrize("make", [alike, theirs])
@pytest.mark.parametrize("normalize", [True, False])
def test_an_inference_model_normalises_as_it_says(make, normalize):
    models = parts()
    given = make(normalize, **models)
    expected = models["embedder"](models["trunk"](IMAGES)).detach()
    expected = F.normalize(expected) if normalize else expected
    if make is theirs:
        assert torch.equal(expected, given.get_embeddings(IMAGES))
    for similarity in SIMILARITIES:
        model = SimilarityModel(given, IMAGES[:2], similarity=similarity)
        torch.testing.assert_close(model.embed(IMAGES), expected)
        # The norm is the encoder's own, and held constant: shares add up through it.
        found = LayerFam(model, "encoder.trunk.last", rule="additive").decompose(IMAGES[2:], 1)
        assert found.gap.abs().max() < 1e-5
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_the_models_of_a_real_trainer():
    trainers = pytest.importorskip("pytorch_metric_learning.trainers")
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    models = parts()
    data = TensorDataset(IMAGES, torch.tensor([0, 0, 1, 1, 1]))
    trainer = trainers.MetricLossOnly(
        models=models,
        optimizers={"trunk_optimizer": torch.optim.SGD(models["trunk"].parameters(), lr=0.1)},
        batch_size=5,
        loss_funcs={"metric_loss": losses.ContrastiveLoss()},
        dataset=data,
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
    )
    trainer.train(num_epochs=1)
    model = SimilarityModel(trainer.models, IMAGES[:2], contrast="others")
    with torch.no_grad():
        models["trunk"].eval()
        models["embedder"].eval()
        torch.testing.assert_close(model.embed(IMAGES), models["embedder"](models["trunk"](IMAGES)))


def test_every_entrance_takes_them():
    models = parts()
    whole = nn.Sequential(models["trunk"], models["embedder"])
    pair = explain_pair(models, "trunk.last", IMAGES[:2], IMAGES[2:4], rule="centred")
    wanted = explain_pair(whole, "0.last", IMAGES[:2], IMAGES[2:4], rule="centred")
    assert torch.equal(pair.map_a, wanted.map_a)
    mean = gallery_mean(alike(**models), [IMAGES])
    assert torch.equal(mean.row, gallery_mean(whole, [IMAGES]).row)
    support = SimilarityModel.from_support(models, IMAGES, [0, 0, 1, 1, 1], contrast=mean)
    assert torch.equal(
        support.references, SimilarityModel.from_support(whole, IMAGES, [0, 0, 1, 1, 1]).references
    )
    data = TensorDataset(torch.rand(12, 3, 8, 8), torch.arange(4).repeat(3))
    options = {"dataset": data, "shots": 2, "mosaics": 2, "singles": 2, "steps": 2}
    found, same = (
        evaluate({"ours": "centred"}, one, layer, **options)
        for one, layer in ((models, "trunk.last"), (whole, "0.last"))
    )
    assert (found.values["ours"]["energy"] == same.values["ours"]["energy"]).all()


def test_a_trunk_alone_and_a_module_dict():
    trunk = encoder()
    for given in ({"trunk": trunk}, {"trunk": trunk, "embedder": None}, nn.ModuleDict(parts())):
        assert SimilarityModel(given, IMAGES[:2])(IMAGES).shape == (5, 2)
    # A module with a trunk of its own is called as it is.
    own = nn.Sequential()
    own.add_module("trunk", trunk)
    own.add_module("flat", nn.Flatten())
    assert as_encoder(own) is own


def test_modes_stay_each_part_its_own():
    models = parts()
    models["trunk"].train().norm.eval()  # a frozen batch norm
    before = [State.of(part) for part in models.values()]
    model = SimilarityModel(models, IMAGES[:2])
    assert model.training
    assert model.encoder.training
    assert not any(part.training for part in SimilarityModel(parts(), IMAGES[:2]).modules())
    LayerFam(model, "encoder.trunk.last", rule="centred").attribute(IMAGES, 1)
    explain_pair(models, "trunk.last", IMAGES[:1], IMAGES[1:2])
    for part, state in zip(models.values(), before, strict=True):
        state.assert_unchanged(part)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"embedder": nn.Identity()}, r'Module or {"trunk": ..., "embedder": ...}, not dict'),
        ({}, "not dict"),
        ([encoder()], "not list"),
        ({"trunk": "resnet50"}, "the encoder's trunk must be a torch.nn.Module, not str"),
        ({"trunk": encoder(), "embedder": nn.Linear}, "the encoder's embedder .* not a class"),
    ],
)
def test_what_is_no_encoder_is_refused_by_every_entrance(given, message):
    for use in (
        lambda: SimilarityModel(given, IMAGES),
        lambda: SimilarityModel.from_support(given, IMAGES, range(5)),
        lambda: explain_pair(given, "last", IMAGES, IMAGES),
        lambda: gallery_mean(given, [IMAGES]),
        lambda: evaluate({"ours": "centred"}, given, "last", TensorDataset(IMAGES)),
    ):
        with pytest.raises(TypeError, match=message):
            use()
    if isinstance(given, dict):
        with pytest.raises(TypeError, match="there is no gallery"):
            gallery_mean(given)
