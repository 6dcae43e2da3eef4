"""The router's linear layer: x [T, H] times weight [E, H] -> logits [T, E], summed in fp32.

Which way it is computed, its tier, is a pure function of shapes, dtypes and the device type:

    rows      up to four tokens on a GPU, or two where clusters run: one program per expert, exact
              fp32 products (Triton)
    cluster   few tokens on Hopper: clusters of blocks share out the sum over H and add its parts
              through shared memory, in one launch (CUDA)
    parts     the same on other GPUs and of other operands, and where batch invariance is asked for:
              tiles that share out the sum over H, whose parts are added in order (Triton)
    mm_fp32   16-bit operands with an fp32 result on a GPU (torch.mm)
    linear    everything else
    by_token  batch invariance where no kernel of ours promises it: ``linear``, token by token
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fusedmoe.forward_only import forward_only
from fusedmoe.kernels.device import device_of, runs_hopper_cuda

GateTier = Literal["rows", "cluster", "parts", "mm_fp32", "linear", "by_token"]

MAX_ROWS_TOKENS = 4
MAX_ROWS_TOKENS_BESIDE_CLUSTER = 2
MAX_PARTS_TOKENS = 16
MAX_HALVES_TOKENS = 64  # MAX_PARTS_TOKENS of 16-bit operands
MAX_CLUSTER_TOKENS = 64
SMALL_WEIGHT_BYTES = 2 << 20
LARGE_WEIGHT_BYTES = 4 << 20
_HALF_DTYPES = (torch.bfloat16, torch.float16)
_DTYPES = (*_HALF_DTYPES, torch.float32)


@dataclass(frozen=True)
class GateTile:
    """``experts`` rows of the weight by ``columns`` per step, and two slabs of ``steps`` steps in
    each of ``parts`` parts.

    With a single step the compiler would merge the sum of the parts into the product.
    """

    experts: int
    columns: int
    steps: int
    parts: int
    warps: int = 2


def gate_tile(E: int, H: int, itemsize: int) -> GateTile:
    """The tile for a weight [E, H] of that many bytes an element; no function of the tokens.

    Each part is small enough to be on its way all at once. Tiles times parts are about as many as a
    large GPU has multiprocessors, and twice as many for a weight of several megabytes, where the
    products of one program would take longer than its reads.
    """
    experts = 32 if E >= 256 else 16
    large = E * H * itemsize > LARGE_WEIGHT_BYTES
    columns, programs = (16, 256) if large else (32, 128)
    wanted = max(1, programs // -(-E // experts))
    steps = max(2, -(-H // (wanted * 2 * columns)))
    return GateTile(experts, columns, steps, -(-H // (2 * steps * columns)))


PIECE = 64  # bytes of a row that a warp of the cluster kernel multiplies at once
CLUSTER = 8  # blocks, which have a part of H each
MAX_PIECES = 16


@dataclass(frozen=True)
class ClusterTile:
    """A block's part of a row: ``pieces`` of PIECE bytes for each of its ``warps``."""

    warps: int
    pieces: int


