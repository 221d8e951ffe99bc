"""Frozen tails: values as they are, shares that add up, and nothing left behind.

Every sum is compared with the score itself in float64, on random weights with random biases, and
the formulas with loops that spell them out.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.utils.checkpoint import checkpoint
from torchvision import models

import fam_plugins
from fam_plugins import SimilarityModel, frozen_tail
from fam_plugins.core.frozen_tail import INNERMOST
from fam_plugins.core.layer_pass import LayerPass
from fam_plugins.core.tail_constants import TailConstants
from tests.networks import classifier, narrow_convnext

GENERATOR = torch.Generator()
EXACT = 1e-12


def normal(*size: int) -> Tensor:
    return torch.randn(*size, generator=GENERATOR.manual_seed(sum(size)), dtype=torch.float64)


def randomised(net: nn.Module) -> nn.Module:
    """In eval mode and float64; no parameter or statistic stays where it starts."""
    torch.manual_seed(0)
    net = net.double().eval()
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if value.is_floating_point():
                noise = torch.rand_like(value) if "running_var" in name else torch.randn_like(value)
                value.add_(0.1 * noise)
    return net


def differentiated(
    one: LayerPass, tail: TailConstants, end: Tensor, cotangents: Tensor
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients of the one layer and, by kind, shares of the constants, from one backward pass."""
    gradients, shares = one.gradients(end, cotangents, [*tail.leaves.values()])
    return gradients, dict(zip(tail.leaves, shares, strict=True))


def check_adds_up(
    net: nn.Module, layer: str, images: Tensor, pick: Callable[[Any], Tensor] = lambda out: out
) -> dict[str, Tensor]:
    """Two random directions: layer and constants add up to the score, image by image."""
    with torch.no_grad():
        value = pick(net(images))
    one = LayerPass(net, [layer])
    with TailConstants(batch=len(images)) as tail:
        embeddings = pick(one.run(lambda: net(images)))
        cotangents = normal(2, 1, embeddings.shape[1]).expand(2, *embeddings.shape)
        gradients, shares = differentiated(one, tail, embeddings, cotangents)
    # The fast path of nn.MultiheadAttention, which no mode can follow, rounds differently.
    torch.testing.assert_close(embeddings, value, rtol=0, atol=1e-14)
    total = sum(shares.values(), torch.zeros(2, len(images), dtype=torch.float64))
    for gradient, given in zip(gradients, one.tracked[0], strict=True):
        total = total + (gradient * given.detach()).flatten(2).sum(2)
    score = torch.einsum("bd,cbd->cb", embeddings.detach(), cotangents)
    assert (total - score).abs().max() <= EXACT
    assert all(parameter.grad is None for parameter in net.parameters())
    return shares


# Formulas, recomputed by loops ------------------------------------------------------------------


class Block(nn.Module):
    """A block of a ViT with LayerScale; attention in the three ways in which it is written."""

    def __init__(self, width: int, heads: int, attention: str) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.multi = nn.MultiheadAttention(width, heads, batch_first=True)
        self.scale1, self.scale2 = (nn.Parameter(torch.rand(width)) for _ in range(2))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm1(x)
        if self.attention == "multi-head":
            mixed = self.multi(u, u, u, need_weights=False)[0]
        else:
            qkv = F.linear(u, self.multi.in_proj_weight, self.multi.in_proj_bias)
            q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, 2))
            if self.attention == "fused":
                mixed = F.scaled_dot_product_attention(q, k, v)
            else:
                mixed = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v
            mixed = self.multi.out_proj(mixed.transpose(1, 2).flatten(2))
        x = x + self.scale1 * mixed
        return x + self.scale2 * self.down(F.gelu(self.up(self.norm2(x))))


class Vit(nn.Module):
    def __init__(self, attention: str = "multi-head", pool: str = "token", depth: int = 2) -> None:
        super().__init__()
        self.patches, self.pool = nn.Conv2d(3, 8, 4, 4), pool
        self.token, self.positions = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(1, 5, 8))
        self.blocks = nn.Sequential(*(Block(8, 2, attention) for _ in range(depth)))
        self.norm = nn.LayerNorm(8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), 1, -1), x], dim=1) + self.positions
        x = self.blocks(x)
        return self.norm(x)[:, 0] if self.pool == "token" else self.norm(x[:, 1:].mean(1))


def centre(v: Tensor) -> Tensor:
    return v - v.mean()


def gelu_gate(u: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(u / 2**0.5))


def sigma(x: Tensor) -> Tensor:
    return (x.var(correction=0) + 1e-5).sqrt()


