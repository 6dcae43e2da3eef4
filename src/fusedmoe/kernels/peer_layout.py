"""What lies where in the memory that the ranks of a host share, and one rank's sight of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from fusedmoe.kernels.quantize import STORED
from fusedmoe.quantization.keys import QuantKey

ALIGNMENT = 256
PUSHED_ROWS = 4096
"""Tokens of a rank up to which buffers hold the row of each pick."""


@dataclass(frozen=True)
class PeerLayout:
    """What one rank's buffer holds, and where (``*_at``: bytes from its beginning).

    Room for ``rows`` tokens of each of ``world`` ranks: their rows [world, rows, hidden], in
    ``dtype`` or rounded as ``key`` says, with scales fp32 [world, rows, groups]; ids int32 and
    weights fp32 [world, rows, topk]; the experts' outputs for the ranks' tokens, or from the ranks'
    experts, [world, rows, hidden] in ``dtype``; three flags int32 per rank, and what each has sent.

    Where a forward has at most ``pushed_rows`` tokens of each rank, there is room behind its
    outputs for the row of each pick of this rank's tokens, [rows of the forward, topk, hidden].
    """

    world: int
    rows: int
    hidden: int
    topk: int
    dtype: torch.dtype
    key: QuantKey | None = None
    pushed_rows: int = PUSHED_ROWS

    def __post_init__(self) -> None:
        if min(self.world, self.rows, self.hidden, self.topk) < 1:
            raise ValueError(f"sizes must be positive: {self}")
        if self.world & (self.world - 1):
            raise ValueError(f"ranks must be a power of two, got {self.world}")
        if self.key is None:
            return
        row, group = self.key.group_shape
        own_scales = row == 1 and (group == -1 or (group > 0 and not group & (group - 1)))
        if self.key.static or self.key.dtype not in STORED or not own_scales:
            raise ValueError(
                "rows travel in fp8 or int8, with scales of their own for all columns or for each "
                f"power of two of them: not {self.key}"
            )

    @property
    def row_dtype(self) -> torch.dtype:
        """The dtype of a row as it travels."""
        return self.dtype if self.key is None else STORED[self.key.dtype]

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        slots = self.world * self.rows
        sizes = (
            slots * self.hidden * self.row_dtype.itemsize,
            slots * self.groups * 4,
            slots * self.topk * 4,
            slots * self.topk * 4,
            max(slots * self._row_bytes, self._picks_end(min(self.rows, self.pushed_rows))),
            *(self.world * 4 for _ in range(4)),
        )
        ends, end = [], 0
        for size in sizes:
            end += -(-size // ALIGNMENT) * ALIGNMENT
            ends.append(end)
        return tuple(ends)

    @property
    def _row_bytes(self) -> int:
        return self.hidden * self.dtype.itemsize

    def _picks_begin(self, rows: int) -> int:
        """Bytes behind ``outputs_at``."""
        return -(-self.world * rows * self._row_bytes // ALIGNMENT) * ALIGNMENT

    def _picks_end(self, rows: int) -> int:
        return self._picks_begin(rows) + rows * self.topk * self._row_bytes

    def picks_at(self, rows: int) -> int:
        """Where the rows of picks begin in a forward of ``rows`` slots per rank, which must not be
        more than ``pushed_rows``."""
        return self.outputs_at + self._picks_begin(rows)

    @property
    def groups(self) -> int:
        """Scales of a row."""
        if self.key is None:
            return 0
        columns = self.key.group_shape.col
        return 1 if columns == -1 else -(-self.hidden // columns)

    @property
    def rows_at(self) -> int:
        return 0

    @property
    def scales_at(self) -> int:
        return self._ends[0]

    @property
    def ids_at(self) -> int:
        return self._ends[1]

    @property
    def weights_at(self) -> int:
        return self._ends[2]

    @property
    def outputs_at(self) -> int:
        return self._ends[3]

    @property
    def dispatch_flags_at(self) -> int:
        return self._ends[4]

    @property
    def combine_flags_at(self) -> int:
        return self._ends[5]

    @property
    def row_flags_at(self) -> int:
        return self._ends[6]

    @property
    def kinds_at(self) -> int:
        """Int32 of each rank: whether it has pushed rows of picks, not a sum."""
        return self._ends[7]

    @property
    def nbytes(self) -> int:
        return self._ends[8]


class Received(NamedTuple):
    """What lies in a rank's buffer, R' = world * rows slots; those without ids hold anything.

    hidden_states [R', H], scales fp32 [R', groups] or None, topk_ids int32 and topk_weights fp32
    [R', K] (-1: not of this rank), outputs [R', H] to be written by the experts; picks [rows * K,
    H] for the rows of this rank's own tokens, None where they are too many.
    """

    hidden_states: torch.Tensor
    scales: torch.Tensor | None
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    outputs: torch.Tensor
    picks: torch.Tensor | None = None


@dataclass(frozen=True)
class PeerView:
    """One rank's sight of all buffers.

    ``bases`` int64 [world]: where they begin. ``own`` uint8: its own. ``state`` int32 [4] on the
    device: (1, 0, 0, 0) at first. ``error`` int32 [1], pinned: 1 + the rank that never came.
    """

    layout: PeerLayout
    rank: int
    bases: torch.Tensor
    own: torch.Tensor
    state: torch.Tensor
    error: torch.Tensor

    def received(self, rows: int) -> Received:
        """Views of the buffer for ``rows`` slots per rank (at most those of the layout)."""
        layout, own = self.layout, self.own
        slots = layout.world * rows

        def section(at: int, columns: int, dtype: torch.dtype, count: int = slots) -> torch.Tensor:
            size = count * columns * dtype.itemsize
            return own[at : at + size].view(dtype).view(count, columns)

        picks = None
        if rows <= layout.pushed_rows:
            at, count = layout.picks_at(rows), rows * layout.topk
            picks = section(at, layout.hidden, layout.dtype, count)

        return Received(
            section(layout.rows_at, layout.hidden, layout.row_dtype),
            section(layout.scales_at, layout.groups, torch.float32) if layout.groups else None,
            section(layout.ids_at, layout.topk, torch.int32),
            section(layout.weights_at, layout.topk, torch.float32),
            section(layout.outputs_at, layout.hidden, layout.dtype),
            picks,
        )


class LateRows(torch.Tensor):
    """Rows [world * rows, H] of which only this rank's own are sure to be here.

    Those of rank ``r`` are when flag ``r`` at ``row_flags_at`` shows the epoch. Its own [T, H] are
    in ``own``, contiguous, instead of among the others, if that is not None. Whoever does not know
    the class has to be given ``settled(x)``.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    here: PeerView
    timeout_us: int
    own: torch.Tensor | None

    @classmethod
    def over(
        cls, x: torch.Tensor, here: PeerView, timeout_us: int, own: torch.Tensor | None
    ) -> LateRows:
        """The memory of ``x``."""
        made = x.as_subclass(cls)
        made.here, made.timeout_us, made.own = here, timeout_us, own
        return made

    def plain(self) -> torch.Tensor:
        """As an ordinary tensor, for kernels that wait by themselves."""
        return self.as_subclass(torch.Tensor)


