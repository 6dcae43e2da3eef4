"""check_experts passes what is right and catches what is wrong, one mistake at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusedmoe.experts.torch_reference import TorchExperts
from fusedmoe.kernels.experts_reference import experts_reference
from fusedmoe.modular_kernel import ExpertsCapabilities, WorkspaceShapes
from fusedmoe.testing import Case, check_experts

CASES = [Case(T=9, K=2, E=4, dropped=0.3), Case(T=5, K=1, E=4, bias=True, local=2)]


class Honest(TorchExperts):
    """The definition as an implementation; the mistakes below change one thing each."""

    name = "honest"

    @classmethod
    def capabilities(cls):
        return ExpertsCapabilities(dtypes=frozenset({torch.float32}))

    def compute(self, x, w1, w2, weights, ids, expert_map, config):
        return experts_reference(
            x,
            w1,
            w2,
            weights,
            ids,
            activation=self.moe_config.activation,
            activation_config=config,
            w1_bias=self.quant_config.w1_bias,
            w2_bias=self.quant_config.w2_bias,
            expert_map=expert_map,
        )

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *rest):
        expert_map = rest[2]
        output.copy_(
            self.compute(
                hidden_states, w1, w2, topk_weights, topk_ids, expert_map, self.activation_config
            )
        )


def test_what_is_right_passes_and_says_how_exact_it_is():
    results = check_experts(Honest, CASES)
    assert [result.case for result in results] == CASES
    assert all(result.error < 1e-6 for result in results)
    assert "fp32: error" in str(results[0])


class RunsDroppedSlots(Honest):
    def compute(self, x, w1, w2, weights, ids, expert_map, config):
        return super().compute(x, w1, w2, weights + 0.1, ids.clamp(min=0), expert_map, config)


class ForgetsBias(Honest):
    def compute(self, x, w1, w2, weights, ids, expert_map, config):
        return experts_reference(x, w1, w2, weights, ids, expert_map=expert_map)


class ReadsItsWorkspace(Honest):
    def workspace_shapes(self, M, N, K, topk, *rest):
        return WorkspaceShapes((M, K), (0,), (M, K))

    def apply(self, output, *rest):
        super().apply(output, *rest)
        output += 0 * rest[10]


class LeavesARowUnwritten(Honest):
    def apply(self, output, *rest):
        full = torch.zeros_like(output)
        super().apply(full, *rest)
        output[:-1] = full[:-1]


class WritesItsInput(Honest):
    def apply(self, output, hidden_states, *rest):
        super().apply(output, hidden_states, *rest)
        hidden_states *= 1.5


class GivesOtherBitsEachTime(Honest):
    calls = 0

    def apply(self, output, *rest):
        super().apply(output, *rest)
        type(self).calls += 1
        output *= 1 + 2.0**-22 * self.calls


class AdmitsIt(GivesOtherBitsEachTime):
    @classmethod
    def capabilities(cls):
        return replace(super().capabilities(), deterministic=False)


class MixesRows(Honest):
    """A column sum over all rows that is exactly zero, unless one row is NaN."""

    def apply(self, output, hidden_states, *rest):
        super().apply(output, hidden_states, *rest)
        output += 0 * hidden_states.sum()


class MultipliesPaddingByZero(Honest):
    """Right as long as the weight of a slot with id -1 is a number."""

    def compute(self, x, w1, w2, weights, *rest):
        return super().compute(x, w1, w2, weights, *rest) + 0 * weights.sum(1, keepdim=True)


class DependsOnTheBatch(Honest):
    @classmethod
    def capabilities(cls):
        return ExpertsCapabilities(dtypes=frozenset({torch.float32}), batch_invariant=True)

    def apply(self, output, hidden_states, *rest):
        super().apply(output, hidden_states, *rest)
        output *= 1 + 2.0**-22 * (hidden_states.shape[0] % 2 + (hidden_states.shape[0] == 1))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (RunsDroppedSlots, "relative error"),
        (ForgetsBias, "relative error"),
        (ReadsItsWorkspace, "finite where the reference is not"),
        (LeavesARowUnwritten, "finite where the reference is not"),
        (WritesItsInput, "hidden_states was written to"),
        (GivesOtherBitsEachTime, "a second run gave other bits"),
        (MixesRows, "a NaN in the last token changed another one"),
        (MultipliesPaddingByZero, "slots of id -1 changed"),
        (DependsOnTheBatch, "bits changed"),
    ],
)
def test_each_mistake_is_caught(mistake, message):
    with pytest.raises(AssertionError, match=message):
        check_experts(mistake, CASES)


def test_what_a_class_says_it_cannot_do_is_skipped_with_the_reason():
    class NoBias(Honest):
        @classmethod
        def capabilities(cls):
            return ExpertsCapabilities(dtypes=frozenset({torch.float32}), bias=False)

    results = check_experts(NoBias, CASES)
    assert results[0].skipped is None
    assert "expert biases" in results[1].skipped
    assert "skipped" in str(results[1])


@pytest.mark.gpu
def test_the_torch_reference_on_a_gpu():
    check_experts(TorchExperts, device="cuda")


def test_who_does_not_promise_the_same_bits_may_change_them():
    assert all(result.error < 1e-5 for result in check_experts(AdmitsIt, CASES))
