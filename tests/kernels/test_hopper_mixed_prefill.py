"""What can be known of the prefill kernels for quantized weights without a GPU: their bit tricks,
which column and row a thread holds, the choice of tiles, and what their launcher refuses."""

import itertools
import re
import types
from pathlib import Path

import pytest
import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.kernels.hopper_mixed_prefill import (
    mixed_prefill,
    mixed_prefill_rows,
    unmet_by_mixed_prefill,
    wide_rows,
)
from fusedmoe.kernels.lane_order import lane_order
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.formats.lookup import CODECS, nf4_group
from fusedmoe.quantization.formats.minifloat import E2M3, E3M2
from fusedmoe.quantization.formats.mxfp6 import pack_sextets
from fusedmoe.testing.tolerances import relative_error
from fusedmoe.tuning.mixed_tiles import (
    MixedPrefillTile,
    MixedPrefillTiles,
    mixed_prefill_tiles,
    runs_mixed_prefill,
)

pytest.importorskip("triton")
from fusedmoe.kernels.triton import lane_order as triton_lane_order
from small_ptx import pair, run_ptx, words_of

BODIES = Path(__file__).parents[2] / "src" / "fusedmoe" / "kernels" / "triton"


NUMBERS, WORDS_OF_LANES = (
    (BODIES / f"hopper_mixed_{name}.py").read_text() for name in ("numbers", "words")
)
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat([E2M1, -E2M1])


def execute(function, *words):
    """What the inline assembly of a device function makes of words, as numbers of every output."""
    body = WORDS_OF_LANES[WORDS_OF_LANES.index(f"def {function}(") :]
    text = re.search(r'_(?:asm|elementwise)\(\s*"""(.*?)""",', body, re.DOTALL)[1]
    outputs = 2 if "{$0, $1}" in text else 4 if "$4" in text and "$5" not in text else 1
    text = text.replace("mov.b32 {$0, $1}, a", "mov.b32 $0, a; mov.b32 $1, a")
    return torch.stack([pair(word).float() for word in run_ptx(text, list(words), outputs)])


def selector(element, lane):
    """What ``selectors`` computes for a lane."""
    chosen = re.search(r"chosen = (.*)", NUMBERS[NUMBERS.index("def selectors(") :])[1]
    return eval(chosen, {"lane": lane, "ELEMENT": element})


WORDS = [0x76543210, 0xFEDCBA98, 0x1F2E3D4C, 0x807F01FE, 0]


@pytest.mark.parametrize("word", WORDS)
def test_a_lane_takes_pairs_of_nibbles_that_are_four_apart(word):
    nibbles = torch.tensor([[word >> 4 * (i + j) & 15 for j in (0, 4)] for i in range(4)])
    assert execute("take_int4", word).equal(nibbles + 128.0)
    assert (execute("take_e2m1", word) * 2.0**126).equal(E2M1[nibbles])


@pytest.mark.parametrize("lane", range(4))
@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("bits", [4, 5])
def test_a_lane_takes_its_columns_of_both_planes(bits, chunk, lane):
    """Of the 32 bytes of 64 columns: pairs of columns i and i + 4, in both halves; fifth bits lie
    in bytes of their own."""
    from fusedmoe.kernels.triton import hopper_mixed_planes as module

    integers = torch.randint(2**bits, (64,), dtype=torch.uint8)
    low, high = integers[:32], integers[32:]
    own = slice(2 * lane, 2 * lane + 2)
    given = words_of((low & 15) | high << 4)[own]
    if bits == 5:
        others = torch.randint(256, (32,), dtype=torch.uint8) & (255 ^ 3 << 2 * chunk)
        fifth = others | (low >> 4) << 2 * chunk | (high >> 4) << 2 * chunk + 1
        given += [*words_of(fifth)[own], 2 * chunk]
    taken = run_ptx(module.planes_asm(bits == 5), given, 8)
    found = torch.stack([pair(word).float() for word in taken])
    expected = integers.view(2, 4, 2, 4)[:, lane].transpose(1, 2).float() + 128
    assert found.view(2, 4, 2).equal(expected)


