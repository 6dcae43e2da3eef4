"""The reference for batched rows: [e, room, H] with a count per expert."""

from __future__ import annotations

from dataclasses import replace

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.experts.torch_reference import TorchExperts
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertTokensMetadata,
    FusedMoEActivationFormat,
    WorkspaceShapes,
)


class BatchedTorchExperts(TorchExperts):
    """As ``TorchExperts``; rows past an expert's count are not used, and come out zero."""

    name = "torch_batched"

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        return replace(
            super().capabilities(), activation_format=FusedMoEActivationFormat.BatchedExperts
        )

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
        return WorkspaceShapes((0,), (0,), (local_num_experts, M, K))

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
        counts = None if expert_tokens_meta is None else expert_tokens_meta.expert_num_tokens
        e, room, H = hidden_states.shape
        if counts is None or counts.shape != (e,) or w1.shape[0] != e:
            raise ValueError(
                f"the batched format needs expert_num_tokens [{w1.shape[0]}] and as many batches, "
                f"got {None if counts is None else tuple(counts.shape)} and {e}"
            )
        live = torch.arange(room, device=counts.device) < counts[:, None]
        experts = torch.arange(e, device=counts.device)[:, None]
        ids = torch.where(live, experts, -1).reshape(e * room, 1)
        super().apply(
            output.view(e * room, H),
            # What lies in the other rows may be anything, and all rows together make some scales.
            hidden_states.masked_fill(~live[..., None], 0).view(e * room, H),
            w1,
            w2,
            torch.ones(ids.shape, dtype=torch.float32, device=ids.device),
            ids,
            activation,
            e,
            None,
            a1q_scale,
            a2_scale,
            workspace13,
            workspace2,
            None,
            True,
        )
