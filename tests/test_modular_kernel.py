"""One prepare/finalize and one experts implementation composed: order, chunks, ids, formats."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from fusedmoe import FusedMoE, FusedMoEConfig, MoEActivation, MoEOptions
from fusedmoe.experts.torch_reference import TorchExperts
from fusedmoe.modular_kernel import (
    ExpertTokensMetadata,
    FinalizeWork,
    FusedMoEActivationFormat,
    FusedMoEExpertsModular,
    FusedMoEKernel,
    FusedMoEMonolithicKernel,
    FusedMoEPrepareAndFinalizeModular,
    PrepareResult,
    PrepareWork,
)
from fusedmoe.modular_kernel.forward import finish, half_sizes
from fusedmoe.prepare_finalize.batched import BatchedPrepareAndFinalize
from fusedmoe.prepare_finalize.no_ep import (
    MoEPrepareAndFinalizeNoDPEPModular,
    MoEPrepareAndFinalizeNoDPEPMonolithic,
)
from fusedmoe.quantization.config import FUSED_MOE_UNQUANTIZED_CONFIG
from fusedmoe.router.routers import SpecRouter
from fusedmoe.router.spec import RoutingSpec
from fusedmoe.topk_weight_and_reduce import TopKWeightAndReduceDelegate, TopKWeightAndReduceNoOP
from toy_stages import AsyncMover, BatchedExperts, LogitsExperts, SlotExperts, SumExperts, expert

E, K, H, I = 5, 2, 6, 4  # noqa: E741
W1 = torch.randn(E, 2 * I, H, generator=torch.Generator().manual_seed(0))
W2 = torch.randn(E, H, I, generator=torch.Generator().manual_seed(1))


def config(**options) -> FusedMoEConfig:
    return FusedMoEConfig(
        num_experts=E,
        experts_per_token=K,
        hidden_dim=H,
        intermediate_size_per_partition=I,
        num_local_experts=E,
        activation=MoEActivation.SILU,
        in_dtype=torch.float32,
        device=torch.device("cpu"),
        options=MoEOptions(**options),
    )


def kernel(experts=SlotExperts, mover=MoEPrepareAndFinalizeNoDPEPModular, **options):
    return FusedMoEKernel(mover(), experts(config(**options), FUSED_MOE_UNQUANTIZED_CONFIG))


def inputs(T: int = 7):
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(T, H, generator=generator)
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)]).int()
    return x, torch.rand(T, K, generator=generator), ids


def run(built: FusedMoEKernel, x, weights, ids, **arguments):
    return built.apply(
        x,
        W1,
        W2,
        weights,
        ids,
        activation=MoEActivation.SILU,
        global_num_experts=E,
        **arguments,
    )


def expected(x, weights, ids):
    out = torch.zeros_like(x)
    for t, k in (ids >= 0).nonzero().tolist():
        e = int(ids[t, k])
        out[t] += weights[t, k] * expert(x[t : t + 1], W1[e], W2[e])[0]
    return out


@pytest.mark.parametrize("experts", [SlotExperts, SumExperts, TorchExperts])
@pytest.mark.parametrize("mover", [MoEPrepareAndFinalizeNoDPEPModular, AsyncMover])
def test_any_experts_work_behind_any_mover(experts, mover):
    x, weights, ids = inputs()
    ids[2, 0] = -1
    ids[3] = -1
    torch.testing.assert_close(
        run(kernel(experts, mover), x, weights, ids), expected(x, weights, ids)
    )


def test_what_is_left_to_do_follows_the_rows_unless_said_otherwise():
    says = FusedMoEExpertsModular.finalize_weight_and_reduce_impl
    standard = TorchExperts(config(), FUSED_MOE_UNQUANTIZED_CONFIG)
    batched = BatchedExperts(config(), FUSED_MOE_UNQUANTIZED_CONFIG, 4, 1)
    assert isinstance(says(standard), TopKWeightAndReduceNoOP)
    assert isinstance(says(batched), TopKWeightAndReduceDelegate)
    assert isinstance(kernel().experts.finalize_weight_and_reduce_impl(), type(says(batched)))


def test_no_tokens_run_no_experts_but_still_finalize():
    AsyncMover.log.clear()
    SlotExperts.calls.clear()
    x, weights, ids = inputs()
    none = run(
        kernel(SlotExperts, AsyncMover), x[:0], weights[:0], ids[:0], while_combining=lambda: None
    )
    assert none.shape == (0, H)
    assert not SlotExperts.calls
    assert AsyncMover.log[-1] == "finalize received"


@pytest.mark.parametrize("with_hooks", [True, False])
def test_async_forms_run_hook_then_receiver_around_the_overlapped_work(with_hooks, monkeypatch):
    monkeypatch.setattr(AsyncMover, "with_hooks", with_hooks)
    AsyncMover.log.clear()
    run(
        kernel(SlotExperts, AsyncMover),
        *inputs(),
        while_combining=lambda: AsyncMover.log.append("shared experts"),
    )
    hook = ["hook"] if with_hooks else []
    assert AsyncMover.log == [
        "finalize started",
        "shared experts",
        *(f"finalize {step}" for step in [*hook, "received"]),
    ]


def test_two_halves_take_turns(monkeypatch):
    """Both are sent before the experts run, and the first is on its way back beside the second."""
    monkeypatch.setattr(AsyncMover, "with_hooks", False)
    monkeypatch.setattr(AsyncMover, "concurrent_forwards", lambda self: 2)
    AsyncMover.log.clear()
    SlotExperts.calls.clear()
    x, weights, ids = inputs()
    found = run(
        kernel(SlotExperts, AsyncMover, micro_batch_tokens=7),
        *(x, weights, ids),
        while_combining=lambda: AsyncMover.log.append("shared experts"),
    )
    torch.testing.assert_close(found, expected(x, weights, ids))
    assert [call["rows"] for call in SlotExperts.calls] == [4, 3]
    assert AsyncMover.log == [
        *["prepare started"] * 2,
        *["prepare received", "finalize started"] * 2,
        "shared experts",
        *["finalize received"] * 2,
    ]


@pytest.mark.parametrize("options", [{}, {"micro_batch_tokens": 8}, {"micro_batch_tokens": 1}])
def test_what_is_not_split(options, monkeypatch):
    """No threshold, fewer tokens, and ways that hold one forward at a time."""
    if options != {"micro_batch_tokens": 1}:
        monkeypatch.setattr(AsyncMover, "concurrent_forwards", lambda self: 2)
    SlotExperts.calls.clear()
    run(kernel(SlotExperts, AsyncMover, **options), *inputs())
    assert [call["rows"] for call in SlotExperts.calls] == [7]


def test_halves_are_a_pure_function_of_the_ranks_tokens():
    assert half_sizes([7, 0, 1, 8], 8) == ([4, 0, 1, 4], [3, 0, 0, 4])
    assert half_sizes([7, 0], 8) is None
    assert half_sizes([1, 1], 1) is None
    assert half_sizes([0], 1) is None
    assert half_sizes([9], None) is None
    with pytest.raises(ValueError, match="micro_batch_tokens must be positive, got 0"):
        MoEOptions(micro_batch_tokens=0)


class ToBatches(FusedMoEPrepareAndFinalizeModular):
    """One rank's rows as [e, max_tokens, H]."""

    row_format = FusedMoEActivationFormat.BatchedExperts
    max_tokens = 9

    def max_num_tokens_per_rank(self):
        return self.max_tokens

    def prepare(self, a1, topk_weights, topk_ids, num_experts, *rest):
        rows = torch.full((num_experts, self.max_tokens, a1.shape[1]), float("nan"))
        counts = [0] * num_experts
        for t, k in (topk_ids >= 0).nonzero().tolist():
            e = int(topk_ids[t, k])
            rows[e, counts[e]] = a1[t]
            counts[e] += 1
        meta = ExpertTokensMetadata.make_from_list(counts, a1.device)
        return rows, None, meta, None, None  # the five that the API reference names

    def finalize(self, output, fused, topk_weights, topk_ids, on_input, reduce_impl):
        reduce_impl.apply(output, fused, topk_weights, topk_ids, on_input)


