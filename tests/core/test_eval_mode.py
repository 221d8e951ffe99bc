"""Eval mode for a while: what it gives back, and when."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from fam_plugins.core.eval_mode import eval_mode, place_of


def modes(net: nn.Module) -> list[bool]:
    return [part.training for part in net.modules()]


def mixed() -> nn.Sequential:
    """A network in training whose dropout is not."""
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    net[1].eval()
    return net


def test_every_part_gets_its_own_mode_back():
    net = mixed()
    with eval_mode(net):
        assert modes(net) == [False] * 3
    assert modes(net) == [True, True, False]
    with pytest.raises(KeyError), eval_mode(net):
        raise KeyError
    assert modes(net) == [True, True, False]


def test_of_blocks_that_overlap_the_last_to_end_gives_the_mode_back():
    net = mixed()
    outer, inner = eval_mode(net), eval_mode(net[0])
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert modes(net) == [True, False, False]
    inner.__exit__(None, None, None)
    assert modes(net) == [True, True, False]


def test_two_threads_may_explain_one_model():
    net, entered, go_on = mixed(), threading.Event(), threading.Event()

    def explain() -> None:
        with eval_mode(net):
            entered.set()
            go_on.wait(10)

    thread = threading.Thread(target=explain)
    with eval_mode(net):
        thread.start()
        entered.wait(10)
    assert modes(net) == [False] * 3
    go_on.set()
    thread.join()
    assert modes(net) == [True, True, False]


def test_the_place_of_a_network_without_parameters_is_that_of_its_buffers():
    net = nn.BatchNorm1d(2, affine=False).double()
    assert place_of(net) == (torch.device("cpu"), torch.float64)
    counts_only = nn.Module()
    counts_only.register_buffer("count", torch.zeros(1, dtype=torch.int64))
    assert place_of(counts_only) == (None, None)
