"""Tokens over the deep_ep package (DeepEP's Buffer), an optional extra, in both of its modes.

    high throughput   Standard: each token once to each rank with one of its experts, one sum back
    low latency       Batched: each pick to its expert, rows side by side, weighted on the way back

The buffer is made once, by ``make_deep_ep_buffer`` or by hand, and given as
``ParallelGroups(deep_ep=...)``. DeepEP counts experts by rank, as many on each; ids are translated
to that order on the way out and back again on arrival, so that any placement will do.

T tokens of this rank, K picks, e local experts, H hidden, M rows per expert at most.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch

from fusedmoe.config import FusedMoEConfig, ParallelGroups
from fusedmoe.distributed.deep_ep import PACKAGE, Placement, learn_placement
from fusedmoe.distributed.groups import TokenRanks, check_sizes, token_ranks
from fusedmoe.modular_kernel import (
    ExpertTokensMetadata,
    FusedMoEActivationFormat,
    PrepareResult,
)
from fusedmoe.modular_kernel.records import Hook
from fusedmoe.prepare_finalize.dispatch import (
    DispatchingModular,
    LoRAContext,
    quantize_input,
    weighted_input,
)
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.keys import FP8_DYNAMIC_128, FP8_DYNAMIC_128_UE8M0, FP8_DYNAMIC_TENSOR
from fusedmoe.topk_weight_and_reduce import (
    TopKWeightAndReduce,
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
)

LOW_LATENCY_HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
"""Rows that the low-latency kernels are compiled for."""
_ROW_BYTES = 512
_BLOCK_FP8 = (FP8_DYNAMIC_128, FP8_DYNAMIC_128_UE8M0)


class _DeepEP(DispatchingModular):
    """What both modes share; ``buffer`` is a ``deep_ep.Buffer`` of ``ranks``."""

    low_latency: ClassVar[bool]
    _handle: Any = None

    def __init__(
        self,
        buffer: Any,
        is_sequence_parallel: bool = False,
        *,
        ranks: TokenRanks,
        max_num_tokens: int | None = None,
    ) -> None:
        super().__init__(is_sequence_parallel, ranks=ranks, max_num_tokens=max_num_tokens)
        self.buffer = buffer
        self._placement: list[Placement] = []

    @classmethod
    def unmet_requirement(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> str | None:
        reason = super().unmet_requirement(moe, groups)
        if reason is not None:
            return reason
        assert groups is not None
        if groups.deep_ep is None:
            if importlib.util.find_spec(PACKAGE) is None:
                return f"needs the module {PACKAGE}, which is not installed"
            return "needs a deep_ep.Buffer in ParallelGroups(deep_ep=...)"
        if bool(groups.deep_ep.low_latency_mode) != cls.low_latency:
            return f"the deep_ep.Buffer is {'not ' * cls.low_latency}made for low latency"
        if not moe.moe_parallel_config.use_ep:
            return "sends tokens to whole experts, but each expert is cut over all ranks"
        ranks = token_ranks(moe.moe_parallel_config, groups)
        if len(ranks.axes) > 1:
            return "needs one process group of all ranks whose tokens differ"
        if groups.deep_ep.group_size != ranks.size:
            return f"has a buffer of {groups.deep_ep.group_size} ranks, the layer has {ranks.size}"
        if moe.in_dtype is not torch.bfloat16:
            return f"moves rows in bfloat16, not {moe.in_dtype}"
        if moe.hidden_dim * moe.in_dtype.itemsize % _ROW_BYTES:
            return f"moves rows of a multiple of {_ROW_BYTES} bytes, hidden_dim is {moe.hidden_dim}"
        return None

    @classmethod
    def make(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> Self:
        assert groups is not None
        parallel = moe.moe_parallel_config
        return cls(
            groups.deep_ep,
            parallel.is_sequence_parallel,
            ranks=token_ranks(parallel, groups),
            max_num_tokens=moe.max_num_tokens,
        )

    def concurrent_forwards(self) -> int:
        """One: that is what the package's buffer has room for."""
        return 1

    def topk_indices_dtype(self) -> torch.dtype | None:
        return torch.int64

    def set_lora_context(self, context: LoRAContext | None) -> None:
        """Raises ValueError: nothing travels beside the activations."""
        if context is not None:
            raise ValueError(f"{self.name} cannot send adapter ids along with the tokens")

    def placement(self, num_experts: int, expert_map: torch.Tensor | None) -> Placement:
        """Asks the other ranks the first time, and again where the map is another tensor."""
        if expert_map is None or expert_map.shape[0] != num_experts:
            raise ValueError(
                f"{self.name} needs the expert map of {num_experts} experts, got "
                f"{None if expert_map is None else tuple(expert_map.shape)}"
            )
        if not self._placement or self._placement[0].expert_map is not expert_map:
            self._placement[:] = [learn_placement(expert_map, self.ranks)]
        return self._placement[0]

    def check_tokens(self, num_tokens: int) -> None:
        """Raise ValueError where a rank brings more than there is room for, as far as is known."""
        if self._given_sizes is None:
            sizes = [num_tokens]
        else:
            sizes = check_sizes(self._given_sizes, self.ranks, num_tokens)
        self.check_room(sizes)