def batched_kernel(**options) -> FusedMoEKernel:
    experts = BatchedExperts(
        config(**options), FUSED_MOE_UNQUANTIZED_CONFIG, max_num_tokens=9, num_dispatchers=1
    )
    return FusedMoEKernel(ToBatches(), experts)


@pytest.mark.parametrize("limit", [None, 1])
def test_the_batched_format_keeps_its_rows_together(limit):
    x, weights, ids = inputs(6)
    ids[0, 1] = -1
    out = run(batched_kernel(max_workspace_bytes=limit), x, weights, ids)
    torch.testing.assert_close(out, expected(x, weights, ids))


def test_what_is_prepared_are_five_things():
    """As the API reference unpacks them."""
    x, weights, ids = inputs(6)
    mover = MoEPrepareAndFinalizeNoDPEPModular()
    arguments = (x, weights, ids, 6, None, False, FUSED_MOE_UNQUANTIZED_CONFIG)
    for found in (mover.prepare(*arguments), finish(mover.prepare_async(*arguments))):
        a, a_scales, expert_meta, topk_ids, topk_weights = found
        assert a is x
        assert a_scales is expert_meta is topk_ids is topk_weights is None


class Plain(FusedMoEPrepareAndFinalizeModular):
    """Written with the records; ``Scaled`` and ``ToBatches`` with one argument after the other."""

    def dispatch(self, work: PrepareWork) -> PrepareResult:
        return PrepareResult(work.weighted_input)

    def combine(self, work: FinalizeWork) -> None:
        self.weight_and_sum(work, work.output)


