"""The joint matrix of a pair, against every region's share embedded by brute force."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fam_plugins import Similarity, explain_pair, tokens_to_map
from fam_plugins.core import joint as core
from fam_plugins.core.similarity import SIMILARITIES, on_unit_length
from tests.hostile.table import LpDistance
from tests.networks import OwnBackward, TinyNet

G = torch.Generator().manual_seed(0)
A = torch.randn(2, 3, 8, 10, generator=G, dtype=torch.float64)
B = torch.randn(2, 3, 12, 6, generator=G, dtype=torch.float64)

W = torch.arange(1, 7, dtype=torch.float64)
EXACT = {"rtol": 0, "atol": 1e-12}


class Depthwise(nn.Module):
    """A pooling with learned weights per place, as face networks have, and a projection."""

    def __init__(self):
        super().__init__()
        self.pool, self.out = nn.Conv2d(6, 6, 4, groups=6), nn.Linear(6, 5)

    def forward(self, maps):
        return self.out(self.pool(maps).flatten(1))


class Signed(nn.Module):
    """A layer of both signs, and whatever follows it."""

    def __init__(self, tail):
        super().__init__()
        self.last, self.tail = nn.Conv2d(3, 6, 3, padding=1, stride=2), tail

    def forward(self, images):
        return self.tail(self.last(images))


def pooling(*head):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


TAILS = {
    "pooled": pooling,
    "linear": lambda: pooling(nn.Linear(6, 7, bias=False)),
    "linear with bias": lambda: pooling(nn.Linear(6, 7)),
    "square": lambda: pooling(nn.Linear(6, 6, bias=False)),
    "batch norm": lambda: pooling(nn.BatchNorm1d(6)),
    "two linear": lambda: pooling(nn.Linear(6, 9), nn.Linear(9, 4)),
    "flat": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)),
    "depthwise": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(4), Depthwise()),
    "sum": lambda: nn.Sequential(nn.Flatten(2), Sum()),
}


class Sum(nn.Module):
    def forward(self, maps):
        return maps.sum(dim=2)


def network(name):
    torch.manual_seed(0)
    net = Signed(TAILS[name]()).double()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm1d):
            nn.init.normal_(part.running_mean)
            nn.init.normal_(part.bias)
    return net.eval()


def one_region_at_a_time(net, images):
    """What each region adds to the embedding, and the constant last: ``[B, R + 1, D]``."""
    with torch.no_grad():
        maps = net.last(images)
        constant = net.tail(torch.zeros_like(maps))
        parts = []
        for place in range(maps[0, 0].numel()):
            alone = torch.zeros_like(maps)
            alone.flatten(2)[..., place] = maps.flatten(2)[..., place]
            parts.append(net.tail(alone) - constant)
    return torch.stack([*parts, constant], dim=1)


def factor_by_hand(similarity, za, zb):
    return {
        "cosine": 1 / (za.norm() * zb.norm()),
        "dot": torch.ones(()),
        "sqeuclidean": 2 * torch.ones(()),
        "euclidean": 1 / (za - zb).norm(),
        "LpDistance": 1 / (za / za.norm() - zb / zb.norm()).norm() / (za.norm() * zb.norm()),
    }[similarity]


@pytest.mark.parametrize("similarity", [*SIMILARITIES, "LpDistance"])
@pytest.mark.parametrize("name", TAILS)
def test_every_entry_is_the_product_of_two_regions_embedded_alone(name, similarity):
    net = network(name)
    chosen = LpDistance() if similarity == "LpDistance" else similarity
    pair = explain_pair(net, "last", A, B, similarity=chosen, joint=True)
    parts_a, parts_b = one_region_at_a_time(net, A), one_region_at_a_time(net, B)
    assert pair.joint.shape == (2, 21, 19)
    for item in range(2):
        za, zb = parts_a[item].sum(0), parts_b[item].sum(0)
        expected = torch.empty(21, 19, dtype=torch.float64)
        for i in range(21):
            for j in range(19):
                expected[i, j] = (parts_a[item, i] * parts_b[item, j]).sum()
        expected *= factor_by_hand(similarity, za, zb)
        expected[-1, -1] += pair.score[item] - expected.sum()
        torch.testing.assert_close(pair.joint[item], expected, **EXACT)
    torch.testing.assert_close(pair.joint[:, :-1].sum(2), pair.map_a.flatten(1), **EXACT)
    torch.testing.assert_close(pair.joint[:, :, :-1].sum(1), pair.map_b.flatten(1), **EXACT)
    torch.testing.assert_close(pair.joint.sum((1, 2)), pair.score, **EXACT)
    constant = name in ("linear with bias", "batch norm", "two linear", "flat", "depthwise")
    for edge in (pair.joint[:, -1, :-1], pair.joint[:, :-1, -1]):
        assert edge.any() if constant else not edge.any()
    if similarity in ("cosine", "dot") and not constant:
        assert not pair.joint[:, -1, -1].any()
    if similarity == "sqeuclidean" and not constant:
        squares = -(parts_a.sum(1).square() + parts_b.sum(1).square()).sum(1)
        torch.testing.assert_close(pair.joint[:, -1, -1], squares, **EXACT)


@pytest.mark.parametrize("embedding", ["model", "pooled"])
def test_whatever_rule_contrast_and_smoothing_say_the_plain_similarity_is_split(embedding):
    net = network("linear with bias")
    width = 7 if embedding == "model" else 6
    plain = explain_pair(net, "last", A, B, embedding=embedding, joint=True)
    for rule in ("additive", "centred", "gradcam", "fam"):
        pair = explain_pair(
            net, "last", A, B, embedding=embedding, rule=rule, smooth=True, joint=True,
            contrast=None if rule == "fam" else torch.ones(3, width, dtype=torch.float64),
        )  # fmt: skip
        assert torch.equal(pair.joint, plain.joint)
        torch.testing.assert_close(pair.joint.sum((1, 2)), pair.score, **EXACT)
    if embedding == "pooled":
        features = net.last(A).flatten(2), net.last(B).flatten(2)
        za, zb = (part.mean(2) for part in features)
        scale = za.norm(dim=1) * zb.norm(dim=1) * 20 * 18
        expected = (features[0].mT @ features[1]) / scale[:, None, None]
        torch.testing.assert_close(plain.joint[:, :-1, :-1], expected, **EXACT)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("name", TAILS)
def test_a_norm_of_the_encoders_own_is_held_constant_as_in_the_maps(name, similarity):
    net = network(name)
    parts_a, parts_b = one_region_at_a_time(net, A), one_region_at_a_time(net, B)
    plain = explain_pair(net, "last", A, B, joint=True).joint
    net.tail = nn.Sequential(net.tail, Unit())
    pair = explain_pair(net, "last", A, B, similarity=similarity, joint=True)
    torch.testing.assert_close(pair.joint[:, :-1].sum(2), pair.map_a.flatten(1), **EXACT)
    torch.testing.assert_close(pair.joint[:, :, :-1].sum(1), pair.map_b.flatten(1), **EXACT)
    torch.testing.assert_close(pair.joint.sum((1, 2)), pair.score, **EXACT)
    if similarity in ("cosine", "dot"):
        torch.testing.assert_close(pair.joint, plain, **EXACT)
    else:
        inner = torch.einsum("bid,bjd->bij", parts_a[:, :-1], parts_b[:, :-1])
        lengths = parts_a.sum(1).norm(dim=1) * parts_b.sum(1).norm(dim=1)
        factor = 2 if similarity == "sqeuclidean" else -1 / pair.score
        expected = inner * (factor / lengths)[:, None, None]
        torch.testing.assert_close(pair.joint[:, :-1, :-1], expected, **EXACT)


def test_a_batch_is_its_pairs_and_swapping_transposes():
    for name in TAILS:
        net = network(name)
        both = explain_pair(net, "last", A, B, joint=True).joint
        for item in range(2):
            alone = explain_pair(net, "last", A[item : item + 1], B[item : item + 1], joint=True)
            torch.testing.assert_close(alone.joint[0], both[item], **EXACT)
        back = explain_pair(net, "last", B, A, joint=True).joint
        torch.testing.assert_close(back, both.mT, **EXACT)
    assert explain_pair(net, "last", A, B).joint is None


NON_LINEAR = {
    "relu": lambda: pooling(nn.ReLU()),
    "projected relu": lambda: pooling(nn.Linear(6, 6, bias=False), nn.ReLU()),
    "relu in between": lambda: pooling(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)),
    "relu in front": lambda: nn.Sequential(nn.ReLU(), *pooling()),
    "tanh": lambda: pooling(nn.Tanh()),
    "gelu": lambda: pooling(nn.GELU()),
    "layer norm": lambda: pooling(nn.LayerNorm(6)),
    "unit length within": lambda: pooling(Unit(), nn.Linear(6, 4)),
    "a bias that keeps ReLUs open": lambda: pooling(Up(), nn.ReLU()),
    "largest": lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
    "root mean square": lambda: RootMeanSquare(),
    "times its length": lambda: pooling(TimesLength()),
}


class Up(nn.Module):
    def forward(self, z):
        return z + 5


class Unit(nn.Module):
    def forward(self, z):
        return nn.functional.normalize(z)


class RootMeanSquare(nn.Module):
    def forward(self, maps):
        return (maps.square().mean(dim=(2, 3)) + 1e-12).sqrt()


class TimesLength(nn.Module):
    def forward(self, z):
        return z * z.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("name", NON_LINEAR)
def test_a_tail_that_is_not_linear_is_found_out(name, normalised, dtype):
    torch.manual_seed(0)
    net = Signed(nn.Sequential(NON_LINEAR[name](), *([Unit()] if normalised else []))).to(dtype)
    a, b = A.to(dtype), B.to(dtype)
    for one, other in ((a, b), (a, a), (a[:1], a[:1]), (0 * a, 0 * a)):
        with pytest.raises(ValueError, match='what follows it is not.*embedding="pooled"'):
            explain_pair(net, "last", one, other, joint=True)
    pooled = explain_pair(net, "last", a, b, joint=True, embedding="pooled")
    torch.testing.assert_close(pooled.joint.sum((1, 2)), pooled.score)


def test_the_largest_of_a_constant_map_is_no_mean():
    class First(nn.Module):
        def forward(self, maps):
            return maps[:, :, 0, 0]

    net = Signed(First()).eval().double()
    nn.init.zeros_(net.last.weight)
    pair = explain_pair(net, "last", A, B, joint=True)
    assert pair.joint[:, 0, 0].abs().min() > 0.1
    assert not pair.joint[:, 1:].any()
    assert not pair.joint[:, :, 1:].any()


@pytest.mark.parametrize(
    "similarity",
    [
        Similarity("weighted", lambda z, t: z @ (t * W).T, lambda z, t, at: z @ (t * W).T),
        on_unit_length(SIMILARITIES["dot"], references_too=False),
    ],
    ids=["another direction", "not symmetric"],
)  # fmt: skip
def test_a_form_that_is_no_multiple_of_the_product_is_refused(similarity):
    with pytest.raises(ValueError, match="multiple of <a, b>"):
        explain_pair(network("pooled"), "last", A, B, similarity=similarity, joint=True)


def test_forms_that_are_multiples_of_it_are_taken_also_negative_ones():
    net = network("linear with bias")
    dot = explain_pair(net, "last", A, B, similarity="dot", joint=True).joint
    for times in (0.1, -3.0):
        scaled = Similarity("scaled", lambda z, t, f=times: f * z @ t.T,
                            lambda z, t, at, f=times: f * z @ t.T)  # fmt: skip
        found = explain_pair(net, "last", A, B, similarity=scaled, joint=True).joint
        torch.testing.assert_close(found, times * dot, **EXACT)


def test_a_similarity_without_a_linear_form_is_refused_before_any_work():
    net = TinyNet(head=nn.Identity()).eval()
    with pytest.raises(ValueError, match="has none"):
        explain_pair(net, "last", A.float(), B.float(), similarity=lambda z, t: z @ t.T, joint=True)
    assert net.calls == 0


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("name", ["pooled", "linear with bias"])
def test_zeros_and_the_same_image_twice(name, similarity):
    net = network(name)
    nn.init.zeros_(net.last.bias)
    for a, b in ((0 * A, B), (A, 0 * B), (0 * A, 0 * B), (A, A)):
        if name == "pooled" and similarity == "cosine" and not (a.any() and b.any()):
            with pytest.warns(UserWarning, match="all zero"):
                pair = explain_pair(net, "last", a, b, similarity=similarity, joint=True)
        else:
            pair = explain_pair(net, "last", a, b, similarity=similarity, joint=True)
        torch.testing.assert_close(pair.joint.sum((1, 2)), pair.score, **EXACT)
        torch.testing.assert_close(pair.joint[:, :-1].sum(2), pair.map_a.flatten(1), **EXACT)


@pytest.mark.parametrize("size", [1e-18, 1e17])
def test_embeddings_whose_squares_leave_float32(size):
    net = Signed(pooling()).eval()
    nn.init.zeros_(net.last.bias)
    expected = explain_pair(net, "last", A.float(), B.float(), joint=True).joint
    found = explain_pair(net, "last", size * A.float(), size * B.float(), joint=True).joint
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


class Tokens(nn.Module):
    """Patches behind a class token of the images' own; the embedding is the mean of all."""

    def __init__(self, weight):
        super().__init__()
        self.last, self.head, self.weight = nn.Identity(), nn.Linear(3, 5), weight

    def forward(self, images):
        patches = images.flatten(2).mT
        tokens = self.last(torch.cat([images.mean(dim=(2, 3))[:, None] + 1, patches], dim=1))
        return self.head(tokens[:, 1:].mean(dim=1) + self.weight * tokens[:, 0])


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_the_share_of_a_class_token_that_is_left_out_is_in_the_constants(weight):
    net = Tokens(weight).eval().double()
    a, b = A[..., :4, :5], B[..., :4, :5]
    to_map = tokens_to_map(4, 5, skip=1)
    pair = explain_pair(net, "last", a, b, reshape_transform=to_map, joint=True)
    torch.testing.assert_close(pair.joint[:, :-1].sum(2), pair.map_a.flatten(1), **EXACT)
    torch.testing.assert_close(pair.joint.sum((1, 2)), pair.score, **EXACT)
    constants = []
    for images in (a, b):
        token = images.mean(dim=(2, 3)) + 1
        constants.append((weight * token) @ net.head.weight.T + net.head.bias)
    lengths = net(a).norm(dim=1) * net(b).norm(dim=1)
    expected = (constants[0] * constants[1]).sum(1) / lengths
    torch.testing.assert_close(pair.joint[:, -1, -1], expected, **EXACT)


