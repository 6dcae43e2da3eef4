"""Experts in the batched format, on Triton: blocks of the rows in use, then two GEMMs.

e local experts, M rows per expert at most, H hidden, I intermediate, S = 2 where gated.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.experts.opaque import opaque
from fusedmoe.experts.triton import TRITON_DTYPES, shared_memory_of
from fusedmoe.kernels.batched_gemm import batched_gemm
from fusedmoe.kernels.counts import batched_moe_align_block_size
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertsWork,
    FusedMoEActivationFormat,
    FusedMoEExpertsModular,
    ProblemSize,
    WorkspaceShapes,
    scratch,
)
from fusedmoe.tuning.tiles import LayerTiles, layer_tiles

# An expert's rows are known only on the device; blocks of more than this would mostly be padding.
_LIKELY_ROWS = 48


@opaque("fusedmoe::batched_triton_experts", ("output", "workspace13"))
def batched_triton_experts(
    work: ExpertsWork,
    expert_num_tokens: torch.Tensor,
    activation_config: ApplyMoEActivationConfig,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    *,
    batch_invariant: bool = False,
    tiles: LayerTiles | None = None,
) -> None:
    """Write ``work.output`` [e, M, H], row by row, up to each expert's count, int32 [e].

    The first workspace holds at least e * M * I elements. Nothing is weighted or summed.
    """
    x, w2 = work.hidden_states, work.w2
    (e, M, H), width = x.shape, w2.shape[2]
    if M == 0:
        return
    if tiles is None:
        tiles = layer_tiles(
            e * min(M, _LIKELY_ROWS),
            1,
            e,
            H,
            width,
            x.dtype,
            gated=work.activation.is_gated,
            batch_invariant=batch_invariant,
            shared_memory=shared_memory_of(x.device),
        )
    blocks = batched_moe_align_block_size(M, tiles.gemm1.block_m, expert_num_tokens)
    act = scratch(work.workspace13, e * M, width).view(e, M, width)
    batched_gemm(
        x,
        work.w1,
        act,
        blocks,
        tiles.gemm1,
        bias=w1_bias,
        activation=work.activation,
        activation_config=activation_config,
    )
    batched_gemm(act, w2, work.output, blocks, tiles.gemm2, bias=w2_bias)


class BatchedTritonExperts(FusedMoEExpertsModular):
    """As ``TritonExperts``, in batched rows; what moved them also weights and sums them.

    ``tiles``, if set, replaces the choice of ``tuning.tiles``.
    """

    name = "triton_batched"
    tiles: LayerTiles | None = None

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return ExpertsCapabilities(
            activation_format=FusedMoEActivationFormat.BatchedExperts,
            devices=frozenset({"cuda"}),
            dtypes=TRITON_DTYPES,
            requires=("triton",),
            batch_invariant=True,
        )

    def shapes(
        self, size: ProblemSize, num_experts: int, activation: MoEActivation
    ) -> WorkspaceShapes:
        """The activation's output; M counts rows per expert."""
        e, M, H = size.E, size.M, size.K
        width = self.adjust_N_for_activation(size.N, activation)
        return WorkspaceShapes((e, M, width), (0,), (e, M, H))

    def run(self, work: ExpertsWork) -> None:
        batched_triton_experts(
            work,
            work.rows_per_expert,
            self.activation_config,
            self.quant_config.w1_bias,
            self.quant_config.w2_bias,
            batch_invariant=self.moe_config.options.batch_invariant,
            tiles=self.tiles,
        )
