"""Weighting the K expert outputs of a token and adding them up: four ways, one contract."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class TopKWeightAndReduce(ABC):
    """What remains to be done to an experts implementation's output."""

    @abstractmethod
    def apply(
        self,
        output: torch.Tensor | None,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
    ) -> torch.Tensor:
        """Reduce to [T, H], in ``output`` if one is given.

        topk_weights fp32 [T, K] and topk_ids int [T, K]; slots with id -1 count as nothing, and
        their rows of ``fused_expert_output`` are never read into a sum.
        """

    def or_else(self, choice: TopKWeightAndReduce) -> TopKWeightAndReduce:
        """This one, unless it leaves the choice to the prepare/finalize: then ``choice``."""
        return self


def _sum_into(output: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    if output is None:
        return result
    if output.shape != result.shape:
        raise ValueError(f"output is {tuple(output.shape)}, the result {tuple(result.shape)}")
    return output.copy_(result)


class TopKWeightAndReduceDelegate(TopKWeightAndReduce):
    """The experts leave the choice to the prepare/finalize; it must put another in its place."""

    def or_else(self, choice: TopKWeightAndReduce) -> TopKWeightAndReduce:
        return choice

    def apply(
        self,
        output: torch.Tensor | None,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
    ) -> torch.Tensor:
        raise RuntimeError("the prepare/finalize must choose how to weight and reduce")


class TopKWeightAndReduceNoOP(TopKWeightAndReduce):
    """The experts already weighted and reduced: [T, H] passes through."""

    def apply(
        self,
        output: torch.Tensor | None,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
    ) -> torch.Tensor:
        if output is None or output is fused_expert_output:
            return fused_expert_output
        return _sum_into(output, fused_expert_output)


class TopKWeightAndReduceContiguous(TopKWeightAndReduce):
    """[T, K, H] or [T * K, H], slot-major: multiply by the weights and sum over K in fp32."""

    def apply(
        self,
        output: torch.Tensor | None,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
    ) -> torch.Tensor:
        from fusedmoe.kernels.mul_sum import moe_fused_mul_sum

        T, K = topk_ids.shape
        rows = fused_expert_output.view(T, K, fused_expert_output.shape[-1])
        weights = None if apply_router_weight_on_input else topk_weights
        return moe_fused_mul_sum(rows, weights, outputs=output, topk_ids=topk_ids)


class TopKWeightAndReduceNaiveBatched(TopKWeightAndReduce):
    """[e, max_tokens, H] of rank ``rank``: add each expert's rows back to their tokens.

    Row j of an expert belongs to the j-th (in token order) slot routed to it.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def apply(
        self,
        output: torch.Tensor | None,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
    ) -> torch.Tensor:
        e, max_tokens, H = fused_expert_output.shape
        T, K = topk_ids.shape
        ids = topk_ids.flatten().long() - self.rank * e
        experts = torch.arange(e, device=ids.device)
        chosen = ids[:, None] == experts  # [R, e]
        local = chosen.any(dim=1)
        position = (chosen.long().cumsum(0) - 1).gather(1, ids.clamp(0, e - 1)[:, None])[:, 0]
        row = (ids.clamp(0, e - 1) * max_tokens + position.clamp(0, max_tokens - 1)).clamp(min=0)
        rows = fused_expert_output.reshape(e * max_tokens, H)[row].float()
        if not apply_router_weight_on_input:
            rows = rows * topk_weights.flatten()[:, None].float()
        rows = torch.where(local[:, None], rows, 0.0)
        result = rows.view(T, K, H).sum(1).to(fused_expert_output.dtype)
        return _sum_into(output, result)