class DeepEPHTPrepareAndFinalize(_DeepEP):
    """[T, H] -> the rows that need an expert of this rank, with global ids, and back.

    Rows in fp8 with scales per 128 columns travel like that; other formats are rounded on arrival.
    How many rows arrive is known to the host, which waits for it: not for CUDA graphs.
    """

    name = "deepep_high_throughput"
    low_latency = False

    def prepare_async(
        self,
        a1: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> Callable[[], PrepareResult]:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ValueError(f"{self.name} waits for counts of rows: it has no CUDA graphs")
        self.check_tokens(a1.shape[0])
        placement = self.placement(num_experts, expert_map)
        a1 = weighted_input(a1, topk_weights, topk_ids, apply_router_weight_on_input)
        blocks = quant_config.a1.key in _BLOCK_FP8 and not defer_input_quant
        x: Any = quantize_input(a1.contiguous(), quant_config) if blocks else a1.contiguous()
        ids = placement.positions_of(topk_ids)
        per_rank, per_node, per_expert, goes, _ = self.buffer.get_dispatch_layout(
            ids, placement.num_positions
        )
        rows, local, weights, counts, self._handle, event = self.buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=goes,
            num_tokens_per_expert=per_expert,
            topk_idx=ids,
            topk_weights=topk_weights.float().contiguous(),
            async_finish=True,
        )

        def receive() -> PrepareResult:
            event.current_stream_wait()
            found, scale = rows if blocks else (rows, None)
            if not blocks and not defer_input_quant:
                found, scale = quantize_input(found, quant_config)
            meta = ExpertTokensMetadata.make_from_list(counts, found.device)
            here = placement.global_ids_of(local).to(topk_ids.dtype)
            return PrepareResult(found, scale, meta, here, weights)

        return receive

    def finalize_async(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: TopKWeightAndReduce,
    ) -> Callable[[], None]:
        reduce = weight_and_reduce_impl.or_else(TopKWeightAndReduceContiguous())
        partial = reduce.apply(
            None, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input
        )
        combined, _, event = self.buffer.combine(
            partial.to(torch.bfloat16).contiguous(), self._handle, async_finish=True
        )

        def receive() -> None:
            event.current_stream_wait()
            output.copy_(combined)

        return receive


class DeepEPLLPrepareAndFinalize(_DeepEP):
    """[T, H] -> [e, ranks * max_num_tokens, H] with a count per expert, and back, weighted.

    Where the experts take fp8 with scales per 128 columns, the package rounds on the way; other
    formats are rounded on arrival. Nothing waits for the host.
    """

    name = "deepep_low_latency"
    row_format = FusedMoEActivationFormat.BatchedExperts
    low_latency = True
    _ids: torch.Tensor | None = None

    @classmethod
    def unmet_requirement(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> str | None:
        reason = super().unmet_requirement(moe, groups)
        if reason is not None:
            return reason
        if moe.max_num_tokens is None:
            return "needs max_num_tokens, the most that any rank brings"
        if moe.hidden_dim not in LOW_LATENCY_HIDDEN:
            sizes = ", ".join(map(str, LOW_LATENCY_HIDDEN))
            return f"has kernels for hidden sizes of {sizes}, not {moe.hidden_dim}"
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        return self.max_num_tokens

    def prepare_async(
        self,
        a1: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> tuple[Hook, Callable[[], PrepareResult]]:
        self.check_tokens(a1.shape[0])
        placement = self.placement(num_experts, expert_map)
        a1 = weighted_input(a1, topk_weights, topk_ids, apply_router_weight_on_input)
        self._ids = placement.positions_of(topk_ids)
        key = quant_config.a1.key
        if key == FP8_DYNAMIC_TENSOR and not defer_input_quant:
            raise ValueError("one scale for all rows would count rows that are in no use")
        blocks = key in _BLOCK_FP8 and not defer_input_quant
        rows, counts, self._handle, _, hook = self.buffer.low_latency_dispatch(
            a1.contiguous(),
            self._ids,
            self.max_num_tokens,
            placement.num_positions,
            use_fp8=blocks,
            round_scale=key == FP8_DYNAMIC_128_UE8M0,
            return_recv_hook=True,
        )

        def receive() -> PrepareResult:
            found, scale = rows if blocks else (rows, None)
            if not blocks and not defer_input_quant and key is not None:
                e, M, H = found.shape
                flat, by_row = quantize_input(found.view(e * M, H), quant_config)
                found = flat.view(e, M, H)
                scale = by_row if by_row is None or by_row.dim() < 2 else by_row.view(e, M, -1)
            return PrepareResult(found, scale, ExpertTokensMetadata(counts))

        return hook, receive

    def finalize_async(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: TopKWeightAndReduce,
    ) -> tuple[Hook, Callable[[], None]]:
        """Raises ValueError for experts that have weighted and summed: the package does."""
        if not isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
            raise ValueError(
                f"{self.name} weights and sums by itself, the experts leave "
                f"{type(weight_and_reduce_impl).__name__} to be done"
            )
        weights = topk_weights.float()
        combined, _, hook = self.buffer.low_latency_combine(
            fused_expert_output,
            self._ids,
            torch.ones_like(weights) if apply_router_weight_on_input else weights.contiguous(),
            self._handle,
            return_recv_hook=True,
            out=output,
        )

        def receive() -> None:
            if combined.data_ptr() != output.data_ptr():
                output.copy_(combined)

        return hook, receive
