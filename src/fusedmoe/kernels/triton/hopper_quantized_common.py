"""What the epilogues of streamed and prefilled quantized layers share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fusedmoe.kernels.triton.quantized_common import float_scale


@gluon.jit
def row_number(ptr, row, step, inside):
    """ptr[row * step] as fp32 [rows, 1], 0 where a row is not inside."""
    value = gl.load(ptr + row * step, inside, 0.0)
    return gl.expand_dims(float_scale(value), 1)
