"""Every activation against a formula written here, one number at a time, in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from fusedmoe.activation import (
    ApplyMoEActivationConfig,
    MoEActivation,
    activation_reference,
    activation_without_mul,
    apply_moe_activation,
)

A = MoEActivation
GATED = [a for a in A if a.is_gated and a is not A.RELU2]
PLAIN = [a for a in A if not a.is_gated]
LIMIT, ALPHA, BETA = 2.5, 1.3, 0.7


def sigmoid(v: float) -> float:
    return 1.0 / (1.0 + math.exp(-v)) if v >= 0 else math.exp(v) / (1.0 + math.exp(v))


def gelu(v: float) -> float:
    return 0.5 * v * (1.0 + math.erf(v / math.sqrt(2.0)))


def gelu_tanh(v: float) -> float:
    return 0.5 * v * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (v + 0.044715 * v**3)))


def at_most(v: float, limit: float) -> float:
    return min(v, limit)


def within(v: float, limit: float) -> float:
    return max(-limit, min(v, limit))


FORMULAS = {
    A.SILU: lambda g, u: g * sigmoid(g) * u,
    A.GELU: lambda g, u: gelu(g) * u,
    A.GELU_TANH: lambda g, u: gelu_tanh(g) * u,
    A.SWIGLUOAI: lambda g, u: (
        (within(u, 7.0) + 1) * at_most(g, 7.0) * sigmoid(1.702 * at_most(g, 7.0))
    ),
    A.SWIGLUOAI_UNINTERLEAVE: lambda g, u: (
        (within(u, LIMIT) + BETA) * at_most(g, LIMIT) * sigmoid(ALPHA * at_most(g, LIMIT))
    ),
    A.SWIGLUSTEP: lambda g, u: at_most(g * sigmoid(g), 7.0) * within(u, 7.0),
    A.SITU: lambda g, u: 2.0 * math.tanh(g / 2.0) * sigmoid(g) * u,
    A.SILU_NO_MUL: lambda v: v * sigmoid(v),
    A.GELU_NO_MUL: gelu,
    A.GELU_TANH_NO_MUL: gelu_tanh,
    A.RELU2_NO_MUL: lambda v: max(v, 0.0) ** 2,
}
NUMBERS = {
    A.SWIGLUOAI_UNINTERLEAVE: ApplyMoEActivationConfig(clamp_limit=LIMIT, alpha=ALPHA, beta=BETA),
    A.SITU: ApplyMoEActivationConfig(situ_beta=2.0),
}
VALUES = torch.tensor(
    [-30.0, -9.0, -7.0, -2.5, -1.0, -0.3, 0.0, 1e-3, 0.6, 2.0, 2.5, 7.0, 9.0, 30.0]
)


def halves(activation: MoEActivation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Gate and up as this activation lays them out."""
    if activation is A.SWIGLUOAI:
        return torch.stack((gate, up), dim=-1).flatten(-2)
    return torch.cat((gate, up), dim=-1)


def expected(activation: MoEActivation, *columns: torch.Tensor) -> torch.Tensor:
    formula = FORMULAS[activation]
    return torch.tensor(
        [formula(*row) for row in zip(*(c.tolist() for c in columns), strict=True)],
        dtype=torch.float64,
    )


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    grid = torch.cartesian_prod(VALUES, VALUES).double()
    return grid[:, 0].contiguous(), grid[:, 1].contiguous()


def test_every_activation_has_a_formula_here():
    assert set(FORMULAS) == set(A) - {A.RELU2}


@pytest.mark.parametrize("activation", GATED)
def test_gated_formulas(activation):
    gate, up = pairs()
    found = activation_reference(activation, halves(activation, gate, up), NUMBERS.get(activation))
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, expected(activation, gate, up), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", PLAIN)
def test_plain_formulas(activation):
    x = VALUES.double()
    torch.testing.assert_close(
        activation_reference(activation, x), expected(activation, x), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("activation", [A.SILU, A.GELU, A.GELU_TANH])
def test_a_limit_clamps_the_gate_above_and_up_on_both_sides(activation):
    gate, up = pairs()
    config = ApplyMoEActivationConfig(clamp_limit=LIMIT)
    found = activation_reference(activation, torch.cat((gate, up)), config)
    clamped = expected(activation, gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT))
    torch.testing.assert_close(found, clamped, rtol=1e-12, atol=1e-12)


def test_step_clamps_after_the_gate_and_swigluoai_before():
    """Far above the limit, silu(min(g, L)) is below L while min(silu(g), L) is L."""
    config = ApplyMoEActivationConfig(clamp_limit=1.0)
    x = torch.tensor([5.0, 1.0])
    assert activation_reference(A.SWIGLUSTEP, x, config).item() == pytest.approx(1.0)
    assert activation_reference(A.SILU, x, config).item() == pytest.approx(sigmoid(1.0))


