"""Every kind of explainer through one evaluation, and what is refused before it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam, LayerGradientXActivation
from PIL import Image
from pytorch_grad_cam import GradCAM, ScoreCAM
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor

from fam_plugins import FAM, LayerFam, SimilarityModel
from fam_plugins.core.smooth import smoothed
from fam_plugins.quality import evaluate
from fam_plugins.quality.evaluate import explain
from tests.networks import State, encoder

FEW = {"shots": 2, "mosaics": 4, "singles": 5, "steps": 2}


class Colours(TensorDataset):
    """Five classes, each a colour of its own with noise."""

    def __init__(self, count=25, side=8, classes=5):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(count) % classes
        colours = torch.rand(classes, 3, 1, 1, generator=generator)
        noise = torch.rand(count, 3, side, side, generator=generator)
        super().__init__(colours[labels] + 0.3 * noise, labels)


def channel_mean(model, layer, images, targets):
    """A function of the user's: ignores the reference."""
    caught = []
    handle = layer.register_forward_hook(lambda _m, _i, out: caught.append(out.detach()))
    model(images)
    handle.remove()
    return caught[0].mean(dim=1)


def backward(model, layer, images, targets):
    """A function of the user's that adds to the gradients of the encoder."""
    model(images).sum().backward()
    return images.grad.sum(dim=1)


EVERY = {
    "backward": backward,  # first: GradCAM would clear what it adds to
    "rule": "centred",
    "LayerFam": partial(LayerFam, rule="additive"),
    "LayerGradCam": LayerGradCam,
    "FAM": partial(FAM, rule="centred"),
    "GradCAM": GradCAM,
    "ScoreCAM": ScoreCAM,
    "function": channel_mean,
}


def test_every_kind_of_explainer_and_nothing_left_behind():
    net = encoder()
    net.train()
    net.norm.eval()
    net.conv.weight.grad = torch.full_like(net.conv.weight, 7)
    net.head.requires_grad_(False)
    before, drawn = State.of(net), torch.get_rng_state()
    with torch.no_grad():
        found = evaluate(EVERY, net, "last", Colours(), **FEW)
        before_grad = torch.is_grad_enabled()
    before.assert_unchanged(net)
    assert net.conv.weight.grad.eq(7).all()
    assert not before_grad
    assert torch.equal(torch.get_rng_state(), drawn)
    assert list(found.values) == list(EVERY)
    counts = {"single deletion": 5, "single insertion": 5}
    for label, columns in found.values.items():
        for name, values in columns.items():
            assert values.shape == (counts.get(name, 4),)
            constant = name == "sensitivity"  # a map may be constant
            assert np.isfinite(values).all() or constant or name == "additivity"
        adds_up = label == "LayerFam"
        assert np.isfinite(columns["additivity"]).all() == adds_up
    assert found.values["LayerFam"]["additivity"].max() < 1e-5
    np.testing.assert_allclose(found.values["function"]["sensitivity"], 1, rtol=1e-5)
    for name in found.values["rule"]:
        if name != "additivity":
            ours, adapter = found.values["rule"][name], found.values["FAM"][name]
            np.testing.assert_allclose(ours, adapter, atol=1e-5)
    assert 0.2 <= found.accuracy <= 1


def test_a_frozen_encoder_and_the_layer_as_a_module_give_the_same():
    net, data = encoder(), Colours()
    explainers = {"GradCAM": GradCAM, "LayerGradCam": LayerGradCam}
    first = evaluate(explainers, net, "last", data, **FEW)
    second = evaluate(explainers, net.requires_grad_(False), net.last, data, **FEW)
    third = evaluate(explainers, net, net.last, data, **FEW, seed=1)
    for label in explainers:
        np.testing.assert_array_equal(first.values[label]["energy"], second.values[label]["energy"])
        assert not np.array_equal(first.values[label]["energy"], third.values[label]["energy"])


def test_a_map_that_is_right_scores_best():
    """Four classes of pure colours behind an encoder of the mean colour."""
    images = torch.zeros(16, 4, 8, 8)
    labels = torch.arange(16) % 4
    images[torch.arange(16), labels] = 1

    def right(model, layer, given, targets):
        return given[torch.arange(len(given)), targets]

    def wrong(model, layer, given, targets):
        return 1 - right(model, layer, given, targets)

    net = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = TensorDataset(images, labels)
    many = FEW | {"mosaics": 12}
    found = evaluate({"right": right, "wrong": wrong}, net, "0", data, **many)
    best, worst = found.values["right"], found.values["wrong"]
    assert found.accuracy == 1
    for name in ("energy", "point", "auc"):
        assert best[name].tolist() == [1] * 12
        assert worst[name].tolist() == [0] * 12
    assert (best["mosaic deletion"] < worst["mosaic deletion"]).all()
    assert (best["mosaic insertion"] > worst["mosaic insertion"]).all()
    assert (best["sensitivity"] < 0).all()


