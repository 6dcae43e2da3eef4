"""From a row and a block to the forwards that take the place of the block's."""

from __future__ import annotations

from torch import nn

from fusedmoe.config import MoEOptions
from fusedmoe.integrations.transformers.block_router import BlockRouter
from fusedmoe.integrations.transformers.blocks import BlockForward, ExpertsForward, RouterForward
from fusedmoe.integrations.transformers.borrowed import (
    BlockDemands,
    BorrowedExperts,
    ExpertWeights,
    borrow_experts,
    gate_of_experts,
    module_weights,
)
from fusedmoe.integrations.transformers.families import Family, at
from fusedmoe.integrations.transformers.gates import Gate
from fusedmoe.integrations.transformers.packed import (
    HeldExperts,
    PackedExperts,
    hold_experts,
    is_packed,
)
from fusedmoe.integrations.transformers.ranks import BlockRanks
from fusedmoe.integrations.transformers.replacement import Replacement
from fusedmoe.integrations.transformers.stacked import (
    StackedWeights,
    gate_of_list,
    stack_list,
    stack_rows,
)
from fusedmoe.runner.moe_runner import MoERunner


def make_replacements(
    block: nn.Module,
    family: Family,
    options: MoEOptions | None = None,
    replay_rows: int = 0,
    ranks: BlockRanks | None = None,
) -> list[Replacement]:
    """The forwards that a row asks for, not yet in place. Raises ValueError with what prevents it.

    Parameters that have to lie together are stacked here, after everything else was checked.
    ``ranks``: those that the block's experts are spread over; packed ones are so already.
    """
    module = at(block, family.experts.at)
    ranks = _ranks_of(module, ranks)
    if not family.whole:
        if ranks is not None and not isinstance(module, PackedExperts):
            raise ValueError("its experts are replaced apart from the rest, which runs on one rank")
        return _make_parts(block, family, options)
    gate = None if is_packed(module) else _gate(family, module)
    router = BlockRouter(family.router, block, options)
    router.keep_result = family.returns == "hidden_and_weights"
    transforms = [
        None if isinstance(found := at(block, path), nn.Identity) else found
        for path in (family.input_projection, family.output_projection)
    ]
    demands = BlockDemands(
        weights_on_input=family.weights_on_input,
        num_zero_experts=router.spec.num_zero_experts,
        hash_routing=family.router.hash_table is not None,
        require_modular=router.keep_result
        or family.router.decides
        or router.spec.num_zero_experts > 0
        or transforms[0] is not None,
        options=options,
    )
    weights: ExpertWeights | None = None
    experts: BorrowedExperts | HeldExperts
    if gate is None:
        experts = hold_experts(module, router.spec.top_k, demands)
    else:
        weights = _weights(family, module)
        experts = _borrow(weights, gate, router.spec.top_k, demands, ranks)
    runner = MoERunner(
        experts.moe_config,
        router,
        experts,
        shared_experts=at(block, family.shared),
        shared_expert_gate=at(block, family.shared_gate),
        routed_input_transform=transforms[0],
        routed_output_transform=transforms[1],
        rank_sum=None if ranks is None else ranks.rank_sum,
    )
    # What other ranks bring changes from call to call.
    return [BlockForward(block, family, weights, runner, 0 if ranks else replay_rows)]


def _ranks_of(module: nn.Module, ranks: BlockRanks | None) -> BlockRanks | None:
    """The ranks that the experts are spread over, or are to be."""
    if not is_packed(module):
        return ranks
    own = module.ranks if isinstance(module, PackedExperts) else None
    if ranks is not None and own is None:
        raise ValueError("packed experts are spread over ranks by from_pretrained(..., ep_group=)")
    if ranks is not None and own != ranks:
        raise ValueError("these packed experts are spread over other ranks already")
    return own


def _gate(family: Family, module: nn.Module) -> Gate:
    part = family.experts
    return gate_of_list(module[0]) if part.layout == "list" else gate_of_experts(part, module)  # type: ignore[index]


def _borrow(
    weights: ExpertWeights, gate: Gate, top_k: int, demands: BlockDemands, ranks: BlockRanks | None
) -> BorrowedExperts:
    """Experts on the module's tensors; what was stacked for them is released if there are none."""
    try:
        return borrow_experts(weights, gate, top_k, demands, ranks)
    except ValueError:
        if isinstance(weights, StackedWeights):
            weights.stack.release()
        raise


def _make_parts(block: nn.Module, family: Family, options: MoEOptions | None) -> list[Replacement]:
    module = at(block, family.experts.at)
    router_module = at(block, family.router.at)
    made: list[Replacement] = []
    top_k = getattr(router_module, "top_k", None)
    if family.router.rule:
        router = BlockRouter(family.router, block, options)
        top_k = router.spec.top_k
        made.append(RouterForward(router_module, router))
    if isinstance(module, PackedExperts):
        return made
    gate = gate_of_experts(family.experts, module)
    experts = borrow_experts(
        _weights(family, module), gate, top_k or 1, BlockDemands(options=options)
    )
    return [*made, ExpertsForward(module, experts)]


def _weights(family: Family, module: nn.Module) -> ExpertWeights:
    part = family.experts
    if part.layout == "list":
        return stack_list(module)  # type: ignore[arg-type]
    if part.layout == "rows":
        gate, up = (name.rpartition(".") for name in part.w13)
        owner = at(module, gate[0])
        down = part.w2.rpartition(".")[2]
        return stack_rows(owner, gate[2], up[2], down, at(module, "num_experts"))
    return module_weights(part, module)
