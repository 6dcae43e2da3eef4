"""Weights that a CPU holds packed are there once, and are what was loaded to whoever looks."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fusedmoe import FusedMoE, MoEOptions, explain, quantize_layer
from fusedmoe.experts import cpu_int4, cpu_int8, cpu_packing
from fusedmoe.experts.packed_weight import PackedWeight, packed_of
from quantized_layers import draw, fill, make_layer

pytestmark = pytest.mark.skipif(
    cpu_int8.unmet_int8() is not None or cpu_int4.unmet_int4(16, 32, 32) is not None,
    reason="this CPU has neither VNNI nor AVX-512",
)

E, H, I = 4, 128, 96  # noqa: E741
PLAIN = (
    *("int8_channel", "int8_channel_zp", "int8_g32", "int8_g32_zp"),
    *("int4_channel", "int4_channel_zp", "int4_g32", "int4_g32_zp"),
    *("int4_g32_act_order", "int4_g32_zp_act_order", "int8_g32_act_order"),
)
WEIGHTS = ("w13_weight", "w2_weight")


def built(name, **arguments):
    """(experts, layer, what was written) of a layer that packs its weights."""
    sizes = {"I": I, "one_order": True}
    layer, w13, w2 = make_layer(name, options=MoEOptions(), **sizes | arguments)
    assert explain(layer).chosen.name == "cpu_quantized"
    return layer.routed_experts, layer, (w13.data, w2.data)


def is_packed(experts):
    return [type(getattr(experts, name)) is PackedWeight for name in WEIGHTS] == [True, True]


def rows(tokens=5):
    gen = torch.Generator().manual_seed(1)
    return torch.randn(tokens, H, generator=gen), torch.randn(tokens, E, generator=gen)


def storage_bytes(experts):
    """What the numbers of both weights take, wherever they lie."""
    total = 0
    for name in WEIGHTS:
        weight = getattr(experts, name)
        with torch._C.DisableTorchFunctionSubclass():
            total += weight.untyped_storage().nbytes()
        for one in packed_of(weight).weights if type(weight) is PackedWeight else ():
            parts = one.packed if isinstance(one.packed, tuple) else (one.packed,)
            total += sum(part.numel() * part.element_size() for part in parts)
    return total


@pytest.mark.parametrize("act", ["silu", "swigluoai", "relu2_no_mul"])
@pytest.mark.parametrize("name", PLAIN)
def test_one_copy_that_gives_back_what_was_loaded(name, act):
    experts, layer, written = built(name, act=act)
    size = sum(weight.nbytes for weight in written)
    first = layer(*rows())
    assert is_packed(experts)
    assert size <= storage_bytes(experts) <= size + 2
    assert [getattr(experts, name).shape for name in WEIGHTS] == [w.shape for w in written]
    state = experts.state_dict()
    assert storage_bytes(experts) == size
    assert all(torch.equal(state[n], w) for n, w in zip(WEIGHTS, written, strict=True))
    assert torch.equal(layer(*rows()), first)
    assert all(torch.equal(state[n], w) for n, w in zip(WEIGHTS, written, strict=True))
    assert not is_packed(experts), "who has a state_dict has the weights too"
    del state
    assert torch.equal(layer(*rows()), first)
    assert is_packed(experts)
    assert size <= storage_bytes(experts) <= size + 2
    assert experts.quant_method.kernel(experts).experts._copies == (None, None)


@pytest.mark.parametrize("N", [16, 48, 64, 80, 192])
@pytest.mark.parametrize("K", [32, 96, 256])
def test_the_layout_of_packed_nibbles_is_the_one_that_is_unpacked(N, K):
    q = draw("int4_channel", 2, N, K, seed=N * K)
    for one, weight in zip(q.data, cpu_int4.int4_weights(q), strict=True):
        assert torch.equal(cpu_int4.unpacked_int4(weight), one)


def test_a_layout_that_is_not_known_costs_a_second_copy(monkeypatch):
    """Another torch may lay nibbles out otherwise: that is seen, and nothing is given up."""
    wrong = lambda weight: torch.zeros(weight.packed.shape, dtype=torch.uint8)  # noqa: E731
    monkeypatch.setattr(cpu_packing, "unpacked_int4", wrong)
    experts, layer, written = built("int4_g32")
    out = layer(*rows())
    assert not is_packed(experts)
    assert torch.equal(experts.w13_weight, written[0])
    monkeypatch.undo()
    experts.process_weights_after_loading()
    assert is_packed(experts)
    assert torch.equal(layer(*rows()), out)


@pytest.mark.parametrize("how", ["state_dict", "assign", "by hand", "per expert"])
@pytest.mark.parametrize("name", ["int8_channel", "int4_g32_zp", "int4_g32_act_order"])
def test_other_values_take_the_place_of_packed_ones_twice(name, how):
    experts, layer, _ = built(name)
    for seed in (5, 6):
        other, *_ = make_layer(name, options=MoEOptions(), I=I)
        w13, w2 = draw(name, E, 2 * I, H, shards=2, seed=seed), draw(name, E, H, I, seed=seed)
        if w13.group_index is not None:
            w13.group_index[:, 1] = w13.group_index[:, 0]
        fill(other, w13, w2)
        state = {key: value.clone() for key, value in other.routed_experts.state_dict().items()}
        if how == "by hand":
            with torch.no_grad():
                for key, value in state.items():
                    getattr(experts, key)[: E // 2] = value[: E // 2]
                    getattr(experts, key)[E // 2 :].copy_(value[E // 2 :])
            experts.process_weights_after_loading()
        elif how == "per expert":
            for part in [key.removeprefix("w2_") for key in state if key.startswith("w2_")]:
                for e in range(E):
                    gate, up = state[f"w13_{part}"][e].chunk(2)
                    gate, up = (t[0] if "index" in part else t for t in (gate, up))
                    experts.load_weights(
                        (f"experts.{e}.{proj}_proj.{part}", tensor)
                        for proj, tensor in (
                            ("gate", gate),
                            ("up", up),
                            ("down", state[f"w2_{part}"][e]),
                        )
                    )
        else:
            experts.load_state_dict(state, assign=how == "assign")
        state = None
        assert torch.equal(layer(*rows()), other(*rows()))
        experts.process_weights_after_loading()
        assert is_packed(experts)


def test_a_few_numbers_written_are_the_only_ones_that_change():
    experts, layer, written = built("int8_channel")
    layer(*rows())
    with torch.no_grad():
        experts.w2_weight[1, 2, 3] = 77  # nobody says so
    out = layer(*rows())
    expected = written[1].clone()
    expected[1, 2, 3] = 77
    other, *_ = make_layer("int8_channel", options=MoEOptions(), I=I)
    other.routed_experts.load_state_dict(experts.state_dict())
    assert torch.equal(out, other(*rows()))
    assert torch.equal(experts.w2_weight, expected)


def test_weights_that_somebody_else_has_too_stay_where_they_are():
    """Giving them up would free nothing, and what is written to the view would be lost."""
    experts, layer, written = built("int4_g32")
    first = layer(*rows())
    view = experts.w13_weight[2]
    assert torch.equal(layer(*rows()), first)
    assert type(experts.w13_weight) is nn.Parameter
    view.zero_()
    assert not torch.equal(layer(*rows()), first)
    del view
    assert not torch.equal(layer(*rows()), first)
    experts.w13_weight.copy_(written[0])
    experts.process_weights_after_loading()
    assert is_packed(experts)
    assert torch.equal(layer(*rows()), first)


@pytest.mark.parametrize("name", ["int8_g32", "int4_g32"])
def test_copies_files_and_pickles_hold_the_numbers(name, tmp_path):
    experts, layer, written = built(name)
    first = layer(*rows())
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(*rows()), first)
    assert is_packed(twin.routed_experts)
    buffer = io.BytesIO()
    layer(*rows())
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert all(
        torch.equal(state[f"routed_experts.{n}"], w) for n, w in zip(WEIGHTS, written, strict=True)
    )
    layer(*rows())
    save_file(dict(experts.named_parameters()), tmp_path / "experts.safetensors")
    loaded = load_file(tmp_path / "experts.safetensors")
    assert all(torch.equal(loaded[n], w) for n, w in zip(WEIGHTS, written, strict=True))
    buffer = io.BytesIO()
    layer(*rows())
    torch.save(experts.w2_weight, buffer)
    assert type(experts.w2_weight) is nn.Parameter


def test_moves_and_casts_take_the_numbers_along():
    experts, layer, written = built("int8_channel")
    first = layer(*rows())
    layer.to(torch.bfloat16)
    assert explain(layer).chosen.name == "cpu_quantized"
    out = layer(rows()[0].bfloat16(), rows()[1])
    assert is_packed(experts)
    assert (out.float() - first).norm() < 1e-2 * first.norm()
    layer.to(torch.float32)
    assert torch.equal(layer(*rows()), first)
    layer.share_memory()
    assert torch.equal(layer(*rows()), first)
    assert experts.w13_weight.is_shared(), "another process may have it"
    layer.to("meta")
    assert experts.w13_weight.is_meta
    layer.to_empty(device="cpu")
    fill(
        layer,
        *(
            draw("int8_channel", E, *s, shards=n, seed=i)
            for i, (s, n) in enumerate((((2 * I, H), 2), ((H, I), 1)))
        ),
    )
    assert torch.equal(layer(*rows()), first)
    assert is_packed(experts)
    assert torch.equal(experts.w2_weight, written[1])


def test_experts_that_move_between_ranks_are_rows_of_the_numbers():
    experts, layer, _ = built("int4_g32")
    before = layer(*rows())
    views = experts.get_expert_weights()
    for view in views:
        view[[0, 1]] = view[[1, 0]]
    del view, views
    experts.process_weights_after_loading()
    assert is_packed(experts)
    x, logits = rows()
    assert torch.equal(layer(x, logits[:, [1, 0, 2, 3]]), before)


def test_compiled_code_of_others_reads_the_numbers():
    """Two layers over the same weights, one of which dequantizes; and one of two that is packed."""
    experts, layer, written = built("int8_channel")
    first = layer(*rows())
    twin, *_ = make_layer("int8_channel", I=I)
    wanted = twin(*rows())
    for name in experts.param_specs:
        twin.routed_experts._parameters[name] = experts._parameters[name]
    twin.routed_experts.quant_method.kernel(twin.routed_experts)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*rows()), wanted)
    assert torch.equal(layer(*rows()), first)
    assert is_packed(experts)
    assert torch.equal(compiled(*rows()), wanted)
    assert torch.equal(experts.w2_weight, written[1])
    layer, *_ = make_layer("int4_g32_act_order", options=MoEOptions())  # only w2 can be sorted
    experts, wanted = layer.routed_experts, layer(*rows())
    experts.process_weights_after_loading()
    assert type(experts.w2_weight) is PackedWeight
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*rows()), wanted)


@pytest.mark.parametrize("name", ["int8_channel", "int4_g32_zp"])
def test_compiled_code_runs_packed_weights(name):
    experts, layer, written = built(name)
    first = layer(*rows())
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*rows()), first)
    assert is_packed(experts)
    assert torch.equal(experts.w13_weight, written[0])
    assert torch.equal(compiled(*rows()), first)
    assert is_packed(experts)
    assert torch.equal(compiled(*rows()), first)


def test_numbers_that_compiled_code_would_read_are_refused():
    """It would see the element that repeats."""
    experts, layer, _ = built("int8_channel")

    def both(x, logits):
        return layer(x, logits) + experts.w13_weight.float().sum()

    with pytest.raises(torch._dynamo.exc.Unsupported, match="packed weights in compiled"):
        torch.compile(both, fullgraph=True, backend="eager")(*rows())


def test_two_layers_over_the_same_weights_share_what_is_packed():
    """As ``accelerate`` has them: the experts of a model, and a whole block over these."""
    experts, layer, _ = built("int8_channel")
    first = layer(*rows())
    twin = copy.deepcopy(layer)
    for name in experts.param_specs:
        twin.routed_experts._parameters[name] = experts._parameters[name]
    twin.routed_experts.process_weights_after_loading()
    held = packed_of(experts.w13_weight)
    for one in (layer, twin, layer):
        assert torch.equal(one(*rows()), first)
        assert packed_of(experts.w13_weight) is held is not None


def test_threads_that_run_a_layer_whose_numbers_came_back():
    experts, layer, written = built("int8_channel")
    first, wrong = layer(*rows()), []

    def run():
        for _ in range(5):
            if not torch.equal(layer(*rows()), first):
                wrong.append("output")

    for _ in range(10):
        assert torch.equal(experts.w13_weight, written[0])
        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert is_packed(experts)


MEASURE = """
import torch
from fusedmoe import FusedMoE
from quantized_layers import Scheme

