"""The Hopper experts where there is no Hopper GPU: refusals, launchers, compilation."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from expert_layers import Layer
from fusedmoe.experts import hopper
from fusedmoe.experts.hopper import HopperExperts
from fusedmoe.experts.hopper_support import readable
from fusedmoe.kernels.align import align_local_slots
from fusedmoe.kernels.hopper_decode import (
    DRAW_WORDS,
    decode_counters,
    decode_table,
    hopper_decode,
)
from fusedmoe.kernels.hopper_direct import hopper_direct
from fusedmoe.kernels.hopper_prefill import hopper_prefill, prefill_rows
from fusedmoe.kernels.layer_tensors import LayerTensors
from fusedmoe.modular_kernel import ExpertsWork, FusedMoEActivationFormat
from fusedmoe.tuning.hopper_tiles import hopper_tiles
from hopper_compiler import run_program

LAYER = Layer(T=3, K=2, E=4, H=48, I=32, dtype=torch.bfloat16)


def arguments(layer):
    tensors = layer.tensors()
    R = layer.T * layer.K
    x = tensors["hidden_states"]
    return {
        "x": x,
        "w1": tensors["w1"],
        "w2": tensors["w2"],
        "topk_weights": tensors["topk_weights"],
        "topk_ids": tensors["topk_ids"],
        "out": torch.full_like(x, float("nan")),
        "act": x.new_empty(R, layer.I),
        "y": x.new_empty(R, layer.H),
        "programs": 132,
    }, tensors


def test_a_cpu_is_refused():
    supported, reason = HopperExperts.is_supported_config(
        LAYER.config(), None, None, FusedMoEActivationFormat.Standard
    )
    assert not supported
    assert "cpu" in reason


@pytest.mark.parametrize("launch", [hopper_decode, hopper_direct, hopper_prefill])
def test_on_a_cpu_the_launchers_are_the_definition(launch):
    given, tensors = arguments(LAYER)
    if launch is hopper_prefill:
        rows = prefill_rows(LAYER.T * LAYER.K, LAYER.E)
        given |= {"act": given["x"].new_empty(rows, 32), "y": given["x"].new_empty(rows, 48)}
    launch(LayerTensors(**given))
    expected = LAYER.expected(tensors)
    torch.testing.assert_close(given["out"].double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"act": torch.empty(5, 32, dtype=torch.bfloat16)}, r"act is \(5, 32\)"),
        ({"y": torch.empty(6, 48)}, "y is .*float32"),
        ({"out": torch.empty(3, 47, dtype=torch.bfloat16)}, r"out is \(3, 47\)"),
        ({"topk_weights": torch.ones(3, 1)}, r"topk_weights is \(3, 1\)"),
        ({"topk_ids": torch.zeros(2, 3, dtype=torch.int32).T}, "topk_ids must be contiguous"),
        ({"w1": torch.empty(4, 48, 64, dtype=torch.bfloat16).mT}, "w1 must be contiguous"),
        ({"x": torch.empty(3, 50, dtype=torch.bfloat16)[:, :48]}, "multiples of 16"),
        ({"w1": torch.empty(4, 64, 32, dtype=torch.bfloat16)}, r"w1 is \(4, 64, 32\)"),
        ({"w1_bias": torch.empty(4, 32)}, r"w1_bias is \(4, 32\)"),
        ({"w2_bias": torch.empty(1, 48).expand(4, 48)}, r"w2_bias is .* strides \(0, 1\)"),
        ({"topk_ids": torch.zeros(3, 65, dtype=torch.int32)}, "at most 64 picks .* got 65"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes, match):
    given, _ = arguments(LAYER)
    with pytest.raises(ValueError, match=match):
        hopper_decode(LayerTensors(**(given | changes)))


@pytest.mark.parametrize("sizes", [{"H": 40}, {"I": 24}, {"dtype": torch.float32}])
def test_sizes_that_the_kernels_cannot_tile_are_refused(sizes):
    given, _ = arguments(replace(LAYER, **sizes))
    with pytest.raises(ValueError, match=r"multiples of 16|float32"):
        hopper_decode(LayerTensors(**given))


def test_which_rows_are_read_where_they_are():
    x = torch.empty(6, 64, dtype=torch.bfloat16)
    assert readable(x)
    assert readable(x[:, 16:48])
    for other in (x[:, 3:19], x[:, ::2], x.T, x[:1].expand(6, 64), x.flatten()[1:321].view(5, 64)):
        assert not readable(other)


@pytest.mark.parametrize("T", [1, 3, 130])
def test_biases_and_maps_may_be_strided(T, monkeypatch):
    """The kernels read them without strides."""
    layer = replace(LAYER, T=T, local=2, bias=True)
    tensors = layer.tensors()
    expected = layer.expected(tensors)
    for name in ("w1_bias", "w2_bias", "expert_map"):
        tensors[name] = torch.stack((tensors[name], tensors[name] - 1), -1)[..., 0]
    monkeypatch.setattr(hopper, "multiprocessors_of", lambda device: 132)
    monkeypatch.setattr(hopper, "device_of", lambda tensor: nullcontext())
    out = torch.full_like(tensors["hidden_states"], float("nan"))
    tiles = hopper_tiles(T, layer.K, layer.E, 2, layer.H, layer.I)
    rows = hopper.scratch_rows(tiles, T * layer.K, 2)
    work = ExpertsWork(
        out,
        *(tensors[n] for n in ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")),
        layer.activation,
        layer.E,
        tensors["expert_map"],
        workspace13=out.new_empty(rows, layer.I),
        workspace2=out.new_empty(rows, layer.H),
    )
    biases = tensors["w1_bias"], tensors["w2_bias"]
    hopper.hopper_experts(work, layer.numbers, *biases, tiles=tiles)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("R", "block", "e"), [(1, 8, 1), (6, 8, 64), (128, 32, 8), (2048, 32, 128)]
)
def test_counters_lie_behind_the_table_of_slots(R, block, e):
    """One for every block that there can be, all of them padding when nobody has counted."""
    places, spare = decode_table(R, block, e)
    ids = torch.randint(0, e, (R, 1), generator=torch.Generator().manual_seed(0))
    tables = align_local_slots(ids, block, e, None, whole_blocks=True, spare_slots=spare)
    assert tables.num_tokens_post_pad <= places
    counters = decode_counters(tables.sorted_ids, R, block, e)
    assert counters.numel() >= DRAW_WORDS + tables.num_tokens_post_pad // block
    assert counters.numel() == spare
    assert (counters == R).all()
    assert counters.data_ptr() % 16 == tables.sorted_ids.data_ptr() % 16
    with pytest.raises(ValueError, match=f"no room for {spare} counters"):
        decode_counters(tables.sorted_ids[:-1], R, block, e)


def test_direct_takes_few_slots():
    given, _ = arguments(replace(LAYER, T=17))
    with pytest.raises(ValueError, match="17"):
        hopper_direct(LayerTensors(**given))


COMPILE = """
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from fusedmoe.kernels.triton import hopper_decode, hopper_direct, hopper_prefill
from fusedmoe.kernels.triton.hopper_decode_steps import DecodeCase
from fusedmoe.kernels.triton.hopper_direct_common import DirectCase
from fusedmoe.tuning.hopper_tiles import PrefillTiles, decode_tiles_of, direct_tiles
import hopper_compiler
from hopper_compiler import cuobjdump, stack_bytes

