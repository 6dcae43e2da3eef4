"""A rank that is missing becomes an exception in the thread that made the memory."""

from __future__ import annotations

import threading
import time

import pytest

from fusedmoe.distributed.peer_memory import PeerTimeoutError, Watchdog, raise_in_thread


def work_until(end: float) -> None:
    while time.monotonic() < end:
        time.sleep(0.01)


def test_the_error_comes_where_the_memory_was_made():
    """While that thread does something else: replays a graph, say."""
    words: list[int] = []

    def check() -> None:
        if words:
            raise PeerTimeoutError(f"rank {words[0]} of 4 did not answer")

    watchdog = Watchdog(check, raise_in_thread(threading.get_ident()))
    time.sleep(0.2)
    words.append(2)
    begin = time.monotonic()
    with pytest.raises(PeerTimeoutError, match="rank 2 of 4 did not answer"):
        work_until(begin + 5)
    assert time.monotonic() < begin + 2
    watchdog.stop()


def test_it_may_be_told_to_someone_else_once():
    told: list[PeerTimeoutError] = []

    def check() -> None:
        raise PeerTimeoutError("rank 0 of 2 did not answer")

    watchdog = Watchdog(check, told.append)
    time.sleep(0.3)
    watchdog.stop()
    assert [str(error) for error in told] == ["rank 0 of 2 did not answer"]
