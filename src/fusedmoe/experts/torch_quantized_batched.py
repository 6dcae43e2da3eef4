"""The quantized reference for batched rows."""

from __future__ import annotations

from fusedmoe.experts.torch_batched import BatchedTorchExperts
from fusedmoe.experts.torch_quantized import TorchQuantizedExperts


class BatchedTorchQuantizedExperts(BatchedTorchExperts, TorchQuantizedExperts):
    """``TorchQuantizedExperts``, which defines what is computed, on batched rows."""

    name = "torch_quantized_batched"
