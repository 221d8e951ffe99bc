"""One hostile use per row, and what must hold after each: nothing is lost or left behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from fam_plugins import SimilarityModel
from tests.networks import State, TinyNet, encoder

X = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
BYTES = (255 * X).byte()


class LpDistance:
    """As pytorch-metric-learning's, in what is read of one: the extra need not be there."""

    is_inverted = False

    def __init__(self, p: float = 2, power: float = 1) -> None:
        self.normalize_embeddings, self.p, self.power = True, p, power

    def __call__(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        unit = nn.functional.normalize(z), nn.functional.normalize(t)
        return torch.cdist(*unit, self.p) ** self.power


class CosineSimilarity(LpDistance):
    """The same of the cosine."""

    is_inverted = True

    def __call__(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(z) @ nn.functional.normalize(t).T


def similarity_model(**options: Any) -> SimilarityModel:
    return SimilarityModel(encoder(), ROWS, **options)


@dataclass(frozen=True)
class Use:
    """A use of a model, and what comes of it.

    ``error`` is the very class of what is raised and ``says`` a part of its message; without an
    error, ``says`` is a part of a warning, and an empty one means that there is none. What is wrong
    is known before the encoder runs, unless ``late``.
    """

    use: Callable[[Any], Any]
    error: type[Exception] | None = None
    says: str = ""
    late: bool = False
    model: Callable[[], nn.Module] = similarity_model

    def on(self, make: Callable[[], nn.Module]) -> Use:
        """The same use, on another model than a similarity model if it names none itself."""
        return replace(self, model=make) if self.model is similarity_model else self

    def check(self) -> None:
        model = self.model()
        before, draws = State.of(model), torch.get_rng_state()
        nets = [part for part in model.modules() if isinstance(part, TinyNet)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)
            if self.error is None:
                assert self.use(model) is not False
            else:
                with pytest.raises(self.error) as raised:
                    self.use(model)
        if self.error is None:
            texts = [str(one.message) for one in caught]
            assert any(self.says in text for text in texts) if self.says else not texts, texts
        else:
            text = str(raised.value)
            assert raised.type is self.error, f"{raised.type.__name__}: {text}"
            assert self.says in text, text
            assert len(text) < 400, text
            assert text.count("\n") < 2
            assert self.late or not any(net.calls for net in nets), "the encoder ran"
            assert not caught
        before.assert_unchanged(model)
        assert torch.equal(draws, torch.get_rng_state()), "the user's random numbers moved"
        assert torch.get_default_dtype() == torch.float32
        assert torch.empty(0).device.type == "cpu"


def refused(name: str, use: Any, error: type[Exception], says: str, **options: Any) -> Any:
    """The use is refused before any work, with what to do instead."""
    return pytest.param(Use(use, error, says, **options), id=name)


def late(name: str, use: Any, error: type[Exception], says: str, **options: Any) -> Any:
    """The use is refused once the model has run, because only then it is known."""
    return pytest.param(Use(use, error, says, late=True, **options), id=name)


def works(name: str, use: Any, **options: Any) -> Any:
    """The use works without a warning; what it returns is not ``False``."""
    return pytest.param(Use(use, **options), id=name)


def warns(name: str, use: Any, says: str, **options: Any) -> Any:
    """The use works and warns."""
    return pytest.param(Use(use, says=says, **options), id=name)


def under(context: Any, use: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The use within a context manager that ``context`` makes."""

    def run(model: Any) -> Any:
        with context():
            return use(model)

    return run


@contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    try:
        torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "no grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autograd on": torch.enable_grad,
    "default device meta": lambda: torch.device("meta"),
    "default dtype float64": lambda: default_dtype(torch.float64),
}
"""What a program may have set around a call: none of it changes what the call returns."""
