"""Rows in the L2 that nobody will read again, and that therefore need not go to memory.

discard_rows  a device function for the kernel that reads them last.

Rows are lines of 128 bytes from end to end. What stood there is undefined until it is written anew.
"""

import torch
import triton
import triton.language as tl

LINE_NUMBERS = 64  # numbers of 16 bits in a line of the L2
# Fewer bytes cost less to write back than to discard; of more, most are written back by then.
LEAST_BYTES, MOST_BYTES = 6 << 20, 128 << 20


def may_discard(rows: torch.Tensor, slots: int) -> bool:
    """Whether it is worth it for ``slots`` of these rows [.., H], and each is whole lines."""
    whole = rows.shape[1] % LINE_NUMBERS == 0 and rows.data_ptr() % 128 == 0
    size = slots * rows.shape[1] * 2
    return rows.element_size() == 2 and whole and LEAST_BYTES <= size <= MOST_BYTES


@triton.jit
def discard_rows(ptr, row, live, column, WIDTH, COLUMNS: tl.constexpr):
    """COLUMNS 16-bit numbers from ``column`` on, a multiple of 64, of the live ones of rows [n],
    WIDTH apart. Every thread of the program has to be done with them."""
    LINE: tl.constexpr = 64
    column += tl.arange(0, COLUMNS // LINE)[None, :] * LINE
    wanted = live[:, None] & (column < WIDTH)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p discard.global.L2 [$1], 128; mov.b32 $0, 0; }",
        "=r,l,r",
        [(ptr + row[:, None] * WIDTH + column).to(tl.int64), wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
