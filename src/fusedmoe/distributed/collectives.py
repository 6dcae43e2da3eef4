"""Rows of tensors between ranks: gathered, summed back, exchanged. Uneven counts, any dtype.

Everything moves as bytes, so that a backend need not know the dtype; what is added up is added
here, in fp32 and in the order of the ranks, so that the same input gives the same bits on every
backend. Counts are host integers: nothing here waits for the device but ``gather_vectors``.

Each function starts its communication and returns a ``Pending``; calling that gives the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fusedmoe.distributed.groups import TokenRanks, communication_device
from fusedmoe.kernels.mul_sum import moe_fused_mul_sum

Pending = Callable[[], torch.Tensor]

# One function, renamed between the versions of torch that are supported.
_all_gather: Callable[..., Any] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)


def gather_vectors(values: Sequence[int], ranks: TokenRanks) -> list[list[int]]:
    """Every rank's ``values``, equally many. Waits for the ranks and the device: no CUDA graph."""
    found = torch.tensor([list(values)], dtype=torch.int64, device="cpu")
    for axis in reversed(ranks.axes):
        mine = found.to(communication_device(axis))
        everyones = mine.new_empty(axis.size() * mine.shape[0], mine.shape[1])
        _all_gather(everyones, mine, group=axis)
        found = everyones.cpu()
    return found.tolist()


def gather_counts(count: int, ranks: TokenRanks) -> list[int]:
    """Every rank's ``count``; as ``gather_vectors``."""
    return [values[0] for values in gather_vectors([count], ranks)]


def captures() -> bool:
    """Whether launches are recorded as a CUDA graph; a compiler could not ask."""
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return False
    return torch.cuda.is_current_stream_capturing()


def may_ask_ranks() -> bool:
    """Whether ranks can tell each other numbers now, which waits for the device: not in compiled
    code, and not while a CUDA graph is captured."""
    return not torch.compiler.is_compiling() and not captures()


def all_gather_rows(x: torch.Tensor, sizes: Sequence[int], ranks: TokenRanks) -> Pending:
    """x [sizes[rank], ...] of every rank, one after the other: [sum(sizes), ...]."""
    if x.shape[0] != sizes[ranks.rank] or len(sizes) != ranks.size:
        raise ValueError(
            f"rank {ranks.rank} of {ranks.size} has {x.shape[0]} rows, sizes are {list(sizes)}"
        )
    pending: Pending = lambda: x  # noqa: E731
    blocks = list(sizes)
    for axis, first in _inner_first(ranks):
        width = axis.size()
        # The blocks of this axis's ranks stand side by side, ``first`` being the first of them.
        mine = blocks[first : first + width]
        pending = _gather_over(pending(), mine, axis)
        blocks = [sum(blocks[i : i + width]) for i in range(0, len(blocks), width)]
    return pending


