"""Where a recorded graph goes: torch.export, torch.compile, ONNX Runtime."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchvision.models as tv
from torch import nn

from fam_plugins import LayerFam, SimilarityModel
from fam_plugins.cape import with_cape_head
from fam_plugins.export import MapModel
from tests.export.test_map_model import ENCODERS, images, made

RECENT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)


@pytest.mark.parametrize("name", ENCODERS)
def test_torch_export_takes_any_batch(name):
    model, layer = made(name)
    graph = MapModel(model, layer, rule="additive", example=images(1))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(graph, (images(2),), dynamic_shapes=({0: batch},))
    for count in (1, 5):
        found, wanted = program.module()(images(count, seed=3)), graph(images(count, seed=3))
        torch.testing.assert_close(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1])


@pytest.mark.parametrize("name", ENCODERS)
def test_torch_compile_takes_the_whole_graph(name):
    model, layer = made(name)
    graph = MapModel(model, layer, rule="additive", example=images(1))
    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images(3))[1], graph(images(3))[1])


def test_the_exporter_that_traces_is_refused_with_the_fix():
    model, layer = made("pooled")
    graph = MapModel(model, layer, rule="additive", example=images(1))
    with pytest.raises(RuntimeError, match="dynamo=True"):
        torch.jit.trace(graph, (images(2),))


def convnext():
    blocks = [tv.convnext.CNBlockConfig(16, 32, 1), tv.convnext.CNBlockConfig(32, None, 1)]
    return SimilarityModel(tv.ConvNeXt(blocks, num_classes=8), torch.randn(3, 8)), 32


def mobilenet():
    net = tv.mobilenet_v3_small()
    net.classifier = nn.Identity()
    return SimilarityModel(net, torch.rand(3, 576), contrast="others"), 64


def resnet():
    net = tv.resnet18()
    net.fc = nn.Identity()
    return SimilarityModel(net, torch.rand(3, 512)), 64


def mean_pooled_vit():
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    net = timm.models.VisionTransformer(**options, num_classes=0, global_pool="avg")
    return SimilarityModel(net, torch.randn(3, 24)), 32


def siglip():
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return SimilarityModel(transformers.SiglipVisionModel(config), torch.randn(3, 24)), 32


def cape():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return with_cape_head(net.append(nn.Linear(4, 5))), 16


@pytest.mark.skipif(not RECENT, reason="the ONNX exporter of torch before 2.9 lacks operations")
@pytest.mark.parametrize("build", [resnet, mobilenet, convnext, mean_pooled_vit, siglip, cape])
def test_onnx_runtime_gives_the_maps_of_layer_fam(build, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is an extra")
    pytest.importorskip("onnxscript", reason="torch's exporter needs it")
    torch.manual_seed(0)
    model, size = build()
    model.eval()
    path, unseen = tmp_path / "maps.onnx", images(5, size, seed=9).float()
    graph = MapModel(model, rule="additive", example=images(1, size).float())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(
            graph,
            (images(2, size).float(),),
            path,
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: "batch"},),
        )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    scores, maps = session.run(None, {session.get_inputs()[0].name: unseen.numpy()})
    if build is cape:
        wanted = graph(unseen)[1]
    else:
        wanted = LayerFam(model, rule="additive").attribute_references(unseen)[:, :, 0]
        torch.testing.assert_close(torch.from_numpy(scores), model(unseen), rtol=1e-4, atol=1e-5)
    gap = (torch.from_numpy(maps) - wanted).abs().max()
    assert gap <= 1e-5 * wanted.abs().max()
