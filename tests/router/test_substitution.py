"""Experts that were removed give a constant vector, whatever else the layer does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedmoe import FusedMoE, MoEOptions, MoERunner, ParallelGroups
from fusedmoe.router.substitution import ExpertSubstitution

E, K, H, I = 6, 3, 16, 24  # noqa: E741
REMOVED = (4, 1)
KEPT = (0, 2, 3, 5)
G = torch.Generator().manual_seed(0)
W13, W2 = torch.randn(E, 2 * I, H, generator=G) / 4, torch.randn(E, H, I, generator=G) / 4
CONSTANTS = torch.randn(len(REMOVED), H, generator=G)
X, LOGITS = torch.randn(9, H, generator=G), torch.randn(9, E, generator=G)


def substitution() -> ExpertSubstitution:
    return ExpertSubstitution(E, REMOVED, CONSTANTS)


def layer(**arguments: Any) -> MoERunner:
    """The layer without the removed experts' weights, loaded by their new numbers."""
    arguments = {"params_dtype": torch.float32, "expert_substitution": substitution()} | arguments
    runner = FusedMoE(E, K, H, I, **arguments)
    runner.load_weights(
        pair
        for new, old in enumerate(KEPT)
        for pair in (
            (f"experts.{new}.gate_proj.weight", W13[old, :I]),
            (f"experts.{new}.up_proj.weight", W13[old, I:]),
            (f"experts.{new}.down_proj.weight", W2[old]),
        )
    )
    return runner


def expected(x: torch.Tensor, logits: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """The whole model, with removed experts that give nothing, and their constants by hand."""
    whole = FusedMoE(E, K, H, I, params_dtype=torch.float32, **arguments)
    down = W2.clone()
    down[list(REMOVED)] = 0
    whole.load_weights([("gate_up_proj", W13), ("down_proj", down)])
    weights, ids = whole.router.select_experts(x, logits)
    out = whole(x, logits)
    scale = whole.routed_scaling_factor
    for t in range(x.shape[0]):
        for w, e in zip(weights[t], ids[t].tolist(), strict=True):
            if e in REMOVED:
                out[t] += scale * w * CONSTANTS[REMOVED.index(e)]
    return out


@pytest.mark.parametrize("experts", [None, "torch", "grouped_mm"])
def test_the_constant_is_weighted_as_the_expert_was(experts: str | None) -> None:
    runner = layer(options=MoEOptions(experts=experts))
    assert runner.routed_experts.w13_weight.shape == (len(KEPT), 2 * I, H)
    torch.testing.assert_close(runner(X, LOGITS), expected(X, LOGITS), rtol=1e-5, atol=1e-5)
    assert runner(X[:0], LOGITS[:0]).shape == (0, H)


def test_a_scale_on_the_output_scales_it_too() -> None:
    numbers = {"routed_scaling_factor": 2.5, "apply_routed_scale_to_output": True}
    torch.testing.assert_close(
        layer(**numbers)(X, LOGITS), expected(X, LOGITS, **numbers), rtol=1e-5, atol=1e-5
    )


def test_ranks_add_it_once() -> None:
    parts = [
        layer(tp_size=2, tp_rank=rank, parallel=parallel)(X, LOGITS)
        for parallel in (ParallelGroups(), ParallelGroups(enable_expert_parallel=True))
        for rank in (0, 1)
    ]
    for first, second in (parts[:2], parts[2:]):
        torch.testing.assert_close(first + second, expected(X, LOGITS), rtol=1e-5, atol=1e-5)


def test_slots_of_no_expert_stay_so_and_wrong_ids_stay_wrong() -> None:
    ids = torch.tensor([[0, -1, 4], [5, 1, 9]], dtype=torch.int32)
    weights, compact, term = substitution()(torch.ones(2, 3), ids)
    assert compact.tolist() == [[0, -1, -1], [3, -1, 9]]
    assert compact.dtype is torch.int32
    assert weights.tolist() == [[1, 0, 0], [1, 0, 1]]
    assert torch.equal(term, CONSTANTS)


def test_it_saves_loads_moves_and_compiles_with_the_layer() -> None:
    wanted, runner = layer()(X, LOGITS), layer()
    state = runner.state_dict()
    assert "expert_substitution.constants" in state
    other = layer(device="cpu").to(torch.float64).to(torch.float32).to_empty(device="cpu")
    other.load_state_dict(state)
    other.routed_experts.process_weights_after_loading()
    assert torch.equal(other(X, LOGITS), wanted)
    compiled = torch.compile(runner, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, LOGITS), wanted)


@pytest.mark.parametrize(
    ("removed", "constants", "message"),
    [
        ((1, 1), torch.zeros(2, H), r"removed experts \[1, 1\] are not different ids in \[0, 6\)"),
        ((6,), torch.zeros(1, H), r"\[6\]"),
        ((-1,), torch.zeros(1, H), r"\[-1\]"),
        ((), torch.zeros(0, H), "0 of 6 experts are removed"),
        (tuple(range(E)), torch.zeros(E, H), "6 of 6"),
        ((1,), torch.zeros(2, H), r"must be \[1, H\], got \(2, 16\)"),
        ((1,), torch.zeros(1, H).int(), "torch.int32"),
        ((1,), torch.full((1, H), torch.nan), "16 of 16 constants are not finite"),
    ],
)
def test_what_makes_no_substitution(
    removed: tuple[int, ...], constants: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertSubstitution(E, removed, constants)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_eplb": True}, "expert_substitution and enable_eplb exclude each other"),
        ({"n_shared_experts": 1}, "n_shared_experts"),
        ({"options": MoEOptions(batch_invariant=True)}, "batch_invariant"),
        ({"num_experts": E + 1}, "for 6 experts of hidden size 16, the layer has 7 of 16"),
        ({"hidden_size": 32}, "the layer has 6 of 32"),
        ({"options": MoEOptions(experts="cpu_monolithic")}, "routes by itself"),
    ],
)
def test_what_it_does_not_go_with(arguments: dict[str, Any], message: str) -> None:
    sizes = {"num_experts": E, "top_k": K, "hidden_size": H, "intermediate_size": I}
    with pytest.raises(ValueError, match=message):
        FusedMoE(**(sizes | {"expert_substitution": substitution()} | arguments))
