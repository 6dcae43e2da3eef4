"""What can be known of the 8-bit prefill kernels without a GPU: that their roles hand each tile on,
where their scales lie, and what their launcher refuses."""

import threading
import time
import types
from dataclasses import replace
from functools import partial

import pytest
import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.experts.hopper_quantized_choice import can_prefill
from fusedmoe.experts.quantized_operands import Operands
from fusedmoe.experts.torch_quantized import quantized_experts_reference
from fusedmoe.kernels.grouped_gemm_quantized import weight_addresses
from fusedmoe.kernels.hopper_fp8_prefill import fp8_prefill, unmet_by_prefill
from fusedmoe.kernels.hopper_prefill import align_rows, prefill_rows
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.kernels.peer_layout import LateRows, PeerLayout, PeerView
from fusedmoe.kernels.quantize import QuantizedRows, quantize_rows_reference
from fusedmoe.kernels.triton import hopper_fp8_prefill as kernels
from fusedmoe.kernels.triton.hopper_common import Scales
from fusedmoe.kernels.triton.hopper_fp8_prefill_common import BytesCase
from fusedmoe.quantization.config import FusedMoEQuantDesc
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.keys import (
    FP8_DYNAMIC_128,
    FP8_DYNAMIC_TENSOR,
    FP8_DYNAMIC_TOKEN,
    INT8_DYNAMIC_TOKEN,
    PER_TOKEN,
    GroupShape,
    QuantKey,
)
from fusedmoe.testing import nan_poison
from fusedmoe.tuning.quantized_tiles import QuantizedPrefillTiles
from gluon_threads import ROUNDING, Matrix, run

ROWS, STEP = 128, 128


class OnTensors:
    """Gluon's arithmetic on numbers and tensors; a pointer is a (tensor, offset) pair."""

    @staticmethod
    def minimum(x, y):
        return torch.as_tensor(x).clamp(max=y)

    @staticmethod
    def maximum(x, y):
        return torch.as_tensor(x).clamp(min=y)

    @staticmethod
    def arange(start, end, layout):
        return torch.arange(start, end)

    @staticmethod
    def load(pointer, mask=True, other=0.0):
        offset = torch.where(torch.as_tensor(mask), torch.as_tensor(pointer.offset), 0)
        return torch.where(torch.as_tensor(mask), pointer.tensor.reshape(-1)[offset], other)


class Pointer:
    def __init__(self, tensor, offset=0):
        self.tensor, self.offset = tensor, offset

    def __add__(self, more):
        return Pointer(self.tensor, self.offset + more)


class Number(int):
    def to(self, dtype):
        return self


def device_function(name):
    """The body of a device function, to be run on tensors."""
    from fusedmoe.kernels.triton import hopper_fp8_prefill_common

    function = getattr(hopper_fp8_prefill_common, name).fn
    numbers = {"int64": torch.int64, "float32": torch.float32}
    names = {"gl": type("gl", (OnTensors,), numbers), "TILE_N": 128}
    inner = {"load_weight_scales": "load_both", "load_both": "load_features"}.get(name)
    if inner is not None:
        names[inner] = device_function(inner)
    return types.FunctionType(function.__code__, function.__globals__ | names)


