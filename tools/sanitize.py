"""Run every GPU kernel once or twice on small, odd problems: a program for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=src compute-sanitizer --tool memcheck \
        --report-api-errors no --error-exitcode 1 python tools/sanitize.py
    PYTHONPATH=src compute-sanitizer --tool racecheck --error-exitcode 1 \
        python tools/sanitize.py --only hopper bounded [--part 0 4] [--formats q4_k ...]

``--part`` runs one of several equal parts of hopper, bounded and experts, and of the two sizes of
quantized and packed. Where several run at once each takes ``--target-processes application-only``,
or the tool follows compilers, too, ``--launch-timeout 0``, or it gives up on a program that has not
begun after ten seconds, and a ``--port`` of its own, ten from the next.

Without caching every tensor is its own allocation, so that a stray access leaves it. Errors of the
API are left out: cuda-bindings asks the driver for every function, also those that it has not.

racecheck names two things in the warp-specialised kernels. The word by which Triton hands work to
the other warps: barriers of all threads stand around it (benchmarks/results/h200/notes_hopper.md).
And the words of ``hopper_drawn``'s box: all threads of the producer write the same one, a barrier
among them follows, and one arrives for all where the consumers wait.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from fusedmoe import FusedMoE, MoEOptions
from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.experts.act_order import as_they_lie, sorted_operands
from fusedmoe.experts.grouped_mm import GroupedMMExperts
from fusedmoe.experts.hopper import hopper_experts, scratch_rows
from fusedmoe.experts.hopper_quantized_choice import runs_decode
from fusedmoe.experts.hopper_support import missing_gluon
from fusedmoe.experts.quantized_operands import Operands
from fusedmoe.experts.triton import TritonExperts
from fusedmoe.experts.triton_quantized_run import quantized_experts
from fusedmoe.integrations.megatron import ActivationType, vllm_fused_moe
from fusedmoe.kernels.activation import moe_activation
from fusedmoe.kernels.align import LoneSlots, MoEAlignment, moe_align_block_size
from fusedmoe.kernels.counts import count_expert_num_tokens, remap_topk_to_local
from fusedmoe.kernels.eplb_map import eplb_map_to_physical_and_record
from fusedmoe.kernels.gate import gate_linear, gate_linear_reference
from fusedmoe.kernels.hopper_fp8_prefill import fp8_prefill, unmet_by_prefill
from fusedmoe.kernels.hopper_mixed_prefill import (
    mixed_prefill,
    mixed_prefill_rows,
    unmet_by_mixed_prefill,
    wide_rows,
)
from fusedmoe.kernels.hopper_prefill import hopper_prefill, prefill_rows
from fusedmoe.kernels.hopper_quantized import decode_tiles_for, quantized_decode
from fusedmoe.kernels.hopper_w8a8 import w8a8_decode
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.mul_sum import moe_fused_mul_sum
from fusedmoe.kernels.peer_all_to_all import (
    announce_outputs,
    combine,
    dispatch,
    wait_for_dispatch,
    wait_for_outputs,
)
from fusedmoe.kernels.peer_layout import PeerLayout, PeerSums, PeerView
from fusedmoe.kernels.peer_picks import add_picks, push_rows_reference
from fusedmoe.kernels.peer_sums import send_sums
from fusedmoe.kernels.permute import moe_permute, moe_unpermute
from fusedmoe.kernels.read_all import read_all
from fusedmoe.modular_kernel import ExpertsWork
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.formats.superblocks import CODECS
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN,
    MXFP4_DYNAMIC,
    NVFP4_DYNAMIC,
    fp8_dynamic_group,
)
from fusedmoe.quantization.quantize_layer import quantize_layer
from fusedmoe.quantization.tensor import QuantizedTensor
from fusedmoe.router.functional import route
from fusedmoe.router.spec import RoutingSpec, RoutingTensors
from fusedmoe.testing import check_experts
from fusedmoe.testing.cases import ACTIVATION_CASES, STANDARD_CASES
from fusedmoe.tuning.cuda_tiles import MAX_LONE_SLOTS
from fusedmoe.tuning.hopper_tiles import (
    DecodeGemmTile,
    DecodeTiles,
    HopperTiles,
    PrefillTiles,
    decode_tiles,
    decode_tiles_of,
    direct_tiles,
)
from fusedmoe.tuning.mixed_tiles import mixed_prefill_tiles

E, K = 24, 4
Item = TypeVar("Item")


def share(items: Sequence[Item], part: Sequence[int]) -> Sequence[Item]:
    """One of several equal parts, (number, parts); neighbours, which are alike, are in different
    ones."""
    return items[part[0] :: part[1]]


def routing() -> None:
    for T in (1, 7):
        bias = torch.randn(E, device="cuda")
        logits = torch.randn(T, 2 * E, device="cuda", dtype=torch.bfloat16)[:, ::2]
        padding = torch.arange(T, device="cuda") % 3 == 2
        groups = {"num_expert_group": 4, "topk_group": 2, "group_score": "top2_sum"}
        for rule, tensors in (
            ({"score_after_topk": True}, RoutingTensors()),
            ({"renormalize": True}, RoutingTensors()),
            ({"renormalize": True, "top_k": 8}, RoutingTensors(correction_bias=bias)),
            ({"score_function": "sigmoid"} | groups, RoutingTensors(correction_bias=bias)),
            ({"selection": "sparsemixer", "top_k": 2}, RoutingTensors()),
        ):
            spec = RoutingSpec(**({"top_k": K, "num_experts": E} | rule))
            result = route(logits, spec, tensors, is_padding=padding)
            mapped = eplb_map_to_physical_and_record(
                result.topk_ids,
                torch.randint(0, 2 * E, (E, 3), device="cuda"),
                torch.randint(1, 4, (E,), device="cuda"),
                torch.zeros(2 * E, dtype=torch.int32, device="cuda"),
            )
            assert mapped.shape == result.topk_ids.shape


def gate() -> None:
    """Each tier and each number of experts a program has; 257 experts and 13 tokens end inside."""
    for T in (1, 3, 7, 13, 100):
        for experts in (E, 257):
            for dtype in (torch.bfloat16, torch.float32):
                x = torch.randn(T, 72, device="cuda", dtype=dtype)
                weight = torch.randn(experts, 72, device="cuda", dtype=dtype)
                bias = torch.randn(experts, device="cuda")
                for invariant in (False, True):
                    gate_linear(x, weight, bias, out_dtype=torch.float32, batch_invariant=invariant)
    read_all(torch.randn(2 * 8192 + 5, device="cuda"))


def long_gate() -> None:
    """fp32 rows so long that they are asked for at once, through shared memory: where the parts of
    a row end inside its last one (4200 columns), and where they are the row (7168)."""
    for H in (4200, 7168):
        weight = torch.randn(E + 1, H, device="cuda")
        for T in (3, 5, 8, 13):
            x = torch.randn(T, H, device="cuda")
            logits = gate_linear(x, weight)
            torch.testing.assert_close(logits, gate_linear_reference(x, weight), rtol=0, atol=1e-3)
            print("gate", H, T, flush=True)


def slots() -> None:
    """By one program (4 and 100 words of ids), sorted at once, by small chunks, and by so many that
    their counts are summed before."""
    for T in (1, 5, 100, 300, 700, 20_000):
        ids = torch.randint(-1, E + 2, (T, K), device="cuda", dtype=torch.int32)
        expert_map = torch.full((E,), -1, dtype=torch.int32, device="cuda")
        expert_map[3:9] = torch.arange(6, dtype=torch.int32, device="cuda")
        for one in (None, expert_map):
            for ignore in (False, True):
                moe_align_block_size(ids, 16, E, one, ignore_invalid_experts=ignore)
                moe_align_block_size(ids.long(), 8, E, one, ignore_invalid_experts=ignore)
        count_expert_num_tokens(ids, 6, expert_map)
        remap_topk_to_local(ids, expert_map)
        x = torch.randn(T, 40, device="cuda", dtype=torch.float16)
        permuted = moe_permute(x, None, ids, E, 6, expert_map)
        weights = torch.rand(T, K, device="cuda")
        moe_unpermute(torch.empty_like(x), permuted[0], weights, permuted.inv_permuted_idx)
        moe_fused_mul_sum(torch.randn(T, K, 40, device="cuda"), weights, None, ids, expert_map)
        torch.cuda.synchronize()
        print("slots", T, flush=True)


def hopper(tokens: Sequence[int], part: Sequence[int]) -> None:
    """Every kernel of the Hopper experts, wherever one runs: each has its barriers."""
    if torch.cuda.get_device_capability()[0] != 9 or missing_gluon():
        print("no Hopper kernels here")
        return
    e, H, width, picks = 6, 272, 208, 3

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16) / 16

    w1, w2, w1_bias, w2_bias = (
        normal(e, 2 * width, H),
        normal(e, H, width),
        normal(e, 2 * width),
        normal(e, H),
    )
    for T in tokens:
        kinds: list[HopperTiles] = [
            decode_tiles_of(8, 64, 64),
            DecodeTiles(16, DecodeGemmTile(64, 128, 2), DecodeGemmTile(64, 128, 2)),
            decode_tiles_of(8, 32, 256),
            decode_tiles_of(64, 128, 256),
            decode_tiles(T * picks, e, H, width),
            replace(decode_tiles_of(8, 64, 64), draws_up=True),
            PrefillTiles(),
            PrefillTiles(stages=2, group=2),
        ]
        if T <= 5:
            kinds.append(direct_tiles(T, picks, H, width))
        ids = torch.randint(-1, e + 1, (T, picks), device="cuda", dtype=torch.int32)
        homes = torch.full((4 * e,), -1, dtype=torch.int32, device="cuda")
        homes[e : 2 * e] = torch.arange(e, dtype=torch.int32, device="cuda")
        spread = torch.randint(-1, 4 * e + 1, (T, picks), device="cuda", dtype=torch.int32)
        for tiles, mapped in share([*itertools.product(kinds, (False, True))], part):
            rows = scratch_rows(tiles, T * picks, e)
            work = ExpertsWork(
                torch.empty(T, H, device="cuda", dtype=torch.bfloat16),
                normal(T, H),
                w1,
                w2,
                torch.rand(T, picks, device="cuda"),
                spread if mapped else ids,
                MoEActivation.SWIGLUOAI,
                4 * e if mapped else e,
                homes if mapped else None,
                workspace13=torch.empty(rows, width, device="cuda", dtype=torch.bfloat16),
                workspace2=torch.empty(rows, H, device="cuda", dtype=torch.bfloat16),
            )
            hopper_experts(work, ApplyMoEActivationConfig(), w1_bias, w2_bias, tiles=tiles)
            torch.cuda.synchronize()
            print("hopper", T, type(tiles).__name__, "mapped" * mapped, flush=True)


def quantized(H: int, width: int, formats: list[str] | None) -> None:
    """The quantized GEMMs, Triton's and the streaming ones, format by format."""
    e, picks, act = 6, 3, MoEActivation.SWIGLUOAI
    streams = torch.cuda.get_device_capability()[0] == 9 and not missing_gluon()

    def weight(name: str, shards: int, *shape: int) -> QuantizedTensor:
        values, interleaved = torch.randn(shape, device="cuda") / 16, shards == 2
        return quantize(values, format_named(name), shards=shards, interleaved=interleaved)

    for name, rows in (
        *((name, None) for name in ("int4_g32", "int4_g32_zp", "int4_channel", "mxfp4")),
        ("nvfp4", None),
        *(("int8_g32", None), ("fp8_block", None), ("fp8_block", FP8_DYNAMIC_128)),
        *(("fp8_channel", FP8_DYNAMIC_TOKEN), ("int8_channel", INT8_DYNAMIC_TOKEN)),
    ):
        if formats is not None and name not in formats:
            continue
        operands = Operands(
            weight(name, 2, e, 2 * width, H),
            weight(name, 1, e, H, width),
            rows,
            rows,
            w1_bias=torch.randn(e, 2 * width, device="cuda"),
            w2_bias=torch.randn(e, H, device="cuda"),
        )
        # 20: 16 slots a block, half of them empty in some.
        for T in (1, 5, 20, 300):
            x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
            ids = torch.randint(-1, e + 1, (T, picks), device="cuda", dtype=torch.int32)
            weights, R = torch.rand(T, picks, device="cuda"), T * picks
            act_rows = torch.empty(R, width, device="cuda", dtype=torch.bfloat16)
            y, out = torch.empty(R, H, device="cuda"), torch.empty_like(x)
            config, halves = ApplyMoEActivationConfig(), y.view(torch.bfloat16)
            pair = operands.w1, operands.w2
            work = ExpertsWork(
                *(out, x, pair[0].data, pair[1].data, weights, ids, act, e),
                workspace13=act_rows,
                workspace2=halves,
            )
            quantized_experts(work, operands, config)
            if rows is None:
                work = work._replace(output=out.half(), hidden_states=x.half())
                work = work._replace(workspace13=act_rows.half(), workspace2=halves.half())
                quantized_experts(work, operands, config)
            if streams and runs_decode(R, e, operands, x, None):
                layer = LayerTensors(
                    *(x, *pair, weights, ids, out, act_rows, y, 132, act, None),
                    w1_bias=operands.w1_bias,
                    w2_bias=operands.w2_bias,
                )
                if rows is not None:
                    w8a8_decode(layer._replace(y=y.bfloat16()), (rows, rows), (None, None))
                else:
                    for lone in (False, True)[: 1 + (R <= MAX_LONE_SLOTS)]:
                        tiles = decode_tiles_for(R, *pair, lone, 132)
                        table = moe_align_block_size(ids, tiles.slots, e)
                        blocks = LoneSlots(ids.flatten()) if lone else MoEAlignment(*table[:3])
                        quantized_decode(layer, blocks, tiles)
                    if T == 1:
                        quantized_decode(layer)  # in one launch, where that reads the format
            if streams and rows is not None and not unmet_by_prefill(*pair, (rows, rows)):
                P = prefill_rows(R, e)
                prefilled = torch.empty(P, width, device="cuda", dtype=torch.bfloat16)
                second = torch.empty(P, H, device="cuda", dtype=torch.bfloat16)
                layer = LayerTensors(x, *pair, weights, ids, out, prefilled, second, 132, act)
                fp8_prefill(layer, (rows, rows), (None, None))
                print("prefill", end=" ")
            if streams and rows is None and not unmet_by_mixed_prefill(*pair):
                bits = operands.w1.format.bits, operands.w2.format.bits
                for slots in (1, 100, 1000):
                    wide = wide_rows(*(w.format for w in pair))
                    mixed_tiles = mixed_prefill_tiles(slots, 1, bits, wide=wide)
                    P = mixed_prefill_rows(R, e, mixed_tiles)
                    wide_dtype = torch.float32 if wide else torch.bfloat16
                    layer = LayerTensors(
                        *(x, *pair, weights, ids, out),
                        torch.empty(P, width, device="cuda", dtype=torch.bfloat16),
                        torch.empty(P, H, device="cuda", dtype=wide_dtype),
                        *(132, act, None, operands.w1_bias, operands.w2_bias),
                    )
                    mixed_prefill(layer, mixed_tiles)
                print("mixed prefill", end=" ")
            torch.cuda.synchronize()
            print("quantized", name, rows, T, flush=True)


