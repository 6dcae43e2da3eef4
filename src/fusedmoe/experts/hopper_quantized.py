"""Quantized experts on Hopper's own units: TMA, WGMMA, dependent launches, in Gluon and CUDA C++.

Few slots per expert stream the weights through ``kernels.hopper_quantized`` or, where rows are
quantized too, ``kernels.hopper_w8a8``; more of them run ``kernels.hopper_mixed_prefill`` or, with
both in 8 bits, ``kernels.hopper_fp8_prefill``. Rows of other formats are rounded to them and
multiplied as bf16 (``HopperEmulatedExperts``). Weights that TMA cannot view, few slots with MXFP6
or superblocks, traced code and batch invariance take the quantized Triton experts' way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.config import FusedMoEConfig
from fusedmoe.experts.hopper_quantized_choice import (
    MAX_DECODE_MEAN,
    can_prefill,
    can_prefill_mixed,
    mixed_tiles_for,
    runs_decode,
    streams_longest,
)
from fusedmoe.experts.hopper_support import too_many_picks, unmet_by_hopper
from fusedmoe.experts.quantized_operands import Operands
from fusedmoe.experts.triton_quantized import TritonQuantizedExperts
from fusedmoe.experts.triton_quantized_formats import emulated_capabilities, unmet_by_groups
from fusedmoe.kernels.align import dense
from fusedmoe.kernels.cuda.program import missing_nvrtc
from fusedmoe.kernels.device import device_of, multiprocessors_of
from fusedmoe.kernels.hopper_fp8_prefill import fp8_prefill
from fusedmoe.kernels.hopper_mixed_prefill import mixed_prefill, mixed_prefill_rows, wide_rows
from fusedmoe.kernels.hopper_prefill import prefill_rows
from fusedmoe.kernels.hopper_quantized import quantized_decode
from fusedmoe.kernels.hopper_w8a8 import w8a8_decode
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.peer_all_to_all import settled
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    ExpertsWork,
    FusedMoEActivationFormat,
    ProblemSize,
    WorkspaceShapes,
    scratch,
)
from fusedmoe.quantization.keys import FP8_DYNAMIC_TENSOR, QuantKey
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.tuning.cuda_tiles import CudaDecodeTiles
from fusedmoe.tuning.mixed_tiles import MixedPrefillTiles
from fusedmoe.tuning.quantized_tiles import (
    QuantizedPrefillTiles,
    runs_prefill,
)
from fusedmoe.tuning.w8a8_tiles import StreamTiles

_Layer = LayerTensors[QuantizedTensor]
_BY_ROUNDED = (torch.float8_e4m3fn, torch.int8)
_BY_FLOATS = (
    *(*_BY_ROUNDED, "mxfp8", "int4", "mxfp4", "nvfp4", "mxfp6_e3m2", "mxfp6_e2m3"),
    *("nf4", "iq4_nl", "q4_k", "q5_k"),
)


def _has_kernels(weight: QuantKey, rows: QuantKey | None) -> bool:
    """Whether any kernel of Hopper's own multiplies this pair, whatever its shapes; act-order
    weights once their columns are sorted."""
    known = _BY_FLOATS if rows is None else _BY_ROUNDED
    return weight.dtype in known and (rows is None or not weight.act_order)


def _is_int8(rows: QuantKey | None) -> bool:
    return rows is not None and rows.dtype == torch.int8


class HopperQuantizedExperts(TritonQuantizedExperts):
    """Quantized weights, with bf16 rows as they come or rounded, in standard rows; compute
    capability 9.

    ``decode_tiles``, ``stream_tiles`` (rows quantized too) and ``prefill_tiles``, if set, replace
    what ``tuning`` chooses, and so do ``mixed_tiles`` where rows are not quantized.
    """

    name = "hopper_quantized"
    takes_late_rows = True
    decode_tiles: CudaDecodeTiles | None = None
    stream_tiles: StreamTiles | None = None
    prefill_tiles: QuantizedPrefillTiles | None = None
    mixed_tiles: MixedPrefillTiles | None = None

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        can = super().capabilities()
        return ExpertsCapabilities(
            devices=can.devices,
            dtypes=frozenset({torch.bfloat16}),
            weight_formats=frozenset(
                (weight, rows)
                for weight, rows in can.weight_formats
                if weight is not None and _has_kernels(weight, rows)
            ),
            min_capability=(9, 0),
            requires=can.requires,
            batch_invariant=True,
            emulated=can.emulated,
        )

    @classmethod
    def unmet_requirement(
        cls, moe: FusedMoEConfig, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> str | None:
        unmet = super().unmet_requirement(moe, weight_key, activation_key)
        unmet = unmet or unmet_by_hopper(moe)
        return unmet or (missing_nvrtc() if activation_key is None else None)

    def shapes(
        self, size: ProblemSize, num_experts: int, activation: MoEActivation
    ) -> WorkspaceShapes:
        """As the Triton experts', the second GEMM's rows in fp32 wherever weights alone are in few
        bits and may be streamed, and whole blocks of rows where slots are many."""
        shapes = super().shapes(size, num_experts, activation)
        R, e, H = size.M * size.topk, size.E, size.K
        if self.moe_config.options.batch_invariant:
            return shapes
        first, second = shapes.workspace13, [shapes.workspace2]
        floating = self.floating_rows
        if MAX_DECODE_MEAN * num_experts >= R:
            second.append((R, 2 * H if floating else H))
        formats = [fmt for fmt in (self.quant_config.w1.format, self.quant_config.w2.format) if fmt]
        tiles = None
        if floating and len(formats) == 2:
            tiles = mixed_tiles_for(R, num_experts, *formats)
        if tiles is not None:
            P = mixed_prefill_rows(R, e, self.mixed_tiles or tiles)
            first = P, first[-1]
            second.append((P, 2 * H if wide_rows(*formats) else H))
        elif not floating and runs_prefill(R, num_experts):
            P = prefill_rows(R, e)
            first = P, first[-1]
            second.append((P, H))
        return shapes._replace(workspace13=first, workspace2=max(second, key=math.prod))

    def run(self, work: ExpertsWork) -> None:
        x, (T, K), e = work.hidden_states, work.topk_ids.shape, work.w1.shape[0]
        R, H = T * K, x.shape[1]
        operands = run = None
        plain = torch.compiler.is_compiling() or self.moe_config.options.batch_invariant
        if not plain and too_many_picks(K) is None:
            given = work.w1, work.w2, work.activation, work.output.dtype
            operands = self.operands_to_run(*given)
        if operands is not None:
            assert work.workspace2 is not None
            room, experts = work.workspace2.numel() // H, (e, work.global_num_experts)
            run = self._fastest(operands, (x, work.a1q_scale), R, experts, room)
        if run != self._prefill:
            x = settled(x)
        if operands is None or run is None:
            super().run(work._replace(hidden_states=x))
            return
        assert work.workspace13 is not None
        assert work.workspace2 is not None
        layer = LayerTensors(
            x,
            operands.w1,
            operands.w2,
            dense(work.output_weights),
            work.topk_ids.contiguous(),
            work.output,
            work.workspace13,  # each kernel takes its rows from it
            work.workspace2,
            multiprocessors_of(x.device),
            work.activation,
            self.activation_config,
            dense(operands.w1_bias),
            dense(operands.w2_bias),
            dense(work.expert_map),
        )
        with device_of(x):
            run(layer, operands, work.a1q_scale)

    def _fastest(
        self,
        operands: Operands,
        rows: tuple[torch.Tensor, torch.Tensor | None],
        R: int,
        experts: tuple[int, int],
        room: int,
    ) -> Callable[..., None] | None:
        """What runs R slots of ``experts`` (local, all) with second scratch for ``room`` rows of 16
        bits; None: plain Triton."""
        e, num_experts = experts
        width = 2 if operands.floating_rows else 1  # the second GEMM's rows: fp32, or 16 bits
        streams = room >= width * R and runs_decode(R, num_experts, operands, *rows)
        if streams and streams_longest(R, num_experts, operands):
            return self._decode
        formats = operands.w1.format, operands.w2.format
        tiles = mixed_tiles_for(R, num_experts, *formats)
        if tiles is not None and can_prefill_mixed(operands, *rows):
            tiles = self.mixed_tiles or tiles
            if room >= (2 if wide_rows(*formats) else 1) * mixed_prefill_rows(R, e, tiles):
                return partial(self._prefill_mixed, tiles)
        prefills = runs_prefill(R, num_experts) and can_prefill(operands, *rows)
        if prefills and room >= prefill_rows(R, e):
            return self._prefill
        return self._decode if streams else None

    def _decode(self, layer: _Layer, operands: Operands, x_scale: torch.Tensor | None) -> None:
        R, (_, H, I) = layer.topk_ids.numel(), layer.w2.shape  # noqa: E741
        act = scratch(layer.act, R, I)
        if operands.floating_rows:
            y = scratch(layer.y, R, 2 * H).view(torch.float32)
            layer = layer._replace(act=act, y=y)
            quantized_decode(layer, tiles=self.decode_tiles, steps=operands.steps)
            return
        layer = layer._replace(act=act, y=scratch(layer.y, R, H))
        w8a8_decode(layer, *operands.rounded_rows, self.stream_tiles, x_scale)

    def _prefill(self, layer: _Layer, operands: Operands, x_scale: torch.Tensor | None) -> None:
        e, H, I = layer.w2.shape  # noqa: E741
        P = prefill_rows(layer.topk_ids.numel(), e)
        layer = layer._replace(act=scratch(layer.act, P, I), y=scratch(layer.y, P, H))
        fp8_prefill(layer, *operands.rounded_rows, self.prefill_tiles, x_scale)

    def _prefill_mixed(
        self,
        tiles: MixedPrefillTiles,
        layer: _Layer,
        operands: Operands,
        x_scale: torch.Tensor | None,
    ) -> None:
        e, H, I = layer.w2.shape  # noqa: E741
        P = mixed_prefill_rows(layer.topk_ids.numel(), e, tiles)
        wide = wide_rows(layer.w1.format, layer.w2.format)
        y = scratch(layer.y, P, 2 * H if wide else H)
        y = y.view(torch.float32) if wide else y
        layer = layer._replace(act=scratch(layer.act, P, I), y=y)
        mixed_prefill(layer, tiles, operands.steps)


class HopperEmulatedExperts(HopperQuantizedExperts):
    """As ``HopperQuantizedExperts`` where rows have a format that these kernels do not multiply.

    They are rounded to it and multiplied as bf16; where slots are neither few nor many, by plain
    Triton. Rows of int8 are left to ``TritonEmulatedExperts``: here the activation's output is bf16
    before it is rounded, which costs int8, unlike formats of fewer bits, 1.06 times the error.
    """

    name = "hopper_emulated"
    emulate = True

    @classmethod
    def capabilities(cls) -> ExpertsCapabilities:
        can = emulated_capabilities(FusedMoEActivationFormat.Standard)
        pairs = ((weight, rows) for weight, rows in can.weight_formats if weight is not None)
        return replace(
            super().capabilities(),
            weight_formats=frozenset(
                (weight, rows)
                for weight, rows in pairs
                if _has_kernels(weight, None) and rows != FP8_DYNAMIC_TENSOR and not _is_int8(rows)
            ),
            emulated=can.emulated,
        )

    @classmethod
    def unmet_requirement(
        cls, moe: FusedMoEConfig, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> str | None:
        int4 = weight_key is not None and weight_key.dtype == "int4"
        by_fp8 = activation_key is not None and activation_key.dtype == torch.float8_e4m3fn
        if int4 and by_fp8 and unmet_by_groups(weight_key, activation_key) is None:
            return "leaves products of int4 with fp8 rows to those who multiply fp8"
        return super().unmet_requirement(moe, weight_key, activation_key)
