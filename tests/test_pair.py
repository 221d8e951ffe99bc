"""Both images of a pair, against explaining each with the other as its only reference."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fam_plugins import LayerFam, SimilarityModel, explain_pair
from fam_plugins.core.rules import RULES
from tests.networks import State, TinyNet, encoder

A = torch.randn(3, 3, 8, 10, generator=torch.Generator().manual_seed(0))
B = torch.randn(3, 3, 12, 6, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))

pytestmark = pytest.mark.filterwarnings('ignore:rule "fam" rescales')


def linear_head(bias: bool = False) -> TinyNet:
    torch.manual_seed(0)
    return TinyNet(head=nn.Linear(6, 6, bias=bias)).eval()


def deep_head() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet(head=nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))).eval()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("similarity", ["cosine", "dot", "sqeuclidean"])
@pytest.mark.parametrize("contrast", [None, ROWS], ids=["none", "rows"])
def test_each_side_is_the_query_and_the_other_its_reference(rule, similarity, contrast):
    for net in (encoder(), linear_head(bias=True), deep_head()):
        pair = explain_pair(net, "last", A, B, similarity=similarity, rule=rule, contrast=contrast)
        for mine, this, other in ((pair.map_a, A, B), (pair.map_b, B, A)):
            model = SimilarityModel(net, net(other), similarity=similarity, contrast=contrast)
            expected = LayerFam(model, "last", rule=rule).attribute(this, [0, 1, 2])
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
        plain = SimilarityModel(net, net(B), similarity=similarity)(A).diagonal()
        torch.testing.assert_close(pair.score, plain.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("embedding", ["model", "pooled"])
@pytest.mark.parametrize("rule", RULES)
def test_swapping_the_images_swaps_the_maps(rule, embedding):
    for net in (encoder(), deep_head()):
        there = explain_pair(net, "last", A, B, rule=rule, difference=True, embedding=embedding)
        back = explain_pair(net, "last", B, A, rule=rule, difference=True, embedding=embedding)
        assert torch.equal(there.map_a, back.map_b)
        assert torch.equal(there.map_b, back.map_a)
        assert torch.equal(there.difference_a, back.difference_b)
        assert torch.equal(there.difference_b, back.difference_a)
        torch.testing.assert_close(there.score, back.score)


@pytest.mark.parametrize("make", [encoder, linear_head])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_additive_maps_sum_to_the_score(make, similarity):
    pair = explain_pair(make(), "last", A, B, similarity=similarity, return_convergence_delta=True)
    for part, delta in ((pair.map_a, pair.delta_a), (pair.map_b, pair.delta_b)):
        torch.testing.assert_close(part.sum((1, 2, 3)), pair.score, rtol=1e-5, atol=1e-6)
        assert delta.abs().max() < 1e-5


@pytest.mark.parametrize("embedding", ["model", "pooled"])
@pytest.mark.parametrize("similarity", ["cosine", "sqeuclidean"])
def test_the_delta_is_that_of_layer_fam(similarity, embedding):
    for net in (encoder(), linear_head(bias=True), deep_head()):
        pair = explain_pair(
            net,
            "last",
            A,
            B,
            similarity=similarity,
            contrast=ROWS,
            embedding=embedding,
            return_convergence_delta=True,
        )
        if embedding == "pooled":
            net.head = nn.Identity()
        for delta, this, other in ((pair.delta_a, A, B), (pair.delta_b, B, A)):
            model = SimilarityModel(net, net(other), similarity=similarity, contrast=ROWS)
            _, expected = LayerFam(model, "last", rule="additive").attribute(
                this, [0, 1, 2], return_convergence_delta=True
            )
            torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)


def test_the_delta_is_zero_behind_a_bias_and_the_gap_behind_a_deep_head():
    biased = explain_pair(linear_head(bias=True), "last", A, B, return_convergence_delta=True)
    assert biased.delta_a.abs().max() < 1e-6
    assert (biased.map_a.sum((1, 2, 3)) - biased.score).abs().min() > 1e-3
    deep = explain_pair(deep_head(), "last", A, B, return_convergence_delta=True, tail="true")
    assert deep.delta_a.abs().max() > 1e-3
    assert explain_pair(encoder(), "last", A, B).delta_a is None
    with pytest.raises(ValueError, match='rule "fam" does not add up'):
        explain_pair(encoder(), "last", A, B, rule="fam", return_convergence_delta=True)


@pytest.mark.parametrize("embedding", ["model", "pooled"])
def test_euclidean_maps_sum_to_the_linear_part(embedding):
    net = encoder()
    pair = explain_pair(
        net, "last", A, B,
        similarity="sqeuclidean", embedding=embedding, return_convergence_delta=True,
    )  # fmt: skip
    za, zb = net(A).detach(), net(B).detach()
    torch.testing.assert_close(pair.map_a.sum((1, 2, 3)), 2 * (za * zb).sum(1))
    assert pair.delta_a.abs().max() < 1e-5
    torch.testing.assert_close(pair.score, -(za - zb).square().sum(1))


def test_pooled_ignores_the_head():
    net, plain = deep_head(), encoder()
    plain.load_state_dict(net.state_dict(), strict=False)
    for rule in RULES:
        through = explain_pair(net, "last", A, B, rule=rule, embedding="pooled", difference=True)
        without = explain_pair(plain, "last", A, B, rule=rule, difference=True)
        for name in ("map_a", "map_b", "score", "difference_a", "difference_b"):
            torch.testing.assert_close(getattr(through, name), getattr(without, name))
    contrast = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(
        explain_pair(net, "last", A, B, embedding="pooled", contrast=contrast).map_a,
        explain_pair(plain, "last", A, B, contrast=contrast).map_a,
    )


def test_the_difference_is_similarity_to_itself_minus_to_the_other():
    net = encoder()
    pair = explain_pair(net, "last", A, B, difference=True)
    unit_a, unit_b = F.normalize(net(A).detach(), dim=1), F.normalize(net(B).detach(), dim=1)
    with torch.no_grad():
        handle = net.last.register_forward_hook(lambda _m, _i, out: kept.append(out.clone()))
        kept: list[torch.Tensor] = []
        z = net(A)
        handle.remove()
    weights = (unit_a - unit_b) / z.norm(dim=1, keepdim=True) / kept[0][0, 0].numel()
    expected = (kept[0] * weights[..., None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(pair.difference_a, expected)
    torch.testing.assert_close(pair.difference_a.sum((1, 2, 3)), 1 - pair.score)
    assert explain_pair(net, "last", A, B).difference_a is None


def test_one_forward_pass_of_each_and_nothing_left_behind():
    net = encoder()
    net(A).sum().backward()
    before = State.of(net)
    net.calls = 0
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            pair = explain_pair(net, "last", A, B, difference=True, joint=True)
        for field in dataclasses.fields(pair):
            if not field.name.startswith(("delta", "source")):
                assert not getattr(pair, field.name).requires_grad
    assert net.calls == 6
    before.assert_unchanged(net)


@pytest.mark.parametrize("embedding", ["model", "pooled"])
@pytest.mark.parametrize("contrast", [None, ROWS, B], ids=["none", "rows", "images"])
def test_an_encoder_in_training_runs_in_eval_mode_and_is_given_back(embedding, contrast):
    options = {"embedding": embedding, "contrast": contrast, "return_convergence_delta": True}
    expected = explain_pair(encoder(), "last", A, B, **options)
    net = encoder().train()
    before = State.of(net)
    pair = explain_pair(net, "last", A, B, **options)
    before.assert_unchanged(net)
    for name in ("map_a", "map_b", "score", "delta_a", "delta_b"):
        assert torch.equal(getattr(pair, name), getattr(expected, name))


def test_one_pair_in_training_is_scored_as_in_eval_mode():
    """Where a batch norm in training would refuse a single value a channel."""
    images = torch.rand(2, 3, 4, 4)
    net = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten())
    expected = explain_pair(net.eval(), "0", images[:1], images[1:])
    before = State.of(net.train())
    found = explain_pair(net, "0", images[:1], images[1:])
    before.assert_unchanged(net)
    assert net.training
    assert torch.equal(found.score, expected.score)
    assert torch.equal(found.map_a, expected.map_a)


def test_a_function_of_the_user_with_a_contrast():
    def bent(z, t):
        return (z @ t.T).tanh()

    net = encoder()
    pair = explain_pair(net, "last", A, B, similarity=bent, contrast=ROWS, rule="gradcam")
    torch.testing.assert_close(pair.score, bent(net(A), net(B)).diagonal().detach())
    model = SimilarityModel(net, net(B), similarity=bent, contrast=ROWS)
    expected = LayerFam(model, "last", rule="gradcam").attribute(A, [0, 1, 2])
    torch.testing.assert_close(pair.map_a, expected, rtol=1e-5, atol=1e-6)
    plain = explain_pair(net, "last", A, B, similarity=bent, rule="gradcam")
    assert (pair.map_a - plain.map_a).abs().max() > 1e-3


def test_leaving_the_contrast_out_warns_once_per_process_at_the_users_line():
    code = (
        "import warnings, torch\n"
        "from torch import nn\n"
        "from fam_plugins import explain_pair\n"
        "net = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "a, b = torch.rand(2, 1, 3, 4, 4)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    explain_pair(net, '0', a, b, contrast=torch.rand(1, 3))\n"
        "    explain_pair(net, '0', a, b, rule='fam')\n"
        "    print(len(caught))\n"
        "    explain_pair(net, '0', a, b)\n"
        "    explain_pair(net, '0', a, b, embedding='pooled')\n"
        "print(len(caught), caught[0].filename, caught[0].lineno)\n"
        "print(caught[0].message)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, where, message = out.stdout.splitlines()
    assert before == "0"
    assert where == "1 <string> 11"
    assert "near chance" in message
    assert "contrast=gallery_mean(encoder, loader)" in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_agree(dtype):
    expected = explain_pair(encoder(), "last", A, B)
    for embedding in ("model", "pooled"):
        pair = explain_pair(
            encoder().to(dtype), "last", A.to(dtype), B.to(dtype), embedding=embedding
        )
        assert pair.map_a.dtype == pair.score.dtype == dtype
        allowed = {torch.float64: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.1}[dtype]
        for name in ("map_a", "map_b", "score"):
            wanted = getattr(expected, name)
            gap = (getattr(pair, name).float() - wanted).abs().max() / wanted.abs().max()
            assert gap < allowed


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"a": A[0]}, ValueError, "there are"),
        ({"a": A[:2]}, ValueError, "2 images a and 3 images b.*explain_hits"),
        ({"a": A[:0]}, ValueError, "at least one image"),
        ({"a": "cat.png"}, TypeError, "weights.transforms"),
        ({"rule": "aditive"}, ValueError, "did you mean"),
        ({"similarity": "cosin"}, ValueError, "did you mean"),
        ({"layer": "lst"}, ValueError, "did you mean"),
        ({"embedding": "head"}, ValueError, '"model" or "pooled"'),
        ({"contrast": torch.ones(2)}, ValueError, r"embeddings \[N, D\]"),
    ],
)
def test_bad_input_is_refused_before_any_work(options, error, message):
    net = encoder()
    before = State.of(net)
    arguments = {"layer": "last", "a": A, "b": B} | options
    if "a" in options and message == "there are":
        arguments["a"] = torch.cat([A, A])
    with pytest.raises(error, match=message):
        explain_pair(net, **arguments)
    assert net.calls == 0
    before.assert_unchanged(net)


def test_a_layer_behind_the_pooling_of_the_wrong_shape_is_refused():
    net = encoder()
    net.head = nn.Sequential(nn.Unflatten(0, (1, 3)), nn.Flatten(0, 1))
    with pytest.raises(ValueError, match=r"gives \(1, 3, 6\) for 3 images, not \[3, C, h, w\]"):
        explain_pair(net, net.head[0], A, B)


class TestTransform:
    """An encoder that hands its map on with the channels last, as Swin does."""

    class ChannelsLast(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Identity()

        def forward(self, x):
            return self.last(self.conv(x).permute(0, 2, 3, 1)).mean(dim=(1, 2))

    @pytest.mark.parametrize("embedding", ["model", "pooled"])
    @pytest.mark.parametrize("transform", ["auto", lambda t: t.permute(0, 3, 1, 2)])
    def test_gives_the_map_that_it_was_made_of(self, embedding, transform):
        net = self.ChannelsLast().eval()
        a, b = torch.randn(2, 2, 3, 7, 9).unbind()
        options = {"difference": True, "embedding": embedding, "contrast": torch.ones(1, 6)}
        ours = explain_pair(net, "last", a, b, reshape_transform=transform, **options)
        expected = explain_pair(net, "conv", a, b, **options)
        for name in ("map_a", "map_b", "score", "difference_a", "difference_b"):
            torch.testing.assert_close(getattr(ours, name), getattr(expected, name))

    def test_images_as_contrast_are_laid_out_alike(self):
        net = self.ChannelsLast().eval()
        a, b, contrast = torch.randn(3, 2, 3, 7, 9).unbind()
        for transform in ("auto", lambda t: t.permute(0, 3, 1, 2)):
            ours = explain_pair(
                net, "last", a, b,
                embedding="pooled", contrast=contrast, reshape_transform=transform,
            )  # fmt: skip
            expected = explain_pair(net, "conv", a, b, contrast=net(contrast).detach())
            torch.testing.assert_close(ours.map_a, expected.map_a)

    def test_a_transform_that_leaves_no_regions_is_refused(self):
        net = self.ChannelsLast().eval()
        a, b = torch.randn(2, 2, 3, 7, 9).unbind()
        with pytest.raises(ValueError, match=r"gives \(2, 6\) for 2 images, not \[2, C, h, w\]"):
            explain_pair(net, "last", a, b, reshape_transform=lambda t: t.mean(dim=(1, 2)))

    def test_patches_that_the_embedding_does_not_read_are_refused(self):
        class FirstToken(nn.Module):
            def forward(self, tokens):
                return tokens[:, 0]

        net = nn.Sequential(nn.Flatten(2), nn.Identity(), FirstToken())
        a, b = torch.rand(2, 2, 5, 4, 5).unbind()
        with pytest.raises(ValueError, match="only through what the transform drops"):
            explain_pair(net, "1", a, b, reshape_transform=lambda t: t[:, 1:].mT[:, :, None])

    def test_a_wrong_shape_is_refused(self):
        net = self.ChannelsLast().eval()
        a, b = torch.randn(2, 2, 3, 7, 9).unbind()
        with pytest.raises(ValueError, match="keeps the batch first"):
            explain_pair(net, "last", a, b, reshape_transform=torch.flatten)
        with pytest.raises(ValueError, match='must be "auto"'):
            explain_pair(net, "last", a, b, reshape_transform="tokens")


def test_a_single_image_needs_no_batch():
    pair, expected = (explain_pair(encoder(), "last", *of) for of in ((A[0], B[0]), (A[:1], B[:1])))
    assert torch.equal(pair.map_a, expected.map_a)
    assert torch.equal(pair.map_b, expected.map_b)
