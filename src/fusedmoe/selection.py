"""The one table that chooses implementations, and the reasons for what it did not choose.

Weight formats, devices and ways to move tokens are independent everywhere else; they meet here.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fusedmoe.config import FusedMoEConfig
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    FusedMoEActivationFormat,
    FusedMoEExperts,
)
from fusedmoe.quantization.keys import QuantKey

if TYPE_CHECKING:
    from collections.abc import Iterator

# In order of preference; "module:class", so that no candidate is imported before it is asked for.
EXPERTS: tuple[str, ...] = ("fusedmoe.experts.torch_reference:TorchExperts",)


@dataclass(frozen=True)
class Candidate:
    """One implementation and why it was not chosen (``reason`` None: it could be)."""

    name: str
    reason: str | None


@dataclass(frozen=True)
class Selection:
    """The outcome: the chosen class and every candidate in the order it was considered."""

    chosen: type[FusedMoEExperts]
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        lines = [f"experts: {self.chosen.name or self.chosen.__name__}"]
        for candidate in self.candidates:
            if candidate.reason is not None:
                lines.append(f"  not {candidate.name}: {candidate.reason}")
            elif candidate.name != self.chosen.name:
                lines.append(f"  not {candidate.name}: it can, but a preferred one came first")
        return "\n".join(lines)


def unmet_requirement(
    can: ExpertsCapabilities,
    moe: FusedMoEConfig,
    weight_key: QuantKey | None,
    activation_key: QuantKey | None,
    activation_format: FusedMoEActivationFormat,
) -> str | None:
    """The first thing ``moe`` asks for that ``can`` lacks, in words; None where nothing is."""
    for module in can.requires:
        if importlib.util.find_spec(module) is None:
            return f"needs the module {module}, which is not installed"
    if can.activation_format is not activation_format:
        return f"takes {can.activation_format.name} rows, not {activation_format.name}"
    if moe.device.type not in can.devices:
        return f"runs on {'/'.join(sorted(can.devices))}, not {moe.device.type}"
    if can.min_capability is not None and moe.device.type == "cuda":
        capability = torch.cuda.get_device_capability(moe.device)
        if capability < can.min_capability:
            return f"needs compute capability {can.min_capability}, this GPU has {capability}"
    if moe.in_dtype not in can.dtypes:
        return f"does not compute in {moe.in_dtype}"
    if (weight_key, activation_key) not in can.weight_formats:
        return f"does not run weights {weight_key} with activations {activation_key}"
    if moe.activation not in can.activations:
        return f"lacks the activation {moe.activation.value}"
    wants = (
        (moe.has_bias, can.bias, "expert biases"),
        (moe.num_local_experts != moe.num_experts, can.expert_map, "an expert map"),
        (
            moe.apply_router_weight_on_input,
            can.apply_router_weight_on_input,
            "router weights on the input",
        ),
        (moe.options.batch_invariant, can.batch_invariant, "batch invariance"),
        (moe.has_hash_routing, can.hash_routing, "hash routing"),
    )
    for wanted, offered, what in wants:
        if wanted and not offered:
            return f"does not support {what}"
    return None


def _load(path: str) -> type[FusedMoEExperts]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _all_experts() -> Iterator[type[FusedMoEExperts]]:
    for path in EXPERTS:
        yield _load(path)


def select_experts_class(
    moe: FusedMoEConfig,
    weight_key: QuantKey | None = None,
    activation_key: QuantKey | None = None,
    activation_format: FusedMoEActivationFormat = FusedMoEActivationFormat.Standard,
) -> Selection:
    """Choose an experts implementation; ``moe.options.experts`` forces one (a name or a class).

    Raises ValueError with every reason where nothing fits, or where the forced one does not.
    """
    forced = moe.options.experts
    if isinstance(forced, type):
        classes: list[type[FusedMoEExperts]] = [forced]
    else:
        classes = [cls for cls in _all_experts() if forced is None or cls.name == forced]
        if not classes:
            known = ", ".join(cls.name for cls in _all_experts())
            raise ValueError(f"no experts implementation is called {forced!r}; known: {known}")
    candidates = []
    chosen = None
    for cls in classes:
        _, reason = cls.is_supported_config(moe, weight_key, activation_key, activation_format)
        candidates.append(Candidate(cls.name or cls.__name__, reason))
        if reason is None and chosen is None:
            chosen = cls
    if chosen is None:
        reasons = "; ".join(f"{c.name}: {c.reason}" for c in candidates)
        raise ValueError(f"no experts implementation runs this layer ({reasons})")
    return Selection(chosen, tuple(candidates))