def _inner_first(ranks: TokenRanks) -> list[tuple[dist.ProcessGroup, int]]:
    """Axes from the innermost on, and where the ranks of each begin among those of its level."""
    found, rank = [], ranks.rank
    for axis in reversed(ranks.axes):
        found.append((axis, rank // axis.size() * axis.size()))
        rank //= axis.size()
    return found


def _gather_over(x: torch.Tensor, sizes: list[int], group: dist.ProcessGroup) -> Pending:
    rows, largest = as_bytes(x), max(sizes)
    shape, dtype, width = x.shape[1:], x.dtype, rows.shape[1]
    if largest * width == 0:
        return lambda: x.new_empty(sum(sizes), *shape)
    if min(sizes) == largest:
        whole = rows.new_empty(sum(sizes), width)
        work = _all_gather(whole, rows, group=group, async_op=_may_overlap())
        return _received(work, rows, lambda: _from_bytes(whole, dtype, shape))
    if rows.is_cuda:
        # NCCL sends each rank's rows as a broadcast, at their own size.
        whole = rows.new_empty(sum(sizes), width)
        work = dist.all_gather(list(whole.split(sizes)), rows, group=group, async_op=True)
        return _received(work, rows, lambda: _from_bytes(whole, dtype, shape))
    padded = rows.new_zeros(largest, width)
    padded[: rows.shape[0]] = rows
    blocks = rows.new_empty(len(sizes) * largest, width)
    work = _all_gather(blocks, padded, group=group, async_op=_may_overlap())

    def valid() -> torch.Tensor:
        parts = [block[:size] for block, size in zip(blocks.split(largest), sizes, strict=True)]
        return _from_bytes(torch.cat(parts), dtype, shape)

    return _received(work, padded, valid)


def reduce_scatter_rows(x: torch.Tensor, sizes: Sequence[int], ranks: TokenRanks) -> Pending:
    """The sum over ranks of x [sum(sizes), ...], each rank keeping its own rows [sizes[rank], ...].

    Each rank sends the others their rows once, in x's dtype; sums are fp32 (fp64 for fp64), rank
    by rank, rounded once per axis.
    """
    if x.shape[0] != sum(sizes) or len(sizes) != ranks.size:
        raise ValueError(f"{x.shape[0]} rows to reduce and scatter over {list(sizes)}")
    pending: Pending = lambda: x  # noqa: E731
    blocks = list(sizes)
    for axis in ranks.axes:
        per_rank = len(blocks) // axis.size()
        sums = [sum(blocks[i : i + per_rank]) for i in range(0, len(blocks), per_rank)]
        pending = _reduce_over(pending(), sums, axis)
        blocks = blocks[axis.rank() * per_rank : (axis.rank() + 1) * per_rank]
    return pending


def _reduce_over(x: torch.Tensor, sizes: list[int], group: dist.ProcessGroup) -> Pending:
    mine = sizes[group.rank()]
    received = exchange_rows(x, sizes, [mine] * len(sizes), group)
    return lambda: sum_in_order(received().view(len(sizes), mine, *x.shape[1:]))


def sum_in_order(parts: torch.Tensor) -> torch.Tensor:
    """parts [n, ...] added up one after the other in fp32 (fp64 stays), in the dtype of parts."""
    if _in_one_launch(parts):
        return moe_fused_mul_sum(parts.transpose(0, 1), None)
    total = parts[0].to(sum_dtype(parts.dtype), copy=True)
    for part in parts[1:]:
        total += part
    return total.to(parts.dtype)


def _in_one_launch(parts: torch.Tensor) -> bool:
    """Whether rows [n, T, H] can be added up on a GPU by the sum over picks, with the same bits.

    That counts elements in 32 bits from one part to the next, and is no operation of a compiler's.
    """
    known = parts.dtype in (torch.bfloat16, torch.float16, torch.float32)
    small = parts.dim() == 3 and parts.numel() < 1 << 31
    return parts.is_cuda and known and small and not torch.compiler.is_compiling()


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What rows of ``dtype`` are added up in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def exchange_rows(
    x: torch.Tensor,
    send_sizes: Sequence[int],
    receive_sizes: Sequence[int],
    group: dist.ProcessGroup,
) -> Pending:
    """The first send_sizes[0] rows of x to rank 0 of ``group``, the next to rank 1, ...

    Returns what the ranks sent here, in their order: [sum(receive_sizes), ...].
    """
    if x.shape[0] != sum(send_sizes):
        raise ValueError(f"{x.shape[0]} rows to send, but {list(send_sizes)} are promised")
    rows = as_bytes(x)
    received = rows.new_empty(sum(receive_sizes), rows.shape[1])
    if rows.shape[1] == 0:
        return lambda: x.new_empty(sum(receive_sizes), *x.shape[1:])
    sizes = list(receive_sizes), list(send_sizes)
    work = dist.all_to_all_single(received, rows, *sizes, group=group, async_op=_may_overlap())
    return _received(work, rows, lambda: _from_bytes(received, x.dtype, x.shape[1:]))


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """x [n, ...] as contiguous bytes [n, bytes of a row]; a view where x is contiguous."""
    if x.numel() == 0:
        width = x.dtype.itemsize
        for size in x.shape[1:]:
            width *= size
        return x.new_empty(x.shape[0], width, dtype=torch.uint8)
    return x.detach().reshape(x.shape[0], -1).contiguous().view(torch.uint8)


def _from_bytes(rows: torch.Tensor, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return rows.view(dtype).view(rows.shape[0], *shape)


def _may_overlap() -> bool:
    """A compiler orders communication itself; it takes no other form of it."""
    return not torch.compiler.is_compiling()


def _received(work: Any, sent: torch.Tensor, result: Callable[[], torch.Tensor]) -> Pending:
    """Wait for ``work`` (the stream does, on a GPU), once; ``sent`` lives until then."""
    # A compiled call is done when it returns; in torch 2.11 it returns something all the same.
    state: list[Any] = [work if _may_overlap() else None, sent]

    def receive() -> torch.Tensor:
        if state:
            if state[0] is not None:
                state[0].wait()
            state.clear()
        return result()

    return receive


def pack_rows(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors [n, ...] side by side as bytes [n, total], each at a multiple of 16 bytes.

    The way back is ``unpack_rows``. One collective instead of several.
    """
    parts = []
    for tensor in tensors:
        rows = as_bytes(tensor)
        padding = -rows.shape[1] % 16
        parts.append(torch.nn.functional.pad(rows, (0, padding)) if padding else rows)
    return torch.cat(parts, dim=1)


def unpack_rows(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Contiguous tensors of the dtypes and row shapes of ``like`` out of packed rows."""
    found, start = [], 0
    for tensor in like:
        width = as_bytes(tensor[:0]).shape[1]
        rows = packed[:, start : start + width].contiguous()
        found.append(_from_bytes(rows, tensor.dtype, tensor.shape[1:]))
        start += width + -width % 16
    return found