def test_a_mover_says_how_with_records_as_well():
    x, weights, ids = inputs()
    out = run(kernel(mover=Plain), x, weights, ids, while_combining=lambda: None)
    torch.testing.assert_close(out, expected(x, weights, ids))


class Elsewhere(Plain):
    """Wants the experts to write into ``place``."""

    place = torch.empty(0)
    written: ClassVar[list[torch.Tensor]] = []

    def expert_output(self) -> torch.Tensor:
        return self.place

    def combine(self, work: FinalizeWork) -> None:
        self.written.append(work.fused_expert_output)
        super().combine(work)


@pytest.mark.parametrize("fits", [True, False])
def test_experts_write_where_the_mover_wants_it(fits):
    x, weights, ids = inputs()
    built = kernel(TorchExperts, Elsewhere)
    place = torch.full((len(x), H if fits else H + 1), float("nan"))
    built.prepare_finalize.place = place
    torch.testing.assert_close(run(built, x, weights, ids), expected(x, weights, ids))
    assert (Elsewhere.written.pop().data_ptr() == place.data_ptr()) == fits


class HalfAMover(Plain):
    combine = FusedMoEPrepareAndFinalizeModular.combine


def test_a_mover_that_lacks_a_half_says_which():
    with pytest.raises(NotImplementedError, match="HalfAMover defines neither combine nor"):
        run(kernel(mover=HalfAMover), *inputs())
    with pytest.raises(NotImplementedError, match="defines neither dispatch nor prepare"):
        run(kernel(mover=FusedMoEPrepareAndFinalizeModular), *inputs())


def test_formats_that_differ_cannot_be_composed():
    with pytest.raises(ValueError, match="ToBatches gives BatchedExperts rows"):
        kernel(mover=ToBatches)
    with pytest.raises(ValueError, match="BatchedExperts has format BatchedExperts"):
        kernel(BatchedExperts)
    with pytest.raises(ValueError, match=r"max_num_tokens \(9\)"):
        SlotExperts(config(), FUSED_MOE_UNQUANTIZED_CONFIG, max_num_tokens=9, num_dispatchers=1)


PER_ROW = 4 * (K * 2 * I + K * I)  # bytes of SlotExperts' two workspaces for one row


@pytest.mark.parametrize(
    ("limit", "passes"),
    [
        (None, [7]),
        (7 * PER_ROW, [7]),
        (7 * PER_ROW - 1, [6, 1]),
        (3 * PER_ROW, [3, 3, 1]),
        (PER_ROW, [1] * 7),
        (1, [1] * 7),
    ],
)
@pytest.mark.parametrize("mover", [MoEPrepareAndFinalizeNoDPEPModular, AsyncMover])
def test_max_workspace_bytes_runs_rows_in_passes_of_equal_result(limit, passes, mover):
    x, weights, ids = inputs()
    whole = run(kernel(mover=mover), x, weights, ids)
    SlotExperts.calls.clear()
    cut = run(kernel(mover=mover, max_workspace_bytes=limit), x, weights, ids)
    assert [call["rows"] for call in SlotExperts.calls] == passes
    assert torch.equal(cut, whole)


