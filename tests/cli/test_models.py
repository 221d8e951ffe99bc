"""Encoders by name: what is refused before a library loads, and what is loaded."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from torch import nn

from fam_plugins.cli.models import check_model, load_encoder
from fam_plugins.core.images import load_images

IMAGE = Image.new("RGB", (300, 260), "orange")


def needs(library):
    missing = find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"{library} is not installed")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("torchvision:resnet5O", "unknown torchvision model 'resnet5O': did you mean 'resnet50'"),
        ("torchvision:fcn_resnet50", "unknown torchvision model"),
        ("resnet50", "unknown model 'resnet50': write torchvision:NAME, timm:NAME"),
        ("torchvision:", "unknown model 'torchvision:'"),
        pytest.param("timm:resnet5O", "did you mean 'resnet50'", marks=needs("timm")),
        pytest.param("timm:resnet5O.a1_in1k", "'resnet5O': did", marks=needs("timm")),
        pytest.param("open_clip:ViTB-32", "or 'ViT-B-32'? There", marks=needs("open_clip")),
    ],
)
def test_a_misspelt_name_is_told_without_a_network(offline, spec, said):
    with pytest.raises(ValueError, match="unknown") as error:
        check_model(spec, "default")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("spec", "host"),
    [
        ("torchvision:resnet50", "download.pytorch.org"),
        pytest.param("timm:resnet50.a1_in1k", "huggingface.co", marks=needs("timm")),
        pytest.param("hf:facebook/dinov2-small", "huggingface.co", marks=needs("transformers")),
        pytest.param("open_clip:ViT-B-32/laion2b", "huggingface.co", marks=needs("open_clip")),
    ],
)
def test_offline_weights_must_have_been_downloaded(offline, spec, host):
    with pytest.raises(ConnectionError, match=f"cannot reach {host}.* connect once, or"):
        check_model(spec, "default")
    kept = {
        "torchvision": "torch/hub/checkpoints/resnet50-11ad3fa6.pth",
        "timm": "hf/hub/models--timm--resnet50.a1_in1k/snapshots/1/model.safetensors",
        "hf": "hf/hub/models--facebook--dinov2-small/snapshots/1/pytorch_model.bin",
        "open_clip": "hf/hub/models--laion--x/snapshots/1/open_clip_pytorch_model.bin",
    }
    file = offline / kept[spec.partition(":")[0]]
    file.parent.mkdir(parents=True)
    file.touch()
    check_model(spec, "default")
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_every_model_of_torchvision_is_known_and_its_file_recognised(offline):
    from torchvision import models

    folder = offline / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    for name in models.list_models(module=models):
        check_model(f"torchvision:{name}", "none")
        if name == "shufflenet_v2_x1_0":  # whose file is called x1
            continue
        file = folder / models.get_model_weights(name).DEFAULT.url.rpartition("/")[2]
        file.touch()
        check_model(f"torchvision:{name}", "default")
        file.unlink()


@needs("timm")
def test_every_model_of_timm_is_known(offline):
    import timm

    for name in timm.list_models()[::20]:
        check_model(f"timm:{name}", "none")


def test_a_mirror_is_asked_in_place_of_the_hub(offline, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    with pytest.raises(ConnectionError, match=r"mirror\.example"):
        check_model("hf:a/b", "none")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    check_model("hf:a/b", "none")  # which only the proxy can tell


def test_files_are_looked_for_first(tmp_path, model):
    with pytest.raises(FileNotFoundError, match=r"no file 'none\.pth'"):
        check_model("torchvision:resnet18", "none.pth")
    with pytest.raises(FileNotFoundError, match=r"no file 'missing\.py'"):
        check_model("missing.py:factory", "default")
    check_model(model[1], "default")


def test_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setattr("fam_plugins.cli.models.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'fam-plugins\[open-clip\]'"):
        check_model("open_clip:ViT-B-32/laion2b", "default")


@pytest.mark.parametrize(
    ("name", "width"),
    [("mobilenet_v3_small", 1024), ("squeezenet1_1", 512), ("vit_b_32", 768), ("resnet18", 512)],
)
def test_a_classifier_of_torchvision_gives_its_embeddings(name, width):
    encoder, transform = load_encoder(f"torchvision:{name}", "none")
    images = load_images(IMAGE, transform)
    assert not encoder.training
    assert images.shape == (1, 3, 224, 224)
    with torch.no_grad():
        assert encoder(images).shape == (1, width)


def test_random_weights_are_the_same_every_time():
    one, two = (load_encoder("torchvision:resnet18", "none")[0] for _ in range(2))
    assert torch.equal(one.conv1.weight, two.conv1.weight)


def test_a_state_dict_in_half_precision_with_a_classifier_of_its_own(tmp_path):
    from torchvision.models import mobilenet_v2

    trained = mobilenet_v2(num_classes=7).eval()
    file = tmp_path / "trained.pth"
    torch.save({key: value.half() for key, value in trained.state_dict().items()}, file)
    encoder, transform = load_encoder("torchvision:mobilenet_v2", str(file), [0.5] * 3, [0.25] * 3)
    trained.load_state_dict(torch.load(file, weights_only=True))
    trained.classifier = nn.Identity()
    images = load_images(IMAGE, transform)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), trained(images))
    # Orange is 255, 165, 0.
    expected = (torch.tensor([255, 165, 0]) / 255 - 0.5) / 0.25
    torch.testing.assert_close(images[0, :, 112, 112], expected)


def test_the_side_of_the_square(tmp_path, model):
    transform = load_encoder(model[1], "default", [0.5] * 3, [0.5] * 3, size=96)[1]
    wide = Image.new("RGB", (224, 112), "black")
    wide.paste("white", (56, 0, 168, 112))  # the square in the middle
    images = load_images(wide, transform)
    assert images.shape[2:] == (96, 96)
    assert (images == images.max()).all()  # 96 of 109 pixels
    thin = Image.new("RGB", (112, 112), "white")
    thin.paste("black", (0, 0, 112, 4))  # of which the upper 4 are cut away
    assert (load_images(thin, transform)[:, :, 0] > images.max() - 0.1).all()


def test_a_state_dict_of_another_network_is_refused_with_its_keys(tmp_path, model):
    file = tmp_path / "other.pth"
    torch.save({"0.weight": torch.zeros(8, 3, 5, 5), "7.scale": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"does not fit .*missing 0\.bias; unexpected 7\.scale"):
        load_encoder(model[1], str(file))
    right = load_encoder(model[1], "default")[0].state_dict()
    torch.save(right | {"7.scale": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"unexpected 7\.scale"):
        load_encoder(model[1], str(file))
    torch.save({"state_dict": right, "epoch": 3}, file)
    load_encoder(model[1], str(file))


def test_safetensors_are_weights_too(tmp_path, model):
    safetensors = pytest.importorskip("safetensors.torch")
    file = tmp_path / "weights.safetensors"
    state = {
        key: value + 1 for key, value in load_encoder(model[1], "default")[0].state_dict().items()
    }
    safetensors.save_file(state, file)
    found = load_encoder(model[1], str(file))[0].state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_a_script_gives_a_pair_or_is_told_to(model):
    encoder, transform = load_encoder(model[1], "default")
    assert not encoder.training
    assert callable(transform)
    bare = model[1].replace(":small", ":bare")
    with pytest.raises(ValueError, match="returns no transform"):
        load_encoder(bare, "default")
    assert load_encoder(bare, "default", size=32)[1] is not None


@needs("timm")
def test_timm_gives_its_own_transform(tmp_path):
    import timm

    encoder, transform = load_encoder("timm:mobilenetv3_small_050", "none")
    images = load_images(IMAGE, transform)
    with torch.no_grad():
        assert encoder(images).shape == (1, 1024)
    full = timm.create_model("mobilenetv3_small_050", num_classes=3)
    torch.save(full.state_dict(), tmp_path / "full.pth")
    filled, _ = load_encoder("timm:mobilenetv3_small_050", str(tmp_path / "full.pth"))
    assert torch.equal(filled.conv_stem.weight, full.conv_stem.weight)


@needs("transformers")
def test_a_folder_of_transformers(tmp_path):
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    saved = Dinov2Model(config).eval()
    saved.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    check_model(f"hf:{tmp_path}", "default")
    encoder, processor = load_encoder(f"hf:{tmp_path}", "default")
    images = load_images(IMAGE, processor)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images).pooler_output, saved(images).pooler_output)


@needs("transformers")
def test_a_checkpoint_without_the_embedding_is_refused(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)  # which has no pooler
    ViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights of pooler\."):
        load_encoder(f"hf:{tmp_path}", "default")


@needs("open_clip")
def test_open_clip_by_its_beginning(monkeypatch):
    import open_clip

    encoder, transform = load_encoder("open_clip:RN50", "none")
    with torch.no_grad():
        assert encoder.encode_image(load_images(IMAGE, transform)).shape == (1, 1024)
    asked = []
    monkeypatch.setattr(
        open_clip,
        "create_model_and_transforms",
        lambda *given, **_: asked.append(given) or (encoder, None, transform),
    )
    load_encoder("open_clip:ViT-B-32/laion2b", "default")
    assert asked == [("ViT-B-32", "laion2b_s34b_b79k")]
    with pytest.raises(ValueError, match="unknown weights of ViT-B-32 'laion9'"):
        load_encoder("open_clip:ViT-B-32/laion9", "default")
