"""Experts on Hopper's own units: TMA, WGMMA and dependent launches, written in Gluon.

One of three kernels by the sizes alone (``tuning.hopper_tiles``): one or two tokens without tables,
few slots per expert at the speed of memory, many at the rate of the products. Weights that TMA
cannot view (not contiguous, not aligned) and tokens of very many picks take the Triton experts'
way.

T tokens, K picks, e local experts, H hidden, I intermediate, R = T * K slots, S = 2 where gated.
"""

from __future__ import annotations

from typing import Any

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.config import FusedMoEConfig
from fusedmoe.experts.hopper_support import too_many_picks, unmet_by_hopper
from fusedmoe.experts.opaque import opaque
from fusedmoe.experts.triton import triton_experts
from fusedmoe.kernels.align import dense
from fusedmoe.kernels.device import device_of, multiprocessors_of
from fusedmoe.kernels.hopper_decode import ALIGNED_ELEMENTS, hopper_decode
from fusedmoe.kernels.hopper_direct import hopper_direct
from fusedmoe.kernels.hopper_prefill import hopper_prefill, prefill_rows
from fusedmoe.kernels.peer_all_to_all import settled
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertTokensMetadata,
    FusedMoEExpertsModular,
    WorkspaceShapes,
)
from fusedmoe.quantization.keys import QuantKey
from fusedmoe.tuning.hopper_tiles import DirectTiles, HopperTiles, PrefillTiles, hopper_tiles

_ALIGNED_BYTES = 16


def scratch_rows(tiles: HopperTiles, R: int, num_local: int) -> int:
    """Rows of the activation's output and of the second GEMM's."""
    return prefill_rows(R, num_local) if isinstance(tiles, PrefillTiles) else R


@opaque("fusedmoe::hopper_experts", ("output", "workspace13", "workspace2"))
def hopper_experts(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    activation: MoEActivation,
    activation_config: ApplyMoEActivationConfig,
    num_experts: int,
    expert_map: torch.Tensor | None,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    workspace13: torch.Tensor,
    workspace2: torch.Tensor,
    *,
    batch_invariant: bool = False,
    tiles: HopperTiles | None = None,
) -> None:
    """Write the weighted sum over K [T, H] into ``output``.

    hidden_states [T, H], w1 [e, S * I, H], w2 [e, H, I], topk_weights fp32 [T, K] (None: all one).
    The workspaces hold at least ``scratch_rows`` rows of I and of H elements. Ids that name no
    local expert count as nothing. ``tiles`` overrides the choice of ``tuning.hopper_tiles``.
    """
    (T, H), K = hidden_states.shape, topk_ids.shape[1]
    e, I = w1.shape[0], w2.shape[2]  # noqa: E741
    if too_many_picks(K) or not _viewable(w1, w2):
        triton_experts(
            output,
            settled(hidden_states),
            w1,
            w2,
            topk_weights,
            topk_ids,
            activation,
            activation_config,
            expert_map,
            w1_bias,
            w2_bias,
            workspace13,
            workspace2,
            batch_invariant=batch_invariant,
        )
        return
    if not _readable(hidden_states):  # never so where rows are late: buffers are dense
        hidden_states = hidden_states.clone(memory_format=torch.contiguous_format)
    if tiles is None:
        tiles = hopper_tiles(T, K, num_experts, e, H, I, batch_invariant=batch_invariant)
    if not isinstance(tiles, PrefillTiles):
        hidden_states = settled(hidden_states)
    rows = scratch_rows(tiles, T * K, e)
    act = workspace13.flatten()[: rows * I].view(rows, I)
    y = workspace2.flatten()[: rows * H].view(rows, H)
    given: dict[str, Any] = {
        "x": hidden_states,
        "w1": w1,
        "w2": w2,
        "topk_weights": dense(topk_weights),
        "topk_ids": topk_ids.contiguous(),
        "out": output,
        "act": act,
        "activation": activation,
        "activation_config": activation_config,
        "w1_bias": dense(w1_bias),
        "w2_bias": dense(w2_bias),
        "expert_map": dense(expert_map),
        "programs": multiprocessors_of(hidden_states.device),
    }
    with device_of(hidden_states):
        if isinstance(tiles, DirectTiles):
            hopper_direct(tiles=tiles, **given)
        elif isinstance(tiles, PrefillTiles):
            hopper_prefill(y=y, tiles=tiles, **given)
        else:
            hopper_decode(y=y, tiles=tiles, **given)


def _viewable(*weights: torch.Tensor) -> bool:
    """Whether TMA can read these as matrices."""
    return all(w.is_contiguous() and w.data_ptr() % _ALIGNED_BYTES == 0 for w in weights)


def _readable(rows: torch.Tensor) -> bool:
    """Whether rows can be gathered 16 bytes at a time, and TMA can read them as a matrix."""
    return (
        rows.stride(1) == 1
        and rows.stride(0) % ALIGNED_ELEMENTS == 0
        and rows.stride(0) >= rows.shape[1]
        and rows.data_ptr() % _ALIGNED_BYTES == 0
    )


class HopperExperts(FusedMoEExpertsModular):
    """Standard rows, unquantized fp16 and bf16, on GPUs of compute capability 9.

    ``tiles``, if set, replaces the choice of ``tuning.hopper_tiles``.
    """

    name = "hopper"
    takes_late_rows = True
    tiles: HopperTiles | None = None

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return ExpertsCapabilities(
            devices=frozenset({"cuda"}),
            dtypes=frozenset({torch.float16, torch.bfloat16}),
            min_capability=(9, 0),
            requires=("triton",),
            batch_invariant=True,
        )

    @classmethod
    def unmet_requirement(
        cls, moe: FusedMoEConfig, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> str | None:
        for name in ("hidden_dim", "intermediate_size_per_partition"):
            size = getattr(moe, name)
            if size % ALIGNED_ELEMENTS:
                return f"wants multiples of {ALIGNED_ELEMENTS}, {name} is {size}"
        return unmet_by_hopper(moe)

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> WorkspaceShapes:
        """The activation's output, then the second GEMM's rows."""
        I = self.adjust_N_for_activation(N, activation)  # noqa: E741
        tiles = self.tiles
        if tiles is None:
            tiles = hopper_tiles(
                M,
                topk,
                global_num_experts,
                local_num_experts,
                K,
                I,
                batch_invariant=self.moe_config.options.batch_invariant,
            )
        rows = scratch_rows(tiles, M * topk, local_num_experts)
        return WorkspaceShapes((rows, I), (rows, K), (M, K))

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor | None,
        workspace2: torch.Tensor | None,
        expert_tokens_meta: ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        assert workspace13 is not None
        assert workspace2 is not None
        weights = None if apply_router_weight_on_input else topk_weights
        hopper_experts(
            output,
            hidden_states,
            w1,
            w2,
            weights,
            topk_ids,
            activation,
            self.activation_config,
            global_num_experts,
            expert_map,
            self.quant_config.w1_bias,
            self.quant_config.w2_bias,
            workspace13,
            workspace2,
            batch_invariant=self.moe_config.options.batch_invariant,
            tiles=self.tiles,
        )
