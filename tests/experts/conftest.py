"""Fixtures for the tests of the experts."""

import pytest
import torch

from expert_layers import use_triton_bodies


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote is NaN, so that reading it shows."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *a, **kw: poison(new_empty(self, *a, **kw))
    )
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: poison(empty(*a, **kw)))


@pytest.fixture(params=["torch", "triton"])
def bodies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the launchers on CPU tensors with their references, then with Triton's bodies."""
    if request.param == "triton":
        use_triton_bodies(monkeypatch)
    return request.param
