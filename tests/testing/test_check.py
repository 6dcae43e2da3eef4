"""check_experts passes what is right and catches what is wrong, one mistake at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from fusedmoe.experts.cpu import CpuMonolithicExperts
from fusedmoe.experts.grouped_mm import GroupedMMExperts
from fusedmoe.experts.torch_batched import BatchedTorchExperts
from fusedmoe.experts.torch_reference import TorchExperts
from fusedmoe.kernels.experts_reference import experts_reference
from fusedmoe.modular_kernel import ExpertsCapabilities, WorkspaceShapes
from fusedmoe.testing import Case, check_experts

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = [
    Case(T=9, K=2, E=4, dropped=0.3),
    Case(T=5, K=1, E=4, bias=True, local=2),
    Case(T=6, K=1, E=4, weight_on_input=True),
    Case(T=6, K=2, E=4, strided=True),
]


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
        weights = torch.ones_like(topk_weights) if rest[-1] else topk_weights
        config = self.activation_config
        output.copy_(self.compute(hidden_states, w1, w2, weights, topk_ids, rest[2], config))


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
        output *= 1 + 2.0**-22 * (self.calls % 3)


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


class WeighsTheOutputToo(Honest):
    def apply(self, *work):
        super().apply(*work[:-1], False)


class TakesIdsForDense(Honest):
    def compute(self, x, w1, w2, weights, ids, *rest):
        return super().compute(
            x, w1, w2, weights, ids.as_strided(ids.shape, (ids.shape[1], 1)), *rest
        )


class KeepsTheRoutingOfAShape(Honest):
    def compute(self, x, w1, w2, weights, ids, *rest):
        known = vars(self).setdefault("known", {})
        return super().compute(x, w1, w2, weights, known.setdefault(ids.shape, ids.clone()), *rest)


class KeepsTheLargestBatch(Honest):
    """Rows of a batch that was larger stay behind this one's."""

    largest: torch.Tensor | None = None

    def apply(self, output, hidden_states, *rest):
        super().apply(output, hidden_states, *rest)
        if self.largest is not None and len(self.largest) > len(output):
            output.add_(self.largest[len(output)])
        self.largest = output.clone()


class PacksOnce(Honest):
    packed: torch.Tensor | None = None

    def process_weights_after_loading(self, layer):
        if self.packed is None:
            self.packed = layer.w13_weight.clone()

    def compute(self, x, w1, *rest):
        return super().compute(x, self.packed, *rest)


class ReplacesItsWeights(PacksOnce):
    def process_weights_after_loading(self, layer):
        self.packed = layer.w13_weight.detach()
        layer.w13_weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)


class TurnsItsWeights(Honest):
    def process_weights_after_loading(self, layer):
        layer.w2_weight.copy_(layer.w2_weight.flip(1))


class KnowsOnePassOnly(Honest):
    """Its scratch memory is asked for by the row; what it writes there is of all tokens."""

    tokens = 0

    def workspace_shapes(self, M, N, K, topk, *rest):
        self.tokens = max(self.tokens, M)
        return WorkspaceShapes((M, K), (0,), (M, K))

    def apply(self, output, *rest):
        super().apply(output, *rest)
        if self.moe_config.options.max_workspace_bytes is not None:
            output *= self.tokens / len(output)


class Monolithic(CpuMonolithicExperts):
    @classmethod
    def capabilities(cls):
        known = super().capabilities()
        return replace(known, dtypes=frozenset({torch.bfloat16}), batch_invariant=False)


class WidensItsRows(Monolithic):
    def apply(self, *work, **more):
        return super().apply(*work, **more).float()


class ReturnsOneBuffer(Monolithic):
    buffers: ClassVar[dict[torch.Size, torch.Tensor]] = {}

    def apply(self, *work, **more):
        output = super().apply(*work, **more)
        return self.buffers.setdefault(output.shape, output).copy_(output)


class DropsTheLastRow(BatchedTorchExperts):
    def run(self, work):
        super().run(work)
        work.output[:, 1:] = 0


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
        (WeighsTheOutputToo, "T6-K1-E4-H64-I48-weight_on_input in fp32: relative error"),
        (TakesIdsForDense, "T6-K2-E4-H64-I48-strided in fp32: relative error"),
        (KeepsTheRoutingOfAShape, "another batch in the same memory: relative error"),
        (KeepsTheLargestBatch, "a smaller batch after it: relative error"),
        (PacksOnce, "weights that changed and were prepacked again: relative error"),
        (ReplacesItsWeights, "w13_weight was replaced or written to by prepacking"),
        (TurnsItsWeights, "w2_weight was replaced or written to by prepacking"),
        (KnowsOnePassOnly, "with max_workspace_bytes=768: relative error"),
        (WidensItsRows, r"rows enter in torch\.bfloat16 and leave in torch\.float32"),
        (ReturnsOneBuffer, "a later forward wrote over the output"),
        (DropsTheLastRow, "relative error"),
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


@pytest.mark.parametrize("experts", [BatchedTorchExperts, GroupedMMExperts])
def test_own_implementations_pass_in_either_format(experts):
    results = check_experts(experts, dtypes=(torch.bfloat16,))
    assert not [str(result) for result in results if result.skipped]


def test_checking_nothing_is_no_success():
    class OnGpusOnly(Honest):
        @classmethod
        def capabilities(cls):
            return replace(super().capabilities(), devices=frozenset({"cuda"}))

    with pytest.raises(AssertionError, match=r"ran none of 4 cases.*runs on cuda, not cpu"):
        check_experts(OnGpusOnly, CASES)
    with pytest.raises(AssertionError, match=r"ran none of 4 cases: it computes in.*float32"):
        check_experts(Honest, CASES, dtypes=(torch.bfloat16,))
    assert check_experts(Honest, ()) == []


def test_an_error_says_in_which_case_it_came():
    class Raises(Honest):
        def apply(self, *work):
            raise KeyError("by mistake")

    with pytest.raises(KeyError) as caught:
        check_experts(Raises, CASES)
    assert caught.value.__notes__ == ["while checking Raises, T9-K2-E4-H64-I48-dropped0.3 in fp32"]


@pytest.mark.gpu
def test_the_torch_reference_on_a_gpu():
    check_experts(TorchExperts, device="cuda")


def test_who_does_not_promise_the_same_bits_may_change_them():
    assert all(result.error < 1e-5 for result in check_experts(AdmitsIt, CASES))
