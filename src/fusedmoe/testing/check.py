"""Run an experts implementation against the definition, over the cases that break things."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusedmoe.config import FusedMoEConfig, MoEOptions
from fusedmoe.kernels.experts_reference import experts_reference
from fusedmoe.modular_kernel import (
    FusedMoEExperts,
    FusedMoEExpertsMonolithic,
    FusedMoEKernel,
    FusedMoEMonolithicKernel,
)
from fusedmoe.quantization.config import biased_moe_quant_config
from fusedmoe.router.base import routing_by
from fusedmoe.router.routers import SpecRouter
from fusedmoe.router.spec import RoutingResult, RoutingSpec
from fusedmoe.selection import Selection, select
from fusedmoe.testing.cases import ACTIVATION_CASES, STANDARD_CASES, Case, Inputs, make_inputs
from fusedmoe.testing.poison import nan_poison
from fusedmoe.testing.tolerances import assert_close, format_name

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, repr=False)
class CaseResult:
    """What became of one case in one dtype: its relative error, or why it was left out."""

    case: Case
    dtype: torch.dtype
    error: float | None = None
    skipped: str | None = None

    def __repr__(self) -> str:
        outcome = f"skipped: {self.skipped}" if self.skipped else f"error {self.error:.1e}"
        return f"{self.case} {format_name(self.dtype)}: {outcome}"


def check_experts(
    experts_class: type[FusedMoEExperts],
    cases: Iterable[Case] = (*STANDARD_CASES, *ACTIVATION_CASES),
    *,
    device: torch.device | str = "cpu",
    dtypes: Iterable[torch.dtype] = _DTYPES,
    options: MoEOptions | None = None,
    seed: int = 0,
) -> list[CaseResult]:
    """Check that ``experts_class`` computes what the reference does, in a layer of one rank.

    A case outside the class's ``capabilities`` is skipped, with the reason in its result. Every
    other one must: agree with the reference in fp64 within ``TOLERANCES``, with scratch memory full
    of NaN; give the same bits twice; leave its inputs alone; keep a row of NaN to its own token;
    heed neither weights of slots with id -1 nor rows of tokens that have no others; and, where it
    claims batch invariance, give a token the same bits alone and among others. Experts that are
    not ``deterministic`` are held to the reference alone: all else compares bits.

    Raises AssertionError at the first case that fails. Returns what was run and what was skipped.
    """
    deterministic = experts_class.capabilities().deterministic
    options = replace(options or MoEOptions(), experts=experts_class, deterministic=deterministic)
    results = []
    for case in cases:
        for dtype in dtypes:
            if dtype not in experts_class.capabilities().dtypes:
                continue
            results.append(_check_case(case, device, dtype, options, seed))
    return results


def _check_case(
    case: Case, device: torch.device | str, dtype: torch.dtype, options: MoEOptions, seed: int
) -> CaseResult:
    try:
        selection = select(case.moe_config(device, dtype, options))
    except ValueError as refusal:
        return CaseResult(case, dtype, skipped=str(refusal))
    layer = _Layer(case, selection, make_inputs(case, device, dtype, seed))
    if layer.routes_by_itself and (case.dropped or case.weight_on_input):
        return CaseResult(case, dtype, skipped="routes by itself: the case fixes ids or weights")
    name = f"{case} in {format_name(dtype)}"
    before = [None if t is None else t.clone() for t in vars(layer.inputs).values()]
    expected = layer.expected()
    first = layer.run()
    for field, old, new in zip(
        vars(layer.inputs), before, vars(layer.inputs).values(), strict=True
    ):
        if old is not None and not torch.equal(old, new):
            raise AssertionError(f"{name}: {field} was written to")
    error = assert_close(name, first, expected, dtype)
    if not options.deterministic:
        return CaseResult(case, dtype, error=error.frobenius)
    if not torch.equal(first, layer.run()):
        raise AssertionError(f"{name}: a second run gave other bits")
    if case.T > 1:
        _check_nan_row(name, layer, first)
        _check_batch_invariance(name, layer)
    _check_padding(name, layer, first)
    return CaseResult(case, dtype, error=error.frobenius)


def _check_padding(name: str, layer: _Layer, clean: torch.Tensor) -> None:
    inputs = layer.inputs
    padding = inputs.topk_ids == -1
    if layer.routes_by_itself or not bool(padding.any()):
        return
    nan = float("nan")
    weights = inputs.topk_weights.masked_fill(padding, nan)
    x = inputs.hidden_states.masked_fill(padding.all(1, keepdim=True), nan)
    dirty = replace(layer, inputs=replace(inputs, topk_weights=weights, hidden_states=x)).run()
    if not torch.equal(dirty, clean):
        raise AssertionError(f"{name}: a NaN at slots of id -1 changed the result")


def _check_nan_row(name: str, layer: _Layer, clean: torch.Tensor) -> None:
    x = layer.inputs.hidden_states.clone()
    x[-1] = float("nan")
    dirty = replace(layer, inputs=replace(layer.inputs, hidden_states=x)).run()
    if not torch.equal(dirty[:-1], clean[:-1]):
        raise AssertionError(f"{name}: a NaN in the last token changed another one")


def _check_batch_invariance(name: str, layer: _Layer) -> None:
    if not layer.selection.chosen.capabilities().batch_invariant:
        return
    moe = layer.selection.moe_config
    options = replace(moe.options, batch_invariant=True)
    invariant = replace(layer, selection=select(replace(moe, options=options)))
    together = invariant.run()
    for token in sorted({0, layer.case.T // 2, layer.case.T - 1}):
        alone = replace(invariant, inputs=layer.only(token)).run()
        if not torch.equal(together[token], alone[0]):
            raise AssertionError(f"{name}: claims batch invariance; token {token}'s bits changed")


@dataclass(frozen=True)
class _Layer:
    case: Case
    selection: Selection
    inputs: Inputs

    @property
    def moe_config(self) -> FusedMoEConfig:
        return self.selection.moe_config

    @property
    def router(self) -> SpecRouter:
        return SpecRouter(RoutingSpec(top_k=self.case.K, num_experts=self.case.E, renormalize=True))

    @property
    def routes_by_itself(self) -> bool:
        return issubclass(self.selection.chosen, FusedMoEExpertsMonolithic)

    def kernel(self) -> FusedMoEKernel | FusedMoEMonolithicKernel:
        """The stages as a layer composes them, weights prepacked."""
        inputs = self.inputs
        kernel = self.selection.make_kernel(biased_moe_quant_config(inputs.w1_bias, inputs.w2_bias))
        weights = torch.nn.Module()
        for name, tensor in (
            ("w13_weight", inputs.w1),
            ("w2_weight", inputs.w2),
            ("w13_bias", inputs.w1_bias),
            ("w2_bias", inputs.w2_bias),
        ):
            if tensor is not None:
                weights.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        kernel.experts.process_weights_after_loading(weights)
        return kernel

    def _routing(self) -> RoutingResult:
        inputs = self.inputs
        if self.routes_by_itself:
            return routing_by(self.router, inputs.hidden_states, inputs.router_logits)
        return RoutingResult(inputs.topk_weights, inputs.topk_ids)

    def only(self, token: int) -> Inputs:
        names = ("hidden_states", "router_logits", "topk_weights", "topk_ids")
        part = slice(token, token + 1)
        return replace(self.inputs, **{name: getattr(self.inputs, name)[part] for name in names})

    def run(self) -> torch.Tensor:
        """One forward through prepare, experts and finalize."""
        inputs, kernel = self.inputs, self.kernel()
        rest: dict[str, Any] = {
            "activation": self.case.activation,
            "global_num_experts": self.case.E,
            "expert_map": inputs.expert_map,
            "apply_router_weight_on_input": self.case.weight_on_input,
        }
        weights = (inputs.w1, inputs.w2)
        with nan_poison(), torch.no_grad():
            if isinstance(kernel, FusedMoEMonolithicKernel):
                return kernel.apply(
                    inputs.hidden_states, *weights, inputs.router_logits, router=self.router, **rest
                )
            return kernel.apply(
                inputs.hidden_states, *weights, inputs.topk_weights, inputs.topk_ids, **rest
            )

    def expected(self) -> torch.Tensor:
        """The definition in fp64, on the same values."""
        inputs, routing = self.inputs, self._routing()
        w1_bias, w2_bias = (
            None if bias is None else bias.double() for bias in (inputs.w1_bias, inputs.w2_bias)
        )
        return experts_reference(
            inputs.hidden_states.double(),
            inputs.w1.double(),
            inputs.w2.double(),
            routing.topk_weights.double(),
            routing.topk_ids,
            activation=self.case.activation,
            activation_config=self.case.numbers,
            w1_bias=w1_bias,
            w2_bias=w2_bias,
            expert_map=inputs.expert_map,
            apply_router_weight_on_input=self.case.weight_on_input,
            compute_dtype=torch.float64,
        )