def test_a_number_times_its_scale_plus_a_term_is_rounded_once():
    pairs = torch.tensor([128.0, 143.0]).bfloat16()
    scale, term = torch.tensor([0.0123, -0.0123 * 128 - 0.05]).unbind()
    body = WORDS_OF_LANES[WORDS_OF_LANES.index("def times_plus(") :]
    text = re.search(r'_(?:asm|elementwise)\(\s*"""(.*?)""",', body, re.DOTALL)[1]
    text = text.replace("mov.b32 {$0, $1}, a", "mov.b32 $0, a; mov.b32 $1, a")
    word = run_ptx(text, [*words_of(pairs), *words_of(scale[None]), *words_of(term[None])], 2)[0]
    assert pair(word).equal((pairs.double() * scale + term).bfloat16())


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(("element", "lift"), [("nf4", 1.4367218017578125), ("iq4_nl", 1.0)])
def test_a_lane_takes_entries_of_nibbles_that_are_four_apart(element, lift, word):
    from fusedmoe.kernels.triton import hopper_mixed_words as module

    text = getattr(module, f"{element.upper()}_ASM").value
    found = torch.stack([pair(taken).float() for taken in run_ptx(text, [word], 4)])
    nibbles = torch.tensor([[word >> 4 * (i + j) & 15 for j in (0, 4)] for i in range(4)])
    entries = torch.tensor(CODECS[element].table) * lift
    assert found.equal(entries.bfloat16().float()[nibbles])


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("lane", range(2))
def test_a_lane_takes_two_neighbouring_bytes(word, lane):
    stored = torch.tensor([word >> 8 * (2 * lane + i) & 255 for i in range(2)], dtype=torch.uint8)
    taken = execute("take_int8", word, selector("int8", lane))[0]
    assert taken.equal(stored.view(torch.int8).float())
    taken = execute("take_e4m3", word, selector("e4m3", lane))[0]
    exact = stored.view(torch.float8_e4m3fn).float()
    assert taken.equal(torch.where(exact.isnan(), 480.0 * (1 - 2 * (stored > 127).float()), exact))


@pytest.mark.parametrize("lane", range(4))
@pytest.mark.parametrize(("kind", "short"), [(E3M2, 124), (E2M3, 126)], ids=["e3m2", "e2m3"])
def test_a_lane_takes_eight_columns_of_32_in_six_bits(kind, short, lane):
    """From the words of all boxes to its pairs of columns i and i + 4, in both halves of a step."""
    from fusedmoe.kernels.triton import hopper_mixed_sextets as module

    codes = torch.randint(64, (64,), dtype=torch.uint8)
    words = pack_sextets(codes).view(torch.int32)
    boxes = types.SimpleNamespace(index=lambda box: words[4 * box : 4 * box + 4])
    names = {"gl": OnTensors, "BOXES": 3, "four_words": lambda box, *_: box.unbind()}
    own = types.FunctionType(module.own.fn.__code__, names)
    load = types.FunctionType(module.load_sextets.fn.__code__, names | {"own": own})
    mine = load(boxes, 0, 0, torch.tensor(lane), 32)
    text = module.sextets_asm(2 if kind is E3M2 else 3)
    found = run_ptx(text, [int(word) & 0xFFFFFFFF for word in mine] + [lane % 2], 8)
    found = torch.stack([pair(word).float() for word in found]).view(2, 4, 2) * 2.0**short
    expected = kind.decode(codes, torch.float32).view(2, 4, 2, 4)[:, lane]
    assert found.equal(expected.transpose(1, 2))


@pytest.mark.parametrize("exponent", [0, 1, 64, 127, 191])
def test_e8m0_scales_are_powers_of_two(exponent):
    assert execute("power_pair", exponent)[0].tolist() == [2.0 ** (exponent - 127 + 63)] * 2