def weights(fmt, E, N, D, shards=1, interleaved=False):
    values = torch.randn(E, N, D)
    return quantize(values, format_named(fmt), shards=shards, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fmt", ["fp8_block", "fp8_channel", "fp8_tensor", "int8_channel"])
@pytest.mark.parametrize("I", [256, 208])
def test_scales_lie_where_the_kernels_read_them(fmt, interleaved, I):  # noqa: E741
    """data * scale, found as ``scale_row`` finds it, is what the weights dequantize to."""
    w = weights(fmt, 2, 2 * I, 384, shards=2, interleaved=interleaved)
    exact = w.dequantize(torch.float32)
    scale_row = device_function("scale_row")
    scales = Scales(Pointer(w.scale), *weight_addresses(w)[4:])
    columns = torch.arange(384) // STEP if fmt == "fp8_block" else torch.zeros(384).long()
    feature = torch.arange(I)
    for expert in range(2):
        for shard in range(2):
            at = scale_row(scales, Number(expert), shard, feature, I).offset
            scale = w.scale.reshape(-1)[at[:, None] + columns]
            rows = feature * 2 + shard if interleaved else shard * I + feature
            found = w.data[expert, rows].float() * scale
            torch.testing.assert_close(found, exact[expert, rows])
    past = scale_row(scales, Number(0), 0, torch.tensor(I + 5), I).offset
    assert past == scale_row(scales, Number(0), 0, torch.tensor(I - 1), I).offset


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fmt", ["fp8_channel", "fp8_tensor", "int8_channel"])
@pytest.mark.parametrize("I", [256, 208])
def test_scales_of_whole_rows_lie_where_epilogues_read_them(fmt, interleaved, I):  # noqa: E741
    w = weights(fmt, 2, 2 * I, 64, shards=2, interleaved=interleaved)
    exact = w.dequantize(torch.float32)
    load = device_function("load_weight_scales")
    given = {"STAGES": 4, "GROUP_M": 8, "STEPPED": False, "PROMOTED": 2, "PER_SCALE": 0}
    given |= {"BY_FEATURE": w.scale.dim() == 3, "INTERLEAVED": interleaved}
    case = BytesCase(I, 64, GATED=True, **given)
    for expert in range(2):
        for column in range(0, I, 128):
            feature = torch.arange(column, min(column + 128, I))
            found = load(Pointer(w.scale), Number(expert), column, case)
            for shard, scale in enumerate(found):
                scale = scale.expand(128)
                if w.scale.dim() == 3:
                    assert (scale[len(feature) :] == 0).all()
                rows = feature * 2 + shard if interleaved else shard * I + feature
                value = w.data[expert, rows].float() * scale[: len(feature), None]
                torch.testing.assert_close(value, exact[expert, rows])


PAIRS_OF_STEPS = QuantizedPrefillTiles(promoted=(2, 2))
MOSTLY_EMPTY = QuantizedPrefillTiles(group=1, finely=True, box=16)


def as_the_kernels_do(
    x, w1, w2, ids, key, monkeypatch, programs=3, late=None, tiles=PAIRS_OF_STEPS
):
    """(y [P, H], position [R]) by up_kernel's and down_kernel's own source, silu. ``late``: x in 8
    bits, not yet there, and its scales."""
    (e, H, I), R = w2.shape, ids.numel()  # noqa: E741
    P = prefill_rows(R, e)
    rows, scales = late or quantize_rows_reference(x, key)
    _, tables, arrivals = align_rows(rows, ids, e, None)
    act, y = torch.full((P, I), 7.0).bfloat16(), torch.full((P, H), float("nan")).bfloat16()
    position = torch.full((R,), -1, dtype=torch.int32)

    def launcher(kernel):
        def launch(programs, matrices, tensors, numbers, constants, **options):
            views = [Matrix(view, memory_of(view)) for view in matrices]
            run(kernel, programs, (*views, *tensors, *numbers, *constants), ROUNDING)

        return launch

    def memory_of(view):
        for memory in (w1.data, w2.data, y, act.view(w2.data.dtype)):
            if 0 <= view.base.data_ptr() - memory.data_ptr() < memory.nbytes:
                return memory
        raise AssertionError("a view of nothing")

    for name in ("up", "down"):
        kernel = getattr(kernels, f"{name}_kernel")
        monkeypatch.setattr(kernels, f"_launch_{name}", launcher(kernel))
    given = LayerTensors(x, w1, w2, None, ids, y, act, y, programs)
    made = kernels.up(
        given, QuantizedRows(rows, scales), position, key, None, tables, tiles, arrivals
    )
    kernels.down(given, made, tables, tiles)
    return y.float(), position


def layer(fmt, e=3, H=384, I=208, shards=2):  # noqa: E741
    return weights(fmt, e, shards * I, H, shards=shards), weights(fmt, e, H, I)


def scratch(T, K, e, H, I):  # noqa: E741
    P = prefill_rows(T * K, e)
    return {
        "out": torch.zeros(T, H, dtype=torch.bfloat16),
        "act": torch.zeros(P, I, dtype=torch.bfloat16),
        "y": torch.zeros(P, H, dtype=torch.bfloat16),
    }


@pytest.mark.parametrize(
    ("fmt", "key", "tiles"),
    [
        ("fp8_block", FP8_DYNAMIC_128, PAIRS_OF_STEPS),
        ("fp8_channel", FP8_DYNAMIC_TOKEN, PAIRS_OF_STEPS),
        ("fp8_block", FP8_DYNAMIC_128, MOSTLY_EMPTY),
        ("int8_channel", INT8_DYNAMIC_TOKEN, MOSTLY_EMPTY),
    ],
    ids=str,
)
@pytest.mark.parametrize("programs", [1, 5, 40])
def test_drawn_tiles_add_up_to_the_definition(programs, fmt, key, tiles, monkeypatch):
    """Full, half-empty and missing blocks, and more programs than there are tiles."""
    torch.manual_seed(0)
    T, K, H, I = 150, 2, 384, 208  # noqa: E741
    w1, w2 = layer(fmt, H=H, I=I)
    x = torch.randn(T, H).bfloat16()
    ids = torch.randint(-1, 4, (T, K), dtype=torch.int32)
    ids[40:, 0] = 0
    picked = torch.rand(T, K)
    given = scratch(T, K, 3, H, I)
    call = LayerTensors(x, w1, w2, picked, ids, programs=7, **given)
    fp8_prefill(call, (key, key), (None, None), tiles)
    y, position = as_the_kernels_do(x, w1, w2, ids, key, monkeypatch, programs, tiles=tiles)
    live = (ids >= 0) & (ids < 3)
    assert ((position >= 0).view(T, K) == live).all()
    rows = torch.where(live[:, :, None], y[position.clamp(min=0)].view(T, K, H), 0.0)
    expected = (rows * picked[:, :, None]).sum(1)
    error = (given["out"].float() - expected).norm() / expected.norm()
    assert error < 5e-3


@pytest.mark.parametrize("programs", [1, 5, 40])
def test_tiles_wait_for_rows_that_come_late(programs, monkeypatch):
    """Those of three other ranks, one after the other; each one's flag says that they are there."""
    torch.manual_seed(0)
    world, me, T, K, H, I, epoch = 4, 2, 40, 2, 384, 208, 7  # noqa: E741
    key, (w1, w2) = FP8_DYNAMIC_128, layer("fp8_block", H=H, I=I)
    x = torch.randn(world * T, H).bfloat16()
    ids = torch.randint(-1, 4, (world * T, K), dtype=torch.int32)
    ids[:, 0] = 0
    expected, position = as_the_kernels_do(x, w1, w2, ids, key, monkeypatch, programs)
    wanted = expected[position[position >= 0]]

    layout = PeerLayout(world, T, H, K, torch.bfloat16, key)
    own = torch.zeros(layout.nbytes, dtype=torch.uint8)
    state = torch.tensor([epoch, epoch, 0, 0], dtype=torch.int32)
    view = PeerView(layout, me, torch.zeros(world).long(), own, state, torch.zeros(1).int())
    rows, scales = quantize_rows_reference(x, key)
    late, late_scales = rows.clone(), scales.clone()
    others = torch.arange(world * T) // T != me
    late.view(torch.uint8)[others] = 0x7F
    late_scales[others] = float("nan")
    arriving = LateRows.over(late, view, 1 << 60, None)
    flags = own[layout.row_flags_at :][: 4 * world].view(torch.int32)

    def bring():
        for rank in (0, 3, 1):
            time.sleep(0.05)
            part = slice(rank * T, rank * T + T)
            late.view(torch.uint8)[part] = rows.view(torch.uint8)[part]
            late_scales[part] = scales[part]
            flags[rank] = epoch

    thread = threading.Thread(target=bring)
    thread.start()
    found, place = as_the_kernels_do(
        x, w1, w2, ids, key, monkeypatch, programs, (arriving, late_scales)
    )
    thread.join()
    assert ((place >= 0) == (position >= 0)).all()
    assert torch.equal(found[place[place >= 0]], wanted)
    assert view.error.item() == 0


def test_a_rank_whose_rows_never_come_is_named(monkeypatch):
    """By the program that waited for them, once the time is over; the others do not wait again."""
    torch.manual_seed(0)
    T, K, H, me, epoch = 40, 2, 384, 0, 3
    key, (w1, w2) = FP8_DYNAMIC_128, layer("fp8_block", H=H, I=208)
    layout = PeerLayout(2, T, H, K, torch.bfloat16, key)
    own = torch.zeros(layout.nbytes, dtype=torch.uint8)
    state = torch.tensor([epoch, epoch, 0, 0], dtype=torch.int32)
    view = PeerView(layout, me, torch.zeros(2).long(), own, state, torch.zeros(1).int())
    rows, scales = quantize_rows_reference(torch.randn(2 * T, H).bfloat16(), key)
    arriving = LateRows.over(rows, view, 200_000, None)
    start = time.monotonic()
    ids = torch.zeros(2 * T, K, dtype=torch.int32)
    as_the_kernels_do(None, w1, w2, ids, key, monkeypatch, 3, (arriving, scales))
    assert 0.2 <= time.monotonic() - start < 10
    assert view.error.item() == view.state[2] == 2


@pytest.mark.parametrize("spread", [1.0, 64.0])
def test_token_rows_with_a_scale_per_tile_are_no_worse(spread):
    """act's columns vary by ``spread`` from one tile to the next, or not."""
    torch.manual_seed(1)
    T, K, H, I = 40, 2, 256, 512  # noqa: E741
    up = torch.randn(3, 2 * I, H) / 16
    up[:, I:] *= spread ** (torch.arange(I) // 128 % 2)[None, :, None]
    w1 = quantize(up, format_named("fp8_channel"), shards=2)
    w2 = weights("fp8_channel", 3, H, I)
    x = torch.randn(T, H).bfloat16()
    ids, picked = torch.randint(0, 3, (T, K), dtype=torch.int32), torch.rand(T, K)
    given, keys = scratch(T, K, 3, H, I), (FP8_DYNAMIC_TOKEN, FP8_DYNAMIC_TOKEN)
    fp8_prefill(LayerTensors(x, w1, w2, picked, ids, programs=7, **given), keys, (None, None))
    rows = FusedMoEQuantDesc(dtype=torch.float8_e4m3fn, shape=PER_TOKEN)
    reference = partial(quantized_experts_reference, x.double(), w1, w2, picked.double(), ids)
    exact, rounded = (reference(a1=a, a2=a, compute_dtype=torch.float64) for a in (None, rows))
    assert (given["out"].double() - exact).norm() <= 1.05 * (rounded - exact).norm()


@pytest.mark.parametrize("I", [48, 800])
def test_rounding_leaves_rows_alone_that_no_slot_has(I):  # noqa: E741
    from fusedmoe.kernels.triton.hopper_fp8_prefill import _round_rows

    R, P = 140, 384  # blocks of 128, 12 and no slots
    table = torch.full((P,), R, dtype=torch.int32)
    live = torch.arange(R)
    table[live] = live.int()
    act = torch.full((P, I), float("nan")).bfloat16()
    act[live] = torch.randn(R, I).bfloat16()
    with nan_poison():
        q, scale = _round_rows(act, table, R)
    expected, expected_scale = quantize_rows_reference(act[live], INT8_DYNAMIC_TOKEN)
    torch.testing.assert_close(scale[live, None], expected_scale)
    assert (q[live].int() - expected.int()).abs().max() <= 1
    assert scale[R:].isnan().all()  # poisoned memory that nobody has written


def test_what_the_kernels_cannot_multiply_is_named():
    both = FP8_DYNAMIC_128, FP8_DYNAMIC_128
    assert unmet_by_prefill(*layer("fp8_block"), both) is None
    assert unmet_by_prefill(*layer("int8_channel"), (INT8_DYNAMIC_TOKEN,) * 2) is None
    assert "wants scales per row" in unmet_by_prefill(*layer("fp8_block"), (FP8_DYNAMIC_TOKEN,) * 2)
    assert "does not run" in unmet_by_prefill(*layer("int4_g128", I=256), both)
    int8 = QuantKey(torch.int8, False, GroupShape(1, 128))
    assert "fp8 scales" in unmet_by_prefill(*layer("int8_g128", I=256), (int8, int8))
    assert "in time" in unmet_by_prefill(*layer("fp8_tensor"), (FP8_DYNAMIC_TENSOR,) * 2)
    w1, w2 = layer("fp8_block")
    x, ids = torch.zeros(4, 384).bfloat16(), torch.zeros(4, 2, dtype=torch.int32)
    call = LayerTensors(x, w1, w2, None, ids, programs=1, **scratch(4, 2, 3, 384, 208))
    none = None, None
    with pytest.raises(ValueError, match="expected"):
        fp8_prefill(call._replace(act=call.act[1:]), both, none)
    with pytest.raises(ValueError, match="contiguous"):
        fp8_prefill(call._replace(y=call.y.T.contiguous().T), both, none)
    q, scale = torch.zeros(4, 384, dtype=torch.float8_e4m3fn), torch.ones(4, 3)
    of_q = call._replace(x=q)
    fp8_prefill(of_q, both, none, x_scale=scale)
    assert can_prefill(Operands(w1, w2, *both), q, scale)
    for rows, scales in ((q, scale.T.contiguous().T), (q, scale[:, :1].expand(4, 3))):
        assert not can_prefill(Operands(w1, w2, *both), rows, scales)
    with pytest.raises(ValueError, match="x_scale must be contiguous"):
        fp8_prefill(of_q, both, none, x_scale=scale.T.contiguous().T)
    with pytest.raises(ValueError, match="x must be contiguous"):
        fp8_prefill(call._replace(x=q[:1].expand(4, 384)), both, none, x_scale=scale)
    with pytest.raises(ValueError, match="w2_bias"):
        fp8_prefill(call._replace(w2_bias=torch.ones(1, 384).expand(3, 384)), both, none)
    with pytest.raises(ValueError, match="shards"):
        fp8_prefill(call._replace(activation=MoEActivation.RELU2_NO_MUL), both, none)
    w1, w2 = layer("fp8_tensor")
    with pytest.raises(ValueError, match="cannot know"):
        fp8_prefill(call._replace(w1=w1, w2=w2), (FP8_DYNAMIC_TENSOR,) * 2, none)


def test_tiles_say_what_is_promoted_and_what_comes_next():
    from fusedmoe.tuning.quantized_tiles import prefill_tiles

    many = QuantizedPrefillTiles(promoted=(2, 0))
    assert prefill_tiles(1000, 8, 7168, 256, "e4m3") == many
    assert prefill_tiles(500, 8, 7168, 256, "e4m3") == replace(many, group=1, finely=True, box=16)
    assert prefill_tiles(1000, 8, 7168, 18432, "int8") == QuantizedPrefillTiles()
