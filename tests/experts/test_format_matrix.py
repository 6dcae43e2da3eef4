"""Every format's kernels with every feature of a layer, as Triton's interpreter runs them."""

import pytest
import torch

from expert_layers import error
from format_matrix import CLASSES, FEATURES, MATRIX, case_of, with_ids_of_no_expert
from fusedmoe.experts.hopper_quantized import HopperQuantizedExperts
from fusedmoe.modular_kernel import FusedMoEActivationFormat
from fusedmoe.quantization.formats import format_named
from fusedmoe.quantization.formats.keys import ACTIVATION_KEYS, WEIGHT_KEYS
from fusedmoe.quantization.keys import accepts
from quantized_bodies import (
    triton_gather,
    triton_gemm,
    triton_round,
    triton_w4a8,
    triton_w8a8,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def interpreted(monkeypatch):
    """Triton's bodies under the interpreter in the place of the launchers' references."""
    from fusedmoe.kernels import (
        gather_columns,
        grouped_gemm_quantized,
        grouped_gemm_quantized_w8a8,
        grouped_gemm_w4a8,
        round_rows,
    )

    monkeypatch.setattr(grouped_gemm_quantized, "quantized_gemm_reference", triton_gemm)
    monkeypatch.setattr(grouped_gemm_w4a8, "w4a8_gemm_reference", triton_w4a8)
    monkeypatch.setattr(grouped_gemm_quantized_w8a8, "w8a8_gemm_reference", triton_w8a8)
    monkeypatch.setattr(round_rows, "round_rows_reference", triton_round)
    monkeypatch.setattr(gather_columns, "gather_columns_reference", triton_gather)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """Which classes serve a case is asked as on a GPU of compute capability 9."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def classes_of(name, rows):
    """Standard and batched rows, products of rounded rows before products of floats."""
    weight, found = format_named(name).key, {}
    for cls in CLASSES:
        pairs = cls.capabilities().weight_formats
        if cls is not HopperQuantizedExperts and any(
            accepts(w, weight) and accepts(a, rows) for w, a in pairs
        ):
            found.setdefault(cls.activation_format(), cls)
    return list(found.values())


CASES = [(name, rows, cls) for name, rows in MATRIX for cls in classes_of(name, rows)]


@pytest.mark.parametrize(("name", "rows", "experts"), CASES, ids=str)
def test_biases_no_gate_a_map_and_ids_of_no_expert(name, rows, experts, interpreted):
    case = case_of(name, rows, FEATURES)
    tensors = with_ids_of_no_expert(case.layer.tensors())
    run = case.runner(tensors, experts, prepare=True)
    out = run()
    # Rounding to fp8 is the interpreter's own on the way into a product: see the GPU tests.
    assert error(out, case.expected(tensors)) <= (2e-5 if rows is None else 0.2)
    assert (out[0] == 0).all()


def test_every_format_is_here():
    weights = {format_named(name).key for name, _ in MATRIX}
    for key in WEIGHT_KEYS:
        assert any(accepts(key, one) for one in weights), key
    for key in ACTIVATION_KEYS:
        assert any(accepts(key, rows) for _, rows in MATRIX if rows is not None), key
    for name, rows in MATRIX:
        served = {cls.activation_format() for cls in classes_of(name, rows)}
        assert served == set(FusedMoEActivationFormat), (name, rows)