def test_e8m0_scales_past_bf16_and_nan_are_infinite():
    for exponent in (192, 254, 255):
        assert execute("power_pair", exponent)[0].tolist() == [float("inf")] * 2


@pytest.mark.parametrize("first", [0, 127, 191, 192, 255])
@pytest.mark.parametrize("second", [0, 1, 200])
def test_two_e8m0_scales_in_a_word(first, second):
    body = WORDS_OF_LANES[WORDS_OF_LANES.index("def power_pairs(") :]
    text = re.search(r'_(?:asm|elementwise)\(\s*"""(.*?)""",', body, re.DOTALL)[1]
    for place, half in enumerate(("low", "high")):
        text = text.replace(
            f"mov.b32 ${place}, {{{half}, {half}}}",
            f"prmt.b32 ${place}, a, 0, {('0x1010', '0x3232')[place]}",
        )
    text = text.replace("mov.b32 {low, high}, a;", "")
    found = run_ptx(text, [first | second << 8], 2)
    expected = [execute("power_pair", exponent)[0] for exponent in (first, second)]
    assert torch.stack([pair(word).float() for word in found]).equal(torch.stack(expected))


def test_numbers_of_eight_bits_are_rounded_once():
    """Times a scale in two parts they are what rounding the exact product gives; times the scale
    rounded before, which is what one part would be, they are further off."""
    torch.manual_seed(0)
    number = torch.randint(-127, 128, (400,)).float()
    scale = torch.rand(400) + 0.01
    factor = scale.bfloat16().float()
    rest = (scale - factor).bfloat16().float()

    def halves(x):
        return words_of(x.bfloat16().repeat_interleave(2))

    both = zip(halves(number), halves(factor), halves(rest), strict=True)
    found = torch.stack([execute("times_both", *words)[0, 0] for words in both])
    exact = number.double() * scale.double()
    twice = (number * factor).bfloat16().double()
    error = (found - exact).norm()
    assert error < 1.02 * (exact.bfloat16() - exact).norm()
    assert error < 0.8 * (twice - exact).norm()


class OnTensors:
    """Gluon's operations that only name or move values, and a few on single values, on tensors."""

    reshape = staticmethod(torch.reshape)
    permute = staticmethod(torch.permute)
    maximum = staticmethod(torch.maximum)
    abs = staticmethod(torch.abs)
    where = staticmethod(torch.where)

    @staticmethod
    def join(x, y):
        return torch.stack([x, y], -1)

    @staticmethod
    def split(x):
        return x[..., 0], x[..., 1]

    @staticmethod
    def convert_layout(x, layout, assert_trivial=False):
        return x

    @staticmethod
    def DotOperandLayout(*arguments):
        return None


