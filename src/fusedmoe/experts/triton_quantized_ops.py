"""The quantized Triton experts as torch.compile sees them: ops that take tensors and words.

What describes the weights and the rows that meet them is ``tensors_and_words`` of a quant config;
``tables`` are those of ``Operands`` that say where columns lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fusedmoe.activation import ApplyMoEActivationConfig
from fusedmoe.experts.act_order import as_they_lie
from fusedmoe.experts.opaque import opaque
from fusedmoe.experts.quantized_operands import Operands, config_of
from fusedmoe.experts.triton_quantized_run import batched_quantized_experts, quantized_experts
from fusedmoe.modular_kernel import ExpertsWork


@opaque("fusedmoe::triton_quantized_experts", ("output", "workspace13", "workspace2"))
def standard_op(
    work: ExpertsWork,
    tensors: Sequence[torch.Tensor | None],
    words: str,
    tables: Sequence[torch.Tensor | None],
    activation_config: ApplyMoEActivationConfig,
    batch_invariant: bool,
    emulate: bool,
) -> None:
    """``quantized_experts``."""
    operands = _operands(work, work.output.dtype, emulate, tensors, words, tables)
    quantized_experts(work, operands, activation_config, batch_invariant=batch_invariant)


@opaque("fusedmoe::batched_triton_quantized_experts", ("output", "workspace13"))
def batched_op(
    work: ExpertsWork,
    tensors: Sequence[torch.Tensor | None],
    words: str,
    tables: Sequence[torch.Tensor | None],
    counts: torch.Tensor,
    activation_config: ApplyMoEActivationConfig,
    batch_invariant: bool,
    emulate: bool,
) -> None:
    """``batched_quantized_experts``."""
    operands = _operands(work, work.hidden_states.dtype, emulate, tensors, words, tables)
    batched_quantized_experts(
        work, operands, counts, activation_config, batch_invariant=batch_invariant
    )


def _operands(
    work: ExpertsWork,
    dtype: torch.dtype,
    emulate: bool,
    tensors: Sequence[torch.Tensor | None],
    words: str,
    tables: Sequence[torch.Tensor | None],
) -> Operands:
    config = config_of(tensors, words)
    found = Operands.of(config, work.w1, work.w2, work.activation, dtype, emulate=emulate)
    order, down_order, places = tables
    return as_they_lie(replace(found, order=order, down_order=down_order, places=places))
