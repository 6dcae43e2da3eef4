"""Activation formulas on registers, shared by the GEMM epilogues, and the stand-alone launch.

Grid (rows, cdiv(I, BLOCK)). x [A, M, S * I] -> out [A, M, I], rows = A * M. With ids [rows], rows
without a local expert are skipped; with counts [A], rows past the count of their part.
"""

import torch
import triton
import triton.language as tl

from fusedmoe.kernels.activation import DeviceActivation
from fusedmoe.kernels.triton.ids import local_expert
from fusedmoe.kernels.triton.launch import Launcher, power_of_2
from fusedmoe.kernels.triton.mul_sum import ANY_EXPERT


@triton.jit
def _clamp_above(x, limit):
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clamp_both(x, limit):
    return tl.maximum(_clamp_above(x, limit), -limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tanh(x):
    """Odd series near zero, where the quotient would lose digits; no overflow elsewhere."""
    square = x * x
    series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    decay = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.01, series, tl.where(x < 0.0, -quotient, quotient))


@triton.jit
def plain_activation(FORMULA: tl.constexpr, x):
    """act(x), x fp32."""
    if FORMULA == "silu":
        return x * tl.sigmoid(x)
    elif FORMULA == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FORMULA == "gelu_tanh":
        return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(FORMULA == "relu2")
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return positive * positive


@triton.jit
def gated_activation(FORMULA: tl.constexpr, gate, up, limit, alpha, beta):
    """act(gate) * up with its clamps, fp32; the numbers are those of ``DeviceActivation``."""
    if FORMULA == "situ":
        if beta != 0.0:
            up = beta * _tanh(up / beta)
        return alpha * _tanh(gate / alpha) * tl.sigmoid(gate) * up
    elif FORMULA == "swiglustep":
        return _clamp_above(plain_activation("silu", gate), limit) * _clamp_both(up, limit)
    else:
        if limit is not None:
            gate = _clamp_above(gate, limit)
            up = _clamp_both(up, limit)
        if FORMULA == "swigluoai":
            return (up + beta) * gate * tl.sigmoid(alpha * gate)
        else:
            return plain_activation(FORMULA, gate) * up


@triton.jit(do_not_specialize=["M"])
def activation_kernel(
    x_ptr,
    out_ptr,
    ids_ptr,
    map_ptr,
    counts_ptr,
    M,
    width,
    num_mapped,
    num_local,
    limit,
    alpha,
    beta,
    stride_xa,
    stride_xm,
    stride_xi,
    stride_oa,
    stride_om,
    stride_oi,
    FORMULA: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    part = (row // M).to(tl.int64)
    position = (row % M).to(tl.int64)
    if counts_ptr is not None:  # noqa: SIM102 (Triton does not short-circuit)
        if position >= tl.load(counts_ptr + part):
            return
    if ids_ptr is not None:  # noqa: SIM102
        if local_expert(tl.load(ids_ptr + row), map_ptr, num_mapped, num_local) < 0:
            return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x_ptr += part * stride_xa + position * stride_xm
    out_ptr += part * stride_oa + position * stride_om
    if GATED:
        at_gate = column * 2 if INTERLEAVED else column
        at_up = column * 2 + 1 if INTERLEAVED else column + width
        gate = tl.load(x_ptr + at_gate * stride_xi, inside, 0.0).to(tl.float32)
        up = tl.load(x_ptr + at_up * stride_xi, inside, 0.0).to(tl.float32)
        result = gated_activation(FORMULA, gate, up, limit, alpha, beta)
    else:
        x = tl.load(x_ptr + column * stride_xi, inside, 0.0).to(tl.float32)
        result = plain_activation(FORMULA, x)
    tl.store(out_ptr + column * stride_oi, result, inside)


_launch = Launcher(activation_kernel)


def activate(
    activation: DeviceActivation,
    output: torch.Tensor,
    input: torch.Tensor,
    topk_ids: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    valid_token_counts: torch.Tensor | None,
) -> None:
    if input.numel() == 0:
        return
    if input.dim() == 2:
        input, output = input[None], output[None]
    elif input.dim() != 3:
        input, output = input.reshape(1, -1, input.shape[-1]), output.view(1, -1, output.shape[-1])
    parts, M, width = output.shape
    block = min(1024, power_of_2(width))
    num_mapped = 0 if expert_map is None else expert_map.shape[0]
    ids = None if topk_ids is None else topk_ids.reshape(-1)
    strides = (*input.stride(), *output.stride())
    _launch(
        (parts * M, -(-width // block)),
        (input, output, ids, expert_map, valid_token_counts),
        (
            M,
            width,
            num_mapped,
            ANY_EXPERT,
            *activation.numbers,
            *strides,
        ),
        (activation.formula, activation.gated, activation.interleaved, block),
        max(1, block // 256),
    )
