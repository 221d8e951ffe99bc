"""lightly's modules as they are: a backbone that ends in a pooled map, a head behind it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from fam_plugins import LayerFam, SimilarityModel, explain_pair, gallery_mean

IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
BACKBONE = nn.Sequential(*list(resnet18(weights=None).children())[:-1]).eval()


class Module(nn.Module):
    """The form of every tutorial of lightly."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projection_head = BACKBONE, head
        self.eval()

    def forward(self, images):
        return self.projection_head(self.backbone(images).flatten(start_dim=1))


def head(kind: str) -> nn.Module:
    if kind == "a linear layer":
        return nn.Linear(512, 16)
    heads = pytest.importorskip("lightly.models.modules.heads", reason="this is a head of lightly")
    torch.manual_seed(0)
    return getattr(heads, kind)(512, 32, 16)


@pytest.mark.parametrize(
    "kind",
    ["a linear layer", "SimCLRProjectionHead", "MoCoProjectionHead", "BYOLProjectionHead"],
)
def test_the_module_is_the_projection_and_its_backbone_the_features(kind):
    module = Module(head(kind))
    for given, width, layer in ((module, 16, "backbone.7"), (module.backbone, 512, "7")):
        model = SimilarityModel(given, IMAGES[:2], contrast=gallery_mean(given, [IMAGES]))
        expected = given(IMAGES).flatten(1)
        assert torch.equal(model.embed(IMAGES), expected)
        assert model.references.shape == (2, width)
        found = LayerFam(model, f"encoder.{layer}", rule="additive").decompose(IMAGES, 1)
        assert found.maps.shape == (3, 1, 2, 2)
        if given is module.backbone or kind == "a linear layer":  # nothing bends behind the layer
            assert found.gap.abs().max() < 1e-5
        pair = explain_pair(given, layer, IMAGES[:1], IMAGES[1:2])
        cosine = torch.cosine_similarity(expected[:1], expected[1:2])
        torch.testing.assert_close(pair.score, cosine.detach())


def test_a_map_of_several_regions_is_still_no_embedding():
    with pytest.raises(ValueError, match=r"shape \(3, 512, 2, 2\), not embeddings"):
        SimilarityModel(BACKBONE[:-1], IMAGES)
