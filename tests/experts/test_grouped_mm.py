"""PyTorch's grouped_mm between our permute and unpermute, against the definition."""

from dataclasses import replace

import pytest
import torch

from expert_layers import Layer
from fusedmoe import MoEOptions, fused_experts
from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.experts.grouped_mm import GroupedMMExperts
from fusedmoe.prepare_finalize.no_ep import MoEPrepareAndFinalizeNoDPEPModular
from fusedmoe.quantization.config import biased_moe_quant_config
from fusedmoe.selection import select

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAN = float("nan")
LAYERS = {
    "plain": Layer(),
    "every_expert": Layer(K=4),
    "bias": Layer(bias=True),
    "expert_map_and_bias": Layer(E=8, local=5, bias=True),
    "nothing_local": Layer(T=1, K=1, E=64, local=1, seed=3),
    "no_gate": Layer(activation=MoEActivation.RELU2_NO_MUL),
    "interleaved": Layer(activation=MoEActivation.SWIGLUOAI, bias=True),
    "clamped": Layer(numbers=ApplyMoEActivationConfig(clamp_limit=0.5)),
    "weight_on_input": Layer(K=1, weight_on_input=True),
    "bf16": Layer(dtype=torch.bfloat16),
    "passes": Layer(T=9, options=MoEOptions(max_workspace_bytes=1500)),
}


def run(layer, tensors):
    return layer.run(GroupedMMExperts, MoEPrepareAndFinalizeNoDPEPModular(), tensors)


def assert_right(out, layer, tensors):
    tolerance = 5e-2 if layer.dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(
        out.double(), layer.expected(tensors), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    layer = LAYERS[name]
    tensors = layer.tensors()
    assert_right(run(layer, tensors), layer, tensors)


def test_dead_slots_and_nan_rows():
    layer = Layer(T=6)
    tensors = layer.tensors()
    tensors["topk_ids"][0], tensors["topk_ids"][2, 1] = -1, -1
    out = run(layer, tensors)
    assert (out[0] == 0).all()
    assert_right(out, layer, tensors)
    tensors["hidden_states"][3] = NAN
    again = run(layer, tensors)
    assert again[3].isnan().all()
    others = [0, 1, 2, 4, 5]
    assert again[others].equal(out[others])


def test_transposed_weights():
    layer = Layer()
    tensors = layer.tensors()
    for name in ("w1", "w2"):
        tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert_right(run(layer, tensors), layer, tensors)


def strided(w):
    """The same numbers, of which no two that belong together are neighbours."""
    return torch.stack([w, torch.full_like(w, float("nan"))], -1)[..., 0]


def unaligned(w):
    return torch.nn.functional.pad(w, (0, 1))[..., :-1]


def of_one_row(w):
    return w[:, :1].expand(w.shape)


@pytest.mark.parametrize("change", [strided, unaligned, of_one_row])
def test_weights_that_torch_cannot_step_through(change):
    layer = Layer()
    tensors = layer.tensors()
    tensors |= {name: change(tensors[name]) for name in ("w1", "w2")}
    assert_right(run(layer, tensors), layer, tensors)


def test_no_tokens():
    layer = Layer(T=0)
    assert run(layer, layer.tensors()).shape == (0, 40)


def test_it_is_chosen_by_name_and_compiles_as_one_op():
    layer = Layer(bias=True, options=MoEOptions(experts="grouped_mm"))
    tensors = layer.tensors()
    names = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")
    quant = biased_moe_quant_config(tensors["w1_bias"], tensors["w2_bias"])
    given = [tensors[n] for n in names]
    out = fused_experts(*given, quant_config=quant, options=layer.options)
    assert_right(out, layer, tensors)
    experts = GroupedMMExperts(layer.config(), quant)

    def apply(*given):
        out = torch.zeros_like(given[0])
        experts.apply(out, *given, layer.activation, 4, None, None, None, None, None, None, False)
        return out

    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")
    assert_right(compiled(*given), layer, tensors)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"H": 39}, "hidden_dim 39"),
        ({"I": 3}, "intermediate_size_per_partition 3"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_what_it_cannot_run_is_refused_with_the_number(changes, reason):
    layer = replace(Layer(options=MoEOptions(experts="grouped_mm")), **changes)
    with pytest.raises(ValueError, match=reason):
        select(layer.config())
