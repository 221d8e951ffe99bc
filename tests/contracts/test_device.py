"""Explaining on a device: nothing is waited for but what is named, and nothing mixes devices.

Without a GPU the meta device stands in for one: its tensors have shapes and no values, so that
whatever reads one, or computes with a tensor of the host, fails. The tests marked ``gpu`` do the
same in torch's debug mode for synchronisation, and compare with the CPU.
"""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import VisionTransformer

from fam_plugins import FAM, LayerFam, SimilarityModel
from fam_plugins.core.rules import RULES
from tests.networks import TinyNet

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
INDICES = [[4, 0], [8, 4], [2, 2]]
TARGETS = [4, 8, 2]

pytestmark = [
    pytest.mark.filterwarnings('ignore:rule "fam" rescales'),
    pytest.mark.filterwarnings("ignore:User provided device_type"),
]


class Normed(nn.Module):
    """An encoder that ends in a norm of its own, or in a gate that looks like one."""

    def __init__(self, end) -> None:
        super().__init__()
        self.net, self.end = tiny(), end

    def forward(self, images):
        return self.end(self.net(images))


def tiny(head: nn.Module | None = None) -> TinyNet:
    torch.manual_seed(0)
    return TinyNet(head=head or nn.Identity()).eval()


def transformer() -> VisionTransformer:
    torch.manual_seed(0)
    net = VisionTransformer(16, 4, num_layers=2, num_heads=2, hidden_dim=6, mlp_dim=12).eval()
    net.heads = nn.Identity()
    return net


def hidden() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))


NETS = {  # with the layer
    "pooled": (tiny, "last"),
    "hidden layer": (lambda: tiny(hidden()), "last"),
    "norm": (lambda: Normed(F.normalize), "net.last"),
    "gate": (lambda: Normed(lambda z: z * z.mean(1, keepdim=True).sigmoid()), "net.last"),
    "class token": (transformer, "encoder.layers.encoder_layer_0"),
}


def model_of(net: str, **options) -> SimilarityModel:
    rows = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    return SimilarityModel(NETS[net][0](), rows, **options)


class NoMixing(TorchDispatchMode):
    """Refuses what torch lets pass on the meta device and a GPU would wait for, or refuse."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in given if tensor.dim()}
        assert len(devices) < 2, f"{func} mixes {devices}"
        if func is torch.ops.aten._to_copy.default and devices == {"cpu"}:
            goes = kwargs.get("device") or torch.device("cpu")
            assert goes.type == "cpu" or kwargs.get("non_blocking"), "a transfer that is waited for"
        return func(*args, **kwargs)


@pytest.fixture
def reads(monkeypatch):
    """Who turned values of the device into a list; flags of the pass as if nothing were wrong."""
    seen, real = [], torch.Tensor.tolist

    def tolist(tensor):
        if tensor.device.type == "cpu":
            return real(tensor)
        seen.append(sys._getframe(1).f_code.co_name)
        if tensor.is_meta:
            return [seen[-1] != "_settle"] * len(tensor)
        torch.cuda.set_sync_debug_mode("default")
        found = real(tensor)
        torch.cuda.set_sync_debug_mode("error")
        return found

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    return seen


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("contrast", [None, "others"])
def test_one_transfer_tells_all(net, rule, contrast, reads):
    explainer = LayerFam(model_of(net, contrast=contrast).to("meta"), NETS[net][1], rule=rule)
    images = IMAGES.to("meta")
    for target in (3, TARGETS, torch.tensor(3)):
        with NoMixing():
            maps = explainer.attribute(images, target)
        assert maps.is_meta
        assert maps.shape == (3, 1, *maps.shape[2:])
        assert reads == ["_settle"]
        reads.clear()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("net", ["pooled", "hidden layer", "norm", "gate"])
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_many_references_take_one_more_to_prove_the_pooling(net, rule, similarity, reads):
    model = model_of(net, similarity=similarity).to("meta")
    explainer = LayerFam(model, NETS[net][1], rule=rule, smooth=True)
    for indices in (None, INDICES):
        images = IMAGES.to("meta")
        with NoMixing():
            maps = explainer.attribute_references(images, indices)
        assert maps.is_meta
        assert reads == ["behind_pooling", "_settle"]
        reads.clear()


def test_a_read_in_between_is_seen(reads):
    """What the two tests above rest on: the meta device gives no value away, and does not mix."""
    model = model_of("pooled").to("meta")

    def looks(images):
        scores = model(images)
        return scores if scores.sum() > 0 else -scores

    with pytest.raises((NotImplementedError, RuntimeError), match="(?i)meta"):
        LayerFam(looks, model.encoder.last, rule="centred").attribute(IMAGES.to("meta"), 0)
    with pytest.raises(RuntimeError, match="device"):
        LayerFam(model, "last", rule="centred").attribute(IMAGES, 0)


def cuda(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.pin_memory().to("cuda", non_blocking=True) for tensor in tensors]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestCuda:
    @pytest.fixture(autouse=True)
    def exact(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield
        torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("net", NETS)
    def test_equals_the_cpu_and_waits_for_nothing_unnamed(self, net, rule, reads):
        on_cpu = LayerFam(model_of(net), NETS[net][1], rule=rule)
        wanted = on_cpu.attribute(IMAGES, TARGETS), on_cpu.attribute_references(IMAGES, INDICES)
        explainer = LayerFam(model_of(net).cuda(), NETS[net][1], rule=rule)
        for images in (*cuda(IMAGES), IMAGES.cuda().to(memory_format=torch.channels_last)):
            explainer.attribute(images, 3)  # what cuDNN and cuBLAS allocate at first
            explainer.attribute_references(images, INDICES)
            reads.clear()
            torch.cuda.set_sync_debug_mode("error")
            maps = explainer.attribute(images, TARGETS)
            many = explainer.attribute_references(images, INDICES)
            torch.cuda.set_sync_debug_mode("default")
            assert reads.count("_settle") == 2
            assert set(reads) <= {"_settle", "behind_pooling"}
            torch.testing.assert_close(maps.cpu(), wanted[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(many.cpu(), wanted[1], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("rule", RULES)
    def test_autocast_and_channels_last_stay_close(self, rule):
        wanted = LayerFam(model_of("pooled"), "last", rule=rule).attribute(IMAGES, TARGETS)
        model = model_of("pooled").cuda().to(memory_format=torch.channels_last)
        explainer = LayerFam(model, "last", rule=rule)
        (images,) = cuda(IMAGES)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            maps = explainer.attribute(images.to(memory_format=torch.channels_last), TARGETS)
        scale = wanted.abs().max()
        torch.testing.assert_close(maps.float().cpu() / scale, wanted / scale, rtol=0, atol=0.06)

    def test_grad_cams_form_equals_the_cpu(self):
        on_cpu = FAM(model_of("pooled"), ["last"], rule="centred")
        on_gpu = FAM(model_of("pooled").cuda(), ["last"], rule="centred")
        wanted, found = (cam.attribute_references(IMAGES, INDICES) for cam in (on_cpu, on_gpu))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=1e-3)
