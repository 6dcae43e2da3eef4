"""The smallest stages that satisfy the contract, each of which records what it was asked to do."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    FusedMoEActivationFormat,
    FusedMoEExpertsModular,
    FusedMoEExpertsMonolithic,
    FusedMoEPrepareAndFinalizeModular,
    PrepareResult,
    WorkspaceShapes,
)
from fusedmoe.topk_weight_and_reduce import (
    TopKWeightAndReduce,
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNaiveBatched,
    TopKWeightAndReduceNoOP,
)

CPU = ExpertsCapabilities(devices=frozenset({"cpu"}), dtypes=frozenset({torch.float32}))


def expert(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """A silu-gated expert on rows x [N, H]."""
    gate, up = (x @ w1.T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ w2.T


class SlotExperts(FusedMoEExpertsModular):
    """Writes every slot's output [T, K, H] and leaves weighting and summing to the finalize."""

    name = "slot"
    calls: ClassVar[list[dict[str, Any]]] = []

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return CPU

    def workspace_shapes(self, M, N, K, topk, global_E, local_E, meta, activation):
        return WorkspaceShapes((M, topk, N), (M, topk, N // 2), (M, topk, K))

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduce:
        return TopKWeightAndReduceDelegate()

    def apply(
        self,
        output,
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation,
        global_num_experts,
        expert_map,
        a1q_scale,
        a2_scale,
        workspace13,
        workspace2,
        expert_tokens_meta,
        apply_router_weight_on_input,
    ) -> None:
        self.calls.append({"rows": hidden_states.shape[0], "scale": a1q_scale})
        assert workspace13.shape[0] >= hidden_states.shape[0]
        output.fill_(float("nan"))
        for t, k in (topk_ids >= 0).nonzero().tolist():
            e = int(topk_ids[t, k])
            output[t, k] = expert(hidden_states[t : t + 1], w1[e], w2[e])[0]


class BatchedExperts(FusedMoEExpertsModular):
    """Takes [e, max_tokens, H] and the row counts."""

    name = "batched"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return ExpertsCapabilities(
            activation_format=FusedMoEActivationFormat.BatchedExperts,
            devices=frozenset({"cpu"}),
        )

    def workspace_shapes(self, M, N, K, topk, global_E, local_E, meta, activation):
        return WorkspaceShapes((local_E, M, N), (0,), (local_E, M, K))

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduce:
        return TopKWeightAndReduceNaiveBatched(0)

    def apply(self, output, hidden_states, w1, w2, *rest) -> None:
        meta = rest[-2]
        output.fill_(float("nan"))
        for e, count in enumerate(meta.expert_num_tokens.tolist()):
            output[e, :count] = expert(hidden_states[e, :count], w1[e], w2[e])


class LogitsExperts(FusedMoEExpertsMonolithic):
    """Asks the layer's router by itself."""

    name = "logits"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return CPU

    def apply(
        self,
        hidden_states,
        w1,
        w2,
        router_logits,
        activation,
        global_num_experts,
        expert_map,
        a1q_scale,
        apply_router_weight_on_input,
        *,
        router,
        input_ids=None,
    ) -> torch.Tensor:
        weights, ids = router.select_experts(hidden_states, router_logits, input_ids=input_ids)
        out = torch.zeros_like(hidden_states)
        for t, k in (ids >= 0).nonzero().tolist():
            e = int(ids[t, k])
            out[t] += weights[t, k] * expert(hidden_states[t : t + 1], w1[e], w2[e])[0]
        return out


class AsyncMover(FusedMoEPrepareAndFinalizeModular):
    """Rows come back from prepare in reverse order and are put right by finalize; everything
    happens in receivers, after hooks."""

    name = "reversing"
    log: ClassVar[list[str]] = []
    with_hooks: ClassVar[bool] = True

    def topk_indices_dtype(self) -> torch.dtype | None:
        return torch.int64

    def max_num_tokens_per_rank(self) -> int | None:
        return None

    def num_dispatchers(self) -> int:
        return 1

    def output_is_reduced(self) -> bool:
        return True

    def supports_async(self) -> bool:
        return True

    def prepare(self, a1, topk_weights, topk_ids, *rest) -> PrepareResult:
        return PrepareResult(
            a1.flip(0), topk_ids=topk_ids.flip(0), topk_weights=topk_weights.flip(0)
        )

    def finalize(self, output, fused, topk_weights, topk_ids, on_input, reduce_impl) -> None:
        if isinstance(reduce_impl, TopKWeightAndReduceDelegate):
            reduce_impl = TopKWeightAndReduceContiguous()
        output.copy_(reduce_impl.apply(None, fused, topk_weights, topk_ids, on_input).flip(0))

    def _pending(self, what, work):
        self.log.append(f"{what} started")

        def receiver():
            self.log.append(f"{what} received")
            return work()

        if not self.with_hooks:
            return receiver
        return (lambda: self.log.append(f"{what} hook")), receiver

    def prepare_async(self, *arguments):
        return self._pending("prepare", lambda: self.prepare(*arguments))

    def finalize_async(self, *arguments):
        return self._pending("finalize", lambda: self.finalize(*arguments))


class SumExperts(SlotExperts):
    """Weights and sums by itself, straight into the layer's output."""

    name = "sum"

    def workspace_shapes(self, M, N, K, topk, global_E, local_E, meta, activation):
        return WorkspaceShapes((M, topk, K), (0,), (M, K))

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *rest) -> None:
        slots = torch.empty(*topk_ids.shape, hidden_states.shape[1])
        super().apply(slots, hidden_states, w1, w2, topk_weights, topk_ids, *rest)
        on_input = rest[-1]
        TopKWeightAndReduceContiguous().apply(output, slots, topk_weights, topk_ids, on_input)
