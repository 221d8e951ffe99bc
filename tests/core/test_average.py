"""The running mean of a gallery against the mean of all at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from fam_plugins import SimilarityModel, gallery_mean
from tests.networks import State, encoder

IMAGES = torch.randn(11, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("similarity", ["cosine", "dot", "sqeuclidean"])
def test_equals_the_mean_of_all_at_once(similarity):
    net = encoder().train()
    before = State.of(net)
    loader = DataLoader(TensorDataset(IMAGES, torch.arange(11)), batch_size=4)
    mean = gallery_mean(net, loader, similarity=similarity)
    before.assert_unchanged(net)
    assert not mean.requires_grad
    z = net.eval()(IMAGES).detach()
    z = F.normalize(z, dim=1) if similarity == "cosine" else z
    torch.testing.assert_close(mean, z.mean(0, keepdim=True))
    torch.testing.assert_close(gallery_mean(net, [IMAGES], similarity=similarity), mean)


def test_is_a_contrast():
    net = encoder()
    z = net(IMAGES).detach()
    model = SimilarityModel(
        net, z, similarity="dot", contrast=gallery_mean(net, [IMAGES], similarity="dot")
    )
    scores = z @ z.T
    torch.testing.assert_close(model(IMAGES), scores - scores.mean(1, keepdim=True))


def test_many_batches_lose_no_digits():
    rows = 1000 + torch.randn(1000, 100, 2, generator=torch.Generator().manual_seed(0))
    mean = gallery_mean(torch.nn.Flatten(), list(rows), similarity="dot")
    assert torch.equal(mean, rows.double().mean(dim=(0, 1))[None].float())


def test_made_in_inference_mode_it_can_be_used_with_gradient():
    with torch.inference_mode():
        mean = gallery_mean(encoder(), [IMAGES])
    assert not mean.is_inference()


def test_takes_the_dtype_of_the_encoder():
    assert gallery_mean(encoder().double(), [IMAGES]).dtype == torch.float64
    assert gallery_mean(encoder().bfloat16(), [IMAGES]).dtype == torch.bfloat16


def test_trouble_leaves_nothing_behind():
    net = encoder().train()
    before = State.of(net)
    for loader, error, message in (
        ([], ValueError, "loader is empty"),
        ([{"image": IMAGES}], TypeError, r"batch\['image'\]"),
        ([IMAGES[:0]], ValueError, "batch is empty"),
        ([IMAGES * float("nan")], ValueError, "gallery embedding row 0"),
    ):
        with pytest.raises(error, match=message):
            gallery_mean(net, loader)
        before.assert_unchanged(net)
    with pytest.raises(ValueError, match="did you mean"):
        gallery_mean(net, [IMAGES], similarity="cosin")