@pytest.mark.parametrize("contrast", ["others", "gallery", None, torch.rand(3, 6)])
def test_all_explain_one_model_of_the_same_references_and_contrast(contrast):
    net, data, seen = encoder(), Colours(), []

    def look(model, layer, images, targets):
        seen.append((model, layer, images))
        return images[:, 0]

    evaluate({"look": look}, net, "last", data, contrast=contrast, **FEW)
    model, layer, images = seen[0]
    assert layer is net.last
    assert len(model.references) == 5
    score, plain = model(images), SimilarityModel(net, model.references)(images)
    if contrast is None:
        torch.testing.assert_close(score, plain)
    elif isinstance(contrast, torch.Tensor):
        wanted = SimilarityModel(net, model.references, contrast=contrast)(images)
        torch.testing.assert_close(score, wanted)
    elif contrast == "others":
        torch.testing.assert_close(score, plain - (plain.sum(1, keepdim=True) - plain) / 4)
    else:
        shift = score - plain
        torch.testing.assert_close(shift, shift[:, :1].expand(-1, 5), atol=1e-6, rtol=0)
        assert shift.abs().min() > 0.1


def test_what_judges_the_maps_does_not_depend_on_what_they_explain():
    net, found = encoder(), {}
    for contrast in (None, "others"):
        given = {"contrast": contrast, **FEW}
        found[contrast] = evaluate({"a": channel_mean}, net, "last", Colours(), **given).values["a"]
    for name, values in found[None].items():
        np.testing.assert_array_equal(values, found["others"][name])


@pytest.mark.parametrize("made", ["centred", partial(LayerFam, rule="centred", smooth=True)])
def test_smooth_smooths_once_whoever_made_the_map(made):
    net, data = encoder(), Colours()

    def by_hand(model, layer, images, targets):
        return LayerFam(model, layer, rule="centred").attribute(images, target=targets)

    own = evaluate(
        {"own": partial(LayerFam, rule="centred", smooth=True)}, net, "last", data, **FEW
    )
    found = evaluate({"made": made, "by hand": by_hand}, net, "last", data, smooth=True, **FEW)
    for name in ("energy", "auc", "mosaic deletion", "sensitivity"):
        for label in ("made", "by hand"):
            np.testing.assert_allclose(
                found.values[label][name], own.values["own"][name], rtol=1e-4, atol=1e-5
            )


def test_maps_of_grad_cam_are_smoothed_before_they_are_cut_at_zero():
    net, images = encoder(), torch.rand(2, 3, 8, 8)
    model = SimilarityModel(net, net(images).detach(), contrast="others")
    targets = torch.tensor([1, 0])
    signed = LayerGradCam(model, net.last).attribute(images, target=targets).detach()
    assert (signed < 0).any()
    plain, smooth = (
        explain(GradCAM, model, net.last, images, targets, given)[0] for given in (False, True)
    )
    for found, wanted in ((plain, signed[:, 0]), (smooth, smoothed(signed[:, 0], 2))):
        wanted = wanted.clamp_min(0)
        wanted = wanted - wanted.amin((1, 2), keepdim=True)
        top = wanted.amax((1, 2), keepdim=True)
        torch.testing.assert_close(found, wanted / top, atol=1e-4, rtol=1e-4)


def test_image_folders_and_black_images(tmp_path):
    """ScoreCAM masks images down to black ones, whose embedding is zero without a bias."""
    rng = np.random.default_rng(0)
    for name in "abcd":
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            pixels[:, :4] *= i > 0
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    data = ImageFolder(str(tmp_path), to_tensor)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    nn.init.constant_(net[0].weight[0], -1)  # a map of zeros: its mask is black
    assert net(torch.zeros(1, 3, 8, 8)).eq(0).all()
    found = evaluate({"ScoreCAM": ScoreCAM}, net, "1", data, **FEW)
    assert np.isfinite(found.values["ScoreCAM"]["energy"]).all()


class Lazy(Colours):
    """Has torchvision's targets, and notes which images are read."""

    def __init__(self, count):
        super().__init__(count)
        self.targets, self.read = self.tensors[1].tolist(), []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def test_labels_are_read_from_targets_when_there_are_any():
    lazy, plain = Lazy(1000), Colours(1000)
    found = [evaluate({"a": "centred"}, encoder(), "last", data, **FEW) for data in (lazy, plain)]
    assert len(lazy.read) == 4 * 4 + 5 + 5 * 2
    np.testing.assert_array_equal(*(one.values["a"]["energy"] for one in found))