def test_a_layer_that_the_embedding_also_passes_by():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)

        def forward(self, images):
            first = self.first(images).tanh()
            return (first + self.last(first)).mean(dim=(2, 3))

    net = Residual().eval().double()
    pair = explain_pair(net, "last", A, B, joint=True)
    torch.testing.assert_close(pair.joint[:, :-1].sum(2), pair.map_a.flatten(1), **EXACT)
    torch.testing.assert_close(pair.joint.sum((1, 2)), pair.score, **EXACT)
    assert pair.joint[:, -1, :-1].abs().min() > 1e-9


def test_a_step_of_somebodys_own_that_is_linear():
    class Twice(nn.Module):
        def forward(self, maps):
            return OwnBackward.apply(maps)

    net = Signed(nn.Sequential(*pooling(nn.Linear(6, 4)), Twice())).eval().double()
    pair = explain_pair(net, "last", A, B, joint=True)
    torch.testing.assert_close(pair.joint.sum((1, 2)), pair.score, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_of_the_encoder(dtype):
    net = network("linear with bias")
    expected = explain_pair(net, "last", A, B, embedding="pooled", joint=True).joint
    a, b = A.to(dtype), B.to(dtype)
    found = explain_pair(net.to(dtype), "last", a, b, embedding="pooled", joint=True).joint
    assert found.dtype == dtype
    allowed = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]
    assert (found.double() - expected).abs().max() < allowed * expected.abs().max()
    if dtype != torch.float32:
        with pytest.raises(ValueError, match=f"not provably in {dtype}.*in float32"):
            explain_pair(net, "last", a, b, joint=True)