class PlainTuples(SlotExperts):
    """Written for an interface that has no names for them."""

    def workspace_shapes(self, *sizes):
        return tuple(super().workspace_shapes(*sizes))

    def moe_problem_size(self, *tensors):
        return tuple(super().moe_problem_size(*tensors))


def test_sizes_and_shapes_may_be_plain_tuples():
    x, weights, ids = inputs()
    found = run(kernel(PlainTuples, max_workspace_bytes=3 * PER_ROW), x, weights, ids)
    assert torch.equal(found, run(kernel(), x, weights, ids))


class FlatSlots(SlotExperts):
    """The slots one below the other, [T * K, H]."""

    def workspace_shapes(self, M, N, K, topk, *rest):
        return super().workspace_shapes(M, N, K, topk, *rest)._replace(output=(M * topk, K))

    def apply(self, output, hidden_states, *rest):
        super().apply(output.view(hidden_states.shape[0], -1, H), hidden_states, *rest)


def test_an_output_of_slots_is_cut_where_its_rows_are():
    x, weights, ids = inputs()
    cut = run(kernel(FlatSlots, max_workspace_bytes=3 * PER_ROW), x, weights, ids)
    assert torch.equal(cut, run(kernel(), x, weights, ids))


def test_the_peak_is_reported_without_running():
    unbounded, bounded = kernel(), kernel(max_workspace_bytes=3 * PER_ROW)
    output = 4 * K * H
    assert unbounded.peak_workspace_bytes(7) == 7 * (PER_ROW + output)
    assert bounded.peak_workspace_bytes(7) == 3 * PER_ROW + 7 * output
    assert bounded.peak_workspace_bytes(2) == 2 * (PER_ROW + output)
    assert kernel(SumExperts).peak_workspace_bytes(7) == 7 * 4 * K * H  # output is the layer's own
    assert kernel().peak_workspace_bytes(0) == 0
    assert kernel(WideExperts).peak_workspace_bytes(7) == 7 * 4 * (K * H + H + 2)


def test_the_peak_of_batched_rows_is_that_of_the_room():
    batched = BatchedExperts(config(), FUSED_MOE_UNQUANTIZED_CONFIG, 6, 1)
    built = FusedMoEKernel(BatchedPrepareAndFinalize(6, E), batched)
    assert built.peak_workspace_bytes(1) == built.peak_workspace_bytes(6) == 4 * E * 6 * (2 * I + H)


class WideExperts(SumExperts):
    """Reduces by itself, but into rows of its own width."""

    def workspace_shapes(self, M, *sizes):
        return super().workspace_shapes(M, *sizes)._replace(output=(M, H + 2))


class Scaled(MoEPrepareAndFinalizeNoDPEPModular):
    """Pretends to quantize: a scale per row, or one for all."""

    scale: torch.Tensor

    def prepare(self, a1, *rest):
        return PrepareResult(a1, self.scale)


@pytest.mark.parametrize("per_row", [True, False])
def test_per_row_scales_are_cut_with_their_rows(per_row, monkeypatch):
    scale = torch.arange(7.0)[:, None] if per_row else torch.ones(1)
    monkeypatch.setattr(Scaled, "scale", scale, raising=False)
    SlotExperts.calls.clear()
    run(kernel(mover=Scaled, max_workspace_bytes=4 * PER_ROW), *inputs())
    seen = [call["scale"] for call in SlotExperts.calls]
    if per_row:
        assert torch.equal(torch.cat(seen), scale)
    else:
        assert all(s is scale for s in seen)


