from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fam_plugins.cape import with_cape_head

QUIET = {"progress": False}


def small_network(classes=3, channels=8, norm=True):
    """A classifier with every thing that must be left alone: batch norm, dropout, modes."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.BatchNorm2d(channels) if norm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(channels, classes),
    )


@pytest.fixture
def network():
    torch.manual_seed(0)
    return small_network()


@pytest.fixture
def model(network):
    return with_cape_head(network)


@pytest.fixture
def batches():
    """Five batches of images and labels, the last one smaller."""
    generator = torch.Generator().manual_seed(1)
    sizes = (8, 8, 8, 8, 3)
    return [
        (
            torch.randn(n, 1, 6, 6, generator=generator),
            torch.randint(0, 3, (n,), generator=generator),
        )
        for n in sizes
    ]


@contextmanager
def default_device(name):
    """As after torch.set_default_device(name); the meta device stands for a GPU's."""
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, state, *, but_head=False):
    for name, tensor in model.state_dict().items():
        if not (but_head and name.startswith("head.")):
            assert torch.equal(tensor, state[name]), name
