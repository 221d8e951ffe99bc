import copy

import pytest
import torch
from torch.utils.data import DataLoader

from fam_plugins.cape import calibrate_temperature, fit_cape_head
from fam_plugins.cape.batches import FeatureCache, feature_batches

from .conftest import QUIET, assert_unchanged, default_device, state_of


def test_the_cache_serves_every_image_once_per_epoch(model, batches):
    uncached = fit_cape_head(copy.deepcopy(model), batches, epochs=1, lr=1e-12, **QUIET)
    # A one-shot iterator will do, since it is read once.
    cached = fit_cape_head(model, iter(batches), epochs=2, lr=1e-12, cache=True, **QUIET)
    for name in ("loss", "agreement", "confidence"):
        assert getattr(cached, name) == pytest.approx(getattr(uncached, name) * 2, rel=1e-5)


def test_the_cache_is_shuffled_anew_every_epoch():
    features, logits = torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10.0)[:, None]
    cache = FeatureCache([(features[:4], logits[:4]), (features[4:], logits[4:])])
    orders = []
    for epoch in (0, 1, 1):
        batches = list(cache.shuffled(epoch))
        assert [len(f) for f, _ in batches] == [4, 4, 2]
        assert len(cache) == 3
        assert all(torch.equal(f.flatten(), t.flatten()) for f, t in batches)
        orders.append(torch.cat([f for f, _ in batches]).flatten().tolist())
        assert sorted(orders[-1]) == list(range(10))
    assert orders[0] != orders[1] == orders[2]


def test_the_cache_is_shuffled_alike_under_another_default_device():
    features, logits = torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10.0)[:, None]
    cache = FeatureCache([(features, logits)])
    ((expected, _),) = cache.shuffled(3)
    with default_device("meta"):
        ((found, _),) = cache.shuffled(3)
    assert torch.equal(found, expected)


def test_loaders_of_images_alone_and_other_dtypes(model, batches):
    fit_cape_head(model, [images.double() for images, _ in batches], epochs=1, **QUIET)
    fit_cape_head(model, [[images, y, "name"] for images, y in batches], epochs=1, **QUIET)


@pytest.mark.parametrize("image", ["image", "images", "img", "pixel_values"])
@pytest.mark.parametrize("label", ["label", "labels", "target", None])
@pytest.mark.parametrize("cache", [False, True])
def test_loaders_of_dicts_fit_and_calibrate_as_tuples_do(model, batches, image, label, cache):
    other = copy.deepcopy(model)
    named = [{"name": "a", image: x} | ({label: y} if label else {}) for x, y in batches]
    found = fit_cape_head(model, named, epochs=2, cache=cache, **QUIET)
    assert found == fit_cape_head(other, batches, epochs=2, cache=cache, **QUIET)
    if label is None:
        with pytest.raises(ValueError, match="no tensor of labels"):
            calibrate_temperature(model, named)
    else:
        assert calibrate_temperature(model, named) == calibrate_temperature(other, batches)


def test_a_loader_of_a_data_set_of_dicts(model, batches):
    images, labels = batches[0]
    data = [{"img": x, "label": int(y)} for x, y in zip(images, labels, strict=True)]
    for _, found, (kept,) in feature_batches(DataLoader(data, batch_size=2), model):
        assert len(found) == len(kept) == 2


images = torch.randn(4, 1, 6, 6)
nan_images = images.clone()
nan_images[2, 0, 1, 1] = float("nan")


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "loader is empty"),
        ([images, nan_images], ValueError, "batch 1 of the loader: images hold NaN"),
        ([images / 0], ValueError, "NaN or infinity"),
        ([images[0]], ValueError, "DataLoader"),
        ([images[:0]], ValueError, "DataLoader"),
        ([images.expand(4, 3, 6, 6)], ValueError, "did not accept images of shape"),
        ([images.to(torch.uint8)], TypeError, r"images\.float\(\) / 255"),
        (
            [{"x": images}],
            TypeError,
            "batch 0 of the loader gives a dict of 'x': .* one of .'image'",
        ),
        (
            [{"image": images, "pixel_values": images, "label": 0}],
            TypeError,
            "a dict of 'image', 'pixel_values', 'label': it must give",
        ),
        (
            [(images,), {"img": images, "label": 0, "target": 0}],
            TypeError,
            "batch 1 of the loader gives a dict of 'img', 'label', 'target'.* at most one of",
        ),
        ([{}], TypeError, "a dict of nothing"),
        ([{"image": [images]}], TypeError, "a dict of 'image': it must give image tensors"),
        ([()], TypeError, "gives a tuple: it must give image tensors"),
        (["a.png"], TypeError, "gives a str: it must give image tensors"),
        ([images, torch.randn(4, 1, 8, 8)], ValueError, "cannot share a cache"),
    ],
)
@pytest.mark.parametrize("cache", [False, True])
def test_bad_loaders_are_refused(model, loader, error, message, cache):
    if "cache" in message and not cache:
        fit_cape_head(model, loader, epochs=1, **QUIET)  # sizes may vary without a cache
        return
    state = state_of(model)
    with pytest.raises(error, match=message):
        fit_cape_head(model, loader, epochs=2, cache=cache, **QUIET)
    assert_unchanged(model, state)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
