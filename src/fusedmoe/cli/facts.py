"""What a checkpoint says about its model's experts, and a clear error where it has none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedmoe.activation import MoEActivation
from fusedmoe.checkpoint import CONFIG_NAME, Checkpoint, CheckpointError, read_quantization_config
from fusedmoe.weights.families import (
    EXPERT_PARTS,
    CheckpointFamily,
    MoESizes,
    TensorRole,
    config_value,
    family_of,
    read_sizes,
)

_LAYER_NUMBER = re.compile(r"(?:layers|blocks)\.(\d+)\.")
# Where experts are likely to be in the files of a family that the table lacks.
_UNKNOWN = CheckpointFamily(
    name="unknown",
    model_types=(),
    names={
        "up": tuple(
            f"{block}.experts.{leaf}"
            for block in ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe")
            for leaf in (
                *(
                    f"{{e}}.{name}"
                    for name in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
                ),
                *("expert_{e}.fc1", "expert_{e}.fc2", "gate_up_proj", "down_proj"),
            )
        ),
        "router": (
            "mlp.gate",
            "block_sparse_moe.gate",
            "feed_forward.router",
            "ffn.gate",
            "ffn.router",
        ),
    },
)
ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "mlp_hidden_act", "activation_function")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Model type, family (None: not one of the table) and sizes (None: config.json omits it).

    ``layers_in_files`` is one more than the highest layer number in a tensor's name.
    """

    model_type: str
    family: CheckpointFamily | None
    sizes: MoESizes
    activation: str | None
    quant_method: str | None
    layers_in_files: int


def model_facts(checkpoint: Checkpoint) -> ModelFacts:
    """Read them; raises CheckpointError where config.json describes no experts."""
    config, where = checkpoint.config, checkpoint.folder / CONFIG_NAME
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{where}: has no model_type")
    family, sizes = family_of(config), read_sizes(config)
    if not any(_is_expert(name, family) for name in checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.folder}: no experts in this {model_type!r} model: {CONFIG_NAME} counts "
            f"{sizes.num_experts or 'none'}, and no tensor has the name of one"
        )
    top_k, num_experts = sizes.top_k, sizes.num_experts
    if top_k is not None and num_experts is not None and not 1 <= top_k <= num_experts:
        raise CheckpointError(f"{where}: chooses {top_k} of {num_experts} experts")
    return ModelFacts(
        model_type=model_type,
        family=family,
        sizes=sizes,
        activation=_activation(config),
        quant_method=_quant_method(checkpoint),
        layers_in_files=_layers_in_files(checkpoint),
    )


def _layers_in_files(checkpoint: Checkpoint) -> int:
    numbers = (_LAYER_NUMBER.search(name) for name in checkpoint.tensors)
    return max((int(match[1]) + 1 for match in numbers if match), default=0)


def role_of(name: str, family: CheckpointFamily | None) -> TensorRole | None:
    """What a tensor is; in a family that is not in the table, only for names under ``experts``."""
    if family is not None:
        return family.classify(name)
    return _UNKNOWN.classify(name)


def _is_expert(name: str, family: CheckpointFamily | None) -> bool:
    role = role_of(name, family)
    return role is not None and role.part in EXPERT_PARTS


def _activation(config: dict[str, Any]) -> str | None:
    name = config_value(config, ACTIVATION_KEYS)
    if name is None:
        function = config_value(config, ("ffn_act_fn",))
        name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _quant_method(checkpoint: Checkpoint) -> str | None:
    found = read_quantization_config(checkpoint.folder, checkpoint.config) or {}
    method = found.get("quant_method")
    return method if isinstance(method, str) else None


def check_activation(facts: ModelFacts, folder: Path) -> None:
    """CheckpointError for a name that neither this library nor Transformers knows."""
    if facts.activation is None:
        return
    try:
        MoEActivation.from_str(facts.activation)
    except ValueError:
        from transformers.activations import ACT2FN

        if facts.activation not in ACT2FN:
            raise CheckpointError(
                f"{folder / CONFIG_NAME}: unknown activation {facts.activation!r}"
            ) from None
