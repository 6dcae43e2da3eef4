"""How checkpoints name the tensors of a Mixture-of-Experts layer: one row per convention, as data.

The names are those of the files, before any rewriting by a model class. ``family_of`` finds the
row of a config.json, ``CheckpointFamily.classify`` says what a tensor is, ``read_sizes`` finds the
layer's sizes under their many config keys. Needs neither torch nor Transformers.

Notation: E experts, H hidden, I intermediate of one expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

Part = Literal[
    "gate",  # one expert's, or with ``expert`` None all experts' stacked
    "up",
    "down",
    "gate_up",
    "router",
    "router_bias",
    "router_scale",
    "correction_bias",
    "per_expert_scale",
    "hash_table",
    "shared",
    "shared_gate",
    "latent",
]

EXPERT_PARTS = ("gate", "up", "down", "gate_up")
# Fused tensors carry what others call ".weight" or ".weight_scale" after an underscore.
_BARE = r"blocks|scales|bias|packed|scale|scale_inv|weight_scale(?:_2)?|(?:input|activation)_scale"
_TAIL = rf"(?P<tail>\..+|_(?:{_BARE}))?"
_LAYER = re.compile(r"^(?P<prefix>.*?)(?:layers|blocks)\.(?P<layer>\d+)\.(?P<rest>.+)$")


class TensorRole(NamedTuple):
    """What one tensor of a checkpoint is.

    ``prefix`` is the path before the list of layers, ``expert`` None where a tensor holds all of
    them, ``leaf`` the last component ("weight", "bias", "weight_scale_inv", "qweight", ...; "" for
    a tensor stored under the bare name).
    """

    part: Part
    layer: int
    expert: int | None
    leaf: str
    prefix: str


@dataclass(frozen=True, kw_only=True)
class CheckpointFamily:
    """One naming convention.

    ``names`` maps a part to paths inside a layer, ``{e}`` standing for the expert's number; a
    tensor's last component (``.weight``, ``.weight_scale``, ``_blocks``) is not part of the path.
    ``fused_in_out``: fused 3-D tensors are (E, H, 2I) and (E, I, H), not (E, 2I, H) and (E, H, I).
    ``interleaved``: gate and up alternate row by row in a fused tensor.
    """

    name: str
    model_types: tuple[str, ...]
    names: Mapping[Part, tuple[str, ...]]
    fused_in_out: bool = False
    interleaved: bool = False

    @cached_property
    def _patterns(self) -> tuple[tuple[Part, re.Pattern[str]], ...]:
        found = []
        for part, paths in self.names.items():
            for path in paths:
                body = re.escape(path).replace(re.escape("{e}"), r"(?P<expert>\d+)")
                found.append((len(path), part, re.compile(rf"^{body}{_TAIL}$")))
        # The longest path first: "gate.weight" must not swallow "gate.weight_1".
        found.sort(key=lambda item: -item[0])
        return tuple((part, pattern) for _, part, pattern in found)

    def classify(self, tensor_name: str) -> TensorRole | None:
        """What ``tensor_name`` is; None for what does not belong to an MoE layer."""
        found = self.locate(tensor_name)
        return None if found is None else found[0]

    def locate(self, tensor_name: str) -> tuple[TensorRole, str] | None:
        """As ``classify``, with all that follows the path: "weight", "weight.absmax", "blocks"."""
        located = _LAYER.match(tensor_name)
        if located is None:
            return None
        for part, pattern in self._patterns:
            match = pattern.match(located["rest"])
            if match is None:
                continue
            expert = match.groupdict().get("expert")
            suffix = (match["tail"] or "").lstrip("._")
            role = TensorRole(
                part=part,
                layer=int(located["layer"]),
                expert=None if expert is None else int(expert),
                leaf=suffix.rpartition(".")[2],
                prefix=located["prefix"],
            )
            return role, suffix
        return None


class MoESizes(NamedTuple):
    """Sizes as config.json states them; None where it leaves them to the model's defaults."""

    num_experts: int | None
    top_k: int | None
    hidden_size: int | None
    intermediate_size: int | None
    num_shared_experts: int | None
    num_layers: int | None


# The first key that a config has wins.
SIZE_KEYS: Mapping[str, tuple[str, ...]] = {
    "num_experts": (
        "n_routed_experts",
        "num_local_experts",
        "num_experts",
        "moe_num_experts",
        "num_routed_experts",
    ),
    "top_k": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_top_k",
        "moe_k",
        "top_k_experts",
        "num_selected_experts",
        "top_k",
    ),
    "hidden_size": ("hidden_size", "d_model"),
    "intermediate_size": (
        "moe_intermediate_size",
        "expert_ffn_hidden_size",
        "ffn_hidden_size",
        "expert_dim",
        "intermediate_size",
    ),
    "num_shared_experts": (
        "num_experts_shared",
        "n_shared_experts",
        "moe_num_shared_experts",
        "num_shared_experts",
        "num_shared_expert",
    ),
    "num_layers": ("num_hidden_layers", "num_layers", "n_layers"),
}

# Where a composite config keeps the part that describes the language model.
TEXT_SECTIONS = ("text_config", "thinker_config", "llm_config", "language_config", "ffn_config")


def _get(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def config_sections(config: Any) -> tuple[Any, ...]:
    """``config`` (a mapping or an object) after the text sections nested in it, innermost first."""
    nested = [_get(config, section) for section in TEXT_SECTIONS]
    inner: tuple[Any, ...] = ()
    for section in nested:
        if section is not None and not isinstance(section, (str, int, float, bool, list)):
            inner += config_sections(section)
    return (*inner, config)


def config_value(config: Any, keys: tuple[str, ...]) -> Any:
    """The value of the first of ``keys`` in the innermost text section that has one."""
    for section in config_sections(config):
        for key in keys:
            value = _get(section, key)
            if value is not None:
                return value
    return None


def read_sizes(config: Any, layer: int = 0) -> MoESizes:
    """Sizes of MoE layer number ``layer`` from a config; per-layer lists are indexed with it."""

    def size(name: str) -> int | None:
        value = config_value(config, SIZE_KEYS[name])
        if isinstance(value, (list, tuple)):
            value = value[min(layer, len(value) - 1)] if value else None
        plain = isinstance(value, int) and not isinstance(value, bool)
        return value if plain else None

    return MoESizes(**{name: size(name) for name in MoESizes._fields})


def family_of(config: Any) -> CheckpointFamily | None:
    """The row whose model types include the config's, the innermost text section first."""
    from fusedmoe.weights.family_table import FAMILIES

    for section in config_sections(config):
        model_type = _get(section, "model_type")
        for family in FAMILIES:
            if model_type in family.model_types:
                return family
    return None