def status(word):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(word)).split()[1]) / 1024

def filled(*sizes):
    layer = FusedMoE(*sizes, torch.bfloat16, quant_config=Scheme("{name}"))
    for parameter in layer.parameters():
        parameter.data.fill_(1)
    return layer

torch.set_num_threads(1)
small = filled(2, 1, 128, 128)
small.routed_experts.process_weights_after_loading()
small(torch.zeros(1, 128).bfloat16(), torch.zeros(1, 2))
before = status("VmRSS")
layer = filled(96, 2, 1024, 1024)
loaded = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
layer.routed_experts.process_weights_after_loading()
rest = status("VmRSS")
layer(torch.zeros(1, 1024).bfloat16(), torch.zeros(1, 96))
size = sum(parameter.nbytes for parameter in layer.parameters()) / 2**20
print(size, loaded - before, status("VmHWM") - before, rest - before)
"""


@pytest.mark.parametrize("name", ["int8_channel", "int4_g128"])
def test_memory_of_the_process(name):
    """At rest what was loaded; while it is packed, one of the two tensors more."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(name=name)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    size, loaded, peak, rest = map(float, done.stdout.split())
    slack = 40  # MiB, of what one expert takes for a moment, and of the allocator
    assert loaded < size + slack
    assert rest < 1.1 * size + slack
    assert peak < (1 + 2 / 3) * 1.1 * size + slack


@pytest.mark.parametrize("run", [False, True])
@pytest.mark.parametrize("made", [False, True])
def test_layers_that_were_made_in_inference_mode(made, run):
    """Their tensors keep no count of writes, and cannot be mixed with those that do."""
    with torch.inference_mode(made):
        layer = FusedMoE(E, 2, H, I, torch.float32)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.1)
        layer.routed_experts.process_weights_after_loading()
        quantize_layer(layer, "int8_channel")
    experts = layer.routed_experts
    assert is_packed(experts)
    with torch.inference_mode(run):
        first = layer(*rows())
        numbers = experts.w13_weight.clone()
        assert experts.w13_weight[0].equal(numbers[0])
        assert torch.equal(layer(*rows()), first)
        assert is_packed(experts)
    assert experts.w13_weight.is_inference() == made
    assert torch.equal(experts.w13_weight, numbers)
