import pytest
import torch

from fam_plugins.cape import (
    CapeHead,
    head_state_from_release,
    head_state_to_release,
    resnet_state_from_release,
    with_cape_head,
)


def released_state(classes=5, channels=16):
    torch.manual_seed(0)
    return {
        "net.0.weight": torch.randn(3),
        "classifiers.orig.2.weight": torch.randn(classes, channels),
        "classifiers.orig.2.bias": torch.randn(classes),
        "classifiers.cape.2.weight": torch.randn(classes, channels),
        "classifiers.cape.2.bias": torch.randn(classes),
        "t1.T": torch.tensor([0.1]),
        "t2.T": torch.tensor([0.2]),
        "t3.T": torch.full((1, 1, 1, 1), 0.3),
    }


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_head_is_read(prefix):
    state = released_state()
    head = CapeHead.from_released_state_dict({prefix + k: v for k, v in state.items()})
    assert torch.equal(head.weight, state["classifiers.cape.2.weight"])
    assert torch.equal(head.bias, state["classifiers.cape.2.bias"])
    assert [round(t.item(), 6) for t in (head.t1, head.t2, head.t3)] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_head_is_of_the_checkpoints_type_and_draws_nothing(dtype):
    state = {name: tensor.to(dtype) for name, tensor in released_state().items()}
    random = torch.get_rng_state()
    head = CapeHead.from_released_state_dict(state)
    assert torch.equal(torch.get_rng_state(), random)
    assert {p.dtype for p in head.parameters()} == {dtype}
    assert torch.equal(head.weight, state["classifiers.cape.2.weight"])
    meta = {name: tensor.to("meta") for name, tensor in state.items()}
    assert all(p.is_meta for p in CapeHead.from_released_state_dict(meta).parameters())


def test_there_and_back():
    state = released_state()
    ours = head_state_from_release(state)
    CapeHead(16, 5).load_state_dict(ours)
    back = head_state_to_release(ours)
    assert set(back) == {k for k in state if not k.startswith(("net", "classifiers.orig"))}
    for name, tensor in back.items():
        assert tensor.shape == state[name].shape
        assert torch.equal(tensor, state[name])


def test_a_whole_resnet_is_read():
    """The released model keeps torchvision's children, but the last two, as a sequence."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    source = models.resnet18(num_classes=5)
    with torch.no_grad():
        for buffer in source.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    backbone = torch.nn.Sequential(*list(source.children())[:-2])
    state = {f"net.{name}": tensor for name, tensor in backbone.state_dict().items()}
    heads = {k: v for k, v in released_state(5, 512).items() if not k.startswith("net")}
    state.update(heads)
    model = with_cape_head(models.resnet18(num_classes=5))
    model.load_state_dict(resnet_state_from_release(state))
    model.eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features, logits = model.features_and_logits(images)
        expected = backbone.eval()(images)
    torch.testing.assert_close(features, expected)
    pooled = expected.mean(dim=(2, 3))
    weight, bias = heads["classifiers.orig.2.weight"], heads["classifiers.orig.2.bias"]
    torch.testing.assert_close(logits, torch.nn.functional.linear(pooled, weight, bias))
    assert torch.equal(model.head.weight, heads["classifiers.cape.2.weight"])


def test_other_checkpoints_are_refused():
    with pytest.raises(ValueError, match=r"t1\.T.*load_state_dict"):
        head_state_from_release(CapeHead(16, 5).state_dict())
    state = released_state()
    state["classifiers.cape.2.bias"] = torch.randn(4)
    with pytest.raises(ValueError, match=r"bias must be \[5\], not 4 values"):
        head_state_from_release(state)
    state = released_state()
    state["t2.T"] = torch.randn(2)
    with pytest.raises(ValueError, match="2 values"):
        head_state_from_release(state)
    state = released_state()
    state["classifiers.cape.2.weight"] = torch.randn(5)
    with pytest.raises(ValueError, match="classes, channels"):
        head_state_from_release(state)
    state = released_state()
    state["net.features.0.weight"] = torch.randn(1)
    with pytest.raises(ValueError, match=r"CapeHead\.from_released"):
        resnet_state_from_release(state)
    state = released_state()
    del state["classifiers.orig.2.bias"]
    with pytest.raises(ValueError, match="both heads"):
        resnet_state_from_release(state)