def standardised(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return norm.weight * centre(x) / sigma(x) + norm.bias


@pytest.mark.parametrize("attention", ["multi-head", "fused", "eager"])
def test_the_class_token_of_the_last_block_by_loops(attention):
    net, images = randomised(Vit(attention)), normal(2, 3, 8, 8)
    direction = normal(8)
    one = LayerPass(net, ["blocks.1.norm1"])
    with TailConstants(batch=2) as tail:
        out = one.run(lambda: net(images))
        (gradient,), shares = differentiated(one, tail, out, direction.expand(1, 2, 8))
    block: Any = net.get_submodule("blocks.1")
    weights, biases = block.multi.in_proj_weight, block.multi.in_proj_bias
    (given,), found = one.tracked[0], (gradient[0] * one.tracked[0][0]).sum(2)
    for image in range(2):
        with torch.no_grad():
            x = net.patches(images).flatten(2).transpose(1, 2)[image]
            x = net.blocks[0]((torch.cat([net.token[None], x]) + net.positions[0])[None])[0]
            u = torch.stack([standardised(block.norm1, row) for row in x])
            torch.testing.assert_close(u, given[image])
            (wq, wk, wv), (bq, bk, bv) = weights.chunk(3), biases.chunk(3)
            token, moved = x[0], torch.zeros(5, 8, dtype=torch.float64)
            for head in (slice(0, 4), slice(4, 8)):
                query = wq[head] @ u[0] + bq[head]
                logits = torch.stack([query @ (wk[head] @ row + bk[head]) for row in u]) / 2
                attended = logits.exp() / logits.exp().sum()
                for j in range(5):
                    moved[j] += (
                        attended[j] * block.multi.out_proj.weight[:, head] @ (wv[head] @ u[j])
                    )
            constant = block.multi.out_proj.weight @ bv + block.multi.out_proj.bias
            middle = token + block.scale1 * (moved.sum(0) + constant)
            hidden = block.up(standardised(block.norm2, middle))
            phi = gelu_gate(hidden)
            y = middle + block.scale2 * (block.down.weight @ (phi * hidden) + block.down.bias)
            torch.testing.assert_close(standardised(net.norm, y), out[image].detach())
            g_y = centre(net.norm.weight * direction) / sigma(y)
            inner = block.up.weight.T @ (phi * (block.down.weight.T @ (block.scale2 * g_y)))
            g_x = g_y + centre(block.norm2.weight * inner) / sigma(middle)
            for j in range(5):
                torch.testing.assert_close(found[image, j], moved[j] @ (block.scale1 * g_x))
            torch.testing.assert_close(shares["residual"][0, image], g_x @ token)


@pytest.mark.parametrize("batch", [1, 3])
def test_mean_and_norm_by_the_formula(batch):
    net, images, direction = randomised(Vit(pool="mean")), normal(batch, 3, 8, 8), normal(8)
    one = LayerPass(net, ["blocks"])
    with TailConstants(batch=batch) as tail:
        out = one.run(lambda: net(images))
        (gradient,), shares = differentiated(one, tail, out, direction.expand(1, batch, 8))
    (tokens,) = one.tracked[0]
    assert list(shares) == ["bias"]
    for image in range(batch):
        mean = tokens[image, 1:].detach().mean(0)
        wanted = centre(net.norm.weight.detach() * direction) / sigma(mean) / 4
        for j in range(1, 5):
            torch.testing.assert_close(gradient[0, image, j], wanted)
        torch.testing.assert_close(shares["bias"][0, image], net.norm.bias.detach() @ direction)


class Map(nn.Module):
    """The attention pooling of SigLIP, on tokens of a last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.norm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.probe, self.multi = nn.Parameter(torch.rand(1, 1, 8)), nn.MultiheadAttention(8, 2)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        u = self.last(tokens).transpose(0, 1)
        p = self.multi(self.probe.expand(-1, u.shape[1], -1), u, u)[0][0]
        return p + self.down(F.gelu(self.up(self.norm(p))))


def test_attention_pooling_by_loops():
    net, tokens, direction = randomised(Map()), normal(3, 4, 8), normal(8)
    one = LayerPass(net, ["last"])
    with TailConstants(batch=3) as tail:
        out = one.run(lambda: net(tokens))
        (gradient,), shares = differentiated(one, tail, out, direction.expand(1, 3, 8))
    assert list(shares) == ["bias"]
    (u,), found = one.tracked[0], (gradient[0] * one.tracked[0][0]).sum(2)
    with torch.no_grad():
        (wq, wk, wv), (bq, bk, bv) = (
            t.chunk(3) for t in (net.multi.in_proj_weight, net.multi.in_proj_bias)
        )
        for image in range(3):
            moved = torch.zeros(4, 8, dtype=torch.float64)
            for head in (slice(0, 4), slice(4, 8)):
                query = wq[head] @ net.probe[0, 0] + bq[head]
                logits = torch.stack([query @ (wk[head] @ row + bk[head]) for row in u[image]]) / 2
                attended = logits.softmax(0)
                for j in range(4):
                    moved[j] += (
                        attended[j] * net.multi.out_proj.weight[:, head] @ (wv[head] @ u[image, j])
                    )
            p = moved.sum(0) + net.multi.out_proj.weight @ bv + net.multi.out_proj.bias
            phi = gelu_gate(net.up(standardised(net.norm, p)))
            inner = net.up.weight.T @ (phi * (net.down.weight.T @ direction))
            g_p = direction + centre(net.norm.weight * inner) / sigma(p)
            for j in range(4):
                torch.testing.assert_close(found[image, j], moved[j] @ g_p)


# Single operations ------------------------------------------------------------------------------

WEIGHT, OTHER = normal(6, 6), normal(6, 6) / 3
HOMOGENEOUS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu spelt out": lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5)),
    "gelu of GPT": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": nn.SiLU(),
    "silu in place": nn.SiLU(inplace=True),
    "silu of a part in place": lambda x: (F.silu(x[:, :3], inplace=True), x)[1],
    "silu_": lambda x: torch._C._nn.silu_(x) * 1,
    "hardswish": nn.Hardswish(),
    "hardswish in place": nn.Hardswish(inplace=True),
    "hardswish spelt out": lambda x: x * F.relu6(x + 3) / 6,
    "mish": F.mish,
    "mish spelt out": lambda x: x * F.softplus(x).tanh(),
    "elu": F.elu,
    "selu": F.selu,
    "celu": lambda x: F.celu(x, alpha=0.7),
    "tanh": torch.tanh,
    "tanh in place": lambda x: (x.tanh_(), x)[1],
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "glu": lambda x: F.glu(x, -1),
    "geglu": lambda x: F.gelu(x @ WEIGHT) * (x @ OTHER),
    "swiglu": lambda x: (x @ OTHER) * F.silu(x @ WEIGHT),
    "swiglu of chunks": lambda x: F.silu((x @ WEIGHT).chunk(2, -1)[0]) * (x @ OTHER)[:, :3],
    "swiglu in place": lambda x: F.silu(x @ WEIGHT).mul_(x @ OTHER),
    "swiglu in place, kept": lambda x: ((g := F.silu(x @ WEIGHT)).mul_(x @ OTHER), g)[1],
    "reglu": lambda x: F.relu(x @ WEIGHT) * (x @ OTHER),
    "squeeze and excite": lambda x: x * (x.mean(1, keepdim=True) * WEIGHT[0]).sigmoid(),
    "hard squeeze": lambda x: x.mul(F.hardsigmoid(F.relu(x @ WEIGHT), inplace=True)),
    "sigmoid in place": lambda x: x * (x @ WEIGHT).sigmoid_(),
    "layer norm": lambda x: F.layer_norm(x, (6,), WEIGHT[0]),
    "layer norm of two": lambda x: F.layer_norm(x.reshape(4, 2, 3), (2, 3), WEIGHT[:2, :3]),
    "layer norm spelt out": lambda x: (
        (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-6).sqrt()
    ),
    "group norm": lambda x: F.group_norm(x, 3, WEIGHT[0]),
    "rms norm spelt out": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "rms norm as a power": lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-6) ** -0.5,
    "global response norm": lambda x: (
        x + x * (g := x.norm(p=2, dim=1, keepdim=True)) / (g.mean(0) + 1)
    ),
    "response norm of vectors": lambda x: x * torch.linalg.vector_norm(x, dim=1, keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=1),
    "norm": lambda x: x / x.norm(dim=1, keepdim=True),
    "norm in place": lambda x: x.div_(x.norm(dim=1, keepdim=True)),
    "standard deviation": lambda x: x / x.std(1, keepdim=True),
    "sum to one": lambda x: x / x.abs().sum(1, keepdim=True),
    "cosine": lambda x: F.cosine_similarity(x[:, None], WEIGHT[None], dim=-1),
    "attention": lambda x: (x @ WEIGHT @ x.T).softmax(-1) @ x,
    "attention of F": lambda x: F.softmax(x @ WEIGHT @ x.T, dim=-1) @ x,
    "attention in torch": lambda x: torch.softmax(x @ WEIGHT @ x.T, -1) @ x,
    "linear attention": lambda x: F.relu(x @ WEIGHT) @ (F.relu(x @ OTHER).T @ x),
    "fused attention": lambda x: F.scaled_dot_product_attention(
        *(x @ w for w in (WEIGHT, OTHER, WEIGHT))
    ),
    "fused by name": lambda x: F.scaled_dot_product_attention(query=x, key=x @ OTHER, value=x),
}
if hasattr(F, "rms_norm"):
    HOMOGENEOUS["rms norm"] = lambda x: F.rms_norm(x, (6,), WEIGHT[0], eps=1e-6)
    HOMOGENEOUS["rms norm, own eps"] = lambda x: F.rms_norm(x, (6,))


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_an_operation_keeps_its_value_and_adds_up(name):
    run, x = HOMOGENEOUS[name], normal(4, 6).requires_grad_()
    wanted = run(x.detach().clone())
    with frozen_tail():
        out = run(x * 1)
        (gradient,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        vectors = normal(3, *out.shape)
        several = torch.autograd.grad(out, x, vectors, is_grads_batched=True)[0]
    if name in ("cosine", "glu"):
        torch.testing.assert_close(out, wanted, rtol=1e-15, atol=1e-15)
    else:
        assert torch.equal(out, wanted)
    assert abs((gradient * x).sum() - out.sum()) <= EXACT
    shares = (several * x).sum((1, 2))
    torch.testing.assert_close(shares, (vectors * out).flatten(1).sum(1), rtol=0, atol=EXACT)


def test_a_gate_at_zero_is_finite():
    for act in (F.gelu, F.silu, F.hardswish, F.mish, torch.tanh, F.elu, F.relu6):
        x = torch.zeros(3, requires_grad=True)
        with frozen_tail():
            (gradient,) = torch.autograd.grad(act(x).sum(), x)
        slope = 0.5 if act(torch.tensor(1e-3)) < 0.7e-3 else 1.0
        assert gradient.eq(slope).all()


def test_each_option_holds_its_own_kind():
    x = normal(4, 6).requires_grad_()
    cases = {"norms": F.layer_norm, "attention": F.scaled_dot_product_attention, "gates": F.gelu}
    arguments: dict[str, Any] = {"norms": [(6,)], "attention": [x, x], "gates": []}
    for held in cases:
        with frozen_tail(**{kind: kind == held for kind in cases}):
            for kind, run in cases.items():
                (inside,) = torch.autograd.grad(run(x, *arguments[kind]).sum(), x)
                with frozen_tail(norms=False, attention=False, gates=False):
                    (true,) = torch.autograd.grad(run(x, *arguments[kind]).sum(), x)
                assert torch.equal(inside, true) == (kind != held)


# Whole networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["multi-head", "fused", "eager"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_names_of_the_constants(attention, batch):
    net, images = randomised(Vit(attention)), normal(batch, 3, 8, 8)  # 5 tokens each
    shares = check_adds_up(net, "patches", images)
    assert set(shares) == {"class token", "position", "bias"}
    assert set(check_adds_up(net, "blocks.0", images)) == {"bias"}
    assert set(check_adds_up(net, "blocks.0.norm1", images)) == {"bias", "residual"}
    assert check_adds_up(net, "norm", images) == {}


@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_computed_from_parameters_is_told_from_what_bypasses_the_layer(batch):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.scale = nn.Embedding(5, 6), nn.Parameter(torch.rand(6))
            self.register_buffer("indices", torch.arange(5)[None])
            self.token, self.layer = nn.Parameter(torch.rand(1, 1, 6)), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.layer(x) + self.scale * x + 2 * self.places(self.indices)
            extra = self.token.expand(len(x), 2, -1) * self.scale
            return torch.cat([tokens[:, :1], extra, tokens[:, 1:]], dim=1).sum(1)

    net, x = randomised(Net()), normal(batch, 5, 6)
    shares, one = check_adds_up(net, "layer", x), normal(2, 1, 6)[:, 0]
    assert set(shares) == {"residual", "position", "registers"}
    with torch.no_grad():
        wanted = one @ (2 * net.places.weight).sum(0)
        torch.testing.assert_close(shares["position"], wanted[:, None].expand(2, batch))
        torch.testing.assert_close(shares["residual"], one @ (net.scale * x).sum(1).T)
        registers = one @ (2 * net.token[0, 0] * net.scale)
        torch.testing.assert_close(shares["registers"], registers[:, None].expand(2, batch))


def build_timm(name: str, **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm", reason="this row is a timm model")
    return timm.create_model(name, num_classes=0, **options)


def timm_vit(name: str, **options: Any) -> Callable[[], nn.Module]:
    small = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4}
    return lambda: build_timm(name, **{**small, **options})


def hugging_face(kind: str, attention: str | None = None, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="this row is of transformers")
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "image_size": 32}
    small |= {"patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
    small = small if attention else {}
    settings = getattr(transformers, kind.replace("ModelWithProjection", "Model")[:-5] + "Config")(
        **{**small, **options}
    )
    if attention:
        settings._attn_implementation = attention
    return getattr(transformers, kind)(settings)


def clip(tower: str, **options: Any) -> nn.Module:
    open_clip = pytest.importorskip("open_clip", reason="this row is of open_clip")
    if tower == "resnet":
        return open_clip.modified_resnet.ModifiedResNet([1, 1, 1, 1], 16, 4, image_size=64, width=8)
    return open_clip.model.VisionTransformer(32, 8, 32, 2, 4, 2.0, output_dim=16, **options)


def swin(**options: Any) -> nn.Module:
    return models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=7, **options)


def encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, **options), 2, enable_nested_tensor=False
    )


class LengthFirst(nn.Module):
    """Tokens ``[L, B, C]`` inside, as nn.TransformerEncoder has them unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.encoder = nn.Linear(6, 32), encoder_layer()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encoder(self.stem(tokens).transpose(0, 1)).mean(0)


def out(output: Any) -> Any:
    return output


def pooled(output: Any) -> Any:
    return output.pooler_output.flatten(1)


NARROW = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
NETWORKS: dict[str, tuple[Any, list[str], int, Any]] = {
    "timm class token": (
        timm_vit("vit_tiny_patch16_224"),
        ["patch_embed", "blocks.0", "blocks.1.norm1"],
        32,
        out,
    ),
    "timm eager": (timm_vit("vit_tiny_patch16_224"), ["blocks.0"], 32, out),
    "timm registers, LayerScale": (
        timm_vit("vit_small_patch14_reg4_dinov2"),
        ["patch_embed", "blocks.0"],
        32,
        out,
    ),
    "timm mean + fc_norm": (
        timm_vit("vit_tiny_patch16_224", global_pool="avg", fc_norm=True),
        ["patch_embed", "blocks.1"],
        32,
        out,
    ),
    "timm MAP": (timm_vit("vit_base_patch16_siglip_224"), ["patch_embed", "norm"], 32, out),
    "timm SwiGLU": (timm_vit("vit_giant_patch14_dinov2"), ["blocks.0"], 32, out),
    "timm DINOv3": (timm_vit("vit_small_patch16_dinov3"), ["patch_embed", "blocks.0"], 32, out),
    "timm EVA-02": (
        timm_vit("eva02_tiny_patch14_224", embed_dim=48),
        ["patch_embed", "blocks.0"],
        32,
        out,
    ),
    "timm DeiT3": (timm_vit("deit3_small_patch16_224"), ["patch_embed", "blocks.0"], 32, out),
    "timm CaiT": (timm_vit("cait_xxs24_224"), ["patch_embed", "blocks.1"], 32, out),
    "timm XCiT": (timm_vit("xcit_nano_12_p16_224"), ["blocks.0"], 32, out),
    "timm Swin": (
        lambda: build_timm("swin_tiny_patch4_window7_224", **SWIN),
        ["patch_embed", "layers.0"],
        32,
        out,
    ),
    "timm ConvNeXt": (
        lambda: build_timm("convnext_atto", **NARROW),
        ["stages.0", "stages.3"],
        64,
        out,
    ),
    "timm ConvNeXt V2": (
        lambda: build_timm("convnextv2_atto", **NARROW),
        ["stages.0", "stages.3"],
        64,
        out,
    ),
    "timm MobileNetV3": (
        lambda: build_timm("mobilenetv3_small_050"),
        ["blocks.2", "blocks.5"],
        64,
        out,
    ),
    "timm EfficientNet": (
        lambda: build_timm("test_efficientnet"),
        ["blocks.1", "blocks.3"],
        64,
        out,
    ),
    "torchvision ViT": (
        lambda: models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=7),
        ["conv_proj", "encoder.layers.encoder_layer_0"],
        32,
        out,
    ),
    "torchvision Swin": (swin, ["features.0", "features.1"], 32, out),
    "torchvision ConvNeXt": (narrow_convnext, ["features.1", "features.7"], 64, out),
    "torchvision MobileNetV3": (
        lambda: models.mobilenet_v3_small(num_classes=7),
        ["features.3", "features.12"],
        64,
        out,
    ),
    "torchvision EfficientNet": (
        lambda: models.efficientnet_b0(num_classes=7),
        ["features.5"],
        64,
        out,
    ),
    "torchvision DenseNet": (
        lambda: models.DenseNet(4, (2, 2), 8, num_classes=7),
        ["features.denseblock1.denselayer1"],
        32,
        out,
    ),
    "TransformerEncoder": (
        lambda: nn.Sequential(nn.Linear(6, 32), encoder_layer(batch_first=True), nn.Flatten()),
        ["0", "1.layers.0", "1.layers.1.norm1"],
        0,
        out,
    ),
    "tokens first": (LengthFirst, ["stem"], 0, out),
    "open_clip ViT": (lambda: clip("vit"), ["conv1", "transformer.resblocks.0"], 32, out),
    "open_clip ResNet": (lambda: clip("resnet"), ["layer2", "layer4"], 64, out),
    "transformers Swin": (
        lambda: hugging_face(
            "SwinModel",
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 4),
            window_size=4,
        ),
        ["embeddings", "encoder.layers.0"],
        32,
        pooled,
    ),
    "transformers ConvNeXt": (
        lambda: hugging_face("ConvNextModel", depths=(1, 1, 1, 1), hidden_sizes=(8, 16, 24, 32)),
        ["encoder.stages.0"],
        64,
        pooled,
    ),
    "transformers ConvNeXt V2": (
        lambda: hugging_face("ConvNextV2Model", depths=(1, 1, 1, 1), hidden_sizes=(8, 16, 24, 32)),
        ["encoder.stages.0"],
        64,
        pooled,
    ),
}
for _way in ("eager", "sdpa"):
    NETWORKS |= {
        f"transformers CLIP, {_way}": (
            partial(hugging_face, "CLIPVisionModelWithProjection", _way, projection_dim=16),
            ["vision_model.embeddings", "vision_model.encoder.layers.0"],
            32,
            attrgetter("image_embeds"),
        ),
        f"transformers SigLIP, {_way}": (
            partial(hugging_face, "SiglipVisionModel", _way),
            ["embeddings", "encoder.layers.0"],
            32,
            pooled,
        ),
        f"transformers DINOv2, {_way}": (
            partial(hugging_face, "Dinov2Model", _way),
            ["embeddings.patch_embeddings", "encoder.layer.0"],
            32,
            pooled,
        ),
        f"transformers DINOv2 SwiGLU, {_way}": (
            partial(hugging_face, "Dinov2Model", _way, use_swiglu_ffn=True),
            ["encoder.layer.0"],
            32,
            pooled,
        ),
        f"transformers ViT, {_way}": (
            partial(hugging_face, "ViTModel", _way),
            ["embeddings", "layers.0"],
            32,
            pooled,
        ),
    }


