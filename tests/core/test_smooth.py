"""Smoothing against torch's convolution, its sums, and every explainer that offers it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fam_plugins import FAM, LayerFam, SimilarityModel, explain_pair
from fam_plugins.core.rules import RULES
from fam_plugins.core.smooth import smoothed
from tests.networks import encoder

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def by_convolution(maps: torch.Tensor, dims: int) -> torch.Tensor:
    """Pad by repeating the edge, then convolve with the outer product of ``[1, 2, 1] / 4``."""
    line = torch.tensor([1.0, 2.0, 1.0], dtype=maps.dtype) / 4
    kernel = torch.ones((), dtype=maps.dtype)
    for _ in range(dims):
        kernel = kernel[..., None] * line
    flat = maps.reshape(-1, 1, *maps.shape[-dims:])
    padded = F.pad(flat, [1, 1] * dims, mode="replicate")
    return CONVOLVE[dims](padded, kernel[None, None]).reshape(maps.shape)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(4, 5, 6), (1, 1, 2), (1, 2, 1)])
def test_it_is_the_convolution_and_keeps_sums(dims, sizes):
    maps = torch.randn(2, 3, *sizes[-dims:], dtype=torch.float64)
    found = smoothed(maps, dims)
    torch.testing.assert_close(found, by_convolution(maps, dims), rtol=0, atol=1e-14)
    whole = list(range(-dims, 0))
    torch.testing.assert_close(found.sum(whole), maps.sum(whole), rtol=0, atol=1e-13)


@pytest.fixture
def model():
    torch.manual_seed(3)
    return SimilarityModel(encoder().double(), torch.rand(4, 3, 8, 10).double()).eval()


IMAGES = torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(4)).double()


@pytest.mark.filterwarnings('ignore:rule "fam" rescales')
@pytest.mark.parametrize("rule", list(RULES))
def test_every_explainer_smooths_its_own_map(model, rule):
    def check(plain: torch.Tensor, smooth: torch.Tensor) -> None:
        torch.testing.assert_close(smooth, by_convolution(plain, 2), rtol=0, atol=1e-13)
        torch.testing.assert_close(smooth.sum((-2, -1)), plain.sum((-2, -1)), rtol=0, atol=1e-12)
        assert (smooth - plain).abs().max() > 1e-6

    def both(explain):
        check(explain(smooth=False), explain(smooth=True))

    def fam(smooth: bool, **many: object) -> torch.Tensor:
        cam = FAM(model, ["last"], rule=rule, smooth=smooth)
        if many:
            cam.attribute_references(IMAGES)
        else:
            cam(IMAGES)
        return cam.attributions[0]

    layer_fam = {s: LayerFam(model, "last", rule=rule, smooth=s) for s in (False, True)}
    both(lambda smooth: layer_fam[smooth].attribute(IMAGES, target=1))
    both(lambda smooth: layer_fam[smooth].attribute_references(IMAGES))
    both(lambda smooth: layer_fam[smooth].attribute(IMAGES, target=1, attr_dim_summation=False))
    both(fam)
    both(lambda smooth: fam(smooth, many=True))
    pair = {
        s: explain_pair(
            model.encoder,
            "last",
            IMAGES[:1],
            IMAGES[1:],
            rule=rule,
            smooth=s,
            difference=True,
            contrast=model.references,
        )
        for s in (False, True)
    }
    for name in ("map_a", "map_b", "difference_a", "difference_b"):
        check(getattr(pair[False], name), getattr(pair[True], name))


def test_additive_still_adds_up(model):
    maps, delta = LayerFam(model, "last", rule="additive", smooth=True).attribute(
        IMAGES, target=2, return_convergence_delta=True
    )
    torch.testing.assert_close(maps.sum((1, 2, 3)), model(IMAGES)[:, 2], rtol=0, atol=1e-12)
    assert delta.abs().max() < 1e-12


def test_features_without_regions_stay_as_they_are():
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    images = torch.rand(2, 4)
    plain, smooth = (
        LayerFam(net, "0", rule="additive", smooth=s).attribute(images, target=0)
        for s in (False, True)
    )
    assert torch.equal(plain, smooth)
