"""What happens to a layer after it was built: copied, cast, reloaded, compiled, loaded in part."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import fusedmoe
from fusedmoe.quantization import keys
from fusedmoe.quantization.formats.act_order import sort_columns
from quantized_layers import make_layer

E, H, I = 4, 128, 128  # noqa: E741
DEFAULT = fusedmoe.MoEOptions()
KINDS = ("floats", "int4_g32", "int4_g32_act_order", "int8_channel", "fp8_block", "nvfp4")


def layer_of(kind: str, dtype: torch.dtype = torch.float32) -> fusedmoe.MoERunner:
    """Ready to run, by the implementation that is chosen for it on this machine."""
    if kind != "floats":
        return make_layer(kind, dtype=dtype, options=DEFAULT)[0]
    layer = fusedmoe.FusedMoE(E, 2, H, I, dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=H**-0.5)
    layer.routed_experts.process_weights_after_loading()
    return layer


def saved_and_read(layer: fusedmoe.MoERunner) -> fusedmoe.MoERunner:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, H, dtype=dtype), torch.randn(6, E)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_computes_the_same_and_has_weights_of_its_own(kind, dtype):
    """What a kernel prepacked may have no storage that could be copied, and is not copied."""
    layer, (x, logits) = layer_of(kind, dtype), inputs(dtype)
    wanted = layer(x, logits)
    twins = copy.deepcopy(layer), saved_and_read(layer)
    for parameter in layer.parameters():
        parameter.data.view(torch.uint8).zero_()
    layer.routed_experts.process_weights_after_loading()
    assert not layer(x, logits).any()
    for twin in twins:
        assert torch.equal(twin(x, logits), wanted)
        assert twin.routed_experts.w13_weight.weight_loader.__self__ is twin.routed_experts


def changed(layer: fusedmoe.MoERunner, how: str) -> fusedmoe.MoERunner:
    if how == "copied":
        return copy.deepcopy(layer)
    if how == "cast":
        return layer.to(torch.float16)
    if how == "reloaded":
        layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    if how == "assigned":
        layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    if how == "emptied":
        state = copy.deepcopy(layer.state_dict())
        layer.to("meta").to_empty(device="cpu").load_state_dict(state)
    return layer


@pytest.mark.parametrize("how", ["copied", "cast", "reloaded", "assigned", "emptied"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_compiled_right_after_a_change(kind, how):
    """Choosing a kernel and checking weights is nothing that a compiler can trace."""
    layer, (x, logits) = layer_of(kind), inputs()
    wanted = layer(x, logits)
    layer = changed(layer, how)
    x = x.to(layer.moe_config.in_dtype if how != "cast" else torch.float16)
    got = torch.compile(layer, backend="eager", fullgraph=True)(x, logits)
    error = (got.float() - wanted).norm() / wanted.norm()
    assert error < 5e-3, float(error)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_changes_the_rows(kind):
    layer, (x, logits) = layer_of(kind), inputs()
    held = {n: p.dtype for n, p in layer.named_parameters() if kind != "floats"}
    wanted = layer(x, logits)
    for dtype, bound in ((torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float32, 0.02)):
        layer.to(dtype)
        got = layer(x.to(dtype), logits)
        assert got.dtype == dtype
        assert (got.float() - wanted).norm() < bound * wanted.norm()
        assert {n: p.dtype for n, p in layer.named_parameters() if n in held} == held
        with pytest.raises(ValueError, match=f"compute in {dtype}, hidden_states are"):
            layer(x.double(), logits)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_brings_its_activation_scales(assign):
    """They are reduced to one number, which a kernel keeps."""
    key = keys.FP8_STATIC_TENSOR
    one, two = (
        make_layer("fp8_tensor", key, input_scale=scale, options=DEFAULT)[0]
        for scale in (0.001, 0.03)
    )
    x, logits = inputs()
    wanted = two(x, logits)
    assert not torch.equal(one(x, logits), wanted)
    one.load_state_dict(two.state_dict(), assign=assign)
    assert torch.equal(one(x, logits), wanted)


@pytest.mark.parametrize("kind", ["int4_g32", "fp8_block"])
def test_a_state_dict_is_checked_like_any_weights(kind):
    layer = layer_of(kind)
    state = copy.deepcopy(layer.state_dict())
    state["routed_experts.w2_weight_scale"].view(-1)[1] = float("nan")
    with pytest.raises(ValueError, match=r"1 of .* numbers of its scale are not finite"):
        layer.load_state_dict(state)
    with pytest.raises(ValueError, match=r"not loaded: .* not finite"):
        layer(*inputs())


def test_a_state_dict_of_other_shapes_leaves_nothing_usable():
    layer, other = layer_of("int4_g32"), layer_of("int4_g32")
    state = copy.deepcopy(other.state_dict())
    name = "routed_experts.w2_weight_scale"
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(state | {name: state[name][:, :-1]})
    with pytest.raises(ValueError, match=r"not loaded: size mismatch for .*w2_weight_scale"):
        layer(*inputs())
    layer.load_state_dict(state)
    assert layer(*inputs()).isfinite().all()


def test_a_state_dict_with_holes_fills_no_new_layer():
    """Where the rest was never written; of a layer that is whole, parts may be replaced."""
    whole = layer_of("floats")
    state = {n: t for n, t in whole.state_dict().items() if "w2" not in n}
    new = fusedmoe.FusedMoE(E, 2, H, I, torch.float32)
    with pytest.raises(RuntimeError, match="Missing key"):
        new.load_state_dict(state)
    with pytest.raises(ValueError, match=r"the state_dict lacks routed_experts\.w2_weight"):
        new(*inputs())
    new.load_state_dict(whole.state_dict())
    x, logits = inputs()
    assert torch.equal(new(x, logits), whole(x, logits))
    whole.load_state_dict(state, strict=False)
    assert torch.equal(new(x, logits), whole(x, logits))


@pytest.mark.parametrize("kind", ["floats", "int4_g32", "fp8_block"])
def test_a_layer_without_storage_may_be_given_its_tensors(kind):
    whole, (x, logits) = layer_of(kind), inputs()
    layer = copy.deepcopy(whole).to("meta")
    layer.load_state_dict(whole.state_dict(), assign=True)
    assert torch.equal(layer(x, logits), whole(x, logits))


def float_tensors() -> list[tuple[str, torch.Tensor]]:
    shapes = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
    return [
        (f"{e}.{name}.weight", torch.randn(shape) / 8)
        for e in range(E)
        for name, shape in shapes.items()
    ]


def test_a_layer_that_is_loaded_in_part_does_not_run():
    layer, tensors = fusedmoe.FusedMoE(E, 2, H, I, torch.float32), float_tensors()
    layer.load_weights(tensors[:-1])
    with pytest.raises(ValueError, match="misses 1 of 12 expert tensors: w2_weight w2 of expert 3"):
        layer(*inputs())
    layer.load_weights(tensors[-1:])  # files may come one after the other
    assert layer(*inputs()).isfinite().all()
    layer.load_weights(tensors[:1])  # and a tensor may be replaced
    assert layer(*inputs()).isfinite().all()


@pytest.mark.parametrize("finish", ["by hand", "state_dict"])
def test_what_was_loaded_in_part_may_be_filled_otherwise(finish):
    layer, tensors = fusedmoe.FusedMoE(E, 2, H, I, torch.float32), float_tensors()
    layer.load_weights(tensors[:-1])
    if finish == "by hand":
        layer.routed_experts.w2_weight.data[-1] = tensors[-1][1]
        layer.routed_experts.process_weights_after_loading()
    else:
        whole = fusedmoe.FusedMoE(E, 2, H, I, torch.float32)
        whole.load_weights(tensors)
        layer.load_state_dict(whole.state_dict())
    assert layer(*inputs()).isfinite().all()


@pytest.mark.parametrize("filled", ["by hand", "by a state_dict"])
def test_the_gate_may_come_after_experts_that_no_checkpoint_filled(filled):
    layer = fusedmoe.FusedMoE(
        E, 2, H, I, torch.float32, gate=torch.nn.Linear(H, E, bias=False), prefix="mlp"
    )
    if filled == "by hand":
        for parameter in layer.routed_experts.parameters():
            torch.nn.init.normal_(parameter)
        layer.routed_experts.process_weights_after_loading()
    else:
        layer.routed_experts.load_state_dict(layer_of("floats").routed_experts.state_dict())
    layer.load_weights({"mlp.gate.weight": torch.randn(E, H)})
    assert layer(torch.randn(2, H)).isfinite().all()


@pytest.mark.parametrize("kind", ["floats", "int4_g32"])
def test_what_was_loaded_is_gone_with_its_memory(kind):
    """An engine that took a layer's memory away and brings it back in part."""
    layer = layer_of(kind)
    state = dict(layer.state_dict())
    layer.to("meta").to_empty(device="cpu")
    last = state.popitem()
    layer.load_state_dict(state, strict=False)
    with pytest.raises(ValueError, match=f"not loaded: the state_dict lacks {last[0]}"):
        layer(*inputs())
    layer.load_state_dict(state | dict([last]))
    assert layer(*inputs()).isfinite().all()


