"""What the core's pure functions promise for every shape, dtype and memory layout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fam_plugins import SimilarityModel, channels_last_to_map, prototypes, tokens_to_map
from fam_plugins.core.many import as_indices
from fam_plugins.core.maps import maps_of
from fam_plugins.core.rules import RULES
from fam_plugins.core.scores import frozen_scores, score
from fam_plugins.core.similarity import SIMILARITIES, unit_length
from fam_plugins.core.similarity_model import ModelScores
from fam_plugins.core.transforms import transform_for
from tests.core.test_rules import by_loops
from tests.core.test_similarity import by_loop

quick = settings(derandomize=True, max_examples=50, deadline=None, database=None)
few = st.integers(1, 4)
dtypes = st.sampled_from([torch.float32, torch.float64])


@st.composite
def tensors(draw, *shape: int, dtype: torch.dtype = torch.float64, exact: bool = False) -> Tensor:
    """Numbers in any memory layout: small integers if ``exact``, so that sums have no rounding."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    if exact:
        values = torch.randint(-2, 3, shape, generator=generator).to(dtype)
    else:
        scale = 10.0 ** draw(st.integers(-3, 3))
        values = scale * torch.randn(shape, generator=generator, dtype=dtype)
    layout = draw(st.sampled_from(["plain", "reversed", "strided", "sliced"]))
    if layout == "reversed":
        order = tuple(range(len(shape)))[::-1]
        return values.permute(order).contiguous().permute(order)
    if layout == "strided":
        return torch.stack([values, -values], dim=-1)[..., 0]
    if layout == "sliced":
        return torch.cat([values, values], dim=0)[len(values) :]
    return values


@pytest.mark.parametrize("rule", sorted(RULES))
@quick
@given(data=st.data(), dtype=dtypes, pooled=st.booleans(), batch=few, k=few, c=few, r=few)
def test_a_rule_equals_loops(rule, data, dtype, pooled, batch, k, c, r):
    activations = data.draw(tensors(batch, c, r, dtype=dtype, exact=True))
    gradients = data.draw(tensors(batch, k, c, 1 if pooled else r, dtype=dtype, exact=True))
    expected = by_loops(rule, activations.double(), gradients.double())
    full = maps_of(RULES[rule], activations, gradients, False, sum_channels=False)[0]
    summed = maps_of(RULES[rule], activations, gradients, False)[0]
    assert full.dtype == summed.dtype == dtype
    torch.testing.assert_close(full.double(), expected, rtol=1e-5, atol=1e-5)
    total = expected.sum(dim=2, keepdim=True)
    torch.testing.assert_close(summed.double(), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(SIMILARITIES))
@quick
@given(data=st.data(), batch=few, n=st.integers(2, 4), m=few, width=few, others=st.booleans())
def test_scores_frozen_or_not(name, data, batch, n, m, width, others):
    z, t, c = (data.draw(tensors(rows, width)) for rows in (batch, n, m))
    contrast = "others" if others else c
    found = score(name, z, t, contrast)
    size = 1 if name == "cosine" else 1 + torch.cat([z, t, c]).square().sum(dim=1).max()
    for image in range(batch):
        plain = [by_loop(name, z[image].tolist(), row) for row in t.tolist()]
        for j in range(n):
            against = plain[:j] + plain[j + 1 :]
            if not others:
                against = [by_loop(name, z[image].tolist(), row) for row in c.tolist()]
            expected = plain[j] - sum(against) / len(against)
            assert abs(found[image, j] - expected) <= 1e-9 * size

    def replayed(x: Tensor) -> Tensor:
        with frozen_scores(frozen, replay=True):
            return score(name, x, t, contrast)

    # Frozen, the same value at its own point and a linear function everywhere.
    with frozen_scores() as frozen:
        assert (score(name, z, t, contrast) - found).abs().max() <= 1e-9 * size
    x = data.draw(tensors(batch, width))
    constant, at_x, at_z = replayed(torch.zeros_like(z)), replayed(x), replayed(z)
    assert (at_z - found).abs().max() <= 1e-9 * size
    gap = replayed(x + 2 * z) + 2 * constant - at_x - 2 * at_z
    assert gap.abs().max() <= 1e-9 * (size + torch.cat([constant, at_x]).abs().max())


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@quick
@given(
    st.integers(1, 5).flatmap(
        lambda w: st.lists(st.lists(finite, min_size=w, max_size=w), min_size=1, max_size=3)
    )
)
def test_unit_length_is_one_or_zero_for_any_finite_row(rows):
    vectors = torch.tensor(rows, dtype=torch.float32, requires_grad=True)
    found = unit_length(vectors)
    for row, unit in zip(rows, found.tolist(), strict=True):
        length = math.sqrt(sum(x * x for x in unit))
        assert length == pytest.approx(float(any(row)), abs=1e-5)
        assert all(x * y >= 0 for x, y in zip(row, unit, strict=True))
    with torch.no_grad():
        assert torch.isfinite(unit_length(vectors, vectors.detach())).all()