@pytest.mark.parametrize("bad", [E, -2, 2**31 - 1])
def test_ids_out_of_range_are_refused_on_the_cpu(bad):
    x, weights, ids = inputs()
    ids[3, 1] = bad
    with pytest.raises(ValueError, match=rf"{bad}.*\[-1, {E}\)"):
        run(kernel(), x, weights, ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(7, H - 1)}, rf"rows \[T, {H}\] in torch.float32, got \(7, {H - 1}\)"),
        ({"x": torch.zeros(1, 7, H)}, r"got \(1, 7, 6\)"),
        ({"x": torch.zeros(7, H).half()}, "in torch.float16"),
        ({"x": torch.zeros(3, H)}, r"got \(3, 6\) and \(7, 2\)"),
        ({"ids": torch.zeros(3, K).int()}, r"got \(7, 6\) and \(3, 2\)"),
        ({"ids": torch.zeros(7).int()}, r"and \(7,\)"),
        ({"ids": torch.zeros(7, K)}, "int32 or int64, got torch.float32"),
        ({"weights": torch.zeros(7, 1)}, r"topk_weights is \(7, 1\), topk_ids \(7, 2\)"),
        ({"weights": torch.zeros(7, K).int()}, "floating point, got torch.int32"),
    ],
)
@pytest.mark.parametrize("experts", [SlotExperts, TorchExperts])
def test_tokens_that_do_not_fit_are_refused_whatever_the_experts(experts, changes, message):
    given = dict(zip(("x", "weights", "ids"), inputs(), strict=True)) | changes
    with pytest.raises(ValueError, match=message):
        run(kernel(experts), **given)


def test_the_output_is_contiguous_and_fresh_whatever_the_input():
    _, weights, ids = inputs()
    strided = torch.randn(H, 7).T
    out = run(kernel(TorchExperts), strided, weights, ids)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected(strided, weights, ids))


def test_weight_on_input_multiplies_before_the_experts_and_keeps_the_input():
    x, weights, ids = inputs()
    kept = x.clone()
    out = run(kernel(), x, weights[:, :1], ids[:, :1], apply_router_weight_on_input=True)
    reference = expected(x * weights[:, :1], torch.ones(7, 1), ids[:, :1])
    torch.testing.assert_close(out, reference)
    assert torch.equal(x, kept)
    with pytest.raises(ValueError, match="top-1 routing, got K = 2"):
        run(kernel(), x, weights, ids, apply_router_weight_on_input=True)


def test_monolithic_experts_get_logits_and_the_router():
    x, _, _ = inputs()
    router = SpecRouter(RoutingSpec(top_k=K, num_experts=E, renormalize=True))
    built = FusedMoEMonolithicKernel(
        MoEPrepareAndFinalizeNoDPEPMonolithic(),
        LogitsExperts(config(), FUSED_MOE_UNQUANTIZED_CONFIG),
    )
    logits = torch.randn(7, E)
    out = built.apply(
        x,
        W1,
        W2,
        logits,
        activation=MoEActivation.SILU,
        global_num_experts=E,
        router=router,
    )
    weights, ids = router.select_experts(x, logits)
    torch.testing.assert_close(out, expected(x, weights, ids))
    assert not built.output_is_reduced
    with pytest.raises(ValueError, match=r"\[T, E\] for hidden_states \(7, 6\), got \(6, 5\)"):
        built.apply(
            x,
            W1,
            W2,
            logits[:6],
            activation=MoEActivation.SILU,
            global_num_experts=E,
            router=router,
        )


@pytest.mark.parametrize("experts", [SlotExperts, SumExperts, LogitsExperts])
def test_your_own_experts_plug_into_a_layer(experts):
    """One option makes a class the layer's experts, in either kind."""
    layer = FusedMoE(E, K, H, I, torch.float32, options=MoEOptions(experts=experts))
    reference = FusedMoE(E, K, H, I, torch.float32, options=MoEOptions(experts="torch"))
    weights = [("gate_up_proj", W1), ("down_proj", W2)]
    layer.load_weights(weights)
    reference.load_weights(weights)
    x, logits = torch.randn(7, H), torch.randn(7, E)
    torch.testing.assert_close(layer(x, logits), reference(x, logits))


def test_your_own_mover_plugs_into_a_layer():
    options = MoEOptions(experts=SlotExperts, prepare_finalize=AsyncMover)
    layer = FusedMoE(E, K, H, I, torch.float32, shared_experts=torch.nn.Identity(), options=options)
    layer.load_weights([("gate_up_proj", W1), ("down_proj", W2)])
    x, logits = torch.randn(7, H), torch.randn(7, E)
    weights, ids = layer.router.select_experts(x, logits)
    assert ids.dtype is torch.int32
    AsyncMover.log.clear()
    torch.testing.assert_close(layer(x, logits), expected(x, weights, ids) + x)
    assert layer.routed_experts.quant_method.topk_indices_dtype is torch.int64
