"""The activation launch: every formula, every mask, and rows that must stay untouched."""

import pytest
import torch

from fusedmoe.activation import (
    ApplyMoEActivationConfig,
    MoEActivation,
    activation_reference,
    apply_moe_activation,
)
from fusedmoe.kernels.activation import device_activation, moe_activation_reference

NAN = float("nan")
PLAIN = ApplyMoEActivationConfig()
CASES = [
    (activation, PLAIN)
    for activation in MoEActivation
    if activation
    not in (MoEActivation.RELU2, MoEActivation.SITU, MoEActivation.SWIGLUOAI_UNINTERLEAVE)
] + [
    (MoEActivation.SILU, ApplyMoEActivationConfig(clamp_limit=1.5)),
    (MoEActivation.GELU, ApplyMoEActivationConfig(clamp_limit=0.5)),
    (MoEActivation.SWIGLUOAI, ApplyMoEActivationConfig(clamp_limit=2.0, alpha=1.3, beta=0.25)),
    (MoEActivation.SWIGLUOAI_UNINTERLEAVE, ApplyMoEActivationConfig(clamp_limit=2.0)),
    (MoEActivation.SWIGLUSTEP, ApplyMoEActivationConfig(clamp_limit=0.75)),
    (MoEActivation.SITU, ApplyMoEActivationConfig(situ_beta=2.5)),
    (MoEActivation.SITU, ApplyMoEActivationConfig(situ_beta=2.5, situ_linear_beta=1.5)),
]


def triton_activation(activation, output, x, config=None, ids=None, expert_map=None, counts=None):
    from fusedmoe.kernels.triton.activation import activate

    activate(device_activation(activation, config), output, x, ids, expert_map, counts)
    return output


def poisoned(activation, x):
    width = x.shape[-1] // 2 if activation.is_gated else x.shape[-1]
    return x.new_full((*x.shape[:-1], width), NAN)


@pytest.mark.parametrize(("activation", "config"), CASES)
def test_triton_agrees_with_the_definition(activation, config):
    x = torch.randn(7, 90) * 4
    x[0, :4] = torch.tensor([0.0, -0.0, 1e-6, -1e-3])
    x[1, ::2] = 80.0
    x[2] = -80.0
    expected = activation_reference(activation, x.double(), config)
    out = triton_activation(activation, poisoned(activation, x), x, config)
    torch.testing.assert_close(out.double(), expected, rtol=3e-5, atol=2e-5)


@pytest.mark.parametrize("activation", [MoEActivation.SILU, MoEActivation.RELU2_NO_MUL])
def test_fp16_is_rounded_once(activation):
    x = torch.randn(5, 64).half()
    out = triton_activation(activation, poisoned(activation, x), x)
    torch.testing.assert_close(out, activation_reference(activation, x).half())


@pytest.mark.parametrize(
    "activation",
    [
        MoEActivation.SILU,
        MoEActivation.SWIGLUOAI,
        MoEActivation.SWIGLUSTEP,
        MoEActivation.RELU2_NO_MUL,
    ],
)
def test_nan_stays_in_its_row_and_is_not_clamped_away(activation):
    x = torch.randn(3, 64)
    x[1] = NAN
    out = triton_activation(activation, poisoned(activation, x), x)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("run", [triton_activation, moe_activation_reference])
def test_slots_without_an_expert_are_skipped(run):
    ids = torch.tensor([[0, -1], [4, 2], [7, 1]])
    expert_map = torch.tensor([0, -1, 1, -1, -1], dtype=torch.int32)
    x = torch.randn(3, 2, 20)
    for mapping, alive in ((None, [0, 2, 3, 4, 5]), (expert_map, [0, 3])):
        out = run(MoEActivation.SILU, x.new_full((3, 2, 10), NAN), x, None, ids, mapping)
        assert (~out.view(6, 10).isnan().any(1)).nonzero()[:, 0].tolist() == alive


@pytest.mark.parametrize("run", [triton_activation, moe_activation_reference])
def test_rows_past_the_counts_are_skipped(run):
    x = torch.randn(3, 4, 20)
    counts = torch.tensor([0, 4, 2], dtype=torch.int32)
    out = run(MoEActivation.GELU, x.new_full((3, 4, 10), NAN), x, None, None, None, counts)
    expected = activation_reference(MoEActivation.GELU, x)
    for part, count in enumerate(counts.tolist()):
        torch.testing.assert_close(out[part, :count], expected[part, :count])
        assert out[part, count:].isnan().all()
    flat = run(MoEActivation.GELU, x.new_full((4, 10), NAN), x[0], None, None, None, counts[2:])
    assert flat.isnan().any(1).tolist() == [False, False, True, True]


def test_strided_and_higher_dimensional_tensors():
    x = torch.randn(40, 6).t()[::2]
    out = torch.full((20, 3), NAN).t()
    triton_activation(MoEActivation.SILU, out, x)
    torch.testing.assert_close(out, activation_reference(MoEActivation.SILU, x))
    deep = torch.randn(2, 1, 3, 8)
    out = triton_activation(MoEActivation.SILU, poisoned(MoEActivation.SILU, deep), deep)
    torch.testing.assert_close(out, activation_reference(MoEActivation.SILU, deep))


def test_no_rows():
    x = torch.empty(0, 8)
    assert triton_activation(MoEActivation.SILU, torch.empty(0, 4), x).shape == (0, 4)
    assert apply_moe_activation(MoEActivation.SILU, torch.empty(0, 4), x).shape == (0, 4)


@pytest.mark.parametrize(
    "masks",
    [
        {"topk_ids": torch.zeros(3, 1, dtype=torch.int32)},
        {"expert_map": torch.zeros(3, dtype=torch.int32)},
        {"valid_token_counts": torch.zeros(2, dtype=torch.int32)},
    ],
)
def test_masks_that_do_not_fit_are_named(masks):
    with pytest.raises(ValueError, match=r"\d"):
        apply_moe_activation(MoEActivation.SILU, torch.empty(4, 5), torch.empty(4, 10), **masks)


def test_whole_numbers_are_floats_to_a_kernel():
    act = device_activation(
        MoEActivation.SWIGLUOAI, ApplyMoEActivationConfig(clamp_limit=7, beta=1)
    )
    assert [type(number) for number in (act.limit, act.alpha, act.beta)] == [float] * 3


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (MoEActivation.RELU2, "relu2_no_mul"),
        (MoEActivation.SITU, "situ_beta"),
        (MoEActivation.SWIGLUOAI_UNINTERLEAVE, "clamp_limit"),
    ],
)
def test_missing_numbers_are_refused(activation, message):
    with pytest.raises(ValueError, match=message):
        device_activation(activation)