def packed(H: int, width: int, formats: list[str] | None) -> None:
    """Superblocks, six bits, tables, act-order (sorted and not), int4 by fp8, emulated rows."""
    e, picks, act = 6, 3, MoEActivation.SILU

    def weight(name: str, shards: int, N: int, D: int) -> QuantizedTensor:
        fmt = format_named(name)
        if name in CODECS:
            raw = torch.randint(0, 256, (e, N, fmt.data_columns(D)), dtype=torch.uint8)
            # Each two bytes of a small number.
            raw.view(e, N, D // CODECS[name].columns, -1)[..., CODECS[name].floats] = 16
            shape = (e, N, D)
            return QuantizedTensor(
                format=fmt, data=raw.cuda(), scale=None, shape=shape, shards=shards
            )
        index = None
        if fmt.act_order:
            order = torch.rand(e, 1, D, device="cuda").argsort(-1) // fmt.group.col
            index = order.int().expand(e, shards, D).contiguous()
        values = torch.randn(e, N, D, device="cuda") / 16
        return quantize(values, fmt, shards=shards, group_index=index)

    for name, rows, emulate in (
        *((name, None, False) for name in CODECS),
        *((name, None, False) for name in ("mxfp6_e3m2", "mxfp6_e2m3", "nf4", "iq4_nl")),
        *(("int4_g32_zp_act_order", None, False), ("int8_g32_act_order", None, False)),
        *(("int4_g64", FP8_DYNAMIC_TOKEN, False), ("int4_channel_zp", FP8_DYNAMIC_TOKEN, False)),
        *(("mxfp4", MXFP4_DYNAMIC, True), ("nvfp4", NVFP4_DYNAMIC, True)),
    ):
        fmt = format_named(name)
        if formats is not None and name not in formats:
            continue
        if width % max(1, fmt.group.col) or width % fmt.values or H % fmt.values:
            continue
        pair = weight(name, 2, 2 * width, H), weight(name, 1, H, width)
        operands = Operands(*pair, rows, rows, emulate=emulate)
        known = sorted_operands(operands)
        ways = [known, *[as_they_lie(operands)] * fmt.act_order]
        for T in (1, 5, 300):
            ids = torch.randint(-1, e + 1, (T, picks), device="cuda", dtype=torch.int32)
            weights, R = torch.rand(T, picks, device="cuda"), T * picks
            for dtype in (torch.bfloat16, torch.float16):
                x = torch.randn(T, H, device="cuda", dtype=dtype)
                act_rows = torch.empty(R, width, device="cuda", dtype=dtype)
                y, out = torch.empty(R, 2 * H, device="cuda", dtype=dtype), torch.empty_like(x)
                config = ApplyMoEActivationConfig()
                work = ExpertsWork(
                    *(out, x, pair[0].data, pair[1].data, weights, ids, act, e),
                    workspace13=act_rows,
                    workspace2=y,
                )
                for way in ways:
                    quantized_experts(work, way, config)
            torch.cuda.synchronize()
            print("packed", name, rows, T, flush=True)


def bounded(part: Sequence[int]) -> None:
    """Megatron's function: without a table and with one, in Triton and, where it fits, Hopper's."""
    e, picks, first = 6, 3, 5
    shapes = (
        *((1, 272, 1), (7, 250, 1), (7, 272, 7), (300, 250, 9), (900, 272, 900)),
        (1500, 250, 1500),
    )
    for (T, H, hint), activation in share([*itertools.product(shapes, ActivationType)], part):
        ups, width = 2 if activation is ActivationType.SWIGLU else 1, H - 64
        x, w1, w2 = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) / 16
            for shape in ((T, H), (e, ups * width, H), (e, H, width))
        )
        vllm_fused_moe(
            x,
            torch.rand(T, picks, device="cuda"),
            w1,
            w2,
            activation,
            e,
            first,
            torch.tensor(max(1, T - 2), dtype=torch.int32, device="cuda"),
            torch.randint(-1, first + e + 3, (T, picks), device="cuda"),
            num_tokens_hint=hint,
        )
        torch.cuda.synchronize()
        print("bounded", T, H, hint, activation.value, flush=True)


