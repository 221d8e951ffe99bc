"""A small encoder in a script, pictures on disk, and a machine without a network."""

from __future__ import annotations

import socket

import numpy as np
import pytest
from PIL import Image

SCRIPT = """
import torch
from torch import nn
from torchvision import transforms as t

def small():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers).train(), t.Compose([t.Resize((32, 32)), t.ToTensor()])

def bare():
    return small()[0]
"""


@pytest.fixture
def model(tmp_path):
    """``--model`` and its value."""
    file = tmp_path / "encoders.py"
    file.write_text(SCRIPT)
    return ["--model", f"{file}:small"]


@pytest.fixture
def photos(tmp_path):
    """A folder of two classes of four pictures each, and one more of each class beside it."""
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for kind, channel in (("green", 1), ("red", 0)):
        (folder / kind).mkdir(parents=True)
        for number in range(5):
            pixels = rng.integers(0, 60, (40, 40, 3), dtype=np.uint8)
            pixels[5:25, 5:25, channel] += 180
            where = tmp_path if number == 4 else folder / kind
            Image.fromarray(pixels).save(where / f"{kind}{number}.png")
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network and empty caches."""

    def refuse(*_args, **_options):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("HF_HUB_CACHE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # restored afterwards
    return tmp_path
