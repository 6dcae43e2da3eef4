"""The records that pass between prepare, experts and finalize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch

from fusedmoe.activation import MoEActivation


class FusedMoEActivationFormat(Enum):
    """How the rows entering the experts are laid out."""

    Standard = ("standard",)  # [T, H], with topk_ids [T, K] beside it
    BatchedExperts = ("batched_experts",)  # [e, max_tokens, H], with a row count per expert


@dataclass(frozen=True)
class ExpertTokensMetadata:
    """How many rows each local expert has: int32 [e], on the device and (if known) on the host."""

    expert_num_tokens: torch.Tensor | None
    expert_num_tokens_cpu: torch.Tensor | None = None

    @classmethod
    def make_from_list(cls, counts: Sequence[int], device: torch.device) -> ExpertTokensMetadata:
        host = torch.tensor(list(counts), dtype=torch.int32)
        return cls(host.to(device), host)


class PrepareResult(NamedTuple):
    """What the experts receive. ``topk_ids``/``topk_weights`` None: those of the caller.

    ``output``: where they write, if their output has its shape and dtype; None for anywhere.
    """

    hidden_states: torch.Tensor
    scale: torch.Tensor | None = None
    expert_tokens_meta: ExpertTokensMetadata | None = None
    topk_ids: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    output: torch.Tensor | None = None


class MonolithicPrepareResult(NamedTuple):
    """As ``PrepareResult``, for experts that route by themselves."""

    hidden_states: torch.Tensor
    scale: torch.Tensor | None
    router_logits: torch.Tensor


class ExpertsWork(NamedTuple):
    """The rows that the experts run at once, with what: the arguments of their ``apply``.

    Standard rows: hidden_states [T, H] (with ``a1q_scale`` where it is quantized), topk_weights
    fp32 [T, K], topk_ids int [T, K]; ``expert_map`` int [E], the local expert of each id or -1,
    None where ids are local. Batched rows: hidden_states [e, M, H], of which
    ``expert_tokens_meta`` counts those in use. Weights w1 [e, S * I, H] and w2 [e, H, I].
    ``output`` and the workspaces have the shapes that were asked for, with any old contents.
    """

    output: torch.Tensor
    hidden_states: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    activation: MoEActivation
    global_num_experts: int
    expert_map: torch.Tensor | None = None
    a1q_scale: torch.Tensor | None = None
    a2_scale: torch.Tensor | None = None
    workspace13: torch.Tensor | None = None
    workspace2: torch.Tensor | None = None
    expert_tokens_meta: ExpertTokensMetadata | None = None
    apply_router_weight_on_input: bool = False

    @property
    def output_weights(self) -> torch.Tensor | None:
        """What the experts' output is multiplied by, fp32 [T, K]; None where the input was."""
        return None if self.apply_router_weight_on_input else self.topk_weights

    @property
    def output_weights_or_ones(self) -> torch.Tensor:
        weights = self.topk_weights
        return torch.ones_like(weights) if self.apply_router_weight_on_input else weights

    @property
    def rows_per_expert(self) -> torch.Tensor:
        """The counts int32 [e] of batched rows; ValueError where these do not fit the weights."""
        metadata, e, batches = (
            self.expert_tokens_meta,
            self.w1.shape[0],
            self.hidden_states.shape[0],
        )
        counts = None if metadata is None else metadata.expert_num_tokens
        if counts is None or counts.shape != (e,) or batches != e:
            raise ValueError(
                f"the batched format needs expert_num_tokens [{e}], got "
                f"{None if counts is None else tuple(counts.shape)}, and as many batches, got "
                f"{batches}"
            )
        return counts


def scratch(workspace: torch.Tensor | None, rows: int, columns: int) -> torch.Tensor:
    """The beginning of a workspace, which is contiguous, as a matrix; ValueError where it has no
    room for one."""
    assert workspace is not None
    if rows * columns > workspace.numel():
        raise ValueError(f"a workspace of {workspace.numel()} holds no {rows} rows of {columns}")
    return workspace.as_strided((rows, columns), (columns, 1))  # where slicing takes three steps


class WorkspaceShapes(NamedTuple):
    """Shapes of the two scratch tensors and of the experts' output; (0,) where none is needed."""

    workspace13: tuple[int, ...]
    workspace2: tuple[int, ...]
    output: tuple[int, ...]


class ProblemSize(NamedTuple):
    """E local experts, M rows (tokens, or tokens per expert when batched), N = S * I, K = H."""

    E: int
    M: int
    N: int
    K: int
    topk: int


Receiver = Callable[[], Any]
Hook = Callable[[], None]
