"""Prototypes against plain loops; embedding once, in chunks, without a trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fam_plugins import prototypes
from fam_plugins.core.eval_mode import place_of
from fam_plugins.core.references import embed_once, unique_labels
from tests.networks import State, encoder


def test_prototypes_equal_plain_loops():
    z = torch.randn(6, 4, dtype=torch.float64)
    labels = [7, 2, 7, 2, 2, 9]
    for name in ("cosine", "dot", "sqeuclidean"):
        rows = prototypes(z, labels, name)
        for row, label in zip(rows, (2, 7, 9), strict=True):
            members = [z[i] for i in range(6) if labels[i] == label]
            if name == "cosine":
                members = [m / m.norm() for m in members]
            torch.testing.assert_close(row, sum(members) / len(members))


def test_labels_may_be_tensors_arrays_or_names():
    z = torch.eye(3)
    by_list = prototypes(z, [5, 1, 5])
    assert torch.equal(by_list, prototypes(z, torch.tensor([5, 1, 5])))
    assert torch.equal(by_list, prototypes(z, np.array([5, 1, 5])))
    assert torch.equal(by_list, prototypes(z, ["b", "a", "b"]))
    assert unique_labels(["b", 1, "b"]) == ["b", 1]


def test_prototypes_are_detached():
    z = torch.randn(2, 3, requires_grad=True)
    assert not prototypes(z, [0, 1]).requires_grad


def test_half_precision_supports_do_not_overflow():
    z = torch.full((2, 512), 300.0, dtype=torch.float16)
    row = prototypes(z, [0, 0])
    assert row.dtype == torch.float16
    torch.testing.assert_close(row, torch.full((1, 512), 512**-0.5, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_supports_are_rounded_once(dtype):
    z = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = (z.double() / z.double().norm(dim=1, keepdim=True)).to(dtype)
    assert (prototypes(z, list(range(20))) == expected).float().mean() > 0.999


@pytest.mark.parametrize(
    ("supports", "labels", "message"),
    [
        (torch.ones(3, 2), [0, 1], "3 supports and 2 labels"),
        (torch.ones(3), [0, 1, 2], r"must be a tensor \[S, D\]"),
        (torch.ones(0, 2), [], "at least one row"),
        (torch.full((1, 2), float("nan")), [0], "NaN"),
    ],
)
def test_bad_supports_are_refused(supports, labels, message):
    with pytest.raises(ValueError, match=message):
        prototypes(supports, labels)


def test_chunks_equal_one_batch_and_leave_nothing_behind():
    model = encoder().train()
    images = torch.randn(7, 3, 8, 8)
    before = State.of(model)
    in_chunks = embed_once(model, images, "references", 3)
    before.assert_unchanged(model)
    assert model.calls == 3
    with torch.no_grad():
        whole = model.eval()(images)
    torch.testing.assert_close(in_chunks, whole)
    assert not in_chunks.requires_grad


def test_training_mode_comes_back_after_an_error():
    class Broken(nn.Module):
        def forward(self, _images):
            raise KeyError("inside the model")

    model = nn.Sequential(encoder().train(), Broken())
    before = State.of(model)
    with pytest.raises(KeyError):
        embed_once(model, torch.ones(1, 3, 8, 8), "references", 8)
    before.assert_unchanged(model)


def test_follows_the_encoder_in_device_and_dtype():
    assert place_of(encoder().double()) == (torch.device("cpu"), torch.float64)
    assert place_of(nn.Flatten()) == (None, None)
    rows = embed_once(encoder(), np.eye(6), "references", 8)
    assert rows.dtype == torch.float32
    assert embed_once(nn.Flatten(), torch.eye(2).half(), "r", 8).dtype == torch.float16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
            r"references of torch.uint8.*\.float\(\) / 255",
        ),
        (torch.eye(2, dtype=torch.int64), "references of torch.int64"),
        (torch.eye(2, dtype=torch.bool), "references of torch.bool"),
        (torch.eye(2, dtype=torch.complex64), "references of torch.complex64"),
        (np.ma.masked_array(np.eye(2), mask=np.eye(2)), "are a masked array: drop the masked rows"),
    ],
)
def test_what_would_be_converted_in_silence_is_refused(given, message):
    with pytest.raises(TypeError, match=message):
        embed_once(encoder(), given, "references")


def test_embeddings_made_in_inference_mode_can_be_used_with_gradient():
    with torch.inference_mode():
        rows = embed_once(encoder(), torch.randn(2, 3, 8, 8), "references", 8)
        given = embed_once(encoder(), torch.eye(6), "references", 8)
    assert not rows.is_inference()
    assert not given.is_inference()


def test_chunk_size_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        embed_once(encoder(), torch.ones(1, 3, 8, 8), "references", 0)


def test_a_list_of_images_names_the_fix():
    with pytest.raises(TypeError, match=r"torch\.stack"):
        embed_once(encoder(), [torch.ones(3, 8, 8), torch.ones(3, 9, 9)], "references", 8)