def test_tensors_loaded_into_other_memory_do_not_count():
    layer, tensors = fusedmoe.FusedMoE(E, 2, H, I, torch.float32), float_tensors()
    layer.load_weights(tensors)
    layer.to("meta").to_empty(device="cpu")
    layer.load_weights(tensors[:-1])
    with pytest.raises(ValueError, match="misses 1 of 12 expert tensors"):
        layer(*inputs())


def test_files_that_break_off_leave_nothing_usable():
    """An error of whoever reads them, between two tensors."""

    def read():
        yield from float_tensors()[:5]
        raise OSError("the disk is gone")

    layer = fusedmoe.FusedMoE(E, 2, H, I, torch.float32)
    for load in (layer.load_weights, layer.routed_experts.load_weights):
        with pytest.raises(OSError, match="the disk is gone"):
            load(read())
        with pytest.raises(ValueError, match="not loaded: the disk is gone"):
            layer(*inputs())


def test_a_part_of_the_layer_that_does_not_fit_leaves_nothing_usable():
    layer = fusedmoe.FusedMoE(
        E, 2, H, I, torch.float32, gate=torch.nn.Linear(H, E, bias=False), prefix="mlp"
    )
    tensors = [*float_tensors()[:3], ("mlp.gate.weight", torch.zeros(H, E))]
    with pytest.raises(ValueError, match=r"gate\.weight: expected shape"):
        layer.load_weights(tensors)
    with pytest.raises(ValueError, match=r"not loaded: gate\.weight: expected shape"):
        layer(torch.randn(2, H))


