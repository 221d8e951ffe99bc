"""The encoder and its references as a model: scores, what it carries, what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fam_plugins import SimilarityModel, prototypes
from fam_plugins.core.scores import score
from tests.networks import State, encoder

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("similarity", ["cosine", "dot", "sqeuclidean"])
@pytest.mark.parametrize("contrast", [None, "others", ROWS[:2]], ids=["none", "others", "rows"])
def test_scores_are_the_similarities_of_the_embeddings(similarity, contrast):
    model = SimilarityModel(encoder(), ROWS, similarity=similarity, contrast=contrast)
    z = encoder()(IMAGES)
    torch.testing.assert_close(model(IMAGES), score(similarity, z, ROWS, contrast))
    torch.testing.assert_close(model.embed(IMAGES), z)
    assert model.similarity == similarity
    assert (model.contrast is None) == (contrast is None)


def test_images_as_references_are_embedded_once_in_eval_mode():
    net = encoder().train()
    before = State.of(net)
    model = SimilarityModel(net, IMAGES, contrast=IMAGES[:2], chunk_size=3)
    before.assert_unchanged(net)
    assert net.calls == 3
    assert model.training
    torch.testing.assert_close(model.references, net.eval()(IMAGES).detach())
    units = F.normalize(model.references[:2], dim=1)
    torch.testing.assert_close(model.contrast.row, units.mean(0, keepdim=True))


def test_takes_the_mode_of_its_encoder():
    assert not SimilarityModel(encoder().eval(), ROWS).training
    assert SimilarityModel(encoder().train(), ROWS).training


def test_references_are_detached_copies():
    rows = ROWS.clone().requires_grad_()
    model = SimilarityModel(encoder(), rows)
    assert not model.references.requires_grad
    copy.deepcopy(model)
    with torch.no_grad():
        rows.zero_()
    assert torch.equal(model.references, ROWS)


def test_the_buffer_follows_the_module():
    model = SimilarityModel(encoder(), ROWS, contrast=ROWS[:1])
    assert model.double().references.dtype == torch.float64
    assert model.contrast.row.dtype == model.contrast.terms.dtype == torch.float64
    state = model.state_dict()
    assert {"references", "contrast_embeddings", "contrast_terms"} <= set(state)
    # One row, however many it was taken of.
    other = SimilarityModel(encoder(), torch.ones(3, 6), contrast=torch.ones(7, 6)).double()
    other.load_state_dict(state)
    assert torch.equal(other(IMAGES.double()), model(IMAGES.double()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": "dot"}, "scores by cosine with no contrast, and this one by dot with no"),
        ({"contrast": "others"}, "and this one by cosine with others as contrast: build the model"),
    ],
)
def test_a_state_of_scores_that_mean_something_else_is_refused(options, message):
    state = SimilarityModel(encoder(), ROWS).state_dict()
    SimilarityModel(encoder(), torch.ones(3, 6)).load_state_dict(state)
    with pytest.raises(ValueError, match=message):
        SimilarityModel(encoder(), ROWS, **options).load_state_dict(state)


def test_gradient_flows_to_the_encoder_for_training():
    model = SimilarityModel(encoder(), ROWS)
    model(IMAGES).sum().backward()
    assert model.encoder.conv.weight.grad is not None


def test_from_support_builds_prototypes_and_remembers_labels():
    net = encoder()
    labels = [30, 10, 30, 20]
    for similarity in ("cosine", "sqeuclidean"):
        model = SimilarityModel.from_support(net, IMAGES, labels, similarity=similarity)
        assert model.labels == (10, 20, 30)
        expected = prototypes(net(IMAGES), labels, similarity)
        torch.testing.assert_close(model.references, expected)
    named = SimilarityModel.from_support(net, net(IMAGES), ["b", "a", "b", "a"])
    assert named.labels == ("a", "b")
    assert copy.deepcopy(named).labels == ("a", "b")
    assert SimilarityModel(net, ROWS).labels is None


@pytest.mark.parametrize("contrast", ["others", ROWS[:2], IMAGES[:2]], ids=["others", "rows", "im"])
def test_from_support_takes_a_contrast(contrast):
    net, labels = encoder(), [0, 1, 2, 2]
    found = SimilarityModel.from_support(net, IMAGES, labels, contrast=contrast)
    expected = SimilarityModel(net, prototypes(net(IMAGES), labels), contrast=contrast)
    torch.testing.assert_close(found(IMAGES), expected(IMAGES))
    plain = SimilarityModel(net, prototypes(net(IMAGES), labels))
    assert (found(IMAGES) - plain(IMAGES)).abs().max() > 0.01


def test_chunk_size_bounds_the_batches_of_supports_and_contrast():
    net, sizes = encoder(), []
    net.conv.register_forward_hook(lambda _m, given, _o: sizes.append(len(given[0])))
    SimilarityModel.from_support(net, IMAGES, [0, 1, 0, 1], contrast=IMAGES[:3], chunk_size=2)
    assert sizes == [2, 2, 2, 1]


def test_shows_what_it_compares_with():
    text = repr(SimilarityModel(encoder(), ROWS, contrast="others"))
    assert "references=3x6, similarity=cosine, others as contrast" in text


class Returns(nn.Module):
    """An encoder that returns what it is told to."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, _images):
        return self.value


