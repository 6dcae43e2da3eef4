"""TritonExperts and fused_experts against the definition, feature by feature."""

import pytest
import torch

from expert_layers import Layer, assert_right
from fusedmoe import MoEOptions, fused_experts
from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.experts.triton import TritonExperts, triton_experts
from fusedmoe.modular_kernel import ExpertsWork
from fusedmoe.prepare_finalize.no_ep import MoEPrepareAndFinalizeNoDPEPModular
from fusedmoe.quantization.config import FusedMoEQuantConfig, FusedMoEQuantDesc

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAN = float("nan")
LAYERS = {
    "plain": Layer(),
    "one_token": Layer(T=1, K=1, E=1, H=16, I=16),
    "every_expert": Layer(K=4),
    "lone_slots": Layer(T=2, K=2, E=16, bias=True),
    "lone_slots_of_few_experts_here": Layer(T=1, K=2, E=32, local=9),
    "odd_sizes": Layer(T=5, H=33, I=19),
    "many_rows": Layer(T=40, E=3),
    "bias": Layer(bias=True),
    "expert_map": Layer(E=8, local=3),
    "expert_map_and_bias": Layer(E=8, local=5, bias=True),
    "no_gate": Layer(activation=MoEActivation.RELU2_NO_MUL),
    "interleaved": Layer(activation=MoEActivation.SWIGLUOAI, bias=True),
    "clamped": Layer(numbers=ApplyMoEActivationConfig(clamp_limit=0.5)),
    "situ": Layer(activation=MoEActivation.SITU, numbers=ApplyMoEActivationConfig(situ_beta=1.5)),
    "weight_on_input": Layer(K=1, weight_on_input=True),
    "fp16": Layer(dtype=torch.float16),
    "batch_invariant": Layer(options=MoEOptions(batch_invariant=True)),
    "passes": Layer(T=9, options=MoEOptions(max_workspace_bytes=1500)),
}


def run(layer, tensors=None):
    tensors = tensors or layer.tensors()
    return layer.run(TritonExperts, MoEPrepareAndFinalizeNoDPEPModular(), tensors)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, bodies):
    layer = LAYERS[name]
    tensors = layer.tensors()
    assert_right(run(layer, tensors), layer, tensors)


@pytest.mark.parametrize("name", LAYERS)
def test_the_functional_form_is_the_same(name):
    layer = LAYERS[name]
    tensors = layer.tensors()
    out = functional(layer, tensors)
    assert_right(out, layer, tensors)


def functional(layer, tensors, function=fused_experts, **changes):
    biases = {n: FusedMoEQuantDesc(bias=tensors[f"{n}_bias"]) for n in ("w1", "w2")}
    names = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids", "expert_map")
    arguments = {
        **{name: tensors[name] for name in names},
        "activation": layer.activation,
        "apply_router_weight_on_input": layer.weight_on_input,
        "quant_config": FusedMoEQuantConfig(**biases),
        "activation_config": layer.numbers,
        "options": layer.options,
    }
    return function(**(arguments | changes))


