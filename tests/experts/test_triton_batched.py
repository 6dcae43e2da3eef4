"""Batched experts between the batched prepare and finalize, against the definition."""

import pytest
import torch

from expert_layers import Layer, assert_right
from fusedmoe import BatchedTritonExperts, MoEOptions
from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.modular_kernel import ExpertTokensMetadata, FusedMoEKernel
from fusedmoe.prepare_finalize.batched import BatchedPrepareAndFinalize
from fusedmoe.prepare_finalize.no_ep import MoEPrepareAndFinalizeNoDPEPModular
from fusedmoe.quantization.config import FusedMoEQuantConfig, biased_moe_quant_config

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAN = float("nan")
LAYERS = {
    "plain": Layer(),
    "one_token": Layer(T=1, K=1, E=1, H=16, I=16),
    "every_expert": Layer(K=4),
    "bias": Layer(bias=True),
    "expert_map_and_bias": Layer(E=8, local=5, bias=True),
    "no_gate": Layer(activation=MoEActivation.RELU2_NO_MUL),
    "interleaved": Layer(activation=MoEActivation.SWIGLUOAI, bias=True),
    "clamped": Layer(numbers=ApplyMoEActivationConfig(clamp_limit=0.5)),
    "weight_on_input": Layer(K=1, weight_on_input=True),
    "fp16": Layer(dtype=torch.float16),
    "batch_invariant": Layer(options=MoEOptions(batch_invariant=True)),
}


def run(layer, tensors, room=11):
    mover = BatchedPrepareAndFinalize(room, layer.local or layer.E)
    return layer.run(BatchedTritonExperts, mover, tensors)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, bodies):
    layer = LAYERS[name]
    tensors = layer.tensors()
    assert_right(run(layer, tensors), layer, tensors)


def test_dead_slots_and_nan_rows(bodies):
    layer = Layer(T=6)
    tensors = layer.tensors()
    tensors["topk_ids"][0], tensors["topk_ids"][2, 1] = -1, -1
    tensors["topk_weights"][0] = NAN
    out = run(layer, tensors)
    assert (out[0] == 0).all()
    safe = tensors | {"topk_weights": tensors["topk_weights"].nan_to_num()}
    assert_right(out, layer, safe)
    tensors["hidden_states"][3] = NAN
    again = run(layer, tensors)
    assert again[3].isnan().all()
    others = [0, 1, 2, 4, 5]
    assert again[others].equal(out[others])


def test_all_tokens_on_one_expert_fill_its_room(bodies):
    layer = Layer(T=20, K=1)
    tensors = layer.tensors()
    tensors["topk_ids"].fill_(3)
    assert_right(run(layer, tensors, room=20), layer, tensors)


def test_no_tokens(bodies):
    layer = Layer(T=0)
    assert run(layer, layer.tensors()).shape == (0, 40)


def test_rows_lie_in_token_order_and_nothing_is_read_past_the_counts():
    x = torch.arange(3.0)[:, None].expand(3, 4)
    ids = torch.tensor([[1, 0], [1, -1], [2, 1]], dtype=torch.int32)
    mover = BatchedPrepareAndFinalize(4, 3)
    prepared = mover.prepare(x, torch.ones(3, 2), ids, 3, None, False, FusedMoEQuantConfig())
    assert prepared.expert_tokens_meta.expert_num_tokens.tolist() == [1, 3, 1]
    assert prepared.hidden_states.shape == (3, 4, 4)
    assert prepared.hidden_states[1, :3, 0].tolist() == [0, 1, 2]
    assert prepared.hidden_states[2, 0, 0] == 2


def test_a_token_that_picks_an_expert_twice_never_writes_past_its_room():
    ids = torch.tensor([[0, 0], [0, 0]])
    mover = BatchedPrepareAndFinalize(2, 2)
    x = torch.ones(2, 4)
    prepared = mover.prepare(x, torch.ones(2, 2), ids, 2, None, False, FusedMoEQuantConfig())
    assert prepared.expert_tokens_meta.expert_num_tokens.tolist() == [2, 0]
    assert prepared.hidden_states[1].isnan().all()


def test_more_tokens_than_room_are_refused():
    layer = Layer(T=9)
    with pytest.raises(ValueError, match=r"9 tokens.*8"):
        run(layer, layer.tensors(), room=8)


def test_it_is_chosen_by_name_where_room_is_known():
    layer = Layer(options=MoEOptions(experts="triton_batched"))
    from fusedmoe.selection import select

    with pytest.raises(ValueError, match="not cpu"):
        select(layer.config(max_num_tokens=16))
    why = BatchedPrepareAndFinalize.unmet_requirement(layer.config(), None)
    assert "max_num_tokens" in why
    assert (
        BatchedPrepareAndFinalize.make(layer.config(max_num_tokens=16), None).max_num_tokens == 16
    )


def test_formats_do_not_mix():
    experts = BatchedTritonExperts(
        Layer().config(), FusedMoEQuantConfig(), max_num_tokens=8, num_dispatchers=1
    )
    with pytest.raises(ValueError, match="Standard"):
        FusedMoEKernel(MoEPrepareAndFinalizeNoDPEPModular(), experts)


def experts_and_arguments(layer, counts):
    t = layer.tensors()
    experts = BatchedTritonExperts(
        layer.config(),
        biased_moe_quant_config(t["w1_bias"], t["w2_bias"]),
        max_num_tokens=8,
        num_dispatchers=1,
    )
    ids, weights = t["topk_ids"], t["topk_weights"]
    scratch = torch.zeros(4, 8, 24)
    rest = (layer.activation, 4, None, None, None, scratch, None, counts, False)
    return (
        experts,
        (torch.zeros(4, 8, 40), torch.randn(4, 8, 40), t["w1"], t["w2"], weights, ids),
        rest,
    )


def test_counts_are_required():
    experts, tensors, rest = experts_and_arguments(Layer(), ExpertTokensMetadata(torch.zeros(3)))
    with pytest.raises(ValueError, match=r"4.*3"):
        experts.apply(*tensors, *rest)


def test_the_op_keeps_its_promises_and_compiles():
    layer = Layer(bias=True)
    counts = torch.tensor([2, 0, 8, 5], dtype=torch.int32)
    experts, tensors, rest = experts_and_arguments(layer, ExpertTokensMetadata(counts))
    experts.apply(*tensors, *rest)
    expected = tensors[0].clone()
    tensors[0].zero_()

    def apply(*tensors):
        experts.apply(*tensors, *rest)
        return tensors[0]

    assert torch.compile(apply, fullgraph=True, backend="aot_eager")(*tensors).equal(expected)
    biases = experts.quant_config.w1_bias, experts.quant_config.w2_bias
    torch.library.opcheck(
        torch.ops.fusedmoe.batched_triton_experts.default,
        (
            *(*tensors, "silu", 4, None, None, None, rest[5], None, False),
            *(counts, layer.numbers.numbers(), *biases, False),
        ),
    )