class PeerSums(torch.Tensor):
    """Experts' output [world * rows, H]: in row r * rows + t this rank's part for rank r's token t.

    Whoever does not know the class writes an ordinary tensor of this rank's memory. A sum that
    knows it calls ``kernels.peer_sums.send_sums`` instead, which sets ``sent`` and leaves this
    memory alone. With ``takes_picks`` a product may instead store its rows, not weighted, each at
    its own pick's place in ``received(rows).picks`` of the token's rank; it sets ``pushed``, too.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    here: PeerView
    rows: int
    takes_picks: bool
    sent: bool
    pushed: bool

    @classmethod
    def make(cls, here: PeerView, rows: int, takes_picks: bool = False) -> PeerSums:
        """Not yet written."""
        layout, device = here.layout, here.own.device
        shape = (layout.world * rows, layout.hidden)
        made = cls.over(torch.empty(shape, dtype=layout.dtype, device=device), here, rows)
        made.takes_picks = takes_picks
        return made

    @classmethod
    def over(cls, sums: torch.Tensor, here: PeerView, rows: int) -> PeerSums:
        """The memory of ``sums``."""
        made = sums.as_subclass(cls)
        made.here, made.rows = here, rows
        made.takes_picks = made.sent = made.pushed = False
        return made


def taker_of_picks(out: torch.Tensor) -> PeerSums | None:
    """``out``, where a product may push its rows."""
    return out if isinstance(out, PeerSums) and out.takes_picks else None
