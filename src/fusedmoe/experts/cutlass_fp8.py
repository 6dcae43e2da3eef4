"""fp8 experts with a scale per token and channel, or per tensor, on torch's grouped scaled GEMM.

The run itself is ``cutlass_fp8_run``; here is what selection sees.

T tokens, K picks, e local experts, M rows per expert at most, H hidden, I intermediate.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.config import FusedMoEConfig
from fusedmoe.experts.cutlass_fp8_run import (
    FUNCTION,
    STRIDE_BYTES,
    batched,
    row_scales,
    standard,
)
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertsWork,
    FusedMoEActivationFormat,
    FusedMoEExpertsModular,
    ProblemSize,
    WorkspaceShapes,
)
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    FP8_STATIC_TENSOR,
    PER_ROW,
    PER_TENSOR,
    PER_TOKEN,
    QuantKey,
)

_WEIGHTS = tuple(QuantKey(torch.float8_e4m3fn, True, shape) for shape in (PER_TENSOR, PER_ROW))
_ROWS = (FP8_DYNAMIC_TOKEN, FP8_STATIC_TENSOR, FP8_DYNAMIC_TENSOR)


class CutlassExpertsFp8Base(FusedMoEExpertsModular):
    """What both formats of rows share."""

    derived = ("_seen", "_scales")
    _seen: tuple[torch.Tensor | None, ...] | None = None
    _scales: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def unmet_requirement(
        cls, moe: FusedMoEConfig, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> str | None:
        if not hasattr(torch.nn.functional, FUNCTION):
            return f"needs torch.nn.functional.{FUNCTION}; torch {torch.__version__} has none"
        major, _ = torch.cuda.get_device_capability(moe.device)
        if major != 9:
            return f"torch multiplies groups with row scales on capability 9, not {major}"
        for name in ("hidden_dim", "intermediate_size_per_partition"):
            size = getattr(moe, name)
            if size % STRIDE_BYTES:
                return f"wants rows of a multiple of {STRIDE_BYTES} bytes, {name} is {size}"
        return None

    @property
    def per_token(self) -> bool:
        return self.quant_config.a1.shape == PER_TOKEN

    def scales(
        self, w1: torch.Tensor, w2: torch.Tensor, activation: MoEActivation
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 [e, S * I] and [e, H] of the weights; remembered for the same tensors.

        Raises ValueError where a scale is missing or does not fit.
        """
        config = self.quant_config
        seen = (config.w1_scale, config.w2_scale)
        if self._seen is None or any(a is not b for a, b in zip(seen, self._seen, strict=True)):
            if config.w1_scale is None or config.w2_scale is None:
                raise ValueError("w1 and w2 need scales, found none")
            interleaved = activation is MoEActivation.SWIGLUOAI
            (e, N, _), H = w1.shape, w2.shape[1]
            self._scales = (
                row_scales(config.w1_scale, e, N, interleaved=interleaved),
                row_scales(config.w2_scale, e, H),
            )
            self._seen = seen
        assert self._scales is not None
        return self._scales


class CutlassExpertsFp8(CutlassExpertsFp8Base):
    """fp8 weights and rows, scaled by row or as a whole, in standard rows; compute capability 9.

    The sum over K is made here.
    """

    name = "cutlass_fp8"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return _capabilities(FusedMoEActivationFormat.Standard)

    def shapes(
        self, size: ProblemSize, num_experts: int, activation: MoEActivation
    ) -> WorkspaceShapes:
        """The permuted rows in bytes, then the activation's output; torch allocates the GEMMs'."""
        width = self.adjust_N_for_activation(size.N, activation)
        M, topk, H = size.M, size.topk, size.K
        return WorkspaceShapes((M, topk, -(-H // 2)), (M, topk, width), (M, H))

    def run(self, work: ExpertsWork) -> None:
        scales = self.scales(work.w1, work.w2, work.activation)
        rows = self.quant_config.a1_scale, self.quant_config.a2_scale
        standard(work, *scales, self.per_token, *rows, self.activation_config)


class CutlassBatchedExpertsFp8(CutlassExpertsFp8Base):
    """As ``CutlassExpertsFp8``, in batched rows; what moved them also weights and sums them.

    Rows in no use are multiplied too: torch's batched form knows no counts.
    """

    name = "cutlass_fp8_batched"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return _capabilities(FusedMoEActivationFormat.BatchedExperts)

    def shapes(
        self, size: ProblemSize, num_experts: int, activation: MoEActivation
    ) -> WorkspaceShapes:
        """The activation's output; M counts rows per expert."""
        e, M, N, H, _ = size
        width = self.adjust_N_for_activation(N, activation)
        return WorkspaceShapes((0,), (e, M, width), (e, M, H))

    def run(self, work: ExpertsWork) -> None:
        counts = work.rows_per_expert
        scales = self.scales(work.w1, work.w2, work.activation)
        rows = self.quant_config.a1_scale, self.quant_config.a2_scale
        batched(work, *scales, self.per_token, *rows, counts, self.activation_config)


def _capabilities(rows: FusedMoEActivationFormat) -> ExpertsCapabilities:
    batched_rows = rows is FusedMoEActivationFormat.BatchedExperts
    # One scale for all rows would take in the unused rows behind those of each expert.
    keys = [key for key in _ROWS if not (batched_rows and key == FP8_DYNAMIC_TENSOR)]
    return ExpertsCapabilities(
        activation_format=rows,
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16}),
        weight_formats=frozenset((weight, key) for weight in _WEIGHTS for key in keys),
        min_capability=(9, 0),
        bias=False,
    )