@pytest.mark.parametrize("tokens", [4, 5, 6])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_tokens_in_front_of_the_images(tokens, batch):
    net, given = randomised(LengthFirst()), normal(batch, tokens, 6)
    check_adds_up(net, "stem", given)
    one = LayerPass(net, ["encoder.layers.0"])
    with TailConstants(batch=batch) as tail:
        score = one.run(lambda: net(given))[:, 3]
        (gradient,), shares = differentiated(one, tail, score, torch.ones(1, batch))
    total = (gradient[0] * one.tracked[0][0]).sum((0, 2)) + shares["bias"][0]
    torch.testing.assert_close(total, score, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", NETWORKS)
def test_layer_and_constants_add_up_to_the_score(name):
    build, layers, size, pick = NETWORKS[name]
    net = randomised(build())
    if name == "timm eager":
        for block in net.blocks:
            block.attn.fused_attn = False
    for layer in layers:
        check_adds_up(net, layer, normal(2, 3, size, size) if size else normal(2, 5, 6), pick)


def test_without_norms_attention_or_gates_nothing_changes():
    net, images = classifier(), torch.randn(2, 3, 8, 8)
    for around in (frozen_tail(), TailConstants(batch=2)):
        one, other = LayerPass(net, ["conv"]), LayerPass(net, ["conv"])
        plain = one.run(lambda one=one: net(images))
        with around:
            frozen = other.run(lambda: net(images))
            found = other.gradients(frozen, torch.ones(1, 2, 5))
        assert torch.equal(plain, frozen)
        assert torch.equal(found[0][0], one.gradients(plain, torch.ones(1, 2, 5))[0][0])


# Half precision, autocast, checkpoints, torch.func ----------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precisions(dtype):
    net, images = randomised(Vit()).to(dtype), normal(2, 3, 8, 8).to(dtype)
    one = LayerPass(net, ["blocks.0"])
    with TailConstants(batch=2) as tail:
        score = one.run(lambda: net(images)).sum(1)
        (gradient,), shares = differentiated(one, tail, score, torch.ones(1, 2))
    assert shares["bias"].dtype == torch.float32
    total = (gradient[0].float() * one.tracked[0][0].float()).sum((1, 2)) + shares["bias"][0]
    error = (total - score).abs() / gradient.float().norm() / one.tracked[0][0].float().norm()
    assert error.max() < 4 * torch.finfo(dtype).eps


def test_autocast():
    net, images = randomised(Vit()).float(), normal(2, 3, 8, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one = LayerPass(net, ["blocks.0"])
        with TailConstants(batch=2) as tail:
            score = one.run(lambda: net(images)).sum(1)
            (gradient,), shares = differentiated(one, tail, score, torch.ones(1, 2))
    total = (gradient[0] * one.tracked[0][0].float()).sum((1, 2)) + shares["bias"][0]
    torch.testing.assert_close(total, score.float(), rtol=0.03, atol=0.03)


def test_checkpoints_are_frozen_or_refused():
    net, x = randomised(nn.Sequential(Block(8, 2, "fused"))), normal(2, 5, 8).requires_grad_()
    with frozen_tail():
        (wanted,) = torch.autograd.grad(net(x)[:, 0].sum(), x)
        saved = checkpoint(net, x, use_reentrant=False)
        (found,) = torch.autograd.grad(saved[:, 0].sum(), x)
    assert torch.equal(found, wanted)
    with TailConstants(batch=2) as tail:
        end = checkpoint(net, x, use_reentrant=False)[:, 0].sum(1)
        ends = [x, tail.leaves["bias"]]
        gradient, biases = torch.autograd.grad(end.sum(), ends)
    torch.testing.assert_close((gradient * x).sum((1, 2)) + biases, end, rtol=0, atol=EXACT)
    with frozen_tail(), pytest.raises(TypeError, match="use_reentrant=False"):
        checkpoint(net, x, use_reentrant=True).sum()


def test_transforms_of_torch_func():
    net, x = randomised(Block(8, 2, "fused")), normal(2, 5, 8)

    def end(tokens: Tensor) -> Tensor:
        return net(tokens)[:, 0].sum()

    with frozen_tail():
        leaf = x.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(end(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(end)(x), wanted)


def test_operations_in_place_behind_a_counted_constant():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)).double()
    x = normal(3, 4).requires_grad_()
    with TailConstants(batch=3) as tail:
        hidden = net[:2](x) * 1.0
        hidden += 0.5
        hidden[:, :2] += torch.ones(2, dtype=torch.float64)
        hidden.sub_(torch.ones(3, 6, dtype=torch.float64), alpha=2).masked_fill_(hidden < 0, 3.0)
        end = (1 - net[2](torch.where(hidden > 5, 5.0, hidden)))[:, 0]
        gradient, *shares = torch.autograd.grad(end.sum(), [x, *tail.leaves.values()])
    torch.testing.assert_close((gradient * x).sum(1) + sum(shares), end, rtol=0, atol=EXACT)


def test_training_statistics_of_a_batch_norm_are_left_alone():
    norm, x = nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2, requires_grad=True)
    other = nn.BatchNorm2d(3)
    with TailConstants(batch=4):
        norm(x)
    other(x)
    assert torch.equal(norm.running_mean, other.running_mean)