def push_rows(view: PeerView, rows: int, weights: tuple[torch.Tensor, ...]) -> None:
    """The kernels for many tokens, whose second product stores at the tokens' ranks."""
    w1, w2, w1_bias, w2_bias = weights
    got, taker = view.received(rows), PeerSums.make(view, rows, takes_picks=True)
    P, (e, H, width) = prefill_rows(got.topk_ids.numel(), w2.shape[0]), w2.shape
    ids = torch.where(got.topk_ids < e, got.topk_ids, -1)
    act, y = (
        torch.empty(P, columns, device="cuda", dtype=torch.bfloat16) for columns in (width, H)
    )
    layer = LayerTensors(got.hidden_states, w1, w2, None, ids, taker, act, y, 132)
    hopper_prefill(layer._replace(w1_bias=w1_bias, w2_bias=w2_bias))
    assert taker.pushed


def ranks() -> None:
    """Dispatch, sums left, sent, or made of pushed rows, and combine between four ranks that live
    on this GPU, an epoch each.

    Flags that nobody raises meanwhile are raised here: a wait sees them at its first look.
    """
    world, rows, H = 4, 5, 160
    hopper = torch.cuda.get_device_capability()[0] == 9 and not missing_gluon()
    shapes = (7, 2 * 96, H), (7, H, 96), (7, 2 * 96), (7, H)
    layer = tuple(torch.randn(s, device="cuda", dtype=torch.bfloat16) / 16 for s in shapes)
    owners = torch.tensor([0, 0, 1, 1, 2, 3, 0], dtype=torch.int32, device="cuda")
    for key in (None, fp8_dynamic_group(32), INT8_DYNAMIC_TOKEN):
        layout = PeerLayout(world, rows, H, K, torch.bfloat16, key)
        buffers = torch.zeros(world, layout.nbytes, dtype=torch.uint8, device="cuda")
        own = [buffer.clone() for buffer in buffers]  # an allocation each
        bases = torch.tensor([buffer.data_ptr() for buffer in own], device="cuda")
        words = torch.zeros(2, 4, dtype=torch.int32, device="cuda")
        words[0, 0] = 1
        views = [
            PeerView(layout, rank, bases, own[rank], words[0].clone(), words[1, :1].clone())
            for rank in range(world)
        ]
        for way in ("left", "sent", "pushed"):
            ids = [
                torch.randint(-1, 9, (T, K), device="cuda", dtype=torch.int32) for T in (5, 3, 0, 2)
            ]
            for view, mine in zip(views, ids, strict=True):
                x = torch.randn(mine.shape[0], H, device="cuda", dtype=torch.bfloat16)
                weights = torch.rand(mine.shape, device="cuda")
                dispatch(x, mine, weights, owners, view, rows, timeout_us=10**6, wait=False)
            for view in views:
                wait_for_dispatch(view, timeout_us=10**6)
                got = view.received(rows)
                y = torch.randn(world * rows * K, H, device="cuda", dtype=torch.bfloat16)
                if way == "pushed" and key is None and hopper:
                    push_rows(view, rows, layer)
                elif way == "pushed":
                    inboxes = [one.received(rows).picks for one in views]
                    held = [inbox for inbox in inboxes if inbox is not None]
                    push_rows_reference(held, y, got.topk_ids, layout, rows)
                elif way == "sent":
                    send_sums(PeerSums.make(view, rows), y, got.topk_weights, got.topk_ids)
                else:
                    moe_fused_mul_sum(y.view(-1, K, H), got.topk_weights, got.outputs, got.topk_ids)
            for view in views:
                announce_outputs(view, way == "pushed")
            for view, mine in zip(views, ids, strict=True):
                out = torch.empty(mine.shape[0], H, device="cuda", dtype=torch.bfloat16)
                wait_for_outputs(view, timeout_us=10**6)
                if way == "pushed":
                    weights = torch.rand(mine.shape, device="cuda")
                    add_picks(
                        out, mine, weights, owners, view, rows,
                        pushed=True, timeout_us=10**6, announce=False,
                    )  # fmt: skip
                else:
                    sent = way == "sent"
                    combine(
                        out, mine, owners, view, rows, sent=sent, timeout_us=10**6, announce=False
                    )
        torch.cuda.synchronize()
        assert not any(view.error.item() for view in views)
        print("ranks", key, flush=True)


