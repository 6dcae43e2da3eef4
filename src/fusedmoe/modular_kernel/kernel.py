"""One prepare/finalize and one experts implementation, composed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.forward_only import forward_only
from fusedmoe.modular_kernel.checks import check_counts, check_ids, check_picks, check_rows
from fusedmoe.modular_kernel.experts import (
    FusedMoEExperts,
    FusedMoEExpertsModular,
    FusedMoEExpertsMonolithic,
)
from fusedmoe.modular_kernel.forward import Forward, half_sizes, run_halves
from fusedmoe.modular_kernel.passes import passes
from fusedmoe.modular_kernel.prepare_finalize import (
    FusedMoEPrepareAndFinalize,
    FusedMoEPrepareAndFinalizeModular,
    FusedMoEPrepareAndFinalizeMonolithic,
)
from fusedmoe.modular_kernel.records import ExpertsWork, PrepareResult, PrepareWork, ProblemSize
from fusedmoe.modular_kernel.workspace import WorkspacePlan, plan_workspaces

_MAX_PLANS = 1024


class FusedMoEKernel:
    """Experts that take ids, between a prepare and a finalize.

    Raises ValueError where their activation formats differ, and on a GPU, where rows can be
    brought in one number format alone, if that is not the experts'.
    """

    def __init__(
        self, prepare_finalize: FusedMoEPrepareAndFinalizeModular, experts: FusedMoEExpertsModular
    ) -> None:
        _check_formats(prepare_finalize, experts)
        if experts.moe_config.device.type != "cpu":  # a layer may be built there and moved
            unquantized = experts.expects_unquantized_inputs
            prepare_finalize.check_rows_as(None if unquantized else experts.quant_config.a1.key)
        prepare_finalize.rows_may_be_late = experts.takes_late_rows
        self.prepare_finalize = prepare_finalize
        self.experts = experts
        self._plans: dict[tuple[Any, ...], WorkspacePlan] = {}

    @property
    def output_is_reduced(self) -> bool:
        return self.prepare_finalize.output_is_reduced()

    @forward_only
    def apply(
        self,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        while_combining: Callable[[], None] | None = None,
        tokens_per_rank: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """The routed output [T, H] of hidden_states [T, H], weights float and ids int [T, K].

        Ids are global. ``w1`` and ``w2`` are this rank's, as its experts take them; ``expert_map``
        int32 [global_num_experts] gives their local ids, -1 for those of other ranks.
        ``while_combining`` runs while the combine is in flight. From
        ``MoEOptions.micro_batch_tokens`` on, in two halves that take turns (``forward.py``).
        ``tokens_per_rank``: as ``FusedMoEPrepareAndFinalize.begin`` takes it. Raises ValueError for
        shapes, dtypes and counts that do not fit.
        """
        options = self.experts.moe_config.options
        check_rows(hidden_states, self.experts.moe_config)
        check_picks(hidden_states, topk_weights, topk_ids)
        check_ids(topk_ids, global_num_experts, options.debug_checks)
        dispatchers = self.prepare_finalize.num_dispatchers()
        check_counts(tokens_per_rank, dispatchers, hidden_states.shape[0])
        output = hidden_states.new_empty(hidden_states.shape)
        tokens = PrepareWork(
            hidden_states,
            topk_weights,
            topk_ids,
            global_num_experts,
            expert_map,
            apply_router_weight_on_input,
            self.experts.quant_config,
            self.experts.expects_unquantized_inputs,
        )
        # The same tokens as the experts take them; what prepare brings is put in their place.
        undispatched = ExpertsWork(
            output,
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            activation,
            global_num_experts,
            expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input,
        )
        compute = partial(self._run_experts, undispatched)
        reduce = self.experts.finalize_weight_and_reduce_impl()

        def forward(sizes: Sequence[int] | None, part: PrepareWork, into: torch.Tensor) -> Forward:
            return Forward(self.prepare_finalize.begin(sizes), compute, part, into, reduce)

        halves = self._halves(hidden_states.shape[0], tokens_per_rank)
        if halves is None:
            forward(tokens_per_rank, tokens, output).run(while_combining)
            return output
        cut = hidden_states.shape[0] - hidden_states.shape[0] // 2
        first, second = (
            forward(sizes, tokens.tokens(part), output[part])
            for sizes, part in zip(halves, (slice(cut), slice(cut, None)), strict=True)
        )
        run_halves(first, second, while_combining)
        return output

    def _halves(
        self, num_tokens: int, tokens_per_rank: Sequence[int] | None
    ) -> tuple[list[int], list[int]] | None:
        """Every rank's tokens in each half of this forward; None where it runs as a whole.

        A compiler orders communication itself.
        """
        from_tokens = self.experts.moe_config.options.micro_batch_tokens
        if from_tokens is None or torch.compiler.is_compiling():
            return None
        if self.prepare_finalize.concurrent_forwards() < 2:
            return None
        sizes = self.prepare_finalize.begin(tokens_per_rank).sizes_for(num_tokens)
        return half_sizes(sizes, from_tokens)

    def _run_experts(
        self,
        undispatched: ExpertsWork,
        prepared: PrepareResult,
        wanted: torch.Tensor | None,
        final_output: torch.Tensor,
    ) -> torch.Tensor:
        """``modular_kernel.forward.Compute``, of tokens that were ``undispatched``."""
        x = prepared.hidden_states
        weights, ids = prepared.topk_weights, prepared.topk_ids
        assert weights is not None
        assert ids is not None
        w1, w2 = undispatched.w1, undispatched.w2
        size = ProblemSize(*self.experts.moe_problem_size(x, w1, w2, ids))
        plan = self._plan(size, final_output.dtype, undispatched, prepared)
        output = _output_for(plan, wanted, final_output)
        if size.M == 0:
            return output
        work = undispatched._replace(
            output=output,
            hidden_states=x,
            topk_weights=weights,
            topk_ids=ids,
            a1q_scale=prepared.scale,
            workspace13=x.new_empty(plan.shapes.workspace13, dtype=plan.dtype),
            workspace2=x.new_empty(plan.shapes.workspace2, dtype=plan.dtype),
            expert_tokens_meta=prepared.expert_tokens_meta,
        )
        for part in passes(work, plan.rows_per_pass):
            self.experts.apply(*part)
        return output

    def _plan(
        self, size: ProblemSize, dtype: torch.dtype, work: ExpertsWork, prepared: PrepareResult
    ) -> WorkspacePlan:
        """``plan_workspaces``, remembered where it depends on sizes alone."""
        given = size, dtype, work.activation, work.global_num_experts
        if prepared.expert_tokens_meta is not None or torch.compiler.is_compiling():
            return plan_workspaces(self.experts, *given, prepared)
        plan = self._plans.get(given)
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            plan = self._plans[given] = plan_workspaces(self.experts, *given)
        return plan

    def peak_workspace_bytes(self, num_tokens: int) -> int:
        """Scratch memory of a forward with ``num_tokens`` rows entering the experts; in the batched
        format, whose rows are as many as there is room for, of any forward."""
        moe, experts = self.experts.moe_config, self.experts
        if experts.max_num_tokens is not None and experts.num_dispatchers is not None:
            num_tokens = experts.max_num_tokens * experts.num_dispatchers
        size = ProblemSize(
            E=moe.num_local_experts,
            M=num_tokens,
            N=moe.w13_num_shards * moe.intermediate_size_per_partition,
            K=moe.hidden_dim,
            topk=moe.experts_per_token,
        )
        return plan_workspaces(
            experts, size, moe.in_dtype, moe.activation, moe.num_experts
        ).peak_bytes


class FusedMoEMonolithicKernel:
    """As ``FusedMoEKernel``, for experts that route by themselves."""

    def __init__(
        self,
        prepare_finalize: FusedMoEPrepareAndFinalizeMonolithic,
        experts: FusedMoEExpertsMonolithic,
    ) -> None:
        _check_formats(prepare_finalize, experts)
        self.prepare_finalize = prepare_finalize
        self.experts = experts

    @property
    def output_is_reduced(self) -> bool:
        return self.prepare_finalize.output_is_reduced()

    @forward_only
    def apply(
        self,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        router_logits: torch.Tensor,
        *,
        activation: MoEActivation,
        global_num_experts: int,
        router: Any,
        expert_map: torch.Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        input_ids: torch.Tensor | None = None,
        tokens_per_rank: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """The routed output [T, H] of hidden_states [T, H] and router_logits float [T, E].

        ``router`` is the layer's, which the experts ask. Raises ValueError for shapes, dtypes and
        devices that do not fit the layer.
        """
        check_rows(hidden_states, self.experts.moe_config)
        if router_logits.dim() != 2 or router_logits.shape[0] != hidden_states.shape[0]:
            raise ValueError(
                f"router_logits must be [T, E] for hidden_states {tuple(hidden_states.shape)}, got "
                f"{tuple(router_logits.shape)}"
            )
        dispatchers = self.prepare_finalize.num_dispatchers()
        check_counts(tokens_per_rank, dispatchers, hidden_states.shape[0])
        mover = self.prepare_finalize.begin(tokens_per_rank)
        if input_ids is not None and dispatchers > 1:
            raise ValueError("input_ids stay on their rank, where experts route for all ranks")
        x, scale, logits = mover.prepare(
            hidden_states,
            router_logits,
            self.experts.quant_config,
            self.experts.expects_unquantized_inputs,
        )
        try:
            routed = self.experts.apply(
                x,
                w1,
                w2,
                logits,
                activation,
                global_num_experts,
                expert_map,
                scale,
                apply_router_weight_on_input,
                router=router,
                input_ids=input_ids,
            )
        except BaseException:
            mover.abandon()
            raise
        return mover.finalize(routed)


def _check_formats(prepare_finalize: FusedMoEPrepareAndFinalize, experts: FusedMoEExperts) -> None:
    if prepare_finalize.activation_format is not experts.activation_format():
        raise ValueError(
            f"{type(prepare_finalize).__name__} gives {prepare_finalize.activation_format.name} "
            f"rows, {type(experts).__name__} takes {experts.activation_format().name} rows"
        )


def _output_for(
    plan: WorkspacePlan, wanted: torch.Tensor | None, final_output: torch.Tensor
) -> torch.Tensor:
    """Where the experts write: where prepare wants it, the layer's output, or somewhere new."""
    shape, dtype = plan.shapes.output, plan.dtype
    if wanted is not None and wanted.shape == shape and wanted.dtype is dtype:
        return wanted
    if plan.in_place and final_output.shape == shape:
        return final_output
    return final_output.new_empty(shape, dtype=dtype)
