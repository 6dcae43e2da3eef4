"""Every format's kernels on a GPU with every feature of a layer, captured in a graph, within the
bounds of ``fusedmoe.testing``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from format_matrix import FEATURES, INVARIANT, MATRIX, case_of, serving, with_ids_of_no_expert
from fusedmoe.experts.torch_quantized import BatchedTorchQuantizedExperts
from fusedmoe.modular_kernel import FusedMoEActivationFormat
from fusedmoe.quantization.keys import FP8_DYNAMIC_TENSOR
from fusedmoe.testing import NO_WORSE, assert_close, assert_no_worse

pytestmark = pytest.mark.gpu
NAMES = ("hidden_states", "topk_weights", "topk_ids")
ON_GPU = {"device": "cuda", "dtype": torch.bfloat16}
FORMATS = pytest.mark.parametrize(
    "rows_are", list(FusedMoEActivationFormat), ids=lambda rows: rows.name
)
EACH = pytest.mark.parametrize(("name", "rows"), MATRIX, ids=str)


def classes(case, rows_are):
    found = [cls for cls in serving(case) if cls.activation_format() is rows_are]
    assert found
    return found


def assert_right(cls, case, tensors, out):
    exact = replace(case, rows=None).expected(tensors)
    # Kernels round numbers with a minimum to 16 bits; torch's are fp32.
    factor = 1.1 if {case.format, case.down} & {"q4_1", "q5_1"} else NO_WORSE
    batched = cls.activation_format() is FusedMoEActivationFormat.BatchedExperts
    if case.rows is None:
        assert_close(cls.name, out, exact, "weight_only")
    elif batched and case.rows == FP8_DYNAMIC_TENSOR:  # made by the rows that are here
        assert_no_worse(cls.name, out, case.run(tensors, BatchedTorchQuantizedExperts), exact)
    else:
        computed = case.expected(tensors).to(out.dtype)
        assert_no_worse(cls.name, out, computed, exact, factor=factor)


@FORMATS
@EACH
def test_captured_with_biases_no_gate_a_map_and_ids_of_no_expert(name, rows, rows_are):
    case = case_of(name, rows, replace(FEATURES, T=33, K=4, E=32, local=9, **ON_GPU))
    tensors = with_ids_of_no_expert(case.layer.tensors())
    for cls in classes(case, rows_are):
        run = case.runner(tensors, cls, prepare=True)
        clean = run().clone()
        assert (clean[0] == 0).all()
        assert_right(cls, case, tensors, clean)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        out.fill_(float("nan"))
        graph.replay()
        assert out.equal(clean)


@FORMATS
@EACH
def test_a_token_gives_the_same_bits_in_any_batch(name, rows, rows_are):
    if rows == FP8_DYNAMIC_TENSOR:
        pytest.skip("one scale for all rows follows the batch")
    case = case_of(name, rows, replace(INVARIANT, T=300, K=4, E=16, **ON_GPU))
    tensors = case.layer.tensors()
    given = {n: tensors[n] for n in NAMES}
    for cls in classes(case, rows_are):
        tensors |= given
        run = case.runner(tensors, cls, prepare=True)
        whole = run().clone()
        assert_right(cls, case, tensors, whole)
        for part in (slice(0, 1), slice(100, 300)):
            tensors |= {n: given[n][part] for n in NAMES}
            assert run().equal(whole[part])