class OneSize(nn.Module):
    """An encoder that takes images of one size, as most vision transformers."""

    def __init__(self, side):
        super().__init__()
        self.net, self.side = encoder(), side

    def forward(self, images):
        assert images.shape[2:] == (self.side, self.side), f"{self.side} pixels and no more"
        return self.net(images)


@pytest.mark.parametrize("side", [8, 9])
def test_an_encoder_of_one_input_size_gets_mosaics_of_that_size(side):
    data, seen = Colours(side=side), []
    colours = torch.stack([data.tensors[0][data.tensors[1] == k].mean((0, 2, 3)) for k in range(5)])

    def nearest_cell(model, layer, images, targets):
        """One where the cell is that is most like the colour of the class."""
        seen.append(images.shape)
        away = (images - colours[targets][:, :, None, None]).abs().sum(1, keepdim=True)
        cells = nn.functional.adaptive_avg_pool2d(away, 2).flatten(1)
        return nn.functional.one_hot(cells.argmin(1), 4).reshape(-1, 2, 2).float()

    methods = {"cell": nearest_cell, "ours": "centred"}
    with pytest.warns(UserWarning, match=f"refuses larger images: {side} pixels") as caught:
        found = evaluate(methods, OneSize(side), "net.last", data, **FEW)
    assert [each.filename for each in caught] == [__file__]
    assert set(seen) == {(4, 3, side, side), (5, 3, side, side)}
    assert (found.values["cell"]["point"] == 1).all()
    assert (found.values["ours"]["energy"] > 0).all()


def test_what_makes_a_reference_is_not_explained():
    lazy = Lazy(25)
    evaluate({"a": "centred"}, encoder(), "last", lazy, **FEW | {"mosaics": 20, "singles": 99})
    explained, references = lazy.read[:-10], lazy.read[-10:]
    assert len(set(references)) == 10
    assert set(explained[:80]) <= set(explained[80:]) == set(range(25)) - set(references)


def sized(*sizes):
    return [(torch.rand(3, *size), k % 4) for k, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("changed", "error", "fix"),
    [
        ({"explainers": {}}, TypeError, 'such as {"ours": "centred"}'),
        ({"explainers": ["centred"]}, TypeError, 'such as {"ours": "centred"}'),
        ({"explainers": {"a": "centered"}}, ValueError, "did you mean 'centred'"),
        ({"explainers": {"a": 3}}, TypeError, "explainer 'a' is 3: pass a rule"),
        (
            {"explainers": {"a": LayerFam(encoder(), "last", rule="centred")}},
            TypeError,
            r"\(not an object\)",
        ),
        ({"explainers": {"a": nn.ReLU}}, TypeError, "pass a rule, a class such as LayerFam"),
        ({"encoder": channel_mean}, TypeError, "torch.nn.Module"),
        ({"layer": "lost"}, ValueError, "did you mean 'last'"),
        ({"similarity": "cosin"}, ValueError, "did you mean 'cosine'"),
        ({"contrast": "other"}, ValueError, '"others", "gallery" or embeddings'),
        ({"mosaics": 0}, ValueError, "must be at least 1"),
        ({"shots": 5}, ValueError, "0 classes have more than 5 images.*lower shots"),
        ({"dataset": Colours(classes=3)}, ValueError, "3 classes .* mosaics need 4"),
        ({"dataset": sized(*[(8, 9)] * 20)}, ValueError, r"\(3, 8, 9\), not \[C, H, H\].*Resize"),
        ({"dataset": sized(*[(8, 8), (9, 9)] * 10)}, ValueError, "CenterCrop"),
        (
            {"dataset": [(torch.zeros(3, 8, 8, dtype=torch.uint8), k % 4) for k in range(20)]},
            TypeError,
            "images.float",
        ),
    ],
)
def test_what_is_refused_before_any_work(changed, error, fix):
    net = encoder()
    given = {"explainers": {"a": "centred"}, "encoder": net, "layer": "last"}
    given |= {"dataset": Colours(), **FEW}
    with pytest.raises(error, match=fix):
        evaluate(**(given | changed))
    assert net.calls == 0


@pytest.mark.parametrize(
    "made", [LayerGradientXActivation, lambda *_: torch.full((4, 2, 2), torch.nan), lambda *_: 1]
)
def test_what_is_no_map_is_refused(made):
    with pytest.raises(ValueError, match=r"\[B, h, w\]"):
        evaluate({"a": made}, encoder(), "last", Colours(), **FEW)
