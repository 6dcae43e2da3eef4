"""MoERunner: the order of one layer's forward.

x ─┬─ shared experts ───────────────────────────────────────────────┐
   ├─ gate ── logits ─┐                                             │
   └─ input transform ┴ pad ── route ── experts ── truncate ── scale ── output transform ── +
      ── sum over ranks ── + zero experts

Experts that were removed from the model add their constants before the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fusedmoe.config import FusedMoEConfig
from fusedmoe.kernels.gate import gate_linear
from fusedmoe.router.base import FusedMoERouter, routing_by
from fusedmoe.router.substitution import ExpertSubstitution
from fusedmoe.runner.borrowed import BorrowedTensors, renew_borrowed
from fusedmoe.runner.inputs import TokenBatch, check_rows, flatten_inputs
from fusedmoe.runner.loading import load_into_parts
from fusedmoe.runner.operator import CompiledLayer
from fusedmoe.runner.reduction import Extent, RankSum, Summand, commutes_with_sum
from fusedmoe.runner.shared_experts import OVERLAP_TOKENS, SharedExpertsRun, choose_order
from fusedmoe.weights.loadable import NamedTensors
from fusedmoe.weights.routed_experts import RoutedExperts


class TransformedInput(NamedTuple):
    """Rows for the routed experts, and those for the shared ones (None: there are none)."""

    hidden_states: torch.Tensor
    shared_experts_input: torch.Tensor | None


class MoERunner(CompiledLayer):
    """One Mixture-of-Experts layer. Build it with ``FusedMoE(...)``.

    ``routed_scaling_factor`` is what multiplies the routed output here (1 where the router
    applies it). In fp16 with shared experts their output is divided by it instead, so that
    nothing overflows: the layer then returns its output over ``routed_scaling_factor``, and the
    model must make up for that. ``shared_experts_sharded`` says that each rank's shared experts
    give one summand of their output. ``shared_overlap_token_limit``: up to that many tokens the
    shared experts run on a second CUDA stream.
    """

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        router: FusedMoERouter,
        routed_experts: RoutedExperts,
        *,
        gate: nn.Module | None = None,
        shared_experts: nn.Module | None = None,
        shared_expert_gate: nn.Module | None = None,
        routed_input_transform: nn.Module | None = None,
        routed_output_transform: nn.Module | None = None,
        routed_scaling_factor: float = 1.0,
        router_logits_dtype: torch.dtype | None = None,
        num_router_logits: int | None = None,
        rank_sum: RankSum | None = None,
        shared_experts_sharded: bool = False,
        skip_padding: bool = False,
        enable_eplb: bool = False,
        expert_substitution: ExpertSubstitution | None = None,
        prefix: str = "",
        shared_overlap_token_limit: int = OVERLAP_TOKENS,
    ) -> None:
        super().__init__()
        self.moe_config = moe_config
        self.router = router
        self.routed_experts = routed_experts
        self.gate = gate
        self.shared_experts = shared_experts
        self.shared_expert_gate = shared_expert_gate
        self.routed_input_transform = routed_input_transform
        self.routed_output_transform = routed_output_transform
        self.routed_scaling_factor = routed_scaling_factor
        self.router_logits_dtype = router_logits_dtype
        self.num_router_logits = num_router_logits
        options = moe_config.options
        self.rank_sum = replace(
            rank_sum or RankSum(),
            in_order=options.batch_invariant,
            compares_counts=options.debug_checks,
        )
        self.shared_experts_sharded = shared_experts_sharded
        self.skip_padding = skip_padding
        self.enable_eplb = enable_eplb
        self.expert_substitution = expert_substitution
        self.prefix = prefix
        self.shared_overlap_token_limit = shared_overlap_token_limit
        routed_experts.set_router(router)
        self.borrowed = BorrowedTensors(self)
        self.register_load_state_dict_post_hook(renew_borrowed)
        self.number_parts()
        wanted: Any = gate
        if router_logits_dtype is not None and hasattr(gate, "set_out_dtype"):
            wanted.set_out_dtype(router_logits_dtype)
        if options.batch_invariant and hasattr(gate, "batch_invariant"):
            wanted.batch_invariant = True
        self._check()

    def _check(self) -> None:
        if self.shared_experts is None and self.shared_expert_gate is not None:
            raise ValueError("shared_expert_gate needs shared_experts")
        if self.shared_experts is None and self.shared_experts_sharded:
            raise ValueError("shared_experts_sharded needs shared_experts")
        stays_partial = self.rank_sum.size > 1 and not self.rank_sum.communicates
        if stays_partial and not commutes_with_sum(self.routed_output_transform):
            raise ValueError(
                f"one of {self.rank_sum.size} ranks cannot apply the routed_output_transform to "
                "its summand alone: give the process group, or mark the transform is_linear"
            )
        if self.moe_config.num_zero_experts and self.routed_input_transform is not None:
            raise ValueError(
                f"{self.moe_config.num_zero_experts} zero experts return the layer's input, which "
                "the routed_input_transform replaces"
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        *,
        is_padding: torch.Tensor | None = None,
        tokens_per_rank: Sequence[int] | None = None,
        one_stream: bool = False,
    ) -> torch.Tensor:
        """hidden_states [..., H] -> [..., H] (the output transform's width, where there is one).

        router_logits [..., E] (+ zero experts), or None to let the layer's gate compute them from
        hidden_states; input_ids [...] for rules that route by token; is_padding bool [...] marks
        rows that are routed nowhere.

        Where ranks hold different tokens, ``tokens_per_rank`` says how many each brings (dp, pcp
        and, if sequence-parallel, tp ranks, the last varying fastest), this one's T included. Left
        out, the ranks tell each other, which waits for the device: CUDA graphs need it given.
        ``one_stream`` keeps the shared experts on the caller's stream.
        """
        if (is_padding is not None) != self.skip_padding:
            raise ValueError(
                f"is_padding belongs to layers built with skip_padding=True, and to each of their "
                f"calls; this one has skip_padding={self.skip_padding}"
            )
        batch = flatten_inputs(
            hidden_states, router_logits, input_ids, is_padding, self.num_router_logits
        )
        routed_input, shared_input = self.apply_routed_input_transform(batch.x)
        zero_expert_weight = None
        if tokens_per_rank is None and self.is_one_operator(batch.x):
            shared_output = None if shared_input is None else self.compute_shared(shared_input)
            if batch.router_logits is None:
                batch = batch._replace(router_logits=self.compute_logits(batch.x))
            routed = self.as_operator(batch, routed_input)
        else:
            shared = self._start_shared(shared_input, one_stream)
            routed, zero_expert_weight = self.run_routed(
                batch, routed_input, shared, tokens_per_rank
            )
            shared_output = None if shared is None else shared.output()
        output = self._combine(routed, shared_output)
        if zero_expert_weight is not None:
            output = self._add_zero_experts(output, batch.x, zero_expert_weight)
        return output.value.reshape(*hidden_states.shape[:-1], output.value.shape[-1])

    def apply_routed_input_transform(self, hidden_states: torch.Tensor) -> TransformedInput:
        """What the routed experts and what the shared experts read, from x [T, width]."""
        shared = None if self.shared_experts is None else hidden_states
        if self.routed_input_transform is None:
            return TransformedInput(hidden_states, shared)
        return TransformedInput(_output_of(self.routed_input_transform(hidden_states)), shared)

    def apply_routed_output_transform(self, fused_output: torch.Tensor) -> torch.Tensor:
        """Back from the routed experts' space to the layer's, [T, H] -> [T, width]."""
        if self.routed_output_transform is None:
            return fused_output
        return _output_of(self.routed_output_transform(fused_output))

    def compute_shared(self, x: torch.Tensor) -> torch.Tensor:
        """The shared experts' output, times the sigmoid of their gate if they have one."""
        assert self.shared_experts is not None
        output = _output_of(self.shared_experts(x))
        if self.shared_expert_gate is None:
            return output
        gate = _output_of(self.shared_expert_gate(x))
        if gate.shape not in ((output.shape[0], 1), output.shape):
            raise ValueError(
                f"shared_expert_gate gives {tuple(gate.shape)} for an output of "
                f"{tuple(output.shape)}"
            )
        return output * torch.sigmoid(gate)

    def compute_logits(self, x: torch.Tensor) -> torch.Tensor:
        """The gate's logits [T, E] of x [T, width]."""
        gate = self.gate
        if gate is None:
            raise ValueError("this layer has no gate: router_logits must be given")
        if isinstance(gate, nn.Linear):
            x = x.to(gate.weight.dtype)
            observed = gate._forward_hooks or gate._forward_pre_hooks
            if self.moe_config.options.batch_invariant and type(gate) is nn.Linear and not observed:
                return gate_linear(x, gate.weight, gate.bias, batch_invariant=True)
        return _output_of(gate(x))

    def _start_shared(self, x: torch.Tensor | None, one_stream: bool) -> SharedExpertsRun | None:
        if x is None:
            return None
        experts = self.routed_experts
        method = experts.quant_method
        order = choose_order(
            on_cuda=x.is_cuda,
            num_tokens=x.shape[0],
            token_limit=self.shared_overlap_token_limit,
            combine_is_async=method.combine_is_async(experts),
            launches_the_wire=method.kernel(experts).prepare_finalize.launches_the_wire,
            one_stream=one_stream or torch.compiler.is_compiling(),
        )
        run = SharedExpertsRun(self.compute_shared, x, order)
        run.start()
        return run

    def run_routed(
        self,
        batch: TokenBatch,
        x: torch.Tensor,
        shared: SharedExpertsRun | None,
        tokens_per_rank: Sequence[int] | None,
    ) -> tuple[Summand, torch.Tensor | None]:
        """The routed output in the checkpoint's hidden size, and the zero experts' weights [T]."""
        experts, moe = self.routed_experts, self.moe_config
        method = experts.quant_method
        check_rows(
            x, moe.hidden_dim_unpadded, method.input_dtype(experts), experts.w13_weight.device
        )
        logits = (
            self.compute_logits(batch.x) if batch.router_logits is None else batch.router_logits
        )
        if self.router_logits_dtype is not None:
            logits = logits.to(self.router_logits_dtype)
        if not method.skip_forward_padding and moe.hidden_dim != moe.hidden_dim_unpadded:
            x = F.pad(x, (0, moe.hidden_dim - moe.hidden_dim_unpadded))
        kernel = method.kernel(experts)
        zero_expert_weight = constant_term = None
        ranks: dict[str, Any] = (
            {} if tokens_per_rank is None else {"tokens_per_rank": tokens_per_rank}
        )
        if method.is_monolithic:
            output = experts.forward_monolithic(x, logits, batch.input_ids, **ranks)
        else:
            masks: dict[str, Any] = {}
            if batch.is_padding is not None:
                masks["is_padding"] = batch.is_padding
            given = batch.x, logits, method.topk_indices_dtype
            weights, ids, zero_expert_weight = routing_by(
                self.router, *given, input_ids=batch.input_ids, **masks
            )
            if self.expert_substitution is not None:
                weights, ids, constant_term = self.expert_substitution(weights, ids)
            output = experts.forward_modular(x, weights, ids, shared, batch.x, **ranks)
        if not method.has_unpadded_output:
            output = output[:, : moe.hidden_dim_unpadded]
        routed = (
            Summand(output, Extent.WHOLE)
            if kernel.output_is_reduced
            else self.rank_sum.partial(output)
        )
        if constant_term is not None:
            routed = self.rank_sum.plus_whole(routed, constant_term)
        return routed, zero_expert_weight

    def _combine(self, routed: Summand, shared_output: torch.Tensor | None) -> Summand:
        """Scale, transform, add the shared experts, sum over ranks; as few sums as are exact."""
        ranks = self.rank_sum
        if not commutes_with_sum(self.routed_output_transform):
            routed = ranks.reduced(routed)
        if self._scales_routed(routed.value.dtype):
            routed = routed.with_value(routed.value * self.routed_scaling_factor)
        elif shared_output is not None and self.routed_scaling_factor != 1.0:
            shared_output = shared_output * (1.0 / self.routed_scaling_factor)
        routed = routed.with_value(self.apply_routed_output_transform(routed.value))
        if shared_output is not None:
            if shared_output.shape != routed.value.shape:
                raise ValueError(
                    f"the shared experts give {tuple(shared_output.shape)}, the routed ones "
                    f"{tuple(routed.value.shape)}"
                )
            shared = (
                ranks.partial(shared_output)
                if self.shared_experts_sharded
                else Summand(shared_output, Extent.WHOLE)
            )
            routed = ranks.add(routed, shared)
        return routed if routed.extent is Extent.WHOLE else ranks.reduced(routed)

    def _scales_routed(self, dtype: torch.dtype) -> bool:
        """Whether the scale multiplies the routed output (else it divides the shared one)."""
        if self.routed_scaling_factor == 1.0:
            return False
        return dtype != torch.float16 or self.shared_experts is None

    def _add_zero_experts(
        self, output: Summand, x: torch.Tensor, zero_expert_weight: torch.Tensor
    ) -> Summand:
        """output + weight * x in fp32, weighted as the routed output is."""
        factor = self.routed_scaling_factor if self._scales_routed(x.dtype) else 1.0
        return self.rank_sum.plus_whole(output, (zero_expert_weight * factor)[:, None] * x.float())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with self.borrowed.renewed(self):
            return super()._apply(fn, recurse)

    def load_weights(self, weights: NamedTensors) -> set[str]:
        """Load (checkpoint name, tensor) pairs, or a mapping; names may begin with ``prefix``.

        Names that begin with one of this module's own parts (``gate.``, ``shared_experts.``, ...)
        go to that part, all others to the routed experts. Returns the parameters written.
        """
        return load_into_parts(self, weights)


def _output_of(result: Any) -> torch.Tensor:
    """The tensor of a module's result; linear layers of some engines return (output, bias)."""
    return result[0] if isinstance(result, tuple) else result