# What stays outside, and what is refused --------------------------------------------------------


def true_gradient(x: Tensor) -> Tensor:
    return torch.autograd.grad(F.layer_norm(x, (4,))[:, 0].sum(), x)[0]


def test_inside_no_grad_nothing_changes_and_nothing_is_left():
    net, images = Vit().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad(), frozen_tail():
        inside = net(images)
    with torch.no_grad():
        torch.testing.assert_close(inside, net(images), rtol=1e-6, atol=1e-6)
    assert not inside.requires_grad
    x = torch.randn(2, 4, requires_grad=True)
    before = true_gradient(x)
    with pytest.raises(ZeroDivisionError), frozen_tail():
        1 / 0  # noqa: B018
    with pytest.raises(IndexError), frozen_tail(), TailConstants(batch=1):
        F.normalize(x, dim=9)
    assert torch.equal(true_gradient(x), before)
    assert INNERMOST.get() is None
    assert not global_hooks._global_forward_pre_hooks


def test_the_graph_and_the_tail_are_freed():
    tail = TailConstants(batch=2)
    with tail:
        end = Vit()(torch.randn(2, 3, 8, 8, requires_grad=True))
    assert not tail._learnt
    gone = weakref.ref(tail)
    del tail, end
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("around", [frozen_tail, lambda: TailConstants(batch=2)])
def test_an_operation_in_place_does_not_hold_its_own_graph(around):
    with around():
        x = torch.randn(2, 4, requires_grad=True) * 1
        F.hardswish(x, inplace=True)
        x += torch.ones(4)
        x.mul_(torch.sigmoid(x))
        gone = weakref.ref(x)
        del x
    gc.collect()
    assert gone() is None


