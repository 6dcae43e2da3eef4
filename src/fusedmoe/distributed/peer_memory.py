"""Buffers that every rank of a host can address, and somebody who notices when a rank is gone."""

from __future__ import annotations

import ctypes
import socket
import threading
from collections.abc import Callable
from dataclasses import fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fusedmoe.config import ParallelGroups
from fusedmoe.distributed.agreement import check_agreement, failures_told
from fusedmoe.distributed.groups import communication_device
from fusedmoe.kernels.peer_all_to_all import copy_rows
from fusedmoe.kernels.peer_layout import PeerLayout, PeerView

_MICROSECONDS = 1_000_000
_LONGEST_S = 2_000.0  # its microseconds fit an int32
_WATCH_INTERVAL = 0.05
SEND_SUMS_FROM = 256
"""Tokens. On four H200s fetching is faster at 8, either at 128, and sending from 256 on."""

PUSH_ROWS_FROM = 256
"""Tokens, from which on experts that can send the row of each pick as their product makes it."""

COPY_ROWS_FROM = 4096
"""Tokens, from which on the copy engines bring rows to experts that begin before all are there.
They take long to begin: on four H200s rows that are sent are faster at 1024, slower at 8192."""
MOST_WASTED = 0.25
"""They bring all rows to all ranks: so many, at most, to ranks without an expert for them."""

OnError = Callable[["PeerTimeoutError"], None]


class PeerTimeoutError(RuntimeError):
    """A rank did not send its tokens, or its sums, in time. What was computed since is void."""

    def __init__(self, message: str = "a rank did not answer in time") -> None:
        super().__init__(message)


