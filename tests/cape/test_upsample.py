import pytest
import torch
import torch.nn.functional as F

from fam_plugins.cape import upsample_conserving_mass

SIZES = [(7, 7), (14, 14), (21, 7), (224, 224), (225, 13), (8, 9), (1, 1), (3, 40)]


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_map_keeps_its_sum(mode, size, dtype):
    torch.manual_seed(0)
    maps = torch.rand(2, 3, 7, 7, dtype=dtype)
    large = upsample_conserving_mass(maps, size, mode)
    assert large.shape == (2, 3, *size)
    assert large.dtype == dtype
    torch.testing.assert_close(
        large.double().sum((2, 3)),
        maps.double().sum((2, 3)),
        rtol=8 * torch.finfo(dtype).eps,
        atol=0,
    )


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_every_region_keeps_its_mass(mode):
    """One-hot maps, corners included; bicubic with aligned corners gives up to 1.35, not 1."""
    one_hot = torch.eye(12, dtype=torch.float64).reshape(12, 1, 3, 4)
    large = upsample_conserving_mass(one_hot, (10, 31), mode)
    torch.testing.assert_close(large.sum((1, 2, 3)), torch.ones(12, dtype=torch.float64))
    assert (large >= 0).all()


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("factors", [(2, 2), (3, 5), (32, 32), (1, 4)])
def test_whole_factors_are_plain_interpolation_over_the_area_factor(mode, factors):
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    size = (5 * factors[0], 4 * factors[1])
    plain = F.interpolate(maps, size=size, mode=mode) / (factors[0] * factors[1])
    torch.testing.assert_close(upsample_conserving_mass(maps, size, mode), plain)


def test_the_same_size_is_the_same_map():
    maps = torch.randn(1, 2, 5, 4)
    for mode in ("nearest", "bilinear"):
        torch.testing.assert_close(upsample_conserving_mass(maps, (5, 4), mode), maps)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # Two regions over five pixels: the middle one is shared by half.
        ({}, [4.0, 4.0, 2.0 + 3.0, 6.0, 6.0]),
        ({"mode": "nearest"}, [4.0, 4.0, 5.0, 6.0, 6.0]),
        # Weights of the first region at pixel centres -.3, .1, .5, .9, 1.3: 1, .9, .5, .1, 0.
        ({"mode": "bilinear"}, [4.0, 3.6 + 0.6, 2.0 + 3.0, 0.4 + 5.4, 6.0]),
    ],
    ids=["default", "nearest", "bilinear"],
)
def test_shares_by_hand(mode, expected):
    maps = torch.tensor([[[[10.0, 15.0]]]])
    found = upsample_conserving_mass(maps, (1, 5), **mode)
    torch.testing.assert_close(found, torch.tensor([[[expected]]]))
    flipped = upsample_conserving_mass(maps.mT, (5, 1), **mode)
    torch.testing.assert_close(flipped, found.mT)


def test_half_precision_is_widened_and_gradients_flow():
    maps = torch.rand(1, 2, 7, 7).half().requires_grad_()
    large = upsample_conserving_mass(maps, 224)
    assert large.dtype == torch.float32
    large[0, 0].sum().backward()
    torch.testing.assert_close(maps.grad[0, 0], torch.ones(7, 7).half())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.rand(2, 7, 7), 14), ValueError, r"\[B, K, h, w\]"),
        ((torch.rand(2, 0, 7, 7), 14), ValueError, r"\[B, K, h, w\]"),
        ((torch.ones(1, 1, 7, 7, dtype=torch.int64), 14), TypeError, r"as_tensor\(maps\)\.float"),
        ((torch.rand(1, 1, 7, 7), 0), ValueError, "whole numbers"),
        ((torch.rand(1, 1, 7, 7), (14, -1)), ValueError, "whole numbers"),
        ((torch.rand(1, 1, 7, 7), (14.5, 14)), ValueError, "whole numbers"),
        ((torch.rand(1, 1, 7, 7), (14, 14, 14)), ValueError, "whole numbers"),
        ((torch.rand(1, 1, 7, 7), 14, "bicubic"), ValueError, "'bilinear'"),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        upsample_conserving_mass(*arguments)