def test_padding_slots_and_ids_of_no_expert_count_as_nothing(bodies):
    layer = Layer(T=6)
    tensors = layer.tensors()
    ids = tensors["topk_ids"]
    ids[0] = -1
    ids[1, 0], ids[2, 1] = -1, 4
    ids[3] = torch.tensor([1000, -77], dtype=torch.int32)
    tensors["topk_weights"][ids < 0] = NAN
    output = torch.full((6, 40), NAN)
    work = ExpertsWork(
        output,
        *(tensors[n] for n in ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")),
        layer.activation,
        4,
        workspace13=torch.full((12, 24), NAN),
        workspace2=torch.full((12, 40), NAN),
    )
    triton_experts(work, layer.numbers, None, None)
    safe = tensors | {"topk_weights": tensors["topk_weights"].nan_to_num()}
    assert_right(output, layer, safe)
    assert (output[[0, 3]] == 0).all()


def test_ids_out_of_range_are_refused_on_a_cpu():
    layer = Layer()
    tensors = layer.tensors()
    for bad in (4, -2):
        tensors["topk_ids"][3, 1] = bad
        with pytest.raises(ValueError, match=str(bad)):
            functional(layer, tensors)
        with pytest.raises(ValueError, match=str(bad)):
            run(layer, tensors)


def test_a_nan_row_harms_its_own_token_alone(bodies):
    layer = Layer(T=8, E=2)
    tensors = layer.tensors()
    clean = run(layer, tensors)
    tensors["hidden_states"][3] = NAN
    out = run(layer, tensors)
    assert out[3].isnan().all()
    others = [0, 1, 2, 4, 5, 6, 7]
    assert out[others].equal(clean[others])


def test_all_tokens_on_one_expert(bodies):
    layer = Layer(T=35, K=1)
    tensors = layer.tensors()
    tensors["topk_ids"].fill_(2)
    assert_right(run(layer, tensors), layer, tensors)


def test_no_tokens(bodies):
    layer = Layer(T=0)
    tensors = layer.tensors()
    assert run(layer, tensors).shape == (0, 40)
    assert functional(layer, tensors).shape == (0, 40)


def test_strides_are_followed(bodies):
    """Transposed checkpoints, and rows cut from a wider tensor."""
    layer = Layer(bias=True)
    tensors = layer.tensors()
    expected = layer.expected(tensors)
    for name in ("w1", "w2"):
        tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    tensors["hidden_states"] = tensors["hidden_states"].repeat(1, 2)[:, :40]
    tensors["topk_ids"] = tensors["topk_ids"].t().contiguous().t()
    tensors["topk_weights"] = tensors["topk_weights"].t().contiguous().t()
    torch.testing.assert_close(run(layer, tensors).double(), expected, rtol=2e-5, atol=2e-5)


def test_ids_of_either_width_agree(bodies):
    layer = Layer(E=6, local=3)
    tensors = layer.tensors()
    narrow = run(layer, tensors)
    tensors["topk_ids"] = tensors["topk_ids"].long()
    assert run(layer, tensors).equal(narrow)


def test_workspaces_follow_from_sizes():
    experts = TritonExperts(Layer().config(), FusedMoEQuantConfig())
    shapes = experts.workspace_shapes(7, 48, 40, 2, 4, 4, None, MoEActivation.SILU)
    assert shapes == ((7, 2, 24), (7, 2, 40), (7, 40))


def test_compiled_without_graph_breaks():
    layer = Layer(bias=True, numbers=ApplyMoEActivationConfig(clamp_limit=0.7))
    tensors = layer.tensors()
    compiled = torch.compile(fused_experts, fullgraph=True, backend="aot_eager")
    out = functional(layer, tensors, compiled)
    assert_right(out, layer, tensors)


@pytest.mark.parametrize("name", ["plain", "bias", "expert_map"])
def test_ops_keep_their_promises(name):
    layer = LAYERS[name]
    t = layer.tensors()
    numbers = layer.numbers.numbers()
    given = [t[n] for n in ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")]
    rest = [t["expert_map"], t["w1_bias"], t["w2_bias"]]
    act = layer.activation.value
    torch.library.opcheck(
        torch.ops.fusedmoe.fused_experts.default,
        (*given, rest[1:], "", rest[0], act, False, -1, numbers, False, None, None, False),
    )
    scratch = torch.zeros(7, 2, 24), torch.zeros(7, 2, 40)
    work = (torch.zeros(7, 40), *given, act, layer.E, rest[0], None, None, *scratch, False)
    torch.library.opcheck(
        torch.ops.fusedmoe.triton_experts.default, (*work, numbers, *rest[1:], False, None)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w1": torch.zeros(4, 47, 40)}, "w1"),
        ({"w2": torch.zeros(4, 39, 24)}, "w2"),
        ({"w2": torch.zeros(4, 40)}, r"w1 \[e, S \* I, H\]"),
        ({"topk_ids": torch.zeros(6, 2, dtype=torch.int32)}, "topk_ids"),
        ({"topk_ids": torch.zeros(7, 2)}, "int32 or int64"),
        ({"topk_weights": torch.zeros(7, 1)}, "topk_weights"),
        ({"hidden_states": torch.zeros(7, 40, dtype=torch.float16)}, "float16"),
        ({"global_num_experts": 9}, "expert_map"),
        ({"expert_map": torch.zeros(5, dtype=torch.int32), "global_num_experts": 6}, "expert_map"),
        ({"expert_map": torch.zeros(4)}, "int32 or int64, got torch.float32"),
        ({"apply_router_weight_on_input": True}, "top-1"),
        (
            {"quant_config": FusedMoEQuantConfig(w1=FusedMoEQuantDesc(dtype="int4"))},
            "no format",
        ),
        ({"quant_config": FusedMoEQuantConfig(w1=FusedMoEQuantDesc(bias=torch.zeros(4, 3)))}, "48"),
        ({"options": MoEOptions(experts="nonsense")}, "nonsense"),
    ],
)
def test_arguments_that_disagree_are_named(changes, message):
    layer = Layer()
    with pytest.raises(ValueError, match=message):
        functional(layer, layer.tensors(), **changes)