class PeerMemory:
    """A buffer per rank of ``group``, as ``layout`` says, all of them mapped into every process.

    The ranks are GPUs of one host with access to each other's memory, one process each, the current
    device being theirs. All ranks construct it at the same time with the same layout, and close it
    at the same time. One object serves all layers of a model, one after the other on one stream.
    ``send_sums_from``: with so many tokens on some rank, experts' sums go to their tokens' ranks as
    they are made, instead of being fetched from where they were left; None: never.
    ``push_rows_from``: with so many, up to the layout's ``pushed_rows``, experts may send the row
    of each pick as their second product makes it, instead of a sum of those; None: never.
    ``copy_rows_from``: with so many, the copy engines bring all rows to all ranks, if the experts
    can begin with those that are there; None: never.

    A launch waits at most ``timeout_s`` seconds for another rank, which the first time may have
    kernels to compile. When one is missing, the first launch to notice ends, later ones do not wait
    at all, and a thread calls ``on_error``; the default raises ``PeerTimeoutError`` in the thread
    that made this object, at its next Python instruction. That also happens while a captured graph
    is replayed.

    Raises RanksDisagreeError where ranks disagree about the layout, are on several hosts, or
    another rank has no room for its buffer.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        layout: PeerLayout,
        *,
        send_sums_from: int | None = SEND_SUMS_FROM,
        push_rows_from: int | None = PUSH_ROWS_FROM,
        copy_rows_from: int | None = COPY_ROWS_FROM,
        timeout_s: float = 4.0,
        on_error: OnError | None = None,
    ) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        ranks, what = ParallelGroups(dp=group), "the peer memory"
        with failures_told(ranks, what):
            if not 0 < timeout_s <= _LONGEST_S:
                raise ValueError(f"timeout_s must lie in (0, {_LONGEST_S:.0f}], got {timeout_s}")
            if layout.world != group.size():
                raise ValueError(
                    f"the layout is for {layout.world} ranks, the group has {group.size()}"
                )
        facts = {one.name: str(getattr(layout, one.name)) for one in fields(layout)}
        facts["host"] = socket.gethostname()
        facts["send_sums_from"] = str(send_sums_from)
        facts["push_rows_from"] = str(push_rows_from)
        facts["copy_rows_from"] = str(copy_rows_from)
        check_agreement(facts, ranks, what)
        with failures_told(ranks, what):
            device = torch.device("cuda", torch.cuda.current_device())
            own = symmetric_memory.empty(layout.nbytes, dtype=torch.uint8, device=device)
        check_agreement({}, ranks, what)
        self._handle: Any = symmetric_memory.rendezvous(own, group)
        bases = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=device)
        self.group, self._device = group, device
        self.send_sums_from = send_sums_from
        self.push_rows_from = push_rows_from
        self.copy_rows_from = copy_rows_from
        sizes, dtype = (layout.nbytes,), torch.uint8
        self.buffers = [self._handle.get_buffer(one, sizes, dtype) for one in range(layout.world)]
        self._stream = torch.cuda.Stream(device)
        self.timeout_us = max(1, int(timeout_s * _MICROSECONDS))
        self._gave_up = False
        self._view: PeerView | None = first_view(layout, group.rank(), bases, own)
        torch.cuda.synchronize(device)
        dist.barrier(group)  # nobody may raise a flag here before it has been cleared
        told = on_error or raise_in_thread(threading.get_ident())
        self._watchdog = Watchdog(self._check_peers, told)

    @property
    def view(self) -> PeerView:
        if self._view is None:
            raise ValueError("this peer memory is closed")
        return self._view

    @property
    def layout(self) -> PeerLayout:
        return self.view.layout

    def spans(self, group: dist.ProcessGroup) -> bool:
        """Whether its buffers are those of the ranks of ``group``, in their order."""
        ranks = dist.get_process_group_ranks
        return group is self.group or ranks(group) == ranks(self.group)

    def pushes_rows(self, rows: int) -> bool:
        """Whether experts may send rows of picks where the fullest rank has so many tokens."""
        least = self.push_rows_from
        return least is not None and least <= rows <= self.layout.pushed_rows

    def copies_rows(self, rows: int) -> bool:
        """Whether the copy engines bring the rows where the fullest rank has so many tokens.

        Not those in 8 bits between two ranks: they are soon sent, while own rows first means that
        weights are read twice (8192 tokens of DeepSeek-V3: 5993 us, sent 5761).
        """
        if self.copy_rows_from is None or rows < self.copy_rows_from:
            return False
        if self.layout.world == 2 and self.layout.key is not None:
            return False
        return (1 - 1 / self.layout.world) ** self.layout.topk <= MOST_WASTED

    def copy_rows(self, x: torch.Tensor | None, num_tokens: int, rows: int) -> None:
        """``copy_rows`` of the kernels to all ranks, beside what follows until ``join_copies``.

        To one rank after the other, each rank beginning with the next one, so that nobody gets rows
        of two: three at once took half as long again on four H200s.
        """
        view = self.view
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for step in range(1, view.layout.world):
                to = (view.rank + step) % view.layout.world
                copy_rows(view, self.buffers[to], x, num_tokens, rows)

    def join_copies(self) -> None:
        """What follows on the current stream waits for the copies."""
        torch.cuda.current_stream().wait_stream(self._stream)

    def give_up(self) -> None:
        """A forward has ended between its dispatch and its combine: what follows would mix it up
        with the next one."""
        self._gave_up = True

    def check(self) -> None:
        """Raise PeerTimeoutError if a rank has been missed, RuntimeError after ``give_up``."""
        if self._gave_up:
            raise RuntimeError(
                "a forward failed between its dispatch and its combine: the ranks have to close "
                "this memory and make another"
            )
        self._check_peers()

    def _check_peers(self) -> None:
        """Costs no synchronisation."""
        missing = int(self.view.error[0])
        if missing:
            raise PeerTimeoutError(
                f"rank {missing - 1} of {self.layout.world} did not answer rank {self.view.rank} "
                f"within {self.timeout_us / _MICROSECONDS:.1f} s"
            )

    def close(self) -> None:
        """Give the memory back, once all ranks have finished; the object is of no use then.

        A rank that was missed is waited for no longer than ``timeout_s``: what other ranks have
        mapped of this memory is theirs until they close it, too.
        """
        self._watchdog.stop()
        if self._handle is None:
            return
        self._meet()
        self._handle = None
        self.buffers = []
        self._view = None

    def _meet(self) -> None:
        torch.cuda.synchronize(self._device)
        device, missed = communication_device(self.group), bool(self.view.error[0])
        if missed and device.type != "cpu":
            return  # a GPU would wait for that rank
        most = timedelta(microseconds=self.timeout_us)
        try:
            come = dist.all_reduce(torch.zeros(1, device=device), group=self.group, async_op=True)
            assert come is not None
            come.wait(most) if missed else come.wait()
        except RuntimeError:
            if not missed:
                raise
        torch.cuda.synchronize(self._device)


def first_view(layout: PeerLayout, rank: int, bases: torch.Tensor, own: torch.Tensor) -> PeerView:
    """The view before anything was sent: clears the flags of this rank's buffer, ``own`` uint8
    [nbytes].

    ``bases`` int64 [world]: where every rank's begins.
    """
    own[layout.dispatch_flags_at :].zero_()
    state = torch.tensor([1, 0, 0, 0], dtype=torch.int32, device=own.device)
    error = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=own.is_cuda)
    return PeerView(layout, rank, bases, own, state, error)


class Watchdog:
    """A thread that calls ``check`` over and over; what that raises goes to ``on_error``, once."""

    def __init__(self, check: Callable[[], None], on_error: OnError) -> None:
        self._check = check
        self._on_error = on_error
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fusedmoe-peers", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(_WATCH_INTERVAL):
            try:
                self._check()
            except PeerTimeoutError as error:
                self._on_error(error)
                return

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()


def raise_in_thread(thread_id: int) -> OnError:
    """An ``on_error`` that raises the error in another thread of this process."""

    def on_error(error: PeerTimeoutError) -> None:
        # Another thread can only be given a class to raise: one that brings its message along.
        kind = type(
            "PeerTimeoutError",
            (PeerTimeoutError,),
            {"__init__": lambda self: PeerTimeoutError.__init__(self, str(error))},
        )
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread_id), ctypes.py_object(kind)
        )

    return on_error
