"""What is measured on one transformer: LayerFam by layer and tail, the partners, and peers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from math import isqrt
from typing import Any

import numpy as np
import pytorch_grad_cam
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam, LayerGradientXActivation
from torch import Tensor, nn
from torchcam.methods import LeGrad
from torchvision.models.vision_transformer import EncoderBlock

from fam_plugins import LayerFam, SimilarityModel, frozen_tail
from fam_plugins.core.maps import TAILS
from fam_plugins.quality import evaluate
from fam_plugins.quality.evaluate import explain
from tests.benchmarks.quality.vits import KINDS, PATCH, Problem, near

PARTNERS = ("HiResCAM", "LayerCAM", "GradCAM", "LayerGradientXActivation", "LayerGradCam")
"""Methods of pytorch-grad-cam and Captum that are also run inside ``frozen_tail()``."""

PARTLY = {"attention=False": {"attention": False}, "gates=False": {"gates": False}}
"""What else ``LayerGradientXActivation`` is run inside of, to tell what each part does."""

Means = dict[str, dict[str, float]]
"""Row -> measure -> mean over the images of one network; NaN where it is undefined."""


def measure(
    kind: str, problem: Problem, *, mosaics: int, singles: int, steps: int, seed: int
) -> tuple[Means, float]:
    """Means by row, contrast "others" and nothing smoothed, and the accuracy on single digits."""
    layers = KINDS[kind].layers
    asked: list[tuple[SimilarityModel, Tensor, Tensor]] = []

    def random(model: SimilarityModel, _layer: nn.Module, images: Tensor, k: Tensor) -> Tensor:
        asked.append((model, images, k))
        return torch.rand(len(images), images.shape[2] // 5, images.shape[3] // 5)

    with warnings.catch_warnings():
        # Low coverage is what is measured.
        warnings.filterwarnings("ignore", "the regions carry")
        found = evaluate(
            {**explainers(kind), "random": random},
            problem.encoder,
            next(iter(layers.values())),
            problem.dataset,
            mosaics=mosaics,
            singles=singles,
            steps=steps,
            seed=seed,
        )
        rows: Means = {}
        for label, columns in found.values.items():
            columns = columns | {
                "faithfulness": columns["mosaic insertion"] - columns["mosaic deletion"]
            }
            rows[label] = {
                name: float(np.nanmean(columns[name])) if name in columns else float("nan")
                for name in ("energy", "point", "auc", "faithfulness")
            }
        for title, layer in layers.items():
            for tail in TAILS:
                rows[fam_row("additive", title, tail)]["coverage"] = coverage(
                    *asked[0], layer, tail
                )
    return rows, found.accuracy


def fam_row(rule: str, layer: str, tail: str) -> str:
    """The label of a row of ours."""
    return f"{rule}, {layer}, {tail}"


def partner_row(name: str, inside: str | None) -> str:
    """The label of a partner's method at the patch embedding, and what it is run inside of."""
    return f"{name}, patches, {'as it is' if inside is None else f'inside ({inside})'}"


def partner_rows() -> list[tuple[str, str | None]]:
    """Partners' methods as they are and inside ``frozen_tail()``; one also inside of its parts."""
    rows: list[tuple[str, str | None]] = [(name, how) for name in PARTNERS for how in (None, "")]
    return [*rows, *(("LayerGradientXActivation", how) for how in PARTLY)]


def explainers(kind: str) -> dict[str, Any]:
    """What is measured on a kind of network, by label."""
    given = KINDS[kind]
    found: dict[str, Any] = {}
    for title, layer in given.layers.items():
        for tail in TAILS:
            found[fam_row("additive", title, tail)] = fam_at(layer, "additive", tail)
        for tail in ("frozen", "norms"):
            found[fam_row("centred", title, tail)] = fam_at(layer, "centred", tail)
        found[f"GradCAM, {title}"] = cam_at("GradCAM", layer)
    if not given.settings:
        return found
    found |= {"LeGrad": legrad, "rollout": rollout}
    if given.settings["global_pool"] != "avg":  # one query reads the patches
        found["Grad-ECLIP"] = grad_eclip
    if given.settings["class_token"]:
        layer = given.layers["patches"]
        for name, inside in partner_rows():
            found[partner_row(name, inside)] = partner(name, layer, inside)
    return found


