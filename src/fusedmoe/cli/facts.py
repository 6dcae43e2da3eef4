"""What config.json says about a model's experts, whatever its family calls the fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedmoe.checkpoint import CONFIG_NAME, CheckpointError

_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "num_selected_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "top_k",
)
_HIDDEN = ("hidden_size", "d_model", "n_embd")
_INTERMEDIATE = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "ffn_hidden_size",
    "intermediate_size",
)
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_experts_shared")
_ACTIVATION = ("hidden_act", "hidden_activation", "mlp_hidden_act", "activation_function")
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The sizes of a model's MoE layers; None where config.json does not say."""

    model_type: str
    num_experts: int
    top_k: int | None
    hidden_size: int | None
    intermediate_size: int | None
    shared_experts: int
    activation: str | None
    quant_method: str | None


def model_facts(config: dict[str, Any], folder: Path) -> ModelFacts:
    """Read them; raises CheckpointError where the model has no experts."""
    where = folder / CONFIG_NAME
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{where}: has no model_type")
    num_experts = _number(config, _EXPERTS)
    if not num_experts:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} has no experts (none of {', '.join(_EXPERTS)})"
        )
    top_k = _number(config, _TOP_K)
    if top_k is not None and not 1 <= top_k <= num_experts:
        raise CheckpointError(f"{where}: chooses {top_k} of {num_experts} experts")
    shared = _number(config, _SHARED)
    if shared is None:
        shared = 1 if _number(config, ("shared_expert_intermediate_size",)) else 0
    quantization = config.get("quantization_config")
    return ModelFacts(
        model_type=model_type,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=_number(config, _HIDDEN),
        intermediate_size=_number(config, _INTERMEDIATE),
        shared_experts=shared,
        activation=_activation(config),
        quant_method=quantization.get("quant_method") if isinstance(quantization, dict) else None,
    )


def _levels(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration, then those nested in it (the text model of a multimodal one)."""
    yield config
    for key in _NESTED:
        nested = config.get(key)
        if isinstance(nested, dict):
            yield from _levels(nested)


def _number(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first of ``keys`` that holds a number; a list per layer counts with its largest."""
    for level in _levels(config):
        for key in keys:
            value = level.get(key)
            if isinstance(value, list) and value and all(type(v) is int for v in value):
                value = max(value)
            if type(value) is int:
                return value
    return None


def _activation(config: dict[str, Any]) -> str | None:
    for level in _levels(config):
        for key in _ACTIVATION:
            if isinstance(level.get(key), str):
                return level[key]
        act = level.get("ffn_act_fn")
        if isinstance(act, dict) and isinstance(act.get("name"), str):
            return act["name"]
    return None
