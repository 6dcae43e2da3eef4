"""Each row once to each rank that needs it, by stores into the memory of the GPUs of one host.

As ``all_to_all``, but nothing is counted beforehand and the host waits for nothing: the launches
can be captured in a CUDA graph. The ranks' tokens stand in slots, ``rows`` for each rank, most of
which may be empty. The experts' sums stay where they are and are fetched by the tokens' ranks; or,
where tokens are many and the memory says so, go there as they are made (``kernels.peer_sums``), or
instead of them the rows that they would be made of (``kernels.peer_picks``). With more tokens yet,
the copy engines bring the rows, if the experts can begin with those that have arrived.

One launch sends and waits, one fetches; the async forms are two each, so that the wait comes later.
The launches themselves are the wire: what is to run beside them needs another stream. There is
room for one forward at a time, and no turns of two halves: they took longer on NVLink.
"""

from __future__ import annotations

from typing import Self

import torch

from fusedmoe.config import FusedMoEConfig, ParallelGroups
from fusedmoe.distributed.groups import token_ranks
from fusedmoe.distributed.peer_memory import PeerMemory
from fusedmoe.kernels import peer_all_to_all as wire
from fusedmoe.kernels.peer_layout import LateRows, PeerSums, PeerView
from fusedmoe.kernels.peer_picks import add_picks
from fusedmoe.kernels.peer_sums import send_rows
from fusedmoe.modular_kernel import (
    FinalizeWork,
    FusedMoEPrepareAndFinalizeModular,
    PrepareResult,
    PrepareWork,
)
from fusedmoe.modular_kernel.records import Hook, Receiver
from fusedmoe.prepare_finalize.dispatch import Dispatching
from fusedmoe.quantization.keys import QuantKey

_ALIGNED_BYTES = 16