def device_function(name):
    """The body of a device function, to be run on torch tensors."""
    from fusedmoe.kernels.triton import hopper_mixed_numbers, hopper_mixed_sums

    module = hopper_mixed_numbers if hasattr(hopper_mixed_numbers, name) else hopper_mixed_sums
    function = getattr(module, name).fn
    names = {"gl": OnTensors, "SIDE": 32, "STEP": 64, "float_scale": torch.Tensor.float}
    names["pairs_layout"] = lambda *sizes: None
    return types.FunctionType(function.__code__, function.__globals__ | names)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_nibbles_come_in_lane_order(count):
    """What ``in_chunks`` makes of each word's four pairs, and ``side`` of those; scales of groups
    of 16 columns meet their own columns."""
    column = torch.arange(64).view(8, 8).expand(32, 8, 8)  # of a row's words, 8 nibbles each
    halves = [
        device_function("in_chunks")(*column[..., first : first + 4].unbind(-1), count)
        for first in (0, 4)
    ]
    assert halves[0].shape == (32, count, 8 // count if count < 4 else 4, 4 if count < 4 else 2)
    if count > 1:
        groups = torch.arange(count).view(count, 1, 1)
        assert all((half // (64 // count) == groups).all() for half in halves)
    joined = device_function("ordered_columns")(*halves)
    order = lane_order(torch.arange(64.0)[None], torch.empty(1, 64))
    assert joined.equal(order.long().expand(32, 64))


@pytest.mark.parametrize("count", [1, 2])
def test_bytes_keep_their_order(count):
    """[32, scales, words, lanes] pairs, flattened, are the columns of a step."""
    column = torch.arange(64).view(1, count, 16 // count, 2, 2).expand(32, -1, -1, -1, -1)
    joined = device_function("ordered_columns")(column[..., 0], column[..., 1])
    assert joined.equal(torch.arange(64).expand(32, 64))


def test_lane_order():
    """Every 32 columns by themselves; rows may be strided, other sizes are refused."""
    x = torch.randn(5, 160)[:, :96]
    found = lane_order(x, torch.empty(5, 96))
    for j, t, h in itertools.product(range(4), range(4), range(2)):
        assert found[:, 8 * j + 2 * t + h :: 32].equal(x[:, 8 * t + 4 * h + j :: 32])
    launched = torch.full((5, 96), float("nan"))
    triton_lane_order.launch(x, launched)
    assert launched.equal(found)
    with pytest.raises(ValueError, match="not 40"):
        lane_order(torch.empty(5, 40), torch.empty(5, 40))
    with pytest.raises(ValueError, match=r"out is \(5, 95\)"):
        lane_order(x, torch.empty(5, 95))
    with pytest.raises(ValueError, match="dense"):
        lane_order(torch.empty(96, 5).T, torch.empty(5, 96))


def test_rows_of_low_and_high_alternate_in_eights_and_come_apart_again():
    low = torch.arange(32)[:, None].expand(32, 64)
    rows = device_function("fragment")(low, low + 32, None)[:, 0]
    eights = rows.view(4, 2, 8)
    assert eights[:, 0].flatten().equal(torch.arange(32))
    assert eights[:, 1].flatten().equal(torch.arange(32, 64))
    sums = rows[:, None].expand(64, 128).clone()
    low, high = device_function("sides")(sums)
    assert low[:, 5].equal(torch.arange(32))
    assert high[:, 5].equal(torch.arange(32, 64))
    assert device_function("together")(low, high, None).equal(sums)


@pytest.mark.parametrize("zeros", ["first", "middle", "last", "all", "none"])
def test_sums_in_units_of_their_scales_are_the_sums(zeros):
    """With scales of any size and sign and groups that are all zero, of 60 groups."""
    torch.manual_seed(0)
    scales = torch.randn(60, 32) * 2.0 ** torch.randint(-30, 3, (60, 32))
    at = {"first": slice(0, 9), "middle": slice(20, 50), "last": slice(50, 60), "none": slice(0, 0)}
    scales[at.get(zeros, slice(None))] = 0
    products = torch.randn(60, 32)
    unit = largest = torch.full((32,), 2.0**-60)
    sums = torch.zeros(32)
    for scale, product in zip(scales, products, strict=True):
        unit, largest, grown = device_function("next_unit")(unit, largest, scale)
        sums = sums * grown + product
    exact = (scales.double() * products).sum(0)
    assert sums.isfinite().all()
    assert (sums * unit - exact).abs().max() <= 2e-6 * exact.abs().max() + 1e-30


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [128, 192, 256])
def test_the_products_of_a_tile_have_all_of_its_rows(rows, gated):
    from fusedmoe.kernels.triton import hopper_mixed_multiply as module

    place, rows_of = module.place_of, module.rows_of.fn
    names = rows_of.__globals__ | {"SIDE": 32}
    rows_of = types.FunctionType(rows_of.__code__, names)
    room = 128 if rows == 128 else 256  # of words in the ring, the second half for up
    features = {}
    for index in range(rows // 64):
        for high in (0, 1):
            first, feature = place(index, room, gated, high), rows_of(0, index, rows, gated)[high]
            features |= {first + i: (high if gated else 0, feature + i) for i in range(32)}
    assert len(set(features.values())) == rows
    for place, (shard, feature) in features.items():
        assert place == (shard * room // 2 if gated else 0) + feature
        assert feature < (rows // 2 if gated else rows)


def layer(fmt, e=3, H=64, I=32, shards=2):  # noqa: E741
    torch.manual_seed(0)
    fmt = format_named(fmt) if isinstance(fmt, str) else fmt
    w1 = quantize(torch.randn(e, shards * I, H) / H**0.5, fmt, shards=shards)
    return w1, quantize(torch.randn(e, H, I) / I**0.5, fmt)


def scratch(T, K, e, H, I, wide=False):  # noqa: E741
    P = mixed_prefill_rows(T * K, e, mixed_prefill_tiles(T * K, e, (4, 4)))
    return {
        "out": torch.full((T, H), float("nan")).bfloat16(),
        "act": torch.full((P, I), float("nan")).bfloat16(),
        "y": torch.full((P, H), float("nan"), dtype=torch.float32 if wide else torch.bfloat16),
    }


@pytest.mark.parametrize("fmt", ["int4_g32", "mxfp4", "int8_channel", "iq4_nl"])
def test_the_reference_is_two_products_and_a_weighted_sum(fmt):
    w1, w2 = layer(fmt)
    T, K = 5, 2
    x, weights = torch.randn(T, 64).bfloat16(), torch.rand(T, K)
    ids = torch.tensor([[0, 1], [2, -1], [1, 2], [0, 9], [-1, -1]], dtype=torch.int32)
    given = scratch(T, K, 3, 64, 32, wide_rows(w1.format))
    tiles = mixed_prefill_tiles(T * K, 3, (w1.format.bits, w2.format.bits))
    mixed_prefill(LayerTensors(x, w1, w2, weights, ids, programs=1, **given), tiles)
    expected = torch.zeros(T, 64)
    gate_up, down = w1.dequantize(torch.float32), w2.dequantize(torch.float32)
    for t in range(T):
        for k in range(K):
            if 0 <= ids[t, k] < 3:
                gate, up = (x[t].float() @ gate_up[ids[t, k]].T).chunk(2)
                act = (torch.nn.functional.silu(gate) * up).bfloat16().float()
                expected[t] += weights[t, k] * (act @ down[ids[t, k]].T)
    assert relative_error(given["out"], expected).frobenius < 5e-3
    assert given["out"][4].eq(0).all()


def test_what_the_kernels_cannot_read_is_named():
    for fmt in ("int4_g32", "int4_g32_zp", "int4_channel", "nvfp4", "mxfp8", "int8_channel"):
        assert unmet_by_mixed_prefill(*layer(fmt)) is None
    assert unmet_by_mixed_prefill(*layer("mxfp6_e3m2", I=64)) is None
    assert "64 columns, got 32" in unmet_by_mixed_prefill(*layer("mxfp6_e3m2", I=32))
    for fmt in ("nf4", "iq4_nl"):
        assert unmet_by_mixed_prefill(*layer(fmt, I=64)) is None
    assert "at least 64 columns" in unmet_by_mixed_prefill(*layer(nf4_group(32), I=64))
    assert "int8" in unmet_by_mixed_prefill(*layer("int8_g32_zp"))
    assert "multiple" in unmet_by_mixed_prefill(*layer("int4_channel", I=8))
    w1, w2 = layer("int4_g32")
    object.__setattr__(w1, "scale", w1.scale.transpose(0, 1).contiguous().transpose(0, 1))
    assert "scale to be contiguous" in unmet_by_mixed_prefill(w1, w2)
    w1, w2 = layer("mxfp4")
    odd = torch.zeros(w1.scale.numel() + 1, dtype=torch.uint8)[1:].view(w1.scale.shape)
    object.__setattr__(w1, "scale", odd)
    assert "even addresses" in unmet_by_mixed_prefill(w1, w2)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x": torch.zeros(4, 64)}, "x is"),
        ({"act": torch.zeros(9, 32).bfloat16()}, "act is"),
        ({"y": torch.zeros(9, 64).bfloat16()}, "y is"),
        ({"out": torch.zeros(4, 63).bfloat16()}, "out is"),
        ({"topk_weights": torch.zeros(4, 3)}, "topk_weights is"),
        ({"activation": MoEActivation.SILU_NO_MUL}, "shards"),
        ({"x": torch.zeros(4, 72).bfloat16()[:, :64]}, "72"),
        ({"w1_bias": torch.zeros(64, 3).T}, "w1_bias is"),
    ],
)
def test_what_does_not_fit_is_refused(changed, words):
    w1, w2 = layer("int4_g32")
    given = {"x": torch.zeros(4, 64).bfloat16(), "topk_weights": None, **scratch(4, 2, 3, 64, 32)}
    ids = torch.zeros(4, 2, dtype=torch.int32)
    given |= {"programs": 1} | changed
    call = LayerTensors(w1=w1, w2=w2, topk_ids=ids, **given)
    with pytest.raises(ValueError, match=words):
        mixed_prefill(call, mixed_prefill_tiles(8, 3, (4, 4)))


def test_tiles():
    means = 48, 49, 128, 129
    found = [mixed_prefill_tiles(mean * 8, 8, (4, 8)) for mean in means]
    shapes = [(tiles.gemm1.rows, tiles.gemm1.slots) for tiles in found]
    assert shapes == [(256, 64), (192, 128), (192, 128), (128, 256)]
    wide = [mixed_prefill_tiles(mean * 8, 8, (4, 4), wide=True) for mean in means]
    for tiles in found + wide:
        tiles.check()
        bytes_written = (64, 64) if tiles in found else (64, 128)
        for tile, words, bytes_of_row in zip(
            [*tiles[:2], *(tiles.tails or ())],
            (8, 16 if tiles in found else 8) * 2,
            bytes_written * 2,
            strict=False,
        ):
            room = 128 if tile.rows == 128 else 256
            ring = tile.stages * tile.steps * (room * words * 4 + tile.slots * 128)
            written = tile.rows // 64 * 2 * max(tile.slots // 2, 64) * bytes_of_row
            assert ring + written + 512 <= 227 * 1024
    assert runs_mixed_prefill(128, 8)
    assert not runs_mixed_prefill(127, 8)
    assert runs_mixed_prefill(64, 8, streams=False)
    assert runs_mixed_prefill(256, 8, streams=False, minima=True)
    assert not runs_mixed_prefill(255, 8, streams=False, minima=True)
    assert mixed_prefill_tiles(97 * 8, 8, (4, 4), costly=True).tails is not None
    with pytest.raises(ValueError, match="128 by 128"):
        MixedPrefillTile(128, 128, 1, 8, 4)
    with pytest.raises(ValueError, match="one or two steps, not 3"):
        MixedPrefillTile(128, 256, 3, 8, 4)
    with pytest.raises(ValueError, match="1 stages"):
        MixedPrefillTile(128, 256, 1, 8, 1)
    w1, w2 = layer("int4_g32")
    unequal = MixedPrefillTiles(found[2].gemm1, found[3].gemm1)
    with pytest.raises(ValueError, match="tails of None"):
        MixedPrefillTiles(*found[3][:2]).check()
    with pytest.raises(ValueError, match=r"128 slots do not go with tails of \(128, 128\)"):
        MixedPrefillTiles(*found[2][:2], tails=found[2][:2]).check()
    x, ids = torch.zeros(4, 64).bfloat16(), torch.zeros(4, 2, dtype=torch.int32)
    call = LayerTensors(x, w1, w2, None, ids, programs=1, **scratch(4, 2, 3, 64, 32))
    with pytest.raises(ValueError, match="128 and 256 slots"):
        mixed_prefill(call, unequal)
