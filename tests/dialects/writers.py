"""Matrices as published packages store them, written from the formats' descriptions.

Each writer rounds a matrix [N, K] and returns what lies in the files, by suffix, with the values
that those bytes stand for, computed from the integers and scales alone. Nothing here uses the
library's own packing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
NF4 = torch.cat(
    [
        torch.tensor(
            [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500]
        ),
        torch.tensor([0.0, 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170]),
        torch.tensor([0.7229568, 1.0]),
    ]
)


class Stored(NamedTuple):
    """Tensors by suffix, and their values fp32 [N, K]."""

    tensors: dict[str, torch.Tensor]
    values: torch.Tensor


Writer = Callable[[torch.Tensor], Stored]


def pack_words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers [R, C] along the last axis into int32 words, the lowest bits first."""
    count = -(-numbers.shape[1] * bits // 32)
    words = [[0] * (count + 1) for _ in range(numbers.shape[0])]
    for r, row in enumerate(numbers.tolist()):
        for i, number in enumerate(row):
            word, shift = divmod(i * bits, 32)
            words[r][word] |= (number << shift) & 0xFFFFFFFF
            words[r][word + 1] |= (number << shift) >> 32
    signed = [[w - (1 << 32) if w >> 31 else w for w in row[:count]] for row in words]
    return torch.tensor(signed, dtype=torch.int32).reshape(numbers.shape[0], count)


def pack_pairs(numbers: torch.Tensor, *, low_first: bool = True) -> torch.Tensor:
    """Numbers below 16 [R, C] into bytes [R, C / 2]."""
    first, second = numbers[:, 0::2], numbers[:, 1::2]
    return (first + 16 * second if low_first else 16 * first + second).to(torch.uint8)


def groups_of(weight: torch.Tensor, size: int) -> torch.Tensor:
    return weight.reshape(weight.shape[0], -1, weight.shape[1] if size == -1 else size)


class Integers(NamedTuple):
    """numbers [N, K], scale fp16 and zero [N, K / g], group [K] of each column."""

    numbers: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    group: torch.Tensor

    @property
    def values(self) -> torch.Tensor:
        scale, zero = self.scale.float()[:, self.group], self.zero[:, self.group]
        return (self.numbers - zero).float() * scale


def round_integers(
    weight: torch.Tensor, bits: int, size: int, symmetric: bool, group: torch.Tensor | None = None
) -> Integers:
    """Unsigned numbers of ``bits`` bits; ``group`` int [K] says which group a column is in."""
    K = weight.shape[1]
    if group is None:
        group = torch.arange(K) // (K if size == -1 else size)
    count, top = int(group.max()) + 1, (1 << bits) - 1
    scales, zeros = [], []
    for g in range(count):
        part = weight[:, group == g]
        if symmetric:
            scales.append((part.abs().amax(1) / (top // 2)).half())
            zeros.append(torch.full((weight.shape[0],), (top + 1) // 2))
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales.append(((high - low) / top).half())
            zeros.append((-low / scales[-1].float()).round().clamp(0, top).long())
    scale, zero = torch.stack(scales, 1), torch.stack(zeros, 1)
    numbers = (weight / scale.float()[:, group]).round().long() + zero[:, group]
    return Integers(numbers.clamp(0, top), scale, zero, group)


def gptq(
    bits: int = 4, size: int = 32, *, sym: bool = True, act_order: bool = False, version: int = 1
) -> Writer:
    def write(weight: torch.Tensor) -> Stored:
        K = weight.shape[1]
        group = torch.arange(K) // (K if size == -1 else size)
        if act_order:
            order = torch.randperm(K, generator=torch.Generator().manual_seed(K))
            group = group[order.argsort()]
        q = round_integers(weight, bits, size, sym, group)
        zeros = q.zero.T if version == 2 else (q.zero.T - 1) % (1 << bits)
        tensors = {
            "qweight": pack_words(q.numbers, bits).T.contiguous(),
            "scales": q.scale.T.contiguous(),
            "qzeros": pack_words(zeros, bits),
            "g_idx": group.int(),
        }
        return Stored(tensors, q.values)

    return write


def awq(size: int = 32, *, sym: bool = False) -> Writer:
    def interleave(numbers: torch.Tensor) -> torch.Tensor:
        """Columns 0, 2, 4, 6, 1, 3, 5, 7 of each eight, from the lowest nibble on."""
        return torch.cat(
            [
                numbers[:, i : i + 8][:, [0, 2, 4, 6, 1, 3, 5, 7]]
                for i in range(0, numbers.shape[1], 8)
            ],
            dim=1,
        )

    def write(weight: torch.Tensor) -> Stored:
        q = round_integers(weight, 4, size, sym)
        tensors = {
            "qweight": pack_words(interleave(q.numbers.T), 4),
            "qzeros": pack_words(interleave(q.zero.T), 4),
            "scales": q.scale.T.contiguous(),
        }
        return Stored(tensors, q.values)

    return write


def packed_integers(
    bits: int = 4, size: int = 32, *, sym: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Writer:
    """compressed-tensors pack-quantized."""

    def write(weight: torch.Tensor) -> Stored:
        q = round_integers(weight, bits, size, sym)
        q = q._replace(scale=q.scale.to(dtype))
        tensors = {
            "weight_packed": pack_words(q.numbers, bits),
            "weight_scale": q.scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not sym:
            tensors["weight_zero_point"] = pack_words(q.zero.T, bits).T.contiguous()
        return Stored(tensors, q.values)

    return write


def int8_rows(weight: torch.Tensor) -> Stored:
    """One scale per row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    numbers = (weight / scale).round().to(torch.int8)
    return Stored({"weight": numbers, "weight_scale": scale}, numbers.float() * scale)


def int8_whole(weight: torch.Tensor) -> Stored:
    """One scale for the matrix."""
    scale = weight.abs().amax() / 127
    numbers = (weight / scale).round().to(torch.int8)
    return Stored({"weight": numbers, "weight_scale": scale.reshape(1)}, numbers.float() * scale)


def fp8(
    block: tuple[int, int] | None = None,
    *,
    leaf: str = "weight_scale",
    shape: str = "keep",
    power_of_two: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    input_scale: float | None = None,
    input_leaf: str = "input_scale",
) -> Writer:
    """e4m3 with one scale per block of (rows, columns), -1 for the whole extent."""

    def write(weight: torch.Tensor) -> Stored:
        N, K = weight.shape
        bn, bk = (
            (N, K)
            if block is None
            else (N if block[0] < 0 else block[0], K if block[1] < 0 else block[1])
        )
        scale = torch.zeros(-(-N // bn), -(-K // bk))
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                part = weight[i * bn : (i + 1) * bn, j * bk : (j + 1) * bk]
                scale[i, j] = part.abs().amax() / 448
        if power_of_two:
            scale = torch.exp2(torch.log2(scale).ceil())
        stored = scale.to(scale_dtype)
        grid = stored.float().repeat_interleave(bn, 0)[:N].repeat_interleave(bk, 1)[:, :K]
        numbers = (weight / grid).to(torch.float8_e4m3fn)
        values = numbers.float() * grid
        stored = {"keep": stored, "scalar": stored.reshape(-1)[0], "flat": stored.reshape(-1)}.get(
            shape, stored.reshape(-1)[:1]
        )
        tensors = {"weight": numbers, leaf: stored}
        if input_scale is not None:
            tensors[input_leaf] = torch.tensor(input_scale)
        return Stored(tensors, values)

    return write


def nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Index of the nearest entry of ``table``."""
    return (values[..., None] - table).abs().argmin(-1)


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    return nearest(values.abs(), E2M1) + 8 * (values < 0)


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    return torch.where(codes >= 8, -1.0, 1.0) * E2M1[codes % 8]


def mxfp4(weight: torch.Tensor, names: tuple[str, str] = ("weight", "weight_scale")) -> Stored:
    """Groups of 32 with e8m0 exponents."""
    groups = groups_of(weight, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=1e-30))) - 2
    scale = torch.exp2(exponent)[..., None]
    codes = e2m1_codes((groups / scale).clamp(-6, 6))
    values = (e2m1_values(codes) * scale).reshape(weight.shape)
    packed = pack_pairs(codes.reshape(weight.shape))
    return Stored({names[0]: packed, names[1]: (exponent + 127).to(torch.uint8)}, values)


def mxfp6(exponent_bits: int) -> Writer:
    """Quark's mxfp6: e3m2 or e2m3, four numbers in three bytes, the lowest bits first."""
    mantissa_bits, bias = 5 - exponent_bits, (1 << (exponent_bits - 1)) - 1
    steps = 1 << mantissa_bits
    table = torch.tensor(
        [
            m / steps * 2.0 ** (1 - bias) if e == 0 else (1 + m / steps) * 2.0 ** (e - bias)
            for e in range(1 << exponent_bits)
            for m in range(steps)
        ]
    )

    def write(weight: torch.Tensor) -> Stored:
        groups = groups_of(weight, 32)
        exponent = torch.ceil(torch.log2(groups.abs().amax(-1).clamp(min=1e-30) / table[-1]))
        scale = torch.exp2(exponent)[..., None]
        scaled = groups / scale
        codes = nearest(scaled.abs(), table)
        values = torch.where(scaled < 0, -1.0, 1.0) * table[codes] * scale
        codes = (codes + 32 * (scaled < 0)).reshape(weight.shape[0], -1, 4)
        word = sum(codes[..., i] << (6 * i) for i in range(4))
        packed = torch.stack([(word >> (8 * i)) & 255 for i in range(3)], -1).flatten(1)
        tensors = {
            "weight": packed.to(torch.uint8),
            "weight_scale": (exponent + 127).to(torch.uint8),
        }
        return Stored(tensors, values.reshape(weight.shape))

    return write


def nvfp4(weight: torch.Tensor, *, inverse: bool = False) -> Stored:
    """ModelOpt's NVFP4, or (``inverse``) that of compressed-tensors."""
    groups = groups_of(weight, 16)
    second = (weight.abs().amax() / (6 * 448)).float()
    if inverse:
        second = 1 / (1 / second)
    scale = (groups.abs().amax(-1) / 6 / second).to(torch.float8_e4m3fn)
    whole = scale.float()[..., None] * second
    codes = e2m1_codes((groups / whole.clamp(min=1e-30)).clamp(-6, 6))
    values = (e2m1_values(codes) * whole).reshape(weight.shape)
    packed = pack_pairs(codes.reshape(weight.shape))
    if inverse:
        names = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
        return Stored(
            dict(zip(names, (packed, scale, (1 / second).reshape(1), torch.ones(1)), strict=True)),
            values,
        )
    names = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    return Stored(dict(zip(names, (packed, scale, second, torch.tensor(1.0)), strict=True)), values)


def nf4(*, nested: bool = True) -> Writer:
    """bitsandbytes: blocks of 64 over the flattened matrix, the first number in the high nibble."""

    def write(weight: torch.Tensor) -> Stored:
        blocks = weight.reshape(-1, 64)
        absmax = blocks.abs().amax(1)
        state: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": 64,
            "dtype": "float32",
            "shape": list(weight.shape),
        }
        tensors = {"weight.quant_map": NF4.clone()}
        if nested:
            offset = float(absmax.mean())
            code = torch.linspace(-1, 1, 256)
            centred = (absmax - offset).reshape(-1)
            count = -(-centred.numel() // 256)
            largest = torch.stack([c.abs().max() for c in centred.split(256)])
            spread = largest.repeat_interleave(256)[: centred.numel()]
            index = nearest(centred / spread, code)
            absmax = code[index] * spread + offset
            assert largest.numel() == count
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            tensors |= {
                "weight.absmax": index.to(torch.uint8),
                "weight.nested_absmax": largest,
                "weight.nested_quant_map": code,
            }
        else:
            tensors["weight.absmax"] = absmax
        codes = nearest(blocks / absmax[:, None], NF4)
        values = (NF4[codes] * absmax[:, None]).reshape(weight.shape)
        tensors["weight"] = pack_pairs(codes.reshape(1, -1), low_first=False).reshape(-1, 1)
        raw = json.dumps(state).encode()
        tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(raw), dtype=torch.uint8)
        return Stored(tensors, values)

    return write


def bnb_int8(weight: torch.Tensor) -> Stored:
    """bitsandbytes' LLM.int8: the largest number of each row stands for 127."""
    largest = weight.abs().amax(1)
    numbers = (weight * 127 / largest[:, None]).round().to(torch.int8)
    tensors = {
        "weight": numbers,
        "SCB": largest,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return Stored(tensors, numbers.float() * largest[:, None] / 127)


@dataclass(frozen=True)
class Case:
    """A dialect: its quantization_config, how one matrix is written, the format that it is."""

    config: dict[str, Any]
    write: Writer
    format: str


def _compressed(
    weights: dict[str, Any], inputs: dict[str, Any] | None, packing: str
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp\\.gate$", "re:.*shared_expert.*"],
        "quantization_status": "compressed",
    }


_DYNAMIC_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
_FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
_DEEPSEEK = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
_QUARK_FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}


def _quark(weight: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": weight, "input_tensors": inputs},
        "layer_quant_config": {},
        "exclude": ["lm_head", "*self_attn*", "*mlp.gate", "*shared_expert*"],
        "export": {"pack_method": "reorder", "weight_format": "real_quantized"},
    }


CASES: dict[str, Case] = {
    "deepseek": Case(
        _DEEPSEEK | {"weight_block_size": [32, 32]},
        fp8((32, 32), leaf="weight_scale_inv"),
        "fp8_block_32x32",
    ),
    "deepseek ue8m0": Case(
        _DEEPSEEK | {"weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
        fp8(
            (32, 32),
            leaf="weight_scale_inv",
            power_of_two=True,
            scale_dtype=torch.float8_e8m0fnu,
        ),
        "fp8_block_32x32",
    ),
    "fp8 per tensor": Case(
        _DEEPSEEK | {"activation_scheme": "static"},
        fp8(shape="scalar", input_scale=0.02),
        "fp8_tensor",
    ),
    "fp8 per tensor by Transformers' names": Case(
        _DEEPSEEK
        | {"activation_scheme": "static", "weight_block_size": None, "scale_fmt": "float"},
        fp8(
            leaf="weight_scale_inv",
            shape="scalar",
            input_scale=0.02,
            input_leaf="activation_scale",
        ),
        "fp8_tensor",
    ),
    "fbgemm": Case({"quant_method": "fbgemm_fp8"}, fp8((1, -1)), "fp8_channel"),
    "ct w4a16": Case(_compressed(_INT4, None, "pack-quantized"), packed_integers(), "int4_g32"),
    "ct w4a16 zero points": Case(
        _compressed(_INT4 | {"symmetric": False}, None, "pack-quantized"),
        packed_integers(sym=False),
        "int4_g32_zp",
    ),
    "ct w8a16": Case(
        _compressed(
            _INT4 | {"num_bits": 8, "strategy": "channel", "group_size": None},
            None,
            "pack-quantized",
        ),
        packed_integers(8, -1),
        "int8_channel",
    ),
    "ct w4afp8": Case(
        _compressed(_INT4, _DYNAMIC_TOKEN, "pack-quantized"), packed_integers(), "int4_g32"
    ),
    "ct w8a8": Case(
        _compressed(
            {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
            _DYNAMIC_TOKEN | {"type": "int"},
            "int-quantized",
        ),
        int8_rows,
        "int8_channel",
    ),
    "ct w8a8 tensor": Case(
        _compressed(
            {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True},
            _DYNAMIC_TOKEN | {"type": "int"},
            "int-quantized",
        ),
        int8_whole,
        "int8_channel",
    ),
    "ct fp8 tensor": Case(
        _compressed(
            _FP8 | {"strategy": "tensor"},
            _FP8 | {"strategy": "tensor", "dynamic": False},
            "float-quantized",
        ),
        fp8(shape="one", input_scale=0.02),
        "fp8_tensor",
    ),
    "ct fp8 channel": Case(
        _compressed(_FP8 | {"strategy": "channel"}, _DYNAMIC_TOKEN, "float-quantized"),
        fp8((1, -1), scale_dtype=torch.bfloat16),
        "fp8_channel",
    ),
    "ct fp8 block": Case(
        _compressed(
            _FP8 | {"strategy": "block", "block_structure": [32, 32]},
            _FP8 | {"strategy": "group", "group_size": 32, "dynamic": True},
            "float-quantized",
        ),
        fp8((32, 32)),
        "fp8_block_32x32",
    ),
    "ct nvfp4": Case(
        _compressed(
            _FP4 | {"strategy": "tensor_group", "group_size": 16},
            _FP4 | {"strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
            "nvfp4-pack-quantized",
        ),
        lambda weight: nvfp4(weight, inverse=True),
        "nvfp4",
    ),
    "ct mxfp4": Case(
        _compressed(_FP4 | {"strategy": "group", "group_size": 32}, None, "mxfp4-pack-quantized"),
        lambda weight: mxfp4(weight, ("weight_packed", "weight_scale")),
        "mxfp4",
    ),
    "gptq": Case(_GPTQ, gptq(), "int4_g32"),
    "gptq v1 zero points": Case(_GPTQ | {"sym": False}, gptq(sym=False), "int4_g32_zp"),
    "gptq v2 zero points": Case(
        _GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        gptq(sym=False, version=2),
        "int4_g32_zp",
    ),
    "gptq act-order": Case(_GPTQ | {"desc_act": True}, gptq(act_order=True), "int4_g32_act_order"),
    "gptq int8": Case(_GPTQ | {"bits": 8, "group_size": -1}, gptq(8, -1), "int8_channel"),
    "gptq 3 bits": Case(_GPTQ | {"bits": 3}, gptq(3), "int4_g32"),
    "awq": Case(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        awq(),
        "int4_g32_zp",
    ),
    "awq symmetric": Case(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": False},
        awq(sym=True),
        "int4_g32",
    ),
    "modelopt fp8": Case(
        {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        fp8(shape="scalar", input_scale=0.02),
        "fp8_tensor",
    ),
    "modelopt fp8 channel": Case(
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        fp8((1, -1), shape="flat"),
        "fp8_channel",
    ),
    "modelopt nvfp4": Case(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, nvfp4, "nvfp4"
    ),
    "quark fp8": Case(
        _quark({"dtype": "fp8_e4m3", "qscheme": "per_channel"}),
        fp8((1, -1), shape="flat"),
        "fp8_channel",
    ),
    "quark mxfp4": Case(_quark(_QUARK_FP4, _QUARK_FP4 | {"is_dynamic": True}), mxfp4, "mxfp4"),
    "quark mxfp6": Case(_quark(_QUARK_FP4 | {"dtype": "fp6_e3m2"}), mxfp6(3), "mxfp6_e3m2"),
    "quark mxfp6 e2m3": Case(_quark(_QUARK_FP4 | {"dtype": "fp6_e2m3"}), mxfp6(2), "mxfp6_e2m3"),
}

_BNB = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
CASES |= {
    "bitsandbytes nf4": Case(
        _BNB | {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, nf4(), "nf4"
    ),
    "bitsandbytes nf4 plain": Case(_BNB | {"load_in_4bit": True}, nf4(nested=False), "nf4"),
    "bitsandbytes int8": Case(
        {"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb_int8, "int8_channel"
    ),
    "bitsandbytes int8 rows": Case(
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0},
        bnb_int8,
        "int8_channel",
    ),
}


def fp4_of_deepseek(weight: torch.Tensor) -> Stored:
    """DeepSeek-V4's experts: pairs in int8, scales in e8m0."""
    packed, scale = mxfp4(weight).tensors.values()
    tensors = {"weight": packed.view(torch.int8), "scale": scale.view(torch.float8_e8m0fnu)}
    return Stored(tensors, mxfp4(weight).values)


def mxfp8(leaf: str) -> Writer:
    """e4m3 with e8m0 exponents per 32 columns."""
    plain = fp8((1, 32), leaf=leaf, power_of_two=True)

    def write(weight: torch.Tensor) -> Stored:
        stored = plain(weight)
        exponent = torch.log2(stored.tensors[leaf]) + 127
        return Stored(stored.tensors | {leaf: exponent.to(torch.uint8)}, stored.values)

    return write


_AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32}
CASES |= {
    "deepseek fp4": Case(
        _DEEPSEEK | {"weight_block_size": [128, 128], "expert_dtype": "fp4"},
        fp4_of_deepseek,
        "mxfp4",
    ),
    "mxfp8": Case({"quant_method": "mxfp8"}, mxfp8("weight_scale_inv"), "mxfp8"),
    "modelopt mxfp8": Case(
        {"quant_method": "modelopt", "quant_algo": "MXFP8"}, mxfp8("weight_scale"), "mxfp8"
    ),
    "auto-round gptq": Case(
        _AUTO_ROUND | {"sym": True, "packing_format": "auto_round:auto_gptq"}, gptq(), "int4_g32"
    ),
    "auto-round awq": Case(
        _AUTO_ROUND | {"sym": False, "packing_format": "auto_round:auto_awq"}, awq(), "int4_g32_zp"
    ),
    "quark fp8 tensor": Case(
        _quark(
            {"dtype": "fp8_e4m3", "qscheme": "per_tensor"},
            {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False},
        ),
        fp8(shape="scalar", input_scale=0.02),
        "fp8_tensor",
    ),
    "quark int8": Case(
        _quark(
            {"dtype": "int8", "qscheme": "per_channel"},
            {"dtype": "int8", "qscheme": "per_token", "is_dynamic": True},
        ),
        lambda weight: int8_rows(weight),
        "int8_channel",
    ),
    "quark mxfp8": Case(_quark(_QUARK_FP4 | {"dtype": "fp8_e4m3"}), mxfp8("weight_scale"), "mxfp8"),
    "quark int8 tensor": Case(
        _quark({"dtype": "int8", "qscheme": "per_tensor"}), int8_whole, "int8_channel"
    ),
}
