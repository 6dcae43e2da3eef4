"""The function behind ``experts_implementation="fusedmoe"``: a module's tensors, our experts.

Transformers calls it with the experts module itself, after its own router. T tokens, K picks,
E experts in the module (under expert parallelism: those of this rank), H hidden, I intermediate,
S = 2 where gated, else 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fusedmoe.experts.functional import fused_experts
from fusedmoe.integrations.transformers.gates import Gate, gate_of
from fusedmoe.integrations.transformers.gradients import NoBackward
from fusedmoe.quantization.config import FusedMoEQuantConfig, biased_moe_quant_config
from fusedmoe.runner.replay import GraphReplay
from fusedmoe.words import FLOATS

_REPLAY = "_fusedmoe_replay"


class ExpertTensors(NamedTuple):
    """A module's parameters as our experts take them; views, never copies."""

    w13: torch.Tensor  # [E, S * I, H]
    w2: torch.Tensor  # [E, H, I]
    w13_bias: torch.Tensor | None  # [E, S * I]
    w2_bias: torch.Tensor | None  # [E, H]


def expert_tensors(experts: Any) -> ExpertTensors:
    """Read a decorated experts module, whatever its layout says about names and transposition."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    w13, w2 = _local(getattr(experts, up)), _local(experts.down_proj)
    if experts.is_transposed:
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    if not experts.has_bias:
        return ExpertTensors(w13, w2, None, None)
    return ExpertTensors(
        w13, w2, _local(getattr(experts, f"{up}_bias")), _local(experts.down_proj_bias)
    )


def _local(parameter: Any) -> torch.Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def takes_implementation(model: torch.nn.Module) -> bool:
    """Whether a module of ``model`` asks its config for an experts implementation at all.

    Transformers sets one on any model, also where the experts run their own loop whatever it is.
    """
    return any(hasattr(module, "has_gate") for module in model.modules())


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states [T, H], top_k_index int [T, K], top_k_weights float [T, K] -> [T, H].

    Index E with weight 0 marks a slot of another expert-parallel rank and counts as nothing.
    Transformers' own ``grouped_mm`` runs instead where the gate is unknown, under autocast (which
    chooses dtypes by itself), and in training mode with gradients on; a backward pass through ours
    raises.
    """
    gate = gate_of(self)
    needs_grad = torch.is_grad_enabled()
    autocast = torch.is_autocast_enabled(hidden_states.device.type)
    if gate.activation is None or autocast or (needs_grad and self.training):
        return _transformers_grouped_mm(self, hidden_states, top_k_index, top_k_weights)
    tensors = expert_tensors(self)
    ids = top_k_index
    if not ids.is_cuda:  # there, ids that name no expert count as nothing anyway
        ids = ids.masked_fill(ids == tensors.w13.shape[0], -1)
    if not needs_grad:
        if torch.compiler.is_compiling():
            return run_experts(hidden_states, tensors, top_k_weights, ids, gate)
        replay = _replay_of(self, gate)
        return replay((hidden_states, top_k_weights, ids), tensors)[0]
    with torch.no_grad():
        output = run_experts(hidden_states, tensors, top_k_weights, ids, gate)
    return NoBackward.apply(output, hidden_states)


def run_experts(
    hidden_states: torch.Tensor,
    tensors: ExpertTensors,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gate: Gate,
) -> torch.Tensor:
    """What Transformers asks of the library: the sum over k of weight * expert(x), [T, H]."""
    if gate.activation is None:
        raise ValueError("run_experts needs a known activation")
    quant_config: FusedMoEQuantConfig | None = None
    if tensors.w13_bias is not None or tensors.w2_bias is not None:
        quant_config = biased_moe_quant_config(tensors.w13_bias, tensors.w2_bias)
    return fused_experts(
        hidden_states,
        tensors.w13,
        tensors.w2,
        topk_weights,
        topk_ids,
        gate.activation,
        quant_config=quant_config,
        activation_config=gate.config,
    )


class _ExpertsCall:
    """``run_experts`` on the tensors that a module has now; copies and pickles with the module."""

    def __init__(self, experts: Any, gate: Gate) -> None:
        self.experts = experts
        self.gate = gate

    def __call__(
        self, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[torch.Tensor]:
        tensors = expert_tensors(self.experts)
        return (run_experts(hidden_states, tensors, topk_weights, topk_ids, self.gate),)

    def can_be_captured(self) -> bool:
        """Not so float64, which runs on the torch experts: they wait for the device."""
        return self.experts.down_proj.dtype in FLOATS


def _replay_of(experts: Any, gate: Gate) -> GraphReplay:
    """The module's own replay of small batches, new where its gate is."""
    replay: GraphReplay | None = experts.__dict__.get(_REPLAY)
    if replay is None or replay.function.gate is not gate:  # type: ignore[attr-defined]
        call = _ExpertsCall(experts, gate)
        replay = GraphReplay(call, call.can_be_captured)
        experts.__dict__[_REPLAY] = replay
    return replay


def _transformers_grouped_mm(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