class PeerPrepareAndFinalize(Dispatching, FusedMoEPrepareAndFinalizeModular):
    """[T of this rank, H] -> [ranks * rows, H] on every rank, ids -1 where a slot is not its own.

    ``rows`` is the largest of ``tokens_per_rank``. ``memory`` is ``ParallelGroups.peers``.
    """

    name = "peer"
    launches_the_wire = True
    by_expert = True
    carries_lora_ids = False
    carried = (*Dispatching.carried, "rows_may_be_late", "memory", "_may_send_sums")
    memory: PeerMemory
    _owners: torch.Tensor | None = None
    _ids: torch.Tensor | None = None
    _weights: torch.Tensor | None = None
    _expert_map: torch.Tensor | None = None
    _expert_output: torch.Tensor | None = None
    _rows: int = 0
    _copied: bool = False
    _may_send_sums: bool = True

    @classmethod
    def unmet_requirement(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> str | None:
        reason = super().unmet_requirement(moe, groups)
        if reason is not None:
            return reason
        assert groups is not None
        if groups.peers is None:
            return "needs a PeerMemory in ParallelGroups(peers=...)"
        axes = token_ranks(moe.moe_parallel_config, groups).axes
        if not groups.peers.spans(axes[0]):
            return (
                f"has buffers of {groups.peers.layout.world} ranks, not of the {axes[0].size()} "
                "whose tokens differ"
            )
        layout = groups.peers.layout
        if (layout.hidden, layout.topk) != (moe.hidden_dim, moe.experts_per_token):
            return (
                f"has buffers for rows of {layout.hidden} and {layout.topk} picks, the layer has "
                f"{moe.hidden_dim} and {moe.experts_per_token}"
            )
        if layout.dtype is not moe.in_dtype:
            return f"has buffers for {layout.dtype}, the layer takes {moe.in_dtype}"
        return None

    @classmethod
    def make(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> Self:
        assert groups is not None
        assert groups.peers is not None
        ranks = token_ranks(moe.moe_parallel_config, groups)
        room = groups.peers.layout.rows
        made = cls(
            moe.moe_parallel_config.is_sequence_parallel,
            ranks=ranks,
            max_num_tokens=min(room, moe.max_num_tokens or room),
        )
        made.memory = groups.peers
        made._may_send_sums = not moe.options.batch_invariant
        made.compares_sizes = moe.options.debug_checks
        return made

    def check_rows_as(self, key: QuantKey | None) -> None:
        layout = self.memory.layout
        if key != layout.key:
            raise ValueError(
                f"the experts take rows in {key or layout.dtype}, the buffers of the peer memory "
                f"hold {layout.key or layout.dtype}: give PeerLayout(..., key=...)"
            )

    def abandon(self) -> None:
        """The other ranks wait for this forward's sums, and get none."""
        self.memory.give_up()

    @property
    def _sends_sums(self) -> bool:
        """Whether parts of sums go to the tokens' ranks, or are fetched: on all ranks alike."""
        least = self.memory.send_sums_from
        sends = least is not None and self._rows >= least
        return self._may_send_sums and (sends or self._takes_picks)

    @property
    def _takes_picks(self) -> bool:
        """Whether ranks may send the rows of picks instead of a sum: on all ranks alike."""
        return self._may_send_sums and self.memory.pushes_rows(self._rows)

    @property
    def _view(self) -> PeerView:
        return self.memory.view

    def dispatch(self, work: PrepareWork) -> PrepareResult:
        """Raises PeerTimeoutError if a rank was missed before, ValueError as ``sizes_for``."""
        a1 = self._send(work, wait=True)
        if not self._copied:
            return self._received()
        own = _dense(a1) if self.memory.layout.key is None else None
        self.memory.copy_rows(own, a1.shape[0], self._rows)
        got, timeout_us = self._received(), self.memory.timeout_us
        rows = LateRows.over(got.hidden_states, self._view, timeout_us, own)
        return got._replace(hidden_states=rows)

    def start_dispatch(self, work: PrepareWork) -> tuple[Hook, Receiver]:
        """As ``prepare``; the hook launches the wait for the other ranks' rows."""
        self._send(work, wait=False)
        timeout_us = self.memory.timeout_us
        return lambda: wire.wait_for_dispatch(self._view, timeout_us=timeout_us), self._received

    def _send(self, work: PrepareWork, wait: bool) -> torch.Tensor:
        """The rows that are sent, weighted where asked."""
        self.memory.check()
        self.check_rows_as(work.key)
        x = work.weighted_input
        rows = max(max(self.sizes_for(x.shape[0])), 1)
        self._owners = self.hosts_of(work.num_experts, work.expert_map).owners
        self._ids, self._expert_map, self._rows = work.topk_ids, work.expert_map, rows
        self._weights = None if work.apply_router_weight_on_input else work.topk_weights
        self._copied = wait and self.rows_may_be_late and self.memory.copies_rows(rows)
        wire.dispatch(
            *(x, work.topk_ids, work.topk_weights, self._owners, self._view, rows),
            timeout_us=self.memory.timeout_us,
            wait=wait,
            copied=self._copied,
        )
        return x

    def _received(self) -> PrepareResult:
        got = self._view.received(self._rows)
        self._expert_output = got.outputs
        if self._sends_sums:
            self._expert_output = PeerSums.make(self._view, self._rows, self._takes_picks)
        return PrepareResult(got.hidden_states, got.scales, None, got.topk_ids, got.topk_weights)

    def expert_output(self) -> torch.Tensor | None:
        return self._expert_output

    def combine(self, work: FinalizeWork) -> None:
        pushed = self._leave_outputs(work)
        self._fetch(work.output, announce=True, pushed=pushed)

    def start_combine(self, work: FinalizeWork) -> tuple[Hook, Receiver]:
        """The others may fetch from here at once; the hook launches the wait for theirs."""
        pushed = self._leave_outputs(work)
        wire.announce_outputs(self._view, pushed)
        timeout_us = self.memory.timeout_us
        return (
            lambda: wire.wait_for_outputs(self._view, timeout_us=timeout_us),
            lambda: self._fetch(work.output, announce=False, pushed=pushed),
        )

    def _leave_outputs(self, work: FinalizeWork) -> bool:
        """Where the tokens' ranks look for them, unless the experts have written there: whether
        those are rows of picks."""
        routed = work.fused_expert_output
        if isinstance(routed, PeerSums) and routed.sent:
            return routed.pushed
        outputs = None if self._sends_sums else self._view.received(self._rows).outputs
        if outputs is not None and routed.data_ptr() == outputs.data_ptr():
            return False
        sums = self.weight_and_sum(work, outputs)
        if outputs is None:
            send_rows(self._view, self._rows, sums, work.topk_ids)
        return False

    def _fetch(self, output: torch.Tensor, announce: bool, pushed: bool) -> None:
        assert self._owners is not None
        assert self._ids is not None
        if self._copied:
            self.memory.join_copies()
        if self._takes_picks:
            add_picks(
                *(output, self._ids, self._weights, self._owners, self._view, self._rows),
                timeout_us=self.memory.timeout_us,
                announce=announce,
                pushed=pushed,
            )
            return
        wire.combine(
            *(output, self._ids, self._owners, self._view, self._rows),
            timeout_us=self.memory.timeout_us,
            announce=announce,
            sent=self._sends_sums,
        )


def _dense(rows: torch.Tensor) -> torch.Tensor:
    """Rows one after the other, where kernels read 16 bytes at once."""
    rows = rows.contiguous()
    return rows if rows.data_ptr() % _ALIGNED_BYTES == 0 else rows.clone()
