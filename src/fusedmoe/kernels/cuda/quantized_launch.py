"""What launches of quantized weights have in common: constants, parameters, how many programs."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from fusedmoe.kernels.activation import DeviceActivation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment
from fusedmoe.kernels.cuda.program import CudaKernel, source_of
from fusedmoe.kernels.grouped_gemm_quantized import weight_addresses
from fusedmoe.quantization.tensor import QuantizedTensor

ELEMENTS = {"int4": 0, "e2m1": 1, "int8": 2, "e4m3": 3, "nf4": 4, "iq4_nl": 4}
SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
SCALES[torch.float8_e4m3fn] = 4
BIASES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
FORMULAS = ("", "silu", "gelu", "gelu_tanh", "relu2", "swigluoai", "swiglustep", "situ")
MAP_BYTES, MAP_ALIGNMENT = 128, 64  # of CUtensorMap
# Shared memory of a multiprocessor, and what every program costs beside its own.
SHARED_BYTES, RESERVED_BYTES = 228 * 1024, 1024


class Product(NamedTuple):
    """One product of a layer: out[slot] = act(x[slot // top_k] @ w[expert].T + bias[expert]).

    x [rows, D] bf16, w [e, S * N, D], out [R, N] bf16 or fp32; ``blocks`` of the tile's slots, or
    ids without a table. ``programs``: the number of multiprocessors. ``early``: weights are read
    before the launch that makes x has ended.
    """

    x: torch.Tensor
    w: QuantizedTensor
    out: torch.Tensor
    bias: torch.Tensor | None
    act: DeviceActivation
    blocks: MoEAlignment | LoneSlots
    top_k: int
    programs: int
    early: bool = False

    @property
    def shards(self) -> int:
        """S"""
        return 2 if self.act.gated else 1

    @property
    def ids(self) -> torch.Tensor | None:
        """Of slots without a table."""
        return self.blocks.topk_ids if isinstance(self.blocks, LoneSlots) else None


def structure_of(
    maps: tuple[str, ...], others: tuple[tuple[str, Any], ...]
) -> type[ctypes.Structure]:
    """A kernel's one parameter, field by field as its source has it: tensor maps, then ``others``.

    C++ rounds its size up to the alignment of maps, and the driver reads all of that.
    """
    fields = (*((name, ctypes.c_char * MAP_BYTES) for name in maps), *others)
    size = ctypes.sizeof(type("Fields", (ctypes.Structure,), {"_fields_": fields}))
    rest = -size % MAP_ALIGNMENT if maps else 0
    if rest:
        fields += (("rest", ctypes.c_char * rest),)
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})


def arguments_of(
    maps: tuple[str, ...], tensors: tuple[str, ...], numbers: tuple[str, ...]
) -> type[ctypes.Structure]:
    """The parameter of a kernel for one product; ``filled`` knows the names."""
    others = (
        *((name, ctypes.c_void_p) for name in tensors),
        ("stride_x", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in numbers),
        *((name, ctypes.c_float) for name in ("limit", "alpha", "beta")),
    )
    return structure_of(maps, others)


def filled(arguments: type[ctypes.Structure], product: Product) -> ctypes.Structure:
    """``arguments`` of this launch; maps, and what else is not here, are zero."""
    x, w, out, bias, act, blocks, *_ = product
    tensors = {"weights": w.data, "scale": w.scale, "scale2": w.scale2, "zero": w.zero_point}
    tensors |= {"bias": bias, "x": x, "out": out}
    sizes = {"stride_x": x.stride(0), "R": out.shape[0], "num_local": w.shape[0]}
    if isinstance(blocks, LoneSlots):
        tensors |= {"ids": blocks.topk_ids, "map": blocks.expert_map}
        sizes["num_mapped"] = 0 if blocks.expert_map is None else blocks.expert_map.shape[0]
    else:
        tensors |= {"experts": blocks.expert_ids, "sorted": blocks.sorted_ids}
        tensors["num_post"] = blocks.num_tokens_post_pad
        sizes["last_block"] = blocks.expert_ids.shape[0] - 1
    found = arguments(**sizes, limit=act.limit or 0.0, alpha=act.alpha, beta=act.beta)
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(found, name, tensor.data_ptr())
    return found


def constants_of(product: Product) -> dict[str, int]:
    """The constants of every source. NEXT: what reads ``out`` takes rows as they are."""
    x, w, out, bias, act, *_ = product
    fmt, scale = w.format, w.scale
    assert scale is not None
    places = ("EXPERT_SCALES", "SCALE_STRIDE", "SCALE_SHARD", "SCALE_STEP", "SCALE_BLOCK")
    return {
        "COLUMNS": x.shape[1],
        "TOP_K": product.top_k,
        "EARLY": int(product.early),
        "WIDE": int(out.dtype == torch.float32),
        "BIAS": 0 if bias is None else BIASES[bias.dtype],
        **dict.fromkeys(("NEXT", "NEXT_EVEN", "NEXT_ODD"), 0),
        "FEATURES": w.shape[1] // product.shards,
        "INTERLEAVED": int(w.interleaved),
        **dict(zip(places, weight_addresses(w)[4:], strict=True)),
        "ELEMENT": ELEMENTS[fmt.element],
        "SCALE": SCALES[scale.dtype],
        "SCALE_BYTES": scale.element_size(),
        "SCALE2": int(w.scale2 is not None),
        "ZERO": int(w.zero_point is not None),
        "FORMULA": FORMULAS.index(act.formula),
        "GATED": int(act.gated),
        "LIMITED": int(act.limit is not None),
        "ID64": int(product.ids is not None and product.ids.dtype == torch.int64),
    }


@lru_cache(maxsize=1024)
def _kernel(
    sources: tuple[str, ...],
    defines: tuple[tuple[str, int], ...],
    threads: int,
    shared: int,
    cooperative: bool,
) -> CudaKernel:
    text, entry = source_of("instructions.cuh", *sources), sources[-1].removesuffix(".cu")
    named = tuple((name, str(value)) for name, value in defines)
    return CudaKernel(text, entry, named, threads, shared, cooperative=cooperative)


def launch(
    sources: tuple[str, ...],
    constants: dict[str, int],
    threads: int,
    shared: int,
    arguments: ctypes.Structure,
    per_multiprocessor: int,
    programs: int,
    device: int,
    *,
    cooperative: bool = False,
) -> None:
    """The entry named as the last of ``sources``, by ``programs`` times as many programs as fit a
    multiprocessor, at most ``per_multiprocessor``; ``cooperative``: as ``CudaKernel`` has it."""
    resident = min(per_multiprocessor, SHARED_BYTES // (shared + RESERVED_BYTES))
    kernel = _kernel(sources, tuple(constants.items()), threads, shared, cooperative)
    kernel.launch(programs * resident, arguments, device)