def desc(rows, columns):
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
    return f"tensordesc<bf16[{rows}, {columns}],{layout!r}>"

def build(kernel, types, constants, **options):
    names = kernel.arg_names
    ints = {"stride_x", "stride_out", "R", "num_local", "num_mapped", "desc_rows", "me", "most",
            "timeout_us", "picks_at", "share"}
    known = {n: "i32" for n in ints} | {n: "fp32" for n in ("limit", "alpha", "beta")}
    pointers = {"x_ptr", "act_ptr", "out_ptr", "bias_ptr", "w_ptr"}
    known |= {n: "*bf16" for n in pointers} | {"weights_ptr": "*fp32"}
    known |= types
    signature = {
        n: "constexpr" if n in constants else known.get(n, "*i32") for n in names
    }
    at = {(names.index(n),): value for n, value in constants.items()}
    aligned = {(names.index(n),): [["tt.divisibility", 16]]
               for n in names if signature[n].startswith("*") or n.startswith("stride")}
    source = GluonASTSource(kernel, signature, at, aligned)
    options = {"num_warps": 4, "launch_pdl": True} | options
    built = hopper_compiler.build(source, **options)
    assert "wgmma" in built.asm["ptx"]
    return built

def runs_ahead(built):
    # Whether ptxas has left products in flight while the next are issued. It does not where it
    # cannot see that nothing else touches their registers; that costs a quarter of the speed.
    return cuobjdump(built, "-sass").count("WARPGROUP.DEPBAR.LE gsb0, 0x1") == 2