@quick
@given(data=st.data(), dtype=dtypes, batch=few, c=few, h=few, w=few, skip=st.integers(0, 3))
def test_transforms_undo_how_maps_become_tokens(data, dtype, batch, c, h, w, skip):
    maps = data.draw(tensors(batch, c, h, w, dtype=dtype))
    tokens = torch.cat([torch.full((batch, skip, c), math.nan), maps.flatten(2).mT], dim=1)
    assert torch.equal(tokens_to_map(h, w, skip=skip)(tokens), maps.to(tokens.dtype))
    assert torch.equal(channels_last_to_map(maps.permute(0, 2, 3, 1)), maps)


sizes = st.integers(1, 40)
stated = st.one_of(
    st.none(), st.integers(-1, 9), st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.lists(st.integers(1, 9), max_size=3), st.sampled_from(["16", 1.5, (None, None), ("a", 2)]),
)  # fmt: skip
names = ["patch_size", "image_size", "class_token", "num_prefix_tokens", "dynamic_img_size"]


@settings(quick, max_examples=200)
@given(
    given=st.tuples(few, sizes, few) | st.lists(sizes, max_size=6),
    images=st.tuples(few, few, sizes, sizes) | st.none() | st.lists(sizes, max_size=5),
    own=st.dictionaries(st.sampled_from(names), stated),
    embed=st.none() | st.dictionaries(st.sampled_from(["grid_size", *names]), stated),
    norm=st.booleans(),
)
def test_a_transform_fits_or_is_refused(given, images, own, embed, norm):
    layer = nn.LayerNorm(4) if norm else nn.Conv2d(1, 8, 1)
    model = nn.Sequential(layer)
    for name, value in own.items():
        setattr(model, name, value)
    if embed is not None:
        model.patch_embed = nn.Module()
        for name, value in embed.items():
            setattr(model.patch_embed, name, value)
    try:
        found = transform_for(model, layer, "0", given, images)
    except ValueError:
        return
    if isinstance(found, tokens_to_map):
        assert len(given) == 3
        assert given[1] == found.skip + found.h * found.w
    elif found is not None:
        assert found is channels_last_to_map
        assert len(given) == 4


@quick
@given(
    rows=st.integers(0, 3).flatmap(
        lambda k: st.lists(
            st.lists(st.integers(-1, 9), min_size=k, max_size=k), min_size=1, max_size=3
        )
    ),
    batch=st.integers(1, 3),
    kind=st.sampled_from(["list", "int64", "int32", "uint8", "tensor", "strided", "float32"]),
)
def test_indices_are_taken_as_they_are_or_refused(rows, batch, kind):
    model = SimilarityModel(nn.Flatten(), torch.eye(9))
    given = rows
    if kind in ("int64", "int32", "float32", "uint8"):
        given = np.array(rows).astype(kind)
    elif kind != "list":
        given = torch.tensor(rows, dtype=torch.int64)
        given = given.repeat_interleave(2, 1)[:, ::2] if kind == "strided" else given
    wrapped = np.array(rows).astype(kind) if kind == "uint8" else np.array(rows)
    fits = len(rows) == batch and wrapped.size and 0 <= wrapped.min() <= wrapped.max() < 9
    if fits and kind != "float32":
        chosen = as_indices(given, ModelScores(model), batch, 64)
        assert chosen.dtype == torch.int64
        assert chosen.tolist() == rows
    else:
        with pytest.raises((IndexError, TypeError, ValueError)):
            as_indices(given, ModelScores(model), batch, 64)


@quick
@given(
    data=st.data(),
    dtype=dtypes,
    labels=st.lists(st.sampled_from("cab") | st.integers(0, 2), min_size=1, max_size=6),
    name=st.sampled_from(sorted(SIMILARITIES)),
)
def test_prototypes_equal_loops_for_any_labels(data, dtype, labels, name):
    z = data.draw(tensors(len(labels), 3, dtype=dtype))
    found = prototypes(z, labels, name)
    order = list(dict.fromkeys(labels))
    if len({type(label) for label in labels}) == 1:
        order.sort()
    for row, label in zip(found, order, strict=True):
        members = [z[i] for i in range(len(labels)) if labels[i] == label]
        if name == "cosine":
            members = [m / m.norm() for m in members]
        expected = sum(members) / len(members)
        assert (row - expected).abs().max() <= 1e-5 * z.abs().max() + 1e-6
