"""What dispatch and combine between four H200s have to reach, by tokens per rank."""

from __future__ import annotations

from typing import Any

from fusedmoe.tuning.peer_tiles import peer_tiles

US = {1: 14.0, 16: 20.0, 128: 36.0}
OF_LIMIT = {1024: 0.75, 4096: 0.85}
SPEEDUPS = ((16, 2.5), (128, 1.3))
SPEEDUP_ABOVE = 1.1
"""Over NCCL's all-gather and reduce-scatter: up to so many tokens, and beyond."""


def reached(ranks: int, T: int, us: float, limit_us: float, nccl_us: float) -> bool | None:
    """Both, for ``T`` tokens per rank: a time or a share of the wire's limit, and NCCL's time.

    None for another number of ranks than four.
    """
    if ranks != 4:
        return None
    asked = next((factor for most, factor in SPEEDUPS if most >= T), SPEEDUP_ABOVE)
    if nccl_us < asked * us:
        return False
    return us <= US.get(T, us) and limit_us >= OF_LIMIT.get(T, 0.0) * us


def as_chosen(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` with the time of the tiles that the library takes: of a sweep older files have the
    fastest."""
    us = row["all_us"]["-".join(map(str, peer_tiles(row["T"], row["H"])))]
    return row | {"us": us, "speedup_over_nccl": row["nccl_us"] / us}