def batched() -> None:
    """Rows laid out per expert, of floats and of packed weights."""
    for H, width in ((272, 208), (256, 128)):
        for fmt in (None, "int4_g16", "int8_channel", "fp8_channel"):
            for T in (1, 7):
                options = MoEOptions(prepare_finalize="batched")
                with torch.device("cuda"):
                    layer = FusedMoE(
                        *(E, K, H, width),
                        params_dtype=torch.bfloat16,
                        max_num_tokens=8,
                        options=options,
                    )
                for weight in layer.parameters():
                    weight.data.normal_(std=0.1)
                if fmt is not None:
                    quantize_layer(layer, fmt)
                x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
                layer(x, torch.randn(T, E, device="cuda"))
                torch.cuda.synchronize()
                print("batched", H, fmt, T, flush=True)


def experts(quick: bool, part: Sequence[int]) -> None:
    cases = (*STANDARD_CASES[::3], *ACTIVATION_CASES[::4]) if quick else STANDARD_CASES
    for cls in (TritonExperts, GroupedMMExperts):
        given = share(cases, part)
        for result in check_experts(cls, given, device="cuda", dtypes=(torch.bfloat16,)):
            print(cls.name, result, flush=True)


def activations() -> None:
    for case in ACTIVATION_CASES:
        x = torch.randn(5, 48, device="cuda", dtype=torch.bfloat16)
        width = 24 if case.activation.is_gated else 48
        out = torch.empty(5, width, device="cuda", dtype=torch.bfloat16)
        moe_activation(case.activation, out, x, case.numbers)