def cluster_tile(row_bytes: int) -> ClusterTile | None:
    """The tile for weights [E, H] with rows of ``row_bytes``: the one with the fewest pieces beyond
    the end of a row and, among equals, the most warps. None where rows are too long."""
    pieces = max(1, -(-row_bytes // (CLUSTER * PIECE)))
    warps = min((8, 7, 6, 5, 4), key=lambda warps: -(-pieces // warps) * warps)
    tile = ClusterTile(warps, -(-pieces // warps))
    return tile if tile.pieces <= MAX_PIECES else None


def gate_tier(
    num_tokens: int,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    out_dtype: torch.dtype,
    device_type: str,
    batch_invariant: bool = False,
    cluster_tokens: int = 0,
) -> GateTier:
    """How logits are computed; see the module's table. ``cluster_tokens``: for how many tokens the
    cluster kernel is the fastest where it can run, 0 where it cannot."""
    if device_type != "cuda" or x_dtype not in _DTYPES or weight_dtype not in _DTYPES:
        return "by_token" if batch_invariant else "linear"
    if batch_invariant:
        return "parts"
    if num_tokens <= (MAX_ROWS_TOKENS_BESIDE_CLUSTER if cluster_tokens else MAX_ROWS_TOKENS):
        return "rows"
    if num_tokens <= cluster_tokens:
        return "cluster"
    halves = x_dtype is weight_dtype and x_dtype in _HALF_DTYPES
    if num_tokens <= (MAX_HALVES_TOKENS if halves else MAX_PARTS_TOKENS):
        return "parts"
    if halves and out_dtype is torch.float32:
        return "mm_fp32"
    return "linear"


@forward_only
def gate_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """x [..., H] and weight [E, H] of any float dtypes, bias [E] -> [..., E] in ``out_dtype``.

    ``out_dtype`` None is x's. Products are added in fp32 and rounded once, to ``out_dtype``; with
    16-bit operands and a 16-bit result, as the vendor's library adds them. No gradient flows.

    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    out_dtype = out_dtype or x.dtype
    _check(x, weight, bias, out_dtype)
    if torch.compiler.is_compiling() and (x.is_cuda or batch_invariant):
        return torch.ops.fusedmoe.gate_linear(x, weight, bias, out_dtype, batch_invariant)
    return _gate_linear(x, weight, bias, out_dtype, batch_invariant)


def _gate_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    batch_invariant: bool,
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    tier = tier_of(rows, weight, bias, out_dtype, batch_invariant)
    if tier == "rows":
        from fusedmoe.kernels.triton.gate_rows import gate_rows

        with device_of(rows):
            logits = gate_rows(rows, weight, bias, out_dtype)
    elif tier == "cluster":
        from fusedmoe.kernels.cuda.gate_cluster import gate_cluster

        tile = cluster_tile(weight.shape[1] * weight.element_size())
        assert tile is not None
        with device_of(rows):
            logits = gate_cluster(rows, weight, bias, out_dtype, tile)
    elif tier == "parts":
        from fusedmoe.kernels.triton.gate_parts import gate_parts

        parts = gate_tile(weight.shape[0], weight.shape[1], weight.element_size())
        with device_of(rows):
            logits = gate_parts(rows, weight, bias, out_dtype, parts)
    elif tier == "mm_fp32":
        logits = torch.mm(rows, weight.t(), out_dtype=torch.float32)
        if bias is not None:
            logits += bias
    else:
        logits = gate_linear_reference(
            rows, weight, bias, out_dtype=out_dtype, batch_invariant=tier == "by_token"
        )
    return logits.view(*x.shape[:-1], weight.shape[0])


def fits_cluster(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> bool:
    """Whether the cluster kernel takes them: rows of one dtype and of whole, aligned 16 bytes."""
    size = x.element_size()
    return (
        x.dtype is weight.dtype
        and (bias is None or bias.dtype in _DTYPES)
        and {x.dtype, out_dtype}.issubset(_DTYPES)
        and cluster_tile(x.shape[1] * size) is not None
        and all(one.stride(1) == 1 and one.data_ptr() % 16 == 0 for one in (x, weight))
        and not any(n * size % 16 for n in (x.shape[1], x.stride(0), weight.stride(0)))
    )


def tier_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> GateTier:
    """``gate_tier`` of x [T, H] and weight [E, H], where they are."""
    tokens = 0
    here = x.is_cuda and runs_hopper_cuda(x.get_device())
    if here and fits_cluster(x, weight, bias, out_dtype):
        # Every 16 tokens read the weight again, which costs next to nothing for a small one, and
        # less than torch takes for fp32.
        small = weight.numel() * weight.element_size() <= SMALL_WEIGHT_BYTES
        tokens = MAX_CLUSTER_TOKENS if small or x.dtype is torch.float32 else MAX_PARTS_TOKENS
    kind = x.device.type
    return gate_tier(x.shape[0], x.dtype, weight.dtype, out_dtype, kind, batch_invariant, tokens)


def gate_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """The definition, in plain torch."""
    out_dtype = out_dtype or x.dtype
    compute_dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), out_dtype)
    weight, bias = weight.to(compute_dtype), None if bias is None else bias.to(compute_dtype)
    linear = torch.nn.functional.linear
    if not batch_invariant or x.shape[0] == 0:
        return linear(x.to(compute_dtype), weight, bias).to(out_dtype)
    rows = x.to(compute_dtype).split(1)
    return torch.cat([linear(row, weight, bias) for row in rows]).to(out_dtype)


_gate_linear_op = torch.library.custom_op("fusedmoe::gate_linear", _gate_linear, mutates_args=())


@_gate_linear_op.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    batch_invariant: bool,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


def _check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x [..., H] and weight [E, H] do not fit: {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    if not (x.is_floating_point() and weight.is_floating_point() and out_dtype.is_floating_point):
        raise ValueError(
            f"x, weight and result must be floating point, got {x.dtype}, {weight.dtype} and "
            f"{out_dtype}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