formula = {"FORMULA": "swigluoai", "GATED": True, "INTERLEAVED": True}
no_gate = {"FORMULA": "relu2"}
tiles = decode_tiles_of(8, 64, 128)
for stages, rows, depth, drawn in (2, 64, 128, True), (6, 64, 128, False), (6, 32, 256, False):
    box = desc(rows, depth)
    for given, more in (formula, {}), (no_gate, {"bias_ptr": None}):
        wide = rows if "GATED" in given else 2 * rows
        case = DecodeCase(N=208, D=272, WIDE=wide, SLOTS=8, DEPTH=depth, STAGES=stages, GROUP=4,
                          PICKS=4, DRAWN=drawn, COUNTED=drawn, **given)
        build(hopper_decode.up_kernel, {"gate_desc": box, "up_desc": box}, more | {"CASE": case})
step = {"N": 272, "D": 208, "WIDE": tiles.down.rows, "SLOTS": 8, "DEPTH": 128}
weights = {"desc": desc(tiles.down.rows, 128)}
build(hopper_decode.down_kernel, weights,
      {"CASE": DecodeCase(**step, STAGES=2, GROUP=4, UP_TILES=4)})
for stages in (3, tiles.down.stages):
    build(hopper_decode.dealt_kernel, weights, {"CASE": DecodeCase(**step, STAGES=stages)})
tiles = direct_tiles(1, 4, 272, 208)
weights = desc(tiles.up_box, tiles.depth)
up = 208, 272, 4, 4, 2 * tiles.up_rows, tiles.up_valid, tiles.up_stages, 0
for shape, more in (("swigluoai", True, True), {}), (("relu2", False, False), {"bias_ptr": None}):
    build(hopper_direct.up_kernel,
          {"low_desc": weights, "high_desc": weights, "x_desc": desc(8, tiles.depth)},
          more | {"CASE": DirectCase(*up, *shape)}, maxnreg=hopper_direct.MAX_REGISTERS)
down = tiles.down_rows, tiles.down_valid, tiles.down_stages, tiles.down_rows // 4
build(hopper_direct.down_kernel,
      {"desc": desc(tiles.down_box, tiles.depth), "act_desc": desc(8, tiles.depth)},
      {"CASE": DirectCase(272, 208, 4, 4, *down)}, maxnreg=hopper_direct.MAX_REGISTERS)
tiles = PrefillTiles()
steps = tiles.stages, tiles.group
all_here = dict.fromkeys(("early_ptr", "flags_ptr", "state_ptr", "error_ptr", "own_ptr"))
weights, rows = desc(128, tiles.depth), desc(64, tiles.depth)
up_types = {"low_desc": weights, "high_desc": weights, "out_desc": desc(64, 64),
            "own_ptr": "*bf16"}
for shape in ("swigluoai", True, True, 4), ("relu2", False, False, 4):
    case = {"CASE": hopper_prefill.Case(208, 272, *steps, *shape)}
    for late in (all_here, {}):
        assert runs_ahead(build(hopper_prefill.up_kernel, up_types, case | late, maxnreg=168))
types = {"act_desc": rows, "w_desc": desc(256, tiles.depth), "out_desc": desc(64, 64)}
types["bases_ptr"] = "*i64"
case = {"CASE": hopper_prefill.Case(272, 208, *steps)}
for stored_here in ({"bases_ptr": None}, {}):
    built = build(hopper_prefill.down_kernel, types, case | stored_here, maxnreg=168)
    assert runs_ahead(built)
    assert stack_bytes(built) == 0
    assert ("st.global.v4" in built.asm["ptx"]) == (not stored_here)  # 16 bytes of a peer's row
print("compiled")
"""


def test_the_kernels_compile_for_hopper():
    run_program(COMPILE)
