"""Experts on Hopper's own units: TMA, WGMMA and dependent launches, written in Gluon.

One of three kernels by the sizes alone (``tuning.hopper_tiles``): one or two tokens without tables,
few slots per expert at the speed of memory, many at the rate of the products. Weights that TMA
cannot view (not contiguous, not aligned) and tokens of very many picks take the Triton experts'
way.

T tokens, K picks, e local experts, H hidden, I intermediate, R = T * K slots, S = 2 where gated.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.config import FusedMoEConfig
from fusedmoe.experts.hopper_support import readable, too_many_picks, unmet_by_hopper, viewable
from fusedmoe.experts.opaque import opaque
from fusedmoe.experts.triton import triton_experts
from fusedmoe.kernels.align import dense
from fusedmoe.kernels.device import device_of, multiprocessors_of
from fusedmoe.kernels.hopper_decode import ALIGNED_ELEMENTS, hopper_decode
from fusedmoe.kernels.hopper_direct import hopper_direct
from fusedmoe.kernels.hopper_prefill import hopper_prefill, prefill_rows
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.peer_all_to_all import settled
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertsWork,
    FusedMoEExpertsModular,
    ProblemSize,
    WorkspaceShapes,
    scratch,
)
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.keys import QuantKey
from fusedmoe.tuning.choice import PlainLayer, hopper_table, hopper_tiles_for
from fusedmoe.tuning.hopper_tiles import DirectTiles, HopperTiles, PrefillTiles, hopper_tiles
from fusedmoe.tuning.tuned_kernels import HOPPER
from fusedmoe.tuning.tuned_table import TunedTable


def scratch_rows(tiles: HopperTiles, R: int, num_local: int) -> int:
    """Rows of the activation's output and of the second GEMM's."""
    return prefill_rows(R, num_local) if isinstance(tiles, PrefillTiles) else R


@opaque("fusedmoe::hopper_experts", ("output", "workspace13", "workspace2"))
def hopper_experts(
    work: ExpertsWork,
    activation_config: ApplyMoEActivationConfig,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    *,
    batch_invariant: bool = False,
    tiles: HopperTiles | None = None,
    table: TunedTable | None = None,
) -> None:
    """Write the weighted sum over K [T, H] into ``work.output``.

    The workspaces hold at least ``scratch_rows`` rows of I and of H elements. Ids that name no
    local expert count as nothing. ``tiles`` overrides the choice of ``tuning.choice``, ``table`` is
    its ``hopper_table``.
    """
    x, w1, w2 = work.hidden_states, work.w1, work.w2
    (T, H), K = x.shape, work.topk_ids.shape[1]
    e, I = w1.shape[0], w2.shape[2]  # noqa: E741
    if too_many_picks(K) or not viewable(w1, w2):
        work = work._replace(hidden_states=settled(x))
        triton_experts(work, activation_config, w1_bias, w2_bias, batch_invariant=batch_invariant)
        return
    if not readable(x):  # never so where rows are late: buffers are dense
        x = x.clone(memory_format=torch.contiguous_format)
    if tiles is None:
        sizes = T, K, work.global_num_experts, e, H, I
        tiles = hopper_tiles_for(*sizes, batch_invariant=batch_invariant, table=table)
    if not isinstance(tiles, PrefillTiles):
        x = settled(x)
    rows = scratch_rows(tiles, T * K, e)
    layer = LayerTensors(
        x,
        w1,
        w2,
        dense(work.output_weights),
        work.topk_ids.contiguous(),
        work.output,
        scratch(work.workspace13, rows, I),
        scratch(work.workspace2, rows, H),
        multiprocessors_of(x.device),
        work.activation,
        activation_config,
        dense(w1_bias),
        dense(w2_bias),
        dense(work.expert_map),
    )
    with device_of(x):
        if isinstance(tiles, DirectTiles):
            hopper_direct(layer, tiles)
        elif isinstance(tiles, PrefillTiles):
            hopper_prefill(layer, tiles)
        else:
            hopper_decode(layer, tiles)


class HopperExperts(FusedMoEExpertsModular):
    """Standard rows, unquantized fp16 and bf16, on GPUs of compute capability 9.

    ``tiles``, if set, replaces the choice of ``tuning.choice``.
    """

    name = HOPPER.name
    takes_late_rows = True
    tiles: HopperTiles | None = None

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig,
        max_num_tokens: int | None = None,
        num_dispatchers: int | None = None,
    ) -> None:
        super().__init__(moe_config, quant_config, max_num_tokens, num_dispatchers)
        table, layer = moe_config.options.table, PlainLayer.of(moe_config)
        self.table = hopper_table(table, layer, moe_config.device)

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return ExpertsCapabilities(
            devices=frozenset({"cuda"}),
            dtypes=frozenset({torch.float16, torch.bfloat16}),
            min_capability=(9, 0),
            requires=("triton",),
            batch_invariant=True,
            tuned_table=HOPPER.name,
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

    def shapes(
        self, size: ProblemSize, num_experts: int, activation: MoEActivation
    ) -> WorkspaceShapes:
        """The activation's output, then the second GEMM's rows."""
        e, M, topk, H = size.E, size.M, size.topk, size.K
        I = self.adjust_N_for_activation(size.N, activation)  # noqa: E741
        rows = scratch_rows(self.tiles or self._tiles(M, topk, num_experts, e, H, I), M * topk, e)
        return WorkspaceShapes((rows, I), (rows, H), (M, H))

    def _tiles(self, *sizes: int) -> HopperTiles:
        """``sizes`` as of ``hopper_tiles``; symbols where a compiler traces this."""
        invariant = self.moe_config.options.batch_invariant
        if not torch.compiler.is_compiling():
            return hopper_tiles_for(*sizes, batch_invariant=invariant, table=self.table)
        if self.table is not None:
            return PrefillTiles()  # a table knows numbers alone, and these need the most scratch
        return hopper_tiles(*sizes, batch_invariant=invariant)

    def run(self, work: ExpertsWork) -> None:
        hopper_experts(
            work,
            self.activation_config,
            self.quant_config.w1_bias,
            self.quant_config.w2_bias,
            batch_invariant=self.moe_config.options.batch_invariant,
            tiles=self.tiles,
            table=self.table,
        )
