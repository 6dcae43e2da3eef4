"""Tiles of words, and of the numbers in them, put beside each other in registers."""

import triton
import triton.language as tl


@triton.jit
def beside(x, y):
    """Two tiles [ROWS, W] as one [ROWS, 2 * W], column by column in turns."""
    return tl.reshape(tl.join(x, y), (x.shape[0], 2 * x.shape[1]))


@triton.jit
def side_by_side(x, y):
    """Two tiles as one, the columns of the second behind those of the first."""
    both = tl.permute(tl.join(x, y), (0, 2, 1))
    return tl.reshape(both, (x.shape[0], 2 * x.shape[1]))


@triton.jit
def four_tiles(x, y, z, w):
    """Four tiles as one."""
    return side_by_side(side_by_side(x, y), side_by_side(z, w))


@triton.jit
def bf16_pair(words):
    """Words [ROWS, W] as the two numbers they hold, [ROWS, 2 * W]."""
    low = (words & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return beside(low, (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True))


_BYTES_ASM = tl.constexpr("prmt.b32 $0, $2, 0x43, 0x4140; prmt.b32 $1, $2, 0x43, 0x4342;")


@triton.jit
def bytes_of_words(words, NATIVE: tl.constexpr):
    """The bytes, below 128, of words [ROWS, W]: the first two of each, [ROWS, 2 * W], and the last
    two; NATIVE: as bf16, and 128 more."""
    if NATIVE:
        first, second = tl.inline_asm_elementwise(
            _BYTES_ASM,
            "=&r,=&r,r",
            [words],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        return bf16_pair(first), bf16_pair(second)
    else:
        first = beside(words & 255, (words >> 8) & 255)
        return first, beside((words >> 16) & 255, (words >> 24) & 255)
