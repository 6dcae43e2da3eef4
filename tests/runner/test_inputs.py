"""What enters forward: any leading shape, and errors that name the numbers."""

from __future__ import annotations

import pytest
import torch

from fusedmoe import FusedMoE, MoEOptions

E, H = 4, 6
LAYER = FusedMoE(E, 2, H, 8, torch.float32, options=MoEOptions(experts="torch"))
for parameter in LAYER.routed_experts.parameters():
    torch.nn.init.normal_(parameter)


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0), (0, 3)])
def test_any_leading_shape(lead):
    x, logits = torch.randn(*lead, H), torch.randn(*lead, E)
    out = LAYER(x, logits)
    assert out.shape == x.shape
    flat = LAYER(x.reshape(-1, H), logits.reshape(-1, E))
    assert torch.equal(out.reshape(-1, H), flat)


def test_flat_logits_and_ids_may_come_with_shaped_rows():
    x, logits = torch.randn(2, 3, H), torch.randn(6, E)
    assert torch.equal(LAYER(x, logits), LAYER(x, logits.view(2, 3, E)))
    assert torch.equal(LAYER(x, logits, torch.arange(6)), LAYER(x, logits))


def test_strides_do_not_matter():
    x, logits = torch.randn(H, 5).T, torch.randn(E, 5).T
    assert not x.is_contiguous()
    torch.testing.assert_close(LAYER(x, logits), LAYER(x.contiguous(), logits.contiguous()))
    wide = torch.randn(5, 2 * H)
    torch.testing.assert_close(
        LAYER(wide[:, ::2], logits), LAYER(wide[:, ::2].contiguous(), logits)
    )


def test_the_input_is_not_written():
    x, logits = torch.randn(5, H), torch.randn(5, E)
    kept = x.clone(), logits.clone()
    LAYER(x, logits)
    assert torch.equal(x, kept[0])
    assert torch.equal(logits, kept[1])


def test_a_nan_row_harms_no_other():
    x, logits = torch.randn(5, H), torch.randn(5, E)
    clean = LAYER(x, logits)
    x[2] = float("nan")
    logits[3] = float("nan")
    out = LAYER(x, logits)
    assert out[2].isnan().all()
    for t in (0, 1, 4):
        torch.testing.assert_close(out[t], clean[t])


ROWS, LOGITS = torch.randn(5, H), torch.randn(5, E)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROWS[:, :-1], LOGITS), r"hidden size 6, got \(5, 5\)"),
        ((torch.tensor(1.0), LOGITS), r"must be \[\.\.\., H\], got \(\)"),
        ((ROWS.double(), LOGITS), r"torch\.float32, hidden_states are torch\.float64"),
        ((ROWS.bfloat16(), LOGITS), "bfloat16"),
        ((ROWS.long(), LOGITS), "int64"),
        ((ROWS.to("meta"), LOGITS.to("meta")), "on cpu, hidden_states on meta"),
        ((ROWS, LOGITS[:, :-1]), r"\[5, 4\] for hidden_states \(5, 6\), got \(5, 3\)"),
        ((ROWS, LOGITS[:-1]), r"got \(4, 4\)"),
        ((ROWS, LOGITS[None].expand(2, 5, E)), r"got \(2, 5, 4\)"),
        ((ROWS, torch.tensor(1.0)), r"got \(\)"),
        ((ROWS, LOGITS.long()), "int64"),
        ((ROWS, LOGITS, torch.arange(4)), "each of 5 tokens, got 4"),
    ],
)
def test_wrong_inputs_are_refused_with_their_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        LAYER(*arguments)


@pytest.mark.parametrize("experts", ["cpu", "cpu_monolithic"])
@pytest.mark.parametrize("counts", [[4], [-5], [5, 5], []])
def test_counts_of_tokens_that_are_not_these_are_refused(experts, counts):
    layer = FusedMoE(E, 2, H, 8, torch.float32, options=MoEOptions(experts=experts))
    assert layer(ROWS, LOGITS, tokens_per_rank=[5]).shape == ROWS.shape
    with pytest.raises(ValueError, match="for 5 tokens here and 1 ranks"):
        layer(ROWS, LOGITS, tokens_per_rank=counts)