def test_situ_bounds_up_too_where_asked():
    gate, up = pairs()
    config = ApplyMoEActivationConfig(situ_beta=2.0, situ_linear_beta=3.0)
    bounded = 3.0 * torch.tanh(up / 3.0)
    found = activation_reference(A.SITU, torch.cat((gate, up)), config)
    torch.testing.assert_close(found, expected(A.SITU, gate, bounded), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", [*GATED, *PLAIN])
def test_it_computes_in_fp32_and_rounds_once(activation, dtype):
    """Apart from fp32's own last bits, the result is the exact one rounded to the dtype."""
    x = torch.randn(5, 64, dtype=torch.float64).to(dtype)
    exact = activation_reference(activation, x.double(), NUMBERS.get(activation))
    out = torch.full(exact.shape, float("nan"), dtype=dtype)
    result = apply_moe_activation(activation, out, x, activation_config=NUMBERS.get(activation))
    assert result is out
    if dtype is torch.float32:
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)
        return
    # Half a spacing by rounding, and what an fp32 error may push across the middle of two values.
    spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
    assert bool(((out.double() - exact).abs() <= 0.51 * spacing + 1e-6).all())


def test_rows_of_any_shape_and_stride():
    x = torch.randn(3, 4, 16)[:, ::2]
    out = torch.empty(3, 2, 8)
    apply_moe_activation(A.SILU, out, x)
    torch.testing.assert_close(out, activation_reference(A.SILU, x.contiguous()))
    assert apply_moe_activation(A.SILU, torch.empty(0, 8), torch.empty(0, 16)).shape == (0, 8)


def test_errors_name_the_numbers():
    x = torch.zeros(3, 10)
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(3, 4\)"):
        apply_moe_activation(A.SILU, torch.empty(3, 4), x)
    with pytest.raises(ValueError):
        apply_moe_activation(A.SILU, torch.empty(3, 4), torch.zeros(3, 9))
    with pytest.raises(ValueError, match=r"\(3, 10\)"):
        apply_moe_activation(A.SILU_NO_MUL, torch.empty(3, 5), x)
    with pytest.raises(ValueError, match="relu2_no_mul"):
        activation_reference(A.RELU2, x)
    with pytest.raises(ValueError, match="situ_beta"):
        activation_reference(A.SITU, x)
    with pytest.raises(ValueError, match="clamp_limit"):
        activation_reference(A.SWIGLUOAI_UNINTERLEAVE, x)


def test_swigluoai_forms_have_their_own_defaults():
    gate, up = torch.tensor([0.5]), torch.tensor([2.0])
    interleaved = activation_reference(A.SWIGLUOAI, torch.cat((gate, up)))
    assert interleaved.item() == pytest.approx(3.0 * 0.5 * sigmoid(1.702 * 0.5))
    config = ApplyMoEActivationConfig(clamp_limit=9.0)
    halved = activation_reference(A.SWIGLUOAI_UNINTERLEAVE, torch.cat((gate, up)), config)
    assert halved.item() == pytest.approx(2.0 * 0.5 * sigmoid(0.5))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("silu", A.SILU),
        ("swish", A.SILU),
        ("gelu_pytorch_tanh", A.GELU_TANH),
        ("gelu_new", A.GELU_TANH),
        ("relu2_no_mul", A.RELU2_NO_MUL),
        ("swigluoai", A.SWIGLUOAI),
    ],
)
def test_names_and_their_aliases(given, name):
    assert MoEActivation.from_str(given) is name


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'mish'.*silu.*relu2_no_mul"):
        MoEActivation.from_str("mish")


@pytest.mark.parametrize("activation", list(A))
def test_names_round_trip_and_say_whether_there_is_a_gate(activation):
    assert MoEActivation.from_str(activation.value) is activation
    assert activation.is_gated == (not activation.value.endswith("_no_mul"))
    assert activation.custom_op_name.endswith("_and_mul") == activation.is_gated
    if not activation.is_gated:
        assert activation.without_mul() is activation


def test_without_mul():
    assert activation_without_mul("silu") == "silu_no_mul"
    assert activation_without_mul("swish") == "silu_no_mul"
    assert activation_without_mul("relu2") == "relu2_no_mul"
    assert MoEActivation.SITU.without_mul() is MoEActivation.SITU


@pytest.mark.parametrize("dynamic", [False, True])
def test_numbers_may_be_arguments_of_compiled_code(dynamic):
    def clamped(x: torch.Tensor, limit: float) -> torch.Tensor:
        numbers = ApplyMoEActivationConfig(clamp_limit=limit, alpha=limit / 4)
        return activation_reference(A.SWIGLUOAI, x, numbers)

    compiled = torch.compile(clamped, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x = 9 * torch.randn(3, 8)
    for limit in (1.0, 2.5):
        torch.testing.assert_close(compiled(x, limit), clamped(x, limit))