def fam_at(layer: str, rule: str, tail: str) -> type[LayerFam]:
    """LayerFam at a layer of the encoder, whichever layer it is asked for."""

    class At(LayerFam):
        def __init__(self, model: SimilarityModel, _layer: nn.Module) -> None:
            super().__init__(model, f"encoder.{layer}", rule=rule, tail=tail)

    return At


def cam_at(name: str, layer: str) -> Any:
    """A method of pytorch-grad-cam at a layer of the encoder, whichever it is asked for."""

    class At(getattr(pytorch_grad_cam, name)):  # type: ignore[misc]
        def __init__(self, model: SimilarityModel, _layers: list[nn.Module]) -> None:
            layers = [model.get_submodule(f"encoder.{layer}")]
            super().__init__(model, layers, reshape_transform=_laid_out)

    return At


def partner(name: str, layer: str, inside: str | None) -> Callable[..., Tensor]:
    """A partner's own method at a layer of the encoder, as it is or inside ``frozen_tail(...)``."""

    def maps(model: SimilarityModel, _layer: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        with nullcontext() if inside is None else frozen_tail(**PARTLY.get(inside, {})):
            if hasattr(pytorch_grad_cam, name):
                given = (model, _layer, images, targets, False)
                return explain(cam_at(name, layer), *given)[0]
            of_captum = {"LayerGradCam": LayerGradCam}.get(name, LayerGradientXActivation)
            found = of_captum(model, model.get_submodule(f"encoder.{layer}"))
            return found.attribute(images, target=targets).sum(dim=1).detach()

    return maps


def coverage(
    model: SimilarityModel, images: Tensor, targets: Tensor, layer: str, tail: str
) -> float:
    """Median over images of the regions' share of the score."""
    one = LayerFam(model, f"encoder.{layer}", rule="additive", tail=tail)
    maps = one.attribute(images, target=targets)
    with torch.no_grad():
        scores = model(images).gather(1, targets[:, None])[:, 0]
    return float((maps.sum(dim=(1, 2, 3)) / scores).median())


def legrad(model: SimilarityModel, _layer: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """LeGrad (arXiv 2404.03214) by torchcam, over all blocks, with the network's own head.

    torchcam reads the attention of torchvision's blocks, so timm's are copied into those.
    """
    same, given = copy.deepcopy(model), model.encoder
    encoder = same.encoder
    for index, block in enumerate(given.blocks):
        encoder.blocks[index] = Copied(block)

    def project(tokens: Tensor) -> Tensor:
        return same.score(encoder.forward_head(encoder.norm(tokens)))

    with LeGrad(
        encoder,
        list(encoder.blocks),
        score_projection=project,
        prefix_tokens=given.num_prefix_tokens,
    ) as extractor:
        encoder(images)
        return extractor(targets.tolist(), normalized=False)[0]


class Copied(EncoderBlock):
    """A block of timm's VisionTransformer as torchvision's, which computes the same."""

    def __init__(self, block: Any) -> None:
        width, heads = block.norm1.weight.numel(), block.attn.num_heads
        super().__init__(heads, width, block.mlp.fc1.out_features, 0.0, 0.0)
        pairs = {
            "ln_1.": block.norm1,
            "self_attention.in_proj_": block.attn.qkv,
            "self_attention.out_proj.": block.attn.proj,
            "ln_2.": block.norm2,
            "mlp.0.": block.mlp.fc1,
            "mlp.3.": block.mlp.fc2,
        }
        with torch.no_grad():
            for name, of in pairs.items():
                for kind in ("weight", "bias"):
                    self.get_parameter(f"{name}{kind}").copy_(getattr(of, kind))
        self.eval()

    def forward(self, tokens: Tensor, attn_mask: Tensor, **_: Any) -> Tensor:
        mask = attn_mask.expand(len(tokens), -1, -1, -1).flatten(0, 1)
        x = self.ln_1(tokens)
        tokens = tokens + self.self_attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return tokens + self.mlp(self.ln_2(tokens))


def grad_eclip(
    model: SimilarityModel, _layer: nn.Module, images: Tensor, targets: Tensor
) -> Tensor:
    """Grad-ECLIP (Zhao et al., ICML 2024) at the last attention that one query reads.

    ``relu(sum_c ds/do_c * lambda_j * v_jc)`` with o the attention's output at the query, and lambda
    the cosine of query and key, scaled to [0, 1] over the patches.
    """
    encoder, pool = model.encoder, model.encoder.attn_pool
    attention = encoder.blocks[-1].attn if pool is None else pool
    read = [attention.qkv] if pool is None else [attention.q, attention.kv]
    with _seen(read) as parts, _seen([attention.proj], inputs=True) as [out]:
        score = model(images).gather(1, targets[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, out[0])
    if pool is None:
        query, key, value = parts[0][0].chunk(3, dim=-1)
        query, key, value = query[:, :1], key[:, 1:], value[:, 1:]
    else:
        query, (key, value) = parts[0][0], parts[1][0].chunk(2, dim=-1)
    close = F.cosine_similarity(query, key, dim=2)
    low, high = close.amin(1, keepdim=True), close.amax(1, keepdim=True)
    weights = (close - low) / (high - low)
    shares = (gradient[:, :1] * value).sum(dim=2) * weights
    return _square(shares.relu().detach())


def rollout(model: SimilarityModel, _layer: nn.Module, images: Tensor, _targets: Tensor) -> Tensor:
    """Attention rollout (Abnar and Zuidema, ACL 2020): products of (A + 1) / 2, mean over heads."""
    encoder, pool = model.encoder, model.encoder.attn_pool
    read = [block.attn.qkv for block in encoder.blocks]
    read += [] if pool is None else [pool.q, pool.kv]
    with torch.no_grad(), _seen(read) as parts:
        model(images)
        heads = encoder.blocks[0].attn.num_heads
        side = images.shape[2] // PATCH, images.shape[3] // PATCH
        bias = near(*side, encoder.num_prefix_tokens)
        flow = torch.eye(parts[0][0].shape[1])
        for (qkv,) in parts[: len(encoder.blocks)]:
            query, key, _ = qkv.chunk(3, dim=-1)
            flow = (_weights(query, key, heads, bias) + torch.eye(len(flow[-1]))) / 2 @ flow
        if pool is not None:
            key = parts[-1][0].chunk(2, dim=-1)[0]
            return _square((_weights(parts[-2][0], key, pool.num_heads) @ flow)[:, 0])
        skip = encoder.num_prefix_tokens
        return _square(flow[:, 0, skip:] if skip else flow.mean(dim=1))


def _weights(query: Tensor, key: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    """Attention weights ``[B, Q, K]``, mean over heads."""
    query, key = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key))
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    return (logits + bias).softmax(dim=-1).mean(dim=1)


@contextmanager
def _seen(modules: list[nn.Module], *, inputs: bool = False) -> Iterator[list[list[Tensor]]]:
    """What modules give, or are given, within the block."""
    kept: list[list[Tensor]] = [[] for _ in modules]
    handles = [
        module.register_forward_hook(
            lambda _m, args, out, own=own: own.append(args[0] if inputs else out)
        )
        for module, own in zip(modules, kept, strict=True)
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _laid_out(given: Tensor) -> Tensor:
    """Tokens ``[B, T, C]``, with a class token or without, as maps ``[B, C, h, w]``."""
    if given.dim() == 4:
        return given
    side = isqrt(given.shape[1])
    tokens = given[:, given.shape[1] - side**2 :]
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def _square(values: Tensor) -> Tensor:
    side = isqrt(values.shape[1])
    return values.unflatten(1, (side, side))