def test_of_nested_blocks_the_innermost_decides():
    x = torch.randn(2, 4, requires_grad=True)
    true = true_gradient(x)
    tail = frozen_tail()
    with tail:
        frozen = true_gradient(x)
        with frozen_tail(norms=False):
            assert torch.equal(true_gradient(x), true)
            with tail:
                assert torch.equal(true_gradient(x), frozen)
            assert torch.equal(true_gradient(x), true)
        with frozen_tail():
            assert torch.equal(true_gradient(x), frozen)
        assert torch.equal(true_gradient(x), frozen)
    assert not torch.equal(true, frozen)


def test_another_thread_is_left_alone():
    x, found = torch.randn(2, 4, requires_grad=True), []
    true = true_gradient(x)
    with frozen_tail():
        thread = threading.Thread(target=lambda: found.append(true_gradient(x)))
        thread.start()
        thread.join()
        assert not torch.equal(true_gradient(x), true)
    assert torch.equal(found[0], true)


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
def test_what_cannot_be_seen_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).eval()
    x = torch.randn(2, 4, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted, traced = torch.jit.script(net), torch.jit.trace(net, x.detach())
    compiled, in_place = torch.compile(net, backend="eager"), copy.deepcopy(net)
    in_place.compile(backend="eager")
    for hidden in (scripted, traced, compiled, in_place):
        with frozen_tail(), torch.no_grad():
            hidden(x)
        with frozen_tail(), pytest.raises(TypeError, match="explain the model as it was before"):
            hidden(x)
        with frozen_tail(), pytest.raises(TypeError, match="explain the model as it was before"):
            nn.Sequential(nn.Linear(4, 4), hidden)(x)
    for hidden in (scripted, traced):
        with frozen_tail():
            hidden(x.detach())  # in front of what is differentiated
    function = torch.compile(lambda x: net(x), backend="aot_eager")
    function(x)
    # Some versions run it as it was, which is frozen; the others are refused.
    with frozen_tail(), contextlib.suppress(TypeError):
        frozen = torch.autograd.grad(function(x)[:, 0].sum(), x)[0]
        assert torch.equal(frozen, torch.autograd.grad(net(x)[:, 0].sum(), x)[0])


# The partners' own methods ----------------------------------------------------------------------


def test_partners_add_up_inside():
    attr = pytest.importorskip("captum.attr")
    net, images = randomised(Vit("fused", "mean")), normal(2, 3, 8, 8)
    model = SimilarityModel(net, normal(3, 8), similarity="cosine")
    layer = net.get_submodule("blocks.0")
    explainer = attr.LayerGradientXActivation(model, layer)
    wanted = model(images)[:, 1]
    with TailConstants(batch=2) as tail:
        one = LayerPass(model, [layer])
        end = one.run(lambda: model(images))[:, 1]
        _, shares = differentiated(one, tail, end, torch.ones(1, 2, dtype=torch.float64))
    with frozen_tail():
        found = explainer.attribute(images, target=1).sum((1, 2))
    torch.testing.assert_close(found + sum(shares.values())[0], wanted, rtol=0, atol=EXACT)
    assert (explainer.attribute(images, target=1).sum((1, 2)) - found).abs().max() > 0.01
    cam = attr.LayerGradCam(model, layer)
    with frozen_tail():
        inside = cam.attribute(images, target=1)
    assert not torch.equal(inside, cam.attribute(images, target=1))


def test_hirescam_inside_is_the_exact_map():
    grad_cam = pytest.importorskip("pytorch_grad_cam")
    raw = []

    class Kept(grad_cam.HiResCAM):
        def get_cam_image(self, *args: Any, **kwargs: Any) -> Any:
            raw.append(super().get_cam_image(*args, **kwargs))
            return raw[-1]

    net, images = randomised(Vit("eager", "mean")).float(), normal(2, 3, 8, 8).float()
    layer, transform = net.get_submodule("blocks.0"), fam_plugins.tokens_to_map(2, 2, skip=1)
    one = LayerPass(net, [layer])
    with frozen_tail():
        score = one.run(lambda: net(images))[:, 3]
        ((gradient,),) = one.gradients(score, torch.ones(1, 2))
        with Kept(net, [layer], reshape_transform=transform) as cam:
            cam(images, [lambda row: row[3]] * 2)
    with Kept(net, [layer], reshape_transform=transform) as cam:
        cam(images, [lambda row: row[3]] * 2)
    maps = transform(gradient[0] * one.tracked[0][0].detach()).sum(1)
    torch.testing.assert_close(torch.as_tensor(raw[0]), maps)
    assert (torch.as_tensor(raw[1]) - maps).abs().max() > 1e-3
