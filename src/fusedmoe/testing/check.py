"""Run an experts implementation against the definition, over the cases that break things."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusedmoe.config import MoEOptions
from fusedmoe.modular_kernel import (
    FusedMoEActivationFormat,
    FusedMoEExperts,
    FusedMoEKernel,
    ProblemSize,
    plan_workspaces,
)
from fusedmoe.selection import select
from fusedmoe.testing.case_layer import CaseLayer
from fusedmoe.testing.cases import ACTIVATION_CASES, STANDARD_CASES, Case, make_inputs
from fusedmoe.testing.tolerances import format_name

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SPARE_ROWS = 3  # of each expert, where rows are batched


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
    of NaN; give the same bits twice; leave its inputs and the layer's parameters alone; serve other
    batches with the same instance, in the same memory too; take tokens in passes of bounded scratch
    memory; follow weights that change after they were prepacked; keep a row of NaN to its own
    token; heed neither weights of slots with id -1 nor rows of tokens that have no others; and,
    where it claims batch invariance, give a token the same bits alone and among others. Experts
    that are not ``deterministic`` are spared what compares bits.

    Raises AssertionError at the first case that fails, and where all cases were skipped: that
    checks nothing. Returns what was run and what was skipped.
    """
    cases, dtypes, known = tuple(cases), tuple(dtypes), experts_class.capabilities()
    options = replace(
        options or MoEOptions(), experts=experts_class, deterministic=known.deterministic
    )
    results = [
        _check_case(case, device, dtype, options, seed)
        for case in cases
        for dtype in dtypes
        if dtype in known.dtypes
    ]
    if cases and all(result.skipped for result in results):
        why = results[0].skipped if results else f"it computes in {set(known.dtypes)}"
        raise AssertionError(f"{experts_class.__name__} ran none of {len(cases)} cases: {why}")
    return results


def _check_case(
    case: Case, device: torch.device | str, dtype: torch.dtype, options: MoEOptions, seed: int
) -> CaseResult:
    experts: Any = options.experts
    moe = case.moe_config(device, dtype, options)
    if experts.activation_format() is FusedMoEActivationFormat.BatchedExperts:
        moe = replace(moe, max_num_tokens=case.T + _SPARE_ROWS)
    try:
        selection = select(moe)
    except ValueError as refusal:
        return CaseResult(case, dtype, skipped=str(refusal))
    layer = CaseLayer.of(case, selection, make_inputs(case, device, dtype, seed))
    if layer.routes_by_itself and (case.dropped or case.weight_on_input):
        return CaseResult(case, dtype, skipped="routes by itself: the case fixes ids or weights")
    try:
        return CaseResult(case, dtype, error=_check_layer(layer, seed))
    except Exception as error:
        error.add_note(f"while checking {experts.__name__}, {layer}")
        raise


def _check_layer(layer: CaseLayer, seed: int) -> float:
    """All checks of one case; the relative error of its first run."""
    first = layer.run()
    error = layer.check(first).frobenius
    clean = first.clone()
    _check_again(layer, clean, "a second run gave other bits")
    if layer.case.T > 0:
        _check_other_batches(layer, first, seed)
        _check_passes(layer)
        _check_other_weights(layer, clean)
    if layer.capabilities.deterministic:
        if layer.case.T > 1:
            _check_nan_row(layer, clean)
            _check_batch_invariance(layer)
        _check_padding(layer, clean)
    return error


def _check_again(layer: CaseLayer, clean: torch.Tensor, message: str) -> None:
    if layer.capabilities.deterministic and not torch.equal(layer.run(), clean):
        raise AssertionError(f"{layer}: {message}")


def _check_other_batches(layer: CaseLayer, first: torch.Tensor, seed: int) -> None:
    """One instance serves a layer for good, and graphs give it their tokens in the same memory."""
    clean = first.clone()
    own = {name: tensor.clone() for name, tensor in layer.tokens.items()}
    other = make_inputs(layer.case, first.device, layer.dtype, seed + 1)
    for name, tensor in layer.tokens.items():
        tensor.copy_(getattr(other, name))
    layer.check(layer.run(), "another batch in the same memory")
    if not torch.equal(first, clean):
        raise AssertionError(f"{layer}: a later forward wrote over the output of an earlier one")
    smaller = layer.only(slice((layer.case.T + 1) // 2))
    smaller.check(smaller.run(), "a smaller batch after it")
    for name, tensor in layer.tokens.items():
        tensor.copy_(own[name])
    _check_again(layer, clean, "another batch in between changed the bits")


def _check_passes(layer: CaseLayer) -> None:
    """The scratch memory of a third of the rows: three passes of them."""
    kernel, inputs = layer.kernel, layer.inputs
    if not isinstance(kernel, FusedMoEKernel) or kernel.experts.is_batched:
        return
    rows = inputs.hidden_states, inputs.w1, inputs.w2, inputs.topk_ids
    size = ProblemSize(*kernel.experts.moe_problem_size(*rows))._replace(M=(layer.case.T + 2) // 3)
    part = plan_workspaces(
        kernel.experts, size, layer.dtype, layer.case.activation, layer.case.E
    ).workspace_bytes
    if part:
        bounded = layer.with_options(max_workspace_bytes=part)
        bounded.check(bounded.run(), f"with max_workspace_bytes={part}")


def _check_other_weights(layer: CaseLayer, clean: torch.Tensor) -> None:
    """Weights that are written to are prepacked again; the last ones count."""
    for weight in layer.weights.parameters():
        weight.neg_()
    layer.prepack()
    layer.check(layer.run(), "weights that changed and were prepacked again")
    for weight in layer.weights.parameters():
        weight.neg_()
    layer.prepack()
    _check_again(layer, clean, "other weights in between changed the bits")


def _check_nan_row(layer: CaseLayer, clean: torch.Tensor) -> None:
    x = layer.inputs.hidden_states.clone()
    x[-1] = float("nan")
    dirty = layer.with_tokens(hidden_states=x).run()
    if not torch.equal(dirty[:-1], clean[:-1]):
        raise AssertionError(f"{layer}: a NaN in the last token changed another one")


def _check_batch_invariance(layer: CaseLayer) -> None:
    if not layer.capabilities.batch_invariant:
        return
    invariant = layer.with_options(batch_invariant=True)
    together = invariant.run()
    for token in sorted({0, layer.case.T // 2, layer.case.T - 1}):
        alone = invariant.only(slice(token, token + 1)).run()
        if not torch.equal(together[token], alone[0]):
            raise AssertionError(f"{layer}: claims batch invariance; token {token}'s bits changed")


def _check_padding(layer: CaseLayer, clean: torch.Tensor) -> None:
    inputs = layer.inputs
    padding = inputs.topk_ids == -1
    if layer.routes_by_itself or not bool(padding.any()):
        return
    nan = float("nan")
    weights = inputs.topk_weights.masked_fill(padding, nan)
    x = inputs.hidden_states.masked_fill(padding.all(1, keepdim=True), nan)
    if not torch.equal(layer.with_tokens(topk_weights=weights, hidden_states=x).run(), clean):
        raise AssertionError(f"{layer}: a NaN at slots of id -1 changed the result")
