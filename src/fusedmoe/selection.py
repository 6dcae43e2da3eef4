"""The one table that chooses implementations, and the reasons for what it did not choose.

Weight formats, devices and ways to move tokens are independent everywhere else; they meet here.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from fusedmoe.config import FusedMoEConfig, MoEOptions, ParallelGroups
from fusedmoe.modular_kernel import (
    FusedMoEActivationFormat,
    FusedMoEExperts,
    FusedMoEExpertsModular,
    FusedMoEExpertsMonolithic,
    FusedMoEKernel,
    FusedMoEMonolithicKernel,
    FusedMoEPrepareAndFinalize,
    FusedMoEPrepareAndFinalizeModular,
    FusedMoEPrepareAndFinalizeMonolithic,
)
from fusedmoe.modular_kernel.capabilities import MissingModule
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.keys import QuantKey, accepts
from fusedmoe.tuning.choice import given_table

if TYPE_CHECKING:
    from fusedmoe.runner.moe_runner import MoERunner
    from fusedmoe.weights.routed_experts import RoutedExperts

_Keys = tuple[QuantKey | None, QuantKey | None]

# In order of preference; "module:class", so that no candidate is imported before it is asked for.
EXPERTS: tuple[str, ...] = (
    "fusedmoe.experts.hopper:HopperExperts",
    "fusedmoe.experts.triton:TritonExperts",
    "fusedmoe.experts.cpu_packed:CpuPackedExperts",
    "fusedmoe.experts.cpu:CpuExperts",
    "fusedmoe.experts.cpu:CpuMonolithicExperts",
    "fusedmoe.experts.grouped_mm:GroupedMMExperts",
    "fusedmoe.experts.triton_batched:BatchedTritonExperts",
    "fusedmoe.experts.torch_reference:TorchExperts",
    "fusedmoe.experts.torch_batched:BatchedTorchExperts",
    "fusedmoe.experts.hopper_quantized:HopperQuantizedExperts",
    "fusedmoe.experts.hopper_quantized:HopperEmulatedExperts",
    "fusedmoe.experts.triton_quantized:TritonQuantizedExperts",
    "fusedmoe.experts.triton_quantized_batched:BatchedTritonQuantizedExperts",
    "fusedmoe.experts.triton_quantized:TritonEmulatedExperts",
    "fusedmoe.experts.triton_quantized_batched:BatchedTritonEmulatedExperts",
    "fusedmoe.experts.deep_gemm:DeepGemmExperts",
    "fusedmoe.experts.deep_gemm:BatchedDeepGemmExperts",
    "fusedmoe.experts.triton_or_deep_gemm:TritonOrDeepGemmExperts",
    "fusedmoe.experts.cutlass_fp8:CutlassExpertsFp8",
    "fusedmoe.experts.cutlass_fp8:CutlassBatchedExpertsFp8",
    "fusedmoe.experts.cpu_quantized:CpuQuantizedExperts",
    "fusedmoe.experts.torch_quantized:TorchQuantizedExperts",
    "fusedmoe.experts.torch_quantized:BatchedTorchQuantizedExperts",
)
PREPARE_FINALIZE: tuple[str, ...] = (
    "fusedmoe.prepare_finalize.no_ep:MoEPrepareAndFinalizeNoDPEPModular",
    "fusedmoe.prepare_finalize.no_ep:MoEPrepareAndFinalizeNoDPEPMonolithic",
    "fusedmoe.prepare_finalize.peer:PeerPrepareAndFinalize",
    "fusedmoe.prepare_finalize.naive_dp_ep:MoEPrepareAndFinalizeNaiveDPEPModular",
    "fusedmoe.prepare_finalize.naive_dp_ep:MoEPrepareAndFinalizeNaiveDPEPMonolithic",
    "fusedmoe.prepare_finalize.all_to_all:AllToAllPrepareAndFinalize",
    "fusedmoe.prepare_finalize.batched:BatchedPrepareAndFinalize",
    "fusedmoe.prepare_finalize.peer_batched:PeerBatchedPrepareAndFinalize",
    "fusedmoe.prepare_finalize.deepep_high_throughput:DeepEPHTPrepareAndFinalize",
    "fusedmoe.prepare_finalize.deepep_low_latency:DeepEPLLPrepareAndFinalize",
)


class MissingPackageError(ImportError, ValueError):
    """All that was asked for needs packages that are not installed."""


@dataclass(frozen=True)
class Candidate:
    """One implementation and why it was not chosen (``reason`` None: it could be)."""

    name: str
    reason: str | None


@dataclass(frozen=True)
class Selection:
    """The outcome for one layer; ``print`` it to read why.

    ``chosen`` is the experts class and ``prepare_finalize`` the one that moves tokens to it;
    the candidates stand in the order in which they were considered. ``notes`` say what about the
    chosen one is not as the keys say.
    """

    chosen: type[FusedMoEExperts]
    candidates: tuple[Candidate, ...]
    prepare_finalize: type[FusedMoEPrepareAndFinalize]
    prepare_finalize_candidates: tuple[Candidate, ...]
    moe_config: FusedMoEConfig
    groups: ParallelGroups | None = None
    notes: tuple[str, ...] = ()

    def make_kernel(
        self, quant_config: FusedMoEQuantConfig
    ) -> FusedMoEKernel | FusedMoEMonolithicKernel:
        """Build one of each and compose them."""
        moe = self.moe_config
        mover = self.prepare_finalize.make(moe, self.groups)
        batched = self.chosen.activation_format() is FusedMoEActivationFormat.BatchedExperts
        experts = self.chosen(
            moe,
            quant_config,
            max_num_tokens=mover.max_num_tokens_per_rank() if batched else None,
            num_dispatchers=mover.num_dispatchers() if batched else None,
        )
        if isinstance(experts, FusedMoEExpertsMonolithic):
            assert isinstance(mover, FusedMoEPrepareAndFinalizeMonolithic)
            return FusedMoEMonolithicKernel(mover, experts)
        assert isinstance(mover, FusedMoEPrepareAndFinalizeModular)
        assert isinstance(experts, FusedMoEExpertsModular)
        return FusedMoEKernel(mover, experts)

    def __str__(self) -> str:
        return "\n".join(
            [
                *_lines("experts", name_of(self.chosen), self.candidates),
                *(f"  {note}" for note in self.notes),
                *_lines(
                    "prepare_finalize",
                    name_of(self.prepare_finalize),
                    self.prepare_finalize_candidates,
                ),
            ]
        )


def _lines(what: str, chosen: str, candidates: tuple[Candidate, ...]) -> list[str]:
    lines = [f"{what}: {chosen}"]
    for candidate in candidates:
        if candidate.reason is not None:
            lines.append(f"  not {candidate.name}: {candidate.reason}")
        elif candidate.name != chosen:
            lines.append(f"  not {candidate.name}: it can, but a preferred one came first")
    return lines


def name_of(cls: type[Any]) -> str:
    """What ``MoEOptions`` and ``explain`` call an implementation."""
    return getattr(cls, "name", "") or cls.__name__


def _load(path: str) -> type[Any]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def candidate_classes(paths: tuple[str, ...], forced: str | type | None = None) -> list[type[Any]]:
    """The classes of a table, or the forced one alone (by class, or by name in the table)."""
    if isinstance(forced, type):
        return [forced]
    classes = [_load(path) for path in paths]
    named = [cls for cls in classes if forced is None or name_of(cls) == forced]
    if not named:
        known = ", ".join(dict.fromkeys(name_of(cls) for cls in classes))
        raise ValueError(f"no implementation is called {forced!r}; known: {known}")
    return named


def check_forced_names(options: MoEOptions | None) -> None:
    """Raise ValueError where ``options`` force an implementation that does not exist."""
    options = MoEOptions.of(options)
    tables = ((EXPERTS, options.experts), (PREPARE_FINALIZE, options.prepare_finalize))
    for paths, forced in tables:
        if isinstance(forced, str):
            candidate_classes(paths, forced)


def _check_kind(forced: str | type | None, kind: type) -> None:
    """Raise ValueError where a class is forced that is not of this kind."""
    if isinstance(forced, type) and not issubclass(forced, kind):
        raise ValueError(f"MoEOptions names {forced.__name__}, which is no {kind.__name__}")


def _serves(mover: type[FusedMoEPrepareAndFinalize], experts: type[FusedMoEExperts]) -> bool:
    """Whether ``mover`` delivers what ``experts`` take: logits or ids, and the same rows."""
    kind = (
        FusedMoEPrepareAndFinalizeMonolithic
        if issubclass(experts, FusedMoEExpertsMonolithic)
        else FusedMoEPrepareAndFinalizeModular
    )
    return issubclass(mover, kind) and mover.row_format is experts.activation_format()


def select(
    moe: FusedMoEConfig,
    weight_key: QuantKey | None = None,
    activation_key: QuantKey | None = None,
    groups: ParallelGroups | None = None,
    *,
    down_keys: tuple[QuantKey | None, QuantKey | None] | None = None,
) -> Selection:
    """Choose experts, and the prepare/finalize that serves them.

    ``moe.options`` forces either by name or class. ``groups`` are the process groups tokens may
    move over. ``down_keys`` are the (weight, activation) keys of the second GEMM where they are not
    those of the first. Raises ValueError with every reason where nothing fits, and where the tuned
    table of the options is not for this layer; ``MissingPackageError`` where what is forced by name
    needs a package that is not installed.
    """
    gemms = (weight_key, activation_key), down_keys
    keys = tuple(dict.fromkeys(pair for pair in gemms if pair is not None))
    _check_table(moe, next((weight for weight, _ in keys if weight is not None), None))
    _check_kind(moe.options.prepare_finalize, FusedMoEPrepareAndFinalize)
    _check_kind(moe.options.experts, FusedMoEExperts)
    movers = candidate_classes(PREPARE_FINALIZE, moe.options.prepare_finalize)
    mover_reasons = {cls: cls.unmet_requirement(moe, groups) for cls in movers}
    able = [cls for cls, reason in mover_reasons.items() if reason is None]
    mover_candidates = tuple(Candidate(name_of(c), reason) for c, reason in mover_reasons.items())
    if not able:
        _refuse("nothing moves the tokens of this layer", mover_candidates)
    candidates = []
    chosen: tuple[type[FusedMoEExperts], type[FusedMoEPrepareAndFinalize]] | None = None
    for cls in candidate_classes(EXPERTS, moe.options.experts):
        serving = [mover for mover in able if _serves(mover, cls)]
        reason = _unmet(cls, moe, keys)
        if reason is None and not serving:
            reason = _undelivered(cls, mover_reasons, moe.options.experts is not None)
        candidates.append(Candidate(name_of(cls), reason))
        if reason is None and chosen is None:
            chosen = cls, serving[0]
    if chosen is None:
        _refuse("no experts implementation runs this layer", tuple(candidates))
    kind = _kind(chosen[1])
    return Selection(
        chosen[0],
        tuple(candidates),
        chosen[1],
        tuple(Candidate(name_of(c), r) for c, r in mover_reasons.items() if issubclass(c, kind)),
        moe,
        groups,
        _notes(chosen[0], keys),
    )


def _check_table(moe: FusedMoEConfig, weight_key: QuantKey | None) -> None:
    """Raise ValueError for a tuned table that says nothing about this layer."""
    table = moe.options.table
    if table is not None and weight_key is not None:
        raise ValueError(
            f"the tuned table is for weights {table.layer.weights}, the layer has ({weight_key}): "
            "no kernel for quantized weights reads a tuned table, leave it out"
        )
    given_table(moe)


def _notes(cls: type[FusedMoEExperts], keys: tuple[_Keys, ...]) -> tuple[str, ...]:
    """What ``cls`` computes in wider numbers than its operands have."""
    emulated = dict.fromkeys(
        f"emulated: {operand} ({key}) have the values of their format, but are multiplied as wider "
        "floats"
        for pair in keys
        for operand, key in zip(("weights", "activations"), pair, strict=True)
        for which, known in cls.capabilities().emulated
        if which == operand and key is not None and accepts(known, key)
    )
    return tuple(emulated)


def _kind(mover: type[FusedMoEPrepareAndFinalize]) -> type[FusedMoEPrepareAndFinalize]:
    modular = issubclass(mover, FusedMoEPrepareAndFinalizeModular)
    return FusedMoEPrepareAndFinalizeModular if modular else FusedMoEPrepareAndFinalizeMonolithic


def _unmet(cls: type[FusedMoEExperts], moe: FusedMoEConfig, keys: tuple[_Keys, ...]) -> str | None:
    if moe.require_modular and issubclass(cls, FusedMoEExpertsMonolithic):
        return "routes by itself, but this layer needs its routing before the experts"
    reasons = (cls.is_supported_config(moe, *pair, cls.activation_format())[1] for pair in keys)
    return next((reason for reason in reasons if reason is not None), None)


def _undelivered(
    cls: type[FusedMoEExperts],
    movers: dict[type[FusedMoEPrepareAndFinalize], str | None],
    in_full: bool,
) -> str:
    """That nothing moves rows to ``cls``; in full, why those that otherwise would cannot."""
    what = f"takes {cls.activation_format().name} rows, which no prepare/finalize delivers"
    reasons = [f"{name_of(mover)}: {why}" for mover, why in movers.items() if _serves(mover, cls)]
    return f"{what} ({'; '.join(reasons)})" if in_full and reasons else what


def _refuse(what: str, candidates: tuple[Candidate, ...]) -> NoReturn:
    reasons = "; ".join(f"{c.name}: {c.reason}" for c in candidates)
    missing = all(isinstance(c.reason, MissingModule) for c in candidates)
    raise (MissingPackageError if missing else ValueError)(f"{what} ({reasons})")


def explain(layer: FusedMoEConfig | MoERunner | RoutedExperts) -> Selection:
    """What runs a layer and why; ``print`` the result.

    Takes a config, a built layer or its experts, those of a model from ``from_pretrained`` too;
    ValueError for anything else.
    """
    if isinstance(layer, FusedMoEConfig):
        return select(layer)
    experts: Any = getattr(layer, "routed_experts", layer)
    if not hasattr(experts, "quant_method"):
        raise ValueError(
            f"explain takes a layer, its experts or a config, not a {type(layer).__name__}; the "
            "layers of an accelerated model are in "
            "fusedmoe.integrations.transformers.accelerate.accelerated_blocks(model)"
        )
    return experts.quant_method.select(experts)