def of_sizes(
    run: Callable[[int, int, list[str] | None], None],
    sizes: Sequence[tuple[int, int]],
    args: argparse.Namespace,
) -> None:
    for H, width in share(sizes, args.part):
        run(H, width, args.formats)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "hopper": lambda args: hopper(args.tokens, args.part),
    # Masked loads, and whole steps.
    "quantized": lambda args: of_sizes(quantized, ((288, 160), (256, 256)), args),
    "packed": lambda args: of_sizes(packed, ((288, 160), (512, 256)), args),
    "ranks": lambda _: ranks(),
    "batched": lambda _: batched(),
    "routing": lambda _: routing(),
    "gate": lambda _: gate(),
    "long_gate": lambda _: long_gate(),
    "slots": lambda _: slots(),
    "bounded": lambda args: bounded(args.part),
    "activations": lambda _: activations(),
    "experts": lambda args: experts(args.quick, args.part),
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a third of the experts' cases")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], help="these alone")
    parser.add_argument("--tokens", nargs="+", type=int, default=(1, 5, 300), help="of hopper's")
    parser.add_argument("--formats", nargs="+", help="of quantized and packed, these alone")
    parser.add_argument("--part", nargs=2, type=int, default=(0, 1), metavar=("NUMBER", "PARTS"))
    args = parser.parse_args(words)
    torch.manual_seed(0)
    for name in args.only:
        PARTS[name](args)
    torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
