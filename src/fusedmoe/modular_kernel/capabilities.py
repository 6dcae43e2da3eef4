"""What an experts implementation can do, as data, and what a layer asks for beyond that."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.config import FusedMoEConfig
from fusedmoe.modular_kernel.records import FusedMoEActivationFormat
from fusedmoe.quantization.keys import QuantKey, accepts

Operand = Literal["weights", "activations"]


class MissingModule(str):
    """A reason not to choose something: a module that it needs is not installed."""

    __slots__ = ()

    @classmethod
    def unless_installed(cls, name: str) -> MissingModule | None:
        """The reason where ``name`` cannot be found."""
        if importlib.util.find_spec(name) is not None:
            return None
        return cls(f"needs the module {name}, which is not installed")


@dataclass(frozen=True, kw_only=True)
class ExpertsCapabilities:
    """What an experts implementation can do, as data that selection reads and explains.

    ``weight_formats`` lists (weight, activation) pairs of ``QuantKey``; (None, None) is
    unquantized, and ``keys.ANY`` in a group shape stands for every number. ``requires`` names
    modules that must be importable. ``min_capability`` is a CUDA compute capability such as (9, 0).
    ``batch_invariant`` is False unless claimed, because nothing else would notice that it does not
    hold; ``deterministic`` is True unless sums are taken in an order that changes from run to run.
    ``graph_capture`` False: it waits for the device. ``emulated``: operands that have the
    values of their format but are multiplied as wider floats, where that is worth saying.
    ``tuned_table``: the kernel whose tables it takes as ``MoEOptions.tuned_table``.
    """

    activation_format: FusedMoEActivationFormat = FusedMoEActivationFormat.Standard
    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    dtypes: frozenset[torch.dtype] = frozenset({torch.float32, torch.float16, torch.bfloat16})
    activations: frozenset[MoEActivation] = frozenset(MoEActivation) - {MoEActivation.RELU2}
    weight_formats: frozenset[tuple[QuantKey | None, QuantKey | None]] = frozenset({(None, None)})
    min_capability: tuple[int, int] | None = None
    requires: tuple[str, ...] = ()
    bias: bool = True
    expert_map: bool = True
    apply_router_weight_on_input: bool = True
    batch_invariant: bool = False
    deterministic: bool = True
    hash_routing: bool = True
    graph_capture: bool = True
    tuned_table: str | None = None
    emulated: frozenset[tuple[Operand, QuantKey]] = frozenset()

    def unmet_by(
        self,
        moe: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: FusedMoEActivationFormat,
    ) -> str | None:
        """The first thing ``moe`` asks for that this lacks, in words; None where nothing is."""
        for module in self.requires:
            missing = MissingModule.unless_installed(module)
            if missing is not None:
                return missing
        if self.activation_format is not activation_format:
            return f"takes {self.activation_format.name} rows, not {activation_format.name}"
        if moe.device.type not in self.devices:
            return f"runs on {'/'.join(sorted(self.devices))}, not {moe.device.type}"
        if self.min_capability is not None and moe.device.type == "cuda":
            capability = torch.cuda.get_device_capability(moe.device)
            if capability < self.min_capability:
                return f"needs compute capability {self.min_capability}, this GPU has {capability}"
        if moe.in_dtype not in self.dtypes:
            return f"does not compute in {moe.in_dtype}"
        if not any(
            accepts(weight, weight_key) and accepts(activation, activation_key)
            for weight, activation in self.weight_formats
        ):
            weights, activations = (key or "unquantized" for key in (weight_key, activation_key))
            return f"does not run weights ({weights}) with activations ({activations})"
        if moe.activation not in self.activations:
            return f"lacks the activation {moe.activation.value}"
        table = moe.options.table
        wants = (
            (moe.has_bias, self.bias, "expert biases"),
            (moe.num_local_experts != moe.num_experts, self.expert_map, "an expert map"),
            (
                moe.apply_router_weight_on_input,
                self.apply_router_weight_on_input,
                "router weights on the input",
            ),
            (moe.options.batch_invariant, self.batch_invariant, "batch invariance"),
            (moe.options.deterministic, self.deterministic, "the same bits from run to run"),
            (moe.has_hash_routing, self.hash_routing, "hash routing"),
            (table is not None, self.tuned_table is not None, "a tuned table"),
        )
        for wanted, offered, what in wants:
            if wanted and not offered:
                return f"does not support {what}"
        if table is not None and table.kernel != self.tuned_table:
            return f"does not take tables of the kernel {table.kernel}"
        return None
