"""bf16 experts on a CPU with weights packed once, for oneDNN to read as they lie.

Without it every product starts by repacking its weights, which for the few rows of decoding takes
longer than reading them. The price is a second copy of the expert weights: it is made only while a
quarter of the memory stays free, layer by layer, and changes no bit of the result.
``MoEOptions(experts="cpu")`` never makes it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from fusedmoe.config import FusedMoEConfig
from fusedmoe.experts.copies import Source, room_for
from fusedmoe.experts.cpu import CpuExperts
from fusedmoe.experts.cpu_gemm import has_native, onednn_linear
from fusedmoe.experts.cpu_run import Products
from fusedmoe.modular_kernel import ExpertsCapabilities
from fusedmoe.quantization.keys import QuantKey

_log = logging.getLogger(__name__)


def packed(weight: torch.Tensor) -> list[torch.Tensor]:
    """weight [e, N, K] as e opaque tensors in oneDNN's own layout."""
    return [torch.ops.mkldnn._reorder_linear_weight(one.detach().contiguous()) for one in weight]


def packed_linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Write x [M, K] times one of ``packed``, transposed, into ``out`` [M, N]."""
    out.copy_(onednn_linear(x, weight))


class CpuPackedExperts(CpuExperts):
    """The default for bf16 on a CPU that has it: as ``CpuExperts``, from a packed copy.

    Weights written to since, other than through ``.data``, are noticed and read as they are. So
    they are where a compiler traces what reads them.
    """

    name = "cpu_packed"
    derived = ("_packed", "_sources")
    _packed: Products | None = None
    _sources: tuple[Source, Source] | None = None

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return ExpertsCapabilities(
            devices=frozenset({"cpu"}),
            dtypes=frozenset({torch.bfloat16}),
            batch_invariant=True,
        )

    @classmethod
    def unmet_requirement(
        cls, moe: FusedMoEConfig, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> str | None:
        if not has_native(torch.bfloat16):
            return "needs a CPU with bf16 instructions and torch's oneDNN"
        return None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if torch.compiler.is_compiling():
            return
        weights: Any = layer
        w13, w2 = weights.w13_weight, weights.w2_weight
        self._packed = self._sources = None
        size = w13.nbytes + w2.nbytes
        if not room_for(size):
            _log.info("no memory to spare for %d bytes of packed expert weights", size)
            return
        self._packed = Products(packed_linear, packed(w13), packed(w2))
        self._sources = Source.of(w13), Source.of(w2)

    def products(self, w1: torch.Tensor, w2: torch.Tensor) -> Products | None:
        return self._packed if (Source.of(w1), Source.of(w2)) == self._sources else None
