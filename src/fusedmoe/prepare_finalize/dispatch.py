"""What every prepare/finalize that sends tokens to other ranks shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self, cast

import torch

from fusedmoe.config import FusedMoEConfig, ParallelGroups
from fusedmoe.distributed.collectives import (
    all_gather_rows,
    captures,
    gather_counts,
    gather_vectors,
    may_ask_ranks,
)
from fusedmoe.distributed.groups import TokenRanks, check_sizes, missing_groups, token_ranks
from fusedmoe.modular_kernel import (
    FinalizeWork,
    FusedMoEPrepareAndFinalize,
    FusedMoEPrepareAndFinalizeModular,
    PrepareResult,
    PrepareWork,
)
from fusedmoe.modular_kernel.forward import finish
from fusedmoe.modular_kernel.records import Hook, Receiver
from fusedmoe.prepare_finalize.luggage import CarriesLuggage, QuantizeInput, quantize_input
from fusedmoe.quantization.config import FusedMoEQuantConfig


class Hosts(NamedTuple):
    """Which ranks have which expert, and the map from which that was learnt.

    ``table`` bool [ranks, num_experts]; ``owners`` int32 [num_experts]: the first of them, or -1.
    """

    expert_map: torch.Tensor
    table: torch.Tensor
    owners: torch.Tensor


class Dispatching(CarriesLuggage, FusedMoEPrepareAndFinalize):
    """Tokens of ``ranks`` meet; ``begin`` gives the object of one forward.

    ``max_num_tokens``: no rank brings more. ``quantize`` is applied to rows before they are sent.
    ``compares_sizes``: ask the ranks whether all were given the same ``tokens_per_rank``.
    """

    by_expert: ClassVar[bool] = False
    """Whether rows go to the ranks of their experts alone: of whole experts, in one group."""
    compares_sizes: bool = False
    # The attributes that the object of a forward takes over. Listed, because torch.compile traces
    # neither copy.copy nor an instance's __dict__ in torch 2.11.
    carried: ClassVar[tuple[str, ...]] = (
        "is_sequence_parallel",
        "ranks",
        "_num_dispatchers",
        "max_num_tokens",
        "quantize",
        "compares_sizes",
        "_learnt",
        "lora_context",
    )

    def __init__(
        self,
        is_sequence_parallel: bool = False,
        num_dispatchers: int = 1,
        *,
        ranks: TokenRanks | None = None,
        max_num_tokens: int | None = None,
        quantize: QuantizeInput = quantize_input,
    ) -> None:
        self.is_sequence_parallel = is_sequence_parallel
        self.ranks = TokenRanks(()) if ranks is None else ranks
        if ranks is not None and num_dispatchers not in (1, ranks.size):
            raise ValueError(f"num_dispatchers {num_dispatchers}, but {ranks.size} ranks are given")
        self._num_dispatchers = num_dispatchers if ranks is None else ranks.size
        self.max_num_tokens = max_num_tokens
        self.quantize = quantize
        self._given_sizes: Sequence[int] | None = None
        self._learnt: list[Hosts] = []

    @classmethod
    def unmet_requirement(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> str | None:
        parallel = moe.moe_parallel_config
        if groups is None:
            return "moves tokens, but no process groups are given"
        if parallel.dp_size * parallel.pcp_size * parallel.sp_size == 1:
            return "moves tokens, but all ranks hold the same ones"
        reason = missing_groups(parallel, groups)
        if reason is not None or not cls.by_expert:
            return reason
        if not parallel.use_ep:
            return "sends tokens to whole experts, but each expert is cut over all ranks"
        if len(token_ranks(parallel, groups).axes) > 1:
            return "needs one process group of all ranks whose tokens differ"
        return None

    @classmethod
    def make(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> Self:
        parallel = moe.moe_parallel_config
        ranks = token_ranks(parallel, groups or ParallelGroups())
        made = cls(parallel.is_sequence_parallel, ranks=ranks, max_num_tokens=moe.max_num_tokens)
        made.compares_sizes = moe.options.debug_checks
        return made

    def begin(self, tokens_per_rank: Sequence[int] | None = None) -> Self:
        one = object.__new__(type(self))
        for name in self.carried:
            setattr(one, name, getattr(self, name))
        one._given_sizes = tokens_per_rank
        return one

    def num_dispatchers(self) -> int:
        return self._num_dispatchers

    def supports_async(self) -> bool:
        return True

    def sizes_for(self, num_tokens: int) -> list[int]:
        """Tokens of every rank: those given to ``begin``, else agreed with the other ranks.

        Raises ValueError where one has more than there is room for, on every rank and before
        anything is sent.
        """
        if self._given_sizes is not None:
            sizes = self.given_sizes(self._given_sizes, num_tokens)
        elif self.ranks.size == 1:
            sizes = [num_tokens]
        elif self.compares_sizes and may_ask_ranks():
            sizes = self._compared_sizes([], num_tokens)
        elif captures():
            raise ValueError("a CUDA graph cannot ask other ranks: give tokens_per_rank")
        else:
            sizes = gather_counts(num_tokens, self.ranks)
        self.check_room(sizes)
        return sizes

    def given_sizes(self, sizes: Sequence[int], num_tokens: int) -> list[int]:
        """``sizes``, checked against this rank's tokens, and if asked for against all ranks'."""
        if self.compares_sizes and may_ask_ranks():
            self._compared_sizes(sizes, num_tokens)
        return check_sizes(sizes, self.ranks, num_tokens)

    def _compared_sizes(self, sizes: Sequence[int], num_tokens: int) -> list[int]:
        """Tokens of every rank, as it says itself; ``sizes`` is empty on a rank that was given
        none. Raises ValueError, on all of them, where one was given others."""
        known = [int(size) for size in sizes][: self.ranks.size]
        padding = [-1] * (self.ranks.size - len(known))
        told = gather_vectors([num_tokens, *known, *padding], self.ranks)
        brought = [tokens for tokens, *_ in told]
        for rank, (_, *theirs) in enumerate(told):
            if theirs != brought and max(theirs) >= 0:
                raise ValueError(
                    f"ranks bring {brought} tokens, but tokens_per_rank of rank {rank} is {theirs}"
                )
        return brought

    def hosts_of(self, num_experts: int, expert_map: torch.Tensor | None) -> Hosts:
        """Asks the other ranks the first time, and again where the map is another tensor.

        Raises ValueError if it would have to while a CUDA graph is captured: what is learnt then
        is not there before the graph has been replayed, and other graphs would read it.
        """
        expert_map = self.checked_map(num_experts, expert_map)
        if not self._learnt or self._learnt[0].expert_map is not expert_map:
            if captures():
                raise ValueError(
                    f"a CUDA graph cannot ask other ranks which of {num_experts} experts they "
                    "have: run the layer once before"
                )
            mine = (expert_map >= 0)[None]
            table = all_gather_rows(mine, [1] * self.ranks.size, self.ranks)()
            first = table.int().argmax(dim=0).int()
            self._learnt[:] = [Hosts(expert_map, table, first.where(table.any(dim=0), -1))]
        return self._learnt[0]

    def checked_map(self, num_experts: int, expert_map: torch.Tensor | None) -> torch.Tensor:
        """``expert_map``; raises ValueError where there is none, or one of another length."""
        if expert_map is None or expert_map.shape[0] != num_experts:
            raise ValueError(
                f"{self.name} needs the expert map of {num_experts} experts, got "
                f"{None if expert_map is None else tuple(expert_map.shape)}"
            )
        return expert_map

    def check_room(self, sizes: Sequence[int]) -> None:
        """Raise ValueError, on every rank alike, where one has more tokens than there is room."""
        if self.max_num_tokens is not None and max(sizes) > self.max_num_tokens:
            raise ValueError(
                f"ranks bring {list(sizes)} tokens, but max_num_tokens is {self.max_num_tokens}"
            )

    def quantized(
        self, a1: torch.Tensor, quant_config: FusedMoEQuantConfig, deferred: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return (a1, None) if deferred else self.quantize(a1, quant_config)

    def abandon(self) -> None:
        self.restore_lora_ids()


class DispatchingModular(Dispatching, FusedMoEPrepareAndFinalizeModular):
    """Says how to start, by the async forms; to do it at once is to start and to wait.

    Experts' output is weighted and summed here, per row that arrived, and ``send_back`` starts to
    send that to the ranks of the tokens.
    """

    def concurrent_forwards(self) -> int:
        """Two, but one with a LoRA context: that has room for the ids of one."""
        return 2 if self.lora_context is None else 1

    def dispatch(self, work: PrepareWork) -> PrepareResult:
        return cast(PrepareResult, finish(self.start_dispatch(work)))

    def combine(self, work: FinalizeWork) -> None:
        finish(self.start_combine(work))

    def start_combine(self, work: FinalizeWork) -> Receiver | tuple[Hook, Receiver]:
        sums = self.weight_and_sum(work, None)
        self.restore_lora_ids()
        return self.send_back(sums, work.output)

    def send_back(self, sums: torch.Tensor, output: torch.Tensor) -> Receiver:
        """Start to send [rows, H] to where they came from; ``output`` is valid once received."""
        raise NotImplementedError
