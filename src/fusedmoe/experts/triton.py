"""Experts on Triton's grouped GEMM: few launches, no host synchronisation, nothing permuted.

    align -> GEMM1 with bias and activation -> GEMM2 with bias -> weighted sum over K

The alignment falls away where slots are few.

T tokens, K picks, e local experts, H hidden, I intermediate, R = T * K slots, S = 2 where gated.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.config import FusedMoEConfig
from fusedmoe.experts.opaque import opaque
from fusedmoe.kernels.align import LoneSlots, MoEAlignment, align_local_slots
from fusedmoe.kernels.grouped_gemm import grouped_gemm
from fusedmoe.kernels.mul_sum import moe_fused_mul_sum
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertsWork,
    FusedMoEExpertsModular,
    ProblemSize,
    WorkspaceShapes,
    scratch,
)
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.tuning.choice import device_facts, given_table, tiles_for, tokens_here
from fusedmoe.tuning.tiles import LayerTiles, slots_are_alone
from fusedmoe.tuning.tuned_kernels import TRITON
from fusedmoe.tuning.tuned_table import TunedTable

TRITON_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


def shared_memory_of(device: torch.device) -> int:
    """Bytes of shared memory that one block of threads may use."""
    return device_facts(device).shared_memory


@opaque("fusedmoe::triton_experts", ("output", "workspace13", "workspace2"))
def triton_experts(
    work: ExpertsWork,
    activation_config: ApplyMoEActivationConfig,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    *,
    batch_invariant: bool = False,
    tiles: LayerTiles | None = None,
    table: TunedTable | None = None,
) -> None:
    """Write the weighted sum over K [T, H] into ``work.output``.

    The workspaces hold at least R * I and R * H elements. Ids that name no local expert count as
    nothing. ``tiles`` overrides the choice of ``tuning.choice``, ``table`` (already checked) the
    packaged tables.
    """
    (T, H), K = work.hidden_states.shape, work.topk_ids.shape[1]
    e, I, R = work.w1.shape[0], work.w2.shape[2], T * K  # noqa: E741
    expert_map = work.expert_map
    if tiles is None:
        tiles = tiles_for(
            tokens_here(T, e, e if expert_map is None else expert_map.shape[0]),
            K,
            e,
            H,
            I,
            work.hidden_states.dtype,
            work.activation,
            device_facts(work.hidden_states.device),
            batch_invariant=batch_invariant,
            table=table,
        )
    act, rows = scratch(work.workspace13, R, I), scratch(work.workspace2, R, H)
    blocks = slot_blocks(work.topk_ids, e, expert_map, tiles.gemm1.block_m, batch_invariant)
    grouped_gemm(
        work.hidden_states,
        work.w1,
        act,
        blocks,
        tiles.gemm1,
        top_k=K,
        bias=w1_bias,
        activation=work.activation,
        activation_config=activation_config,
    )
    grouped_gemm(act, work.w2, rows, blocks, tiles.gemm2, top_k=1, bias=w2_bias)
    moe_fused_mul_sum(
        rows.view(T, K, H),
        work.output_weights,
        work.output,
        work.topk_ids,
        expert_map,
        num_local_experts=e,
    )


def slot_blocks(
    topk_ids: torch.Tensor,
    e: int,
    expert_map: torch.Tensor | None,
    block_m: int,
    batch_invariant: bool,
) -> MoEAlignment | LoneSlots:
    """No table, and a launch less, where slots are few."""
    if slots_are_alone(topk_ids.numel(), e) and not batch_invariant:
        return LoneSlots.of(topk_ids, expert_map)
    return align_local_slots(topk_ids, block_m, e, expert_map)


class TritonExperts(FusedMoEExpertsModular):
    """Standard rows, unquantized, any GPU that Triton compiles for.

    ``tiles``, if set, replaces the choice of ``tuning.choice``.
    """

    name = "triton"
    tiles: LayerTiles | None = None

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig,
        max_num_tokens: int | None = None,
        num_dispatchers: int | None = None,
    ) -> None:
        super().__init__(moe_config, quant_config, max_num_tokens, num_dispatchers)
        self.table = given_table(moe_config)

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return ExpertsCapabilities(
            devices=frozenset({"cuda"}),
            dtypes=TRITON_DTYPES,
            requires=("triton",),
            batch_invariant=True,
            tuned_table=TRITON.name,
        )

    def shapes(
        self, size: ProblemSize, num_experts: int, activation: MoEActivation
    ) -> WorkspaceShapes:
        """The activation's output, then the second GEMM's rows by slot."""
        I = self.adjust_N_for_activation(size.N, activation)  # noqa: E741
        M, topk, H = size.M, size.topk, size.K
        return WorkspaceShapes((M, topk, I), (M, topk, H), (M, H))

    def run(self, work: ExpertsWork) -> None:
        triton_experts(
            work,
            self.activation_config,
            self.quant_config.w1_bias,
            self.quant_config.w2_bias,
            batch_invariant=self.moe_config.options.batch_invariant,
            tiles=self.tiles,
            table=self.table,
        )
