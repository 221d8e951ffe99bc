"""Every contract holds inside ``frozen_tail()`` too, unless it is about the true gradient."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from fam_plugins import frozen_tail


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test of this folder twice; once where it is marked ``true_gradient``."""
    if metafunc.definition.get_closest_marker("true_gradient") is None:
        metafunc.parametrize("inside", [False, True], ids=["plain", "frozen"], indirect=True)


@pytest.fixture(autouse=True)
def inside(request: pytest.FixtureRequest):
    """What a test runs inside of."""
    with frozen_tail() if getattr(request, "param", False) else nullcontext():
        yield
