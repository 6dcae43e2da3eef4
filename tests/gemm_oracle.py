"""What the tests of the grouped GEMMs on packed weights share: rows, ids, and the right answer."""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation, activation_reference
from fusedmoe.kernels.ids import local_ids
from fusedmoe.quantization.tensor import QuantizedTensor

E, TOP_K = 3, 2


def rows_and_ids(
    K: int, T: int = 5, dtype: torch.dtype = torch.float32, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """a [T, K] and ids [T, TOP_K], some of which name no expert."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, E + 1, (T, TOP_K), dtype=torch.int32, generator=gen)
    return torch.randn(T, K, generator=gen).to(dtype), ids


def by_slot(
    a: torch.Tensor,
    w: QuantizedTensor,
    ids: torch.Tensor,
    activation: MoEActivation | None = None,
    config: ApplyMoEActivationConfig | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp64, one slot at a time; NaN where no expert is here."""
    values = w.dequantize(torch.float32).double()
    shards = 2 if activation is not None and activation.is_gated else 1
    N = w.shape[1] // shards
    rows = torch.full((ids.numel(), N), float("nan"), dtype=torch.float64)
    for slot, expert in enumerate(local_ids(ids, E, None).flatten().tolist()):
        if expert < 0:
            continue
        row = values[expert] @ a[slot // TOP_K].double()
        if bias is not None:
            row = row + bias[expert].double()
        if activation is not None:
            row = activation_reference(activation, row, config)
        rows[slot] = row
    return rows


def assert_right(out: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """NaN in the same places, and elsewhere close to the fp64 numbers ``expected`` as a whole."""
    assert torch.equal(out.isnan(), expected.isnan())
    error = (out.double() - expected).nan_to_num().norm() / expected.nan_to_num().norm()
    assert error < tolerance, float(error)
