"""The records that pass between prepare, experts and finalize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.keys import QuantKey
from fusedmoe.topk_weight_and_reduce import TopKWeightAndReduce


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
        """Counts that the host knows, also on ``device``."""
        host = torch.tensor(list(counts), dtype=torch.int32, device="cpu")
        return cls(host.to(device), host)


class PrepareWork(NamedTuple):
    """Tokens that are to reach the experts: the arguments of ``prepare``.

    a1 [T, H], topk_weights fp32 [T, K], topk_ids int [T, K] (-1: nothing), expert_map int32
    [num_experts] global -> local id or -1. The rows are quantized as ``quant_config`` says, unless
    that is left to the experts (``defer_input_quant``).
    """

    a1: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    num_experts: int
    expert_map: torch.Tensor | None
    apply_router_weight_on_input: bool
    quant_config: FusedMoEQuantConfig
    defer_input_quant: bool = False

    @property
    def weighted_input(self) -> torch.Tensor:
        """``a1``, times its weights in its dtype where asked; out of place: shared experts still
        read ``a1``. ValueError unless K is 1."""
        if not self.apply_router_weight_on_input:
            return self.a1
        if self.topk_ids.shape[1] != 1:
            raise ValueError(
                "apply_router_weight_on_input needs top-1 routing, got K = "
                f"{self.topk_ids.shape[1]}"
            )
        return self.a1 * self.topk_weights.to(self.a1.dtype)

    @property
    def key(self) -> QuantKey | None:
        """The format the rows are to be quantized to; None: they stay as they are."""
        return None if self.defer_input_quant else self.quant_config.a1.key

    def tokens(self, part: slice) -> PrepareWork:
        """The same for some of the tokens."""
        x, weights, ids = self.a1[part], self.topk_weights[part], self.topk_ids[part]
        return self._replace(a1=x, topk_weights=weights, topk_ids=ids)


class PrepareResult(NamedTuple):
    """What the experts receive. ``topk_ids``/``topk_weights`` None: those of the caller."""

    hidden_states: torch.Tensor
    scale: torch.Tensor | None = None
    expert_tokens_meta: ExpertTokensMetadata | None = None
    topk_ids: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None


class FinalizeWork(NamedTuple):
    """What the experts made of their rows: the arguments of ``finalize``.

    ``output`` [T, H] of this rank's tokens is written. ``fused_expert_output`` has the shape that
    ``weight_and_reduce_impl`` takes, for the weights and ids that ``prepare`` gave.
    """

    output: torch.Tensor
    fused_expert_output: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    apply_router_weight_on_input: bool
    weight_and_reduce_impl: TopKWeightAndReduce


class MonolithicPrepareResult(NamedTuple):
    """As ``PrepareResult``, for experts that route by themselves."""

    hidden_states: torch.Tensor
    scale: torch.Tensor | None
    router_logits: torch.Tensor


class ExpertsWork(NamedTuple):
    """The rows that the experts run at once, and all they need: the arguments of ``apply``.

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
        metadata, e = self.expert_tokens_meta, self.w1.shape[0]
        batches = self.hidden_states.shape[0]
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
