"""The reference for batched rows: [e, room, H] with a count per expert."""

from __future__ import annotations

from dataclasses import replace

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.experts.torch_reference import TorchExperts
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertsWork,
    FusedMoEActivationFormat,
    ProblemSize,
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

    def shapes(
        self, size: ProblemSize, num_experts: int, activation: MoEActivation
    ) -> WorkspaceShapes:
        return WorkspaceShapes((0,), (0,), (size.E, size.M, size.K))

    def run(self, work: ExpertsWork) -> None:
        counts, (e, room, H) = work.rows_per_expert, work.hidden_states.shape
        live = torch.arange(room, device=counts.device) < counts[:, None]
        experts = torch.arange(e, device=counts.device)[:, None]
        ids = torch.where(live, experts, -1).reshape(e * room, 1)
        # Unused rows may hold anything, and some scales are computed of all rows together.
        rows = work.hidden_states.masked_fill(~live[..., None], 0)
        super().run(
            work._replace(
                output=work.output.view(e * room, H),
                hidden_states=rows.view(e * room, H),
                topk_ids=ids,
                topk_weights=torch.ones(ids.shape, dtype=torch.float32, device=ids.device),
                global_num_experts=e,
                expert_map=None,
                expert_tokens_meta=None,
                apply_router_weight_on_input=True,
            )
        )