@pytest.mark.parametrize(
    ("references", "options", "error", "message"),
    [
        (torch.ones(0, 6), {}, ValueError, "references are empty.*at least one"),
        (torch.ones(6), {}, ValueError, r"pass embeddings \[N, D\] or images"),
        (torch.full((1, 6), math.nan), {}, ValueError, "row 0 holds NaN"),
        (torch.full((1, 6), math.inf), {}, ValueError, "infinite"),
        (torch.ones(1, 6), {"similarity": "cosin"}, ValueError, "did you mean 'cosine'"),
        (torch.ones(1, 6), {"contrast": "others"}, ValueError, "at least 2 references"),
        (torch.ones(1, 6), {"contrast": "all"}, ValueError, 'contrast must be "others"'),
        (torch.ones(1, 6), {"contrast": torch.ones(1, 5)}, ValueError, "same encoder"),
        ("cat.png", {}, TypeError, "must be a tensor or an array"),
    ],
)
def test_bad_references_are_refused(references, options, error, message):
    net = encoder().train()
    before = State.of(net)
    with pytest.raises(error, match=message):
        SimilarityModel(net, references, **options)
    before.assert_unchanged(net)


def test_references_of_another_width_are_refused_on_use():
    model = SimilarityModel(encoder(), torch.ones(2, 5))
    with pytest.raises(ValueError, match="6 values and the references have 5"):
        model(IMAGES)


def test_labels_of_another_length_are_refused_before_embedding():
    net = encoder()
    with pytest.raises(ValueError, match="4 supports and 3 labels"):
        SimilarityModel.from_support(net, IMAGES, [0, 1, 2])
    assert net.calls == 0


def test_an_unknown_similarity_is_refused_before_embedding():
    net = encoder()
    for build in (
        lambda: SimilarityModel(net, IMAGES, similarity="cos"),
        lambda: SimilarityModel.from_support(net, IMAGES, [0, 1, 2, 3], similarity="cos"),
    ):
        with pytest.raises(ValueError, match="unknown similarity"):
            build()
    assert net.calls == 0


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ((torch.ones(4, 6),), TypeError, "returns a tuple.*picks the embeddings"),
        ({"z": torch.ones(4, 6)}, TypeError, "returns a dict.*picks the embeddings"),
        (torch.ones(4, 6, 2, 2), ValueError, r"append pooling.*AdaptiveAvgPool2d"),
        (torch.ones(3, 6), ValueError, r"3 embeddings for 4 inputs.*image\[None\]"),
    ],
)
def test_an_encoder_that_gives_no_embeddings_is_refused(value, error, message):
    with pytest.raises(error, match=message):
        SimilarityModel(Returns(value), ROWS)(IMAGES)
    with pytest.raises(error, match=message):
        SimilarityModel(Returns(value), IMAGES)


def test_a_function_is_no_encoder():
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        SimilarityModel(lambda x: x, ROWS)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="batch is empty"):
        SimilarityModel(encoder(), ROWS)(IMAGES[:0])
