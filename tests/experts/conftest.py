"""Fixtures for the tests of the experts."""

from collections.abc import Iterator

import pytest

from expert_layers import use_triton_bodies
from fusedmoe.testing import nan_poison


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote is NaN, so that reading it shows."""
    with nan_poison():
        yield


@pytest.fixture(params=["torch", "triton"])
def bodies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the launchers on CPU tensors with their references, then with Triton's bodies."""
    if request.param == "triton":
        use_triton_bodies(monkeypatch)
    return request.param
