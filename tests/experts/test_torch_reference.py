"""The definition itself, against a sum over all experts written without gathers."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedmoe import FusedMoE, MoEOptions, explain, quantize_layer
from fusedmoe.activation import MoEActivation, activation_reference
from fusedmoe.experts.torch_reference import TorchExperts
from fusedmoe.kernels.experts_reference import experts_reference
from fusedmoe.quantization.keys import FP8_DYNAMIC_TENSOR
from fusedmoe.testing import STANDARD_CASES, Case, check_experts, make_inputs, relative_error
from quantized_layers import make_layer


def dense(case: Case, inputs) -> torch.Tensor:
    """Every expert on every token, times the weight that the token gives it (mostly 0), in fp64."""
    x, total = inputs.hidden_states.double(), 0.0
    for expert in range(case.E):
        local = expert if inputs.expert_map is None else int(inputs.expert_map[expert])
        if local < 0:
            continue
        weight = (inputs.topk_weights * (inputs.topk_ids == expert)).sum(1, keepdim=True).double()
        rows = x * weight if case.weight_on_input else x
        up = torch.einsum("th,nh->tn", rows, inputs.w1[local].double())
        if inputs.w1_bias is not None:
            up = up + inputs.w1_bias[local].double()
        middle = activation_reference(case.activation, up, case.numbers)
        down = torch.einsum("ti,hi->th", middle, inputs.w2[local].double())
        if inputs.w2_bias is not None:
            down = down + inputs.w2_bias[local].double()
        chosen = (inputs.topk_ids == expert).any(1, keepdim=True)
        total = total + (torch.where(chosen, down, 0.0) if case.weight_on_input else weight * down)
    return total + torch.zeros_like(x)


@pytest.mark.parametrize("case", STANDARD_CASES, ids=str)
def test_the_definition_is_the_weighted_sum_over_all_experts(case):
    inputs = make_inputs(case, dtype=torch.float64)
    found = experts_reference(
        inputs.hidden_states,
        inputs.w1,
        inputs.w2,
        inputs.topk_weights,
        inputs.topk_ids,
        activation=case.activation,
        activation_config=case.numbers,
        w1_bias=inputs.w1_bias,
        w2_bias=inputs.w2_bias,
        expert_map=inputs.expert_map,
        apply_router_weight_on_input=case.weight_on_input,
        compute_dtype=torch.float64,
    )
    assert found.dtype is torch.float64
    assert relative_error(found, dense(case, inputs)).maximum < 1e-12


@pytest.mark.usefixtures("one_thread")
def test_as_an_implementation():
    """fp64 too, batch invariant, and nothing of what it cannot do."""
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    results = check_experts(TorchExperts, dtypes=dtypes)
    assert not [str(result) for result in results if result.skipped]


def test_ids_that_no_expert_has_count_as_nothing():
    inputs = make_inputs(Case(T=3, K=2, E=4))
    ids = torch.tensor([[0, 4], [-1, 99], [-7, 2]])
    found = experts_reference(inputs.hidden_states, inputs.w1, inputs.w2, inputs.topk_weights, ids)
    kept = torch.tensor([[0, -1], [-1, -1], [-1, 2]])
    expected = experts_reference(
        inputs.hidden_states, inputs.w1, inputs.w2, inputs.topk_weights, kept
    )
    assert torch.equal(found, expected)
    assert not found[1].any()


def test_sixteen_bit_inputs_are_summed_in_fp32():
    """2048 times 1 + 2**-9 rounds to 2048 in bf16 sums, to 2052 in fp32 ones."""
    x = torch.ones(1, 2048, dtype=torch.bfloat16)
    w1 = torch.full((1, 1, 2048), 1.0078125, dtype=torch.bfloat16)
    w2 = torch.ones(1, 2048, 1, dtype=torch.bfloat16)
    found = experts_reference(
        x,
        w1,
        w2,
        torch.ones(1, 1),
        torch.zeros(1, 1, dtype=torch.long),
        activation=MoEActivation.RELU2_NO_MUL,
        compute_dtype=torch.float32,
    )
    assert found[0, 0].item() == torch.tensor((2048 * 1.0078125) ** 2).bfloat16().item()


class Largest(TorchDispatchMode):
    """The most bytes of a new tensor with as many columns as ``width``, weights aside."""

    def __init__(self, width):
        super().__init__()
        self.width, self.bytes = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func is torch.ops.aten.mm.default and out.shape[1] == self.width:
            self.bytes = max(self.bytes, out.nbytes)
        return out


@pytest.mark.parametrize("fmt", [None, "fp8_channel"])
def test_tokens_are_taken_in_passes_that_fit(fmt):
    """All tokens go to the same experts: one product has all rows, unless a limit is given."""
    results, largest = [], []
    for limit in (None, 40_000):
        torch.manual_seed(0)
        options = MoEOptions(max_workspace_bytes=limit, experts="torch" if fmt is None else None)
        layer = FusedMoE(4, 2, 64, 48, torch.float32, options=options)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        layer.routed_experts.process_weights_after_loading()
        if fmt is not None:
            quantize_layer(layer, fmt)
            assert explain(layer).chosen.name == "torch_quantized"
        x, logits = torch.randn(50, 64), torch.tensor([[3.0, 2.0, 0.0, 0.0]]).expand(50, 4)
        with Largest(96) as mode, torch.no_grad():
            results.append(layer(x, logits))
        largest.append(mode.bytes)
    assert largest[0] == 50 * 96 * 4
    assert 0 < largest[1] < largest[0] / 3
    torch.testing.assert_close(*results)


def test_a_scale_that_all_tokens_make_is_made_of_all_tokens():
    outs = []
    for limit in (None, 1):
        options = MoEOptions(experts="torch_quantized", max_workspace_bytes=limit)
        layer, *_ = make_layer("fp8_tensor", FP8_DYNAMIC_TENSOR, options=options)
        torch.manual_seed(0)
        x, logits = torch.randn(9, 128) * torch.logspace(-3, 0, 9)[:, None], torch.randn(9, 4)
        outs.append(layer(x, logits))
    assert torch.equal(*outs)
