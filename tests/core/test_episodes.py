"""Supports as classes by shots: averaged where nothing else can be meant, refused elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fam_plugins import FAM, LayerFam, SimilarityModel, explain_pair, gallery_mean, prototypes
from fam_plugins.core.scores import takes_images_only
from tests.networks import State, encoder

EPISODE = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NAMES = [name for name in "abc" for _ in range(4)]


@pytest.mark.parametrize("similarity", ["cosine", "dot", "sqeuclidean", "euclidean"])
def test_references_are_the_prototypes_of_the_flat_episode(similarity):
    net = encoder().train()
    before = State.of(net)
    expected = SimilarityModel.from_support(
        net, EPISODE.flatten(0, 1), NAMES, similarity=similarity
    )
    options = {"similarity": similarity, "contrast": "others", "labels": "abc"}
    for given in (EPISODE, EPISODE.numpy(), {"pixel_values": EPISODE}):
        model = SimilarityModel(net, given, **options)
        assert torch.equal(model.references, expected.references)
        assert model.labels == ("a", "b", "c")
    before.assert_unchanged(net)
    before = net.calls
    SimilarityModel(net, EPISODE, chunk_size=5)
    assert net.calls == before + 3  # twelve images, five at a time


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_embeddings_without_labels_are_averaged_class_by_class(similarity):
    rows = torch.randn(3, 4, 6, dtype=torch.float64)
    found = prototypes(rows, similarity=similarity)
    for mean, of in zip(found, rows, strict=True):
        members = [z / z.norm() if similarity == "cosine" else z for z in of]
        torch.testing.assert_close(mean, sum(members) / 4)
    assert torch.equal(found, prototypes(rows.flatten(0, 1), NAMES, similarity))


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        (
            torch.ones(3, 4, 6),
            NAMES,
            r"tensor \[S, D\] of at least one row, or \[N, K, D\] without",
        ),
        (torch.ones(3, 6), None, "3 supports and 0 labels: give one label each"),
        (torch.ones(3, 4, 6, 2), None, r"\[N, K, D\] without labels, not \(3, 4, 6, 2\)"),
        (torch.ones(3, 0, 6), None, "at least one row"),
    ],
)
def test_other_shapes_of_embeddings_are_refused(rows, labels, message):
    with pytest.raises(ValueError, match=message):
        prototypes(rows, labels)


def volumes() -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(3, 6, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten()).eval()


def mixed() -> nn.Module:
    """Volumes whose slices go through convolutions of images."""
    slices = nn.Sequential(nn.Conv3d(3, 6, (1, 3, 3)), nn.Flatten(1, 2), nn.LazyConv2d(4, 1))
    net = nn.Sequential(slices, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net(EPISODE.transpose(1, 2))
    return net.eval()


class Clips(nn.Module):
    """Images of a clip one by one, as transformers' TimeSformer, which says how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.config = encoder(), SimpleNamespace(num_frames=4)

    def forward(self, clips):
        return self.net(clips.flatten(0, 1)).unflatten(0, clips.shape[:2]).mean(1)


@pytest.mark.parametrize("make", [volumes, mixed, nn.Flatten, Clips])
def test_volumes_and_clips_stay_what_they_are(make):
    net = make().eval()
    given = EPISODE if make in (Clips, nn.Flatten) else EPISODE.transpose(1, 2)
    model = SimilarityModel(net, given)
    assert torch.equal(model.references, net(given))
    assert torch.equal(model.embed(given), net(given))


def test_a_model_of_clips_by_transformers():
    hub = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = hub.TimesformerConfig(
        **sizes, num_attention_heads=2, image_size=8, patch_size=4, num_frames=4
    )
    net = hub.TimesformerModel(config).eval()
    model = SimilarityModel(net, EPISODE, output=lambda out: out.last_hidden_state[:, 0])
    assert model.references.shape == (3, 16)
    assert not takes_images_only(net)


@pytest.mark.parametrize(
    "use",
    [
        lambda net: SimilarityModel(net, torch.eye(6))(EPISODE),
        lambda net: SimilarityModel(net, torch.eye(6), contrast=EPISODE),
        lambda net: SimilarityModel.from_support(net, EPISODE, list("abc")),
        lambda net: explain_pair(net, "last", EPISODE, EPISODE),
        lambda net: gallery_mean(net, [EPISODE]),
        lambda net: gallery_mean(net, EPISODE),
        lambda net: FAM(SimilarityModel(net, torch.eye(6)), ["last"], rule="centred")(EPISODE),
        lambda net: LayerFam(SimilarityModel(net, torch.eye(6)), "last", rule="centred").attribute(
            EPISODE, 0
        ),
    ],
)
def test_elsewhere_an_error_names_the_fix_before_any_work(use):
    net = encoder()
    before = State.of(net)
    with pytest.raises(
        ValueError, match=r"flatten an episode, x.flatten\(0, 1\), or .* references"
    ):
        use(net)
    assert net.calls == 0
    before.assert_unchanged(net)


def test_an_empty_episode_is_refused():
    for shape in ((0, 4), (3, 0)):
        with pytest.raises(ValueError, match="references are empty"):
            SimilarityModel(encoder(), np.zeros((*shape, 3, 8, 8), np.float32))