def test_sorted_columns_live_through_a_layers_life():
    """As a GPU's experts leave them: copied, saved, moved, and written one tensor at a time."""
    layer, (x, logits) = make_layer("int4_g32_act_order")[0], inputs()
    experts, wanted = layer.routed_experts, layer(x, logits)
    published = copy.deepcopy(layer.state_dict())
    w13, w2 = experts.quant_method.quantized_weights(experts)
    assert sort_columns(w2)
    assert not sort_columns(w13)  # gate and up of random weights have orders of their own
    experts.w13_weight_group_index.copy_(experts.w13_weight_group_index[:, :1])
    fresh = layer(x, logits)
    assert sort_columns(w13)
    assert torch.equal(layer(x, logits), fresh)
    for twin in (copy.deepcopy(layer), saved_and_read(layer), copy.deepcopy(layer).to("cpu")):
        assert torch.equal(twin(x, logits), fresh)
    other = make_layer("int4_g32_act_order")[0]
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, logits), fresh)
    for half in ("weight", "group_index"):
        named = {n: t for n, t in published.items() if n.endswith(half)}
        layer.load_state_dict(named, strict=False)
    assert torch.equal(layer(x, logits), wanted)


@pytest.mark.parametrize("first", ["weight", "weight_group_index"])
def test_sorted_experts_are_loaded_one_tensor_at_a_time(first):
    layer, (x, logits) = layer_of("int4_g32_act_order"), inputs()
    experts, wanted = layer.routed_experts, layer(x, logits)
    state = copy.deepcopy(dict(experts.named_parameters()))
    sort_columns(experts.quant_method.quantized_weights(experts)[1])
    names = (first, "weight_group_index" if first == "weight" else "weight")
    for expert in (2, 0):
        for name in names:
            parameter = getattr(experts, f"w2_{name}")
            data = state[f"w2_{name}"][expert]
            experts.weight_loader(parameter, data, f"{expert}.{name}", "w2", expert)
            assert torch.equal(layer(x, logits), wanted)
    groups = experts.w2_weight_group_index
    assert (groups[[0, 2]] >= 0).all()
    assert (groups[[1, 3]] < 0).all()
