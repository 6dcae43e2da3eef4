"""The records that pass between prepare, experts and finalize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch


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


def rows_per_expert(metadata: ExpertTokensMetadata | None, num_experts: int) -> torch.Tensor:
    """The counts int32 [num_experts] of batched rows; ValueError where there are none such."""
    counts = None if metadata is None else metadata.expert_num_tokens
    if counts is None or counts.shape != (num_experts,):
        raise ValueError(
            f"the batched format needs expert_num_tokens [{num_experts}], got "
            f"{None if counts is None else tuple(counts.shape)}"
        )
    return counts


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
