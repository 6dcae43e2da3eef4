"""The experts of a small batch on Hopper: the whole layer but routing, at the speed of memory.

Device code: ``kernels/triton/hopper_decode.py`` (Gluon). The definition is ``experts_reference``.
"""

from __future__ import annotations

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.experts.torch_reference import experts_reference
from fusedmoe.kernels.activation import device_activation
from fusedmoe.kernels.align import align_local_slots
from fusedmoe.kernels.tensor_checks import check_contiguous, check_tensors
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.hopper_tiles import MAX_PICKS, DecodeTiles, decode_tiles

# TMA strides and 16-byte gathers; and a width that Triton takes for divisible.
ALIGNED_ELEMENTS = 16


def hopper_decode(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    act: torch.Tensor,
    y: torch.Tensor,
    *,
    activation: MoEActivation = MoEActivation.SILU,
    activation_config: ApplyMoEActivationConfig | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    tiles: DecodeTiles | None = None,
    programs: int,
) -> None:
    """out[t] = sum over k of topk_weights[t, k] * expert_k(x[t]), weights None: all one.

    x [T, H], w1 [e, S * I, H] and w2 [e, H, I] contiguous, bf16 or fp16; topk_ids int [T, K]
    contiguous; out [T, H]; scratch act [R, I] and y [R, H] of x's dtype, R = T * K. Biases
    [e, S * I] and [e, H]. ``programs``: how many run at once, the number of multiprocessors.
    Raises ValueError for sizes that are not multiples of 16 and for tensors that do not fit.
    """
    check_experts(x, w1, w2, topk_weights, topk_ids, out, act, y, topk_ids.numel())
    check_biases(w1, w2, w1_bias, w2_bias)
    if not x.is_cuda:
        hopper_decode_reference(
            x, w1, w2, topk_weights, topk_ids, out, activation=activation,
            activation_config=activation_config, w1_bias=w1_bias, w2_bias=w2_bias,
            expert_map=expert_map,
        )  # fmt: skip
        return
    from fusedmoe.kernels.triton.hopper_decode import decode

    (e, H, I), R = w2.shape, topk_ids.numel()  # noqa: E741
    if R == 0:
        return
    tiles = tiles or decode_tiles(R, e, H, I)
    decode(
        x, w1, w2, topk_weights, topk_ids, out, act, y,
        device_activation(activation, activation_config), w1_bias, w2_bias, expert_map,
        align_local_slots(topk_ids, tiles.block, e, expert_map), tiles, programs,
    )  # fmt: skip


def hopper_decode_reference(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    *,
    activation: MoEActivation = MoEActivation.SILU,
    activation_config: ApplyMoEActivationConfig | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> None:
    """The definition, in plain torch."""
    if topk_weights is None:
        topk_weights = torch.ones_like(topk_ids, dtype=torch.float32)
    result = experts_reference(
        x, w1, w2, topk_weights, topk_ids, activation=activation,
        activation_config=activation_config, w1_bias=w1_bias, w2_bias=w2_bias,
        expert_map=expert_map,
    )  # fmt: skip
    out.copy_(result)


def check_experts(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    act: torch.Tensor,
    y: torch.Tensor | None,
    rows: int,
) -> None:
    """Raise ValueError where the tensors of a Hopper launch do not fit; ``rows`` of act and y."""
    (e, H, I), (T, K) = w2.shape, topk_ids.shape  # noqa: E741
    check_picks(K)
    if H % ALIGNED_ELEMENTS or I % ALIGNED_ELEMENTS:
        raise ValueError(f"H {H} and I {I} must be multiples of {ALIGNED_ELEMENTS}")
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"the Hopper kernels compute in fp16 or bf16, got {x.dtype}")
    check_tensors(
        (
            ("x", x, (T, H), x.dtype),
            ("out", out, (T, H), x.dtype),
            ("act", act, (rows, I), x.dtype),
            ("y", y, (rows, H), x.dtype),
        )
    )
    if w1.shape not in ((e, I, H), (e, 2 * I, H)):
        raise ValueError(f"w1 is {tuple(w1.shape)}, w2 {tuple(w2.shape)} asks for {(e, 2 * I, H)}")
    if topk_weights is not None and topk_weights.shape != (T, K):
        raise ValueError(f"topk_weights is {tuple(topk_weights.shape)}, expected {(T, K)}")
    check_contiguous(w1=w1, w2=w2, topk_weights=topk_weights, topk_ids=topk_ids, act=act, y=y)
    if x.stride(1) != 1 or x.stride(0) % ALIGNED_ELEMENTS or out.stride(1) != 1:
        raise ValueError(
            f"rows of x must start at multiples of {ALIGNED_ELEMENTS} elements and rows of x and "
            f"out must be dense, strides are {x.stride()} and {out.stride()}"
        )


def check_picks(K: int) -> None:
    """Raise ValueError for more picks of a token than the sums add up."""
    if K > MAX_PICKS:
        raise ValueError(f"at most {MAX_PICKS} picks of a token are added up, got {K}")


def check_biases(
    w1: torch.Tensor | QuantizedTensor,
    w2: torch.Tensor | QuantizedTensor,
    w1_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
) -> None:
    """Raise ValueError for biases that are not dense with a number for each row of the weights."""
    for name, bias, shape in (("w1_bias", w1_bias, w1.shape), ("w2_bias", w2_bias, w2.shape)):
        if bias is None:
            continue
        if bias.shape != shape[:2] or not bias.is_contiguous():
            raise ValueError(
                f"{name} is {tuple(bias.shape)} of strides {bias.stride()}, expected a contiguous "
                f"{tuple(shape[:2])}"
            )