class Largest(TorchDispatchMode):
    """The most values that one tensor had that was made within the block."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        there = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        for part in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() not in there:
                self.values = max(self.values, part.untyped_storage().nbytes() // part.itemsize)
        return made


@pytest.mark.parametrize(
    ("embedding", "head"), [("pooled", nn.Identity()), ("model", nn.Linear(64, 2000))]
)
def test_nothing_is_made_that_is_larger_than_the_matrix(monkeypatch, embedding, head):
    def watched(*args):
        with watch:
            return real(*args)

    real, watch = core.joint_shares, Largest()
    monkeypatch.setattr("fam_plugins.pair.joint_shares", watched)
    net = nn.Sequential(nn.Identity(), *pooling(head)).eval()
    a, b = torch.rand(2, 64, 8, 8, generator=G), torch.rand(2, 64, 7, 9, generator=G)
    pair = explain_pair(net, "0", a, b, embedding=embedding, joint=True)
    assert pair.joint.numel() == 2 * 65 * 64
    # The activations are 2 * 64 * 64; each region's own embedding would be 2 * 64 * 2000.
    assert pair.joint.numel() <= watch.values <= max(pair.joint.numel(), 2 * 64 * 65)


def test_one_product_of_activations_takes_no_further_forward_pass():
    net = TinyNet(head=nn.Identity()).eval()
    for embedding in ("model", "pooled"):
        net.calls = 0
        explain_pair(net, "last", A.float(), B.float(), embedding=embedding, joint=True)
        assert net.calls == 2
    projected = TinyNet(head=nn.Linear(6, 4)).eval()
    before = torch.get_rng_state()
    explain_pair(projected, "last", A.float(), B.float(), joint=True)
    assert projected.calls == 4
    assert torch.equal(before, torch.get_rng_state())
    assert projected.head.weight.grad is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["pooled", "linear with bias"])
def test_on_cuda(name):
    net = network(name)
    expected = explain_pair(net, "last", A, B, joint=True).joint
    found = explain_pair(net.cuda(), "last", A.cuda(), B.cuda(), joint=True).joint
    torch.testing.assert_close(found.cpu(), expected, **EXACT)


def test_a_mean_of_more_channels_than_regions_is_taken_in_parts(monkeypatch):
    def watched(*args):
        with watch:
            return real(*args)

    real, watch = core.joint_shares, Largest()
    monkeypatch.setattr("fam_plugins.pair.joint_shares", watched)
    net = nn.Sequential(nn.Identity(), *pooling()).eval()
    a, b = torch.rand(2, 300, 8, 8, generator=G), torch.rand(2, 300, 7, 9, generator=G)
    pair = explain_pair(net, "0", a, b, joint=True)
    # The activations themselves are 2 * 300 * 64.
    assert watch.values == pair.joint.numel() == 2 * 65 * 64
    torch.testing.assert_close(pair.joint.sum((1, 2)), pair.score)
