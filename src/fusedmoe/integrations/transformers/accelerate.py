"""``accelerate(model)``: its MoE blocks run by our runner; ``restore(model)`` undoes it.

Which blocks, and how, is ``plan(model)``: nothing else decides.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from fusedmoe.config import MoEOptions, ParallelGroups
from fusedmoe.distributed.agreement import (
    FAILURE,
    RanksDisagreeError,
    check_agreement,
    failures_told,
)
from fusedmoe.integrations.transformers.blocks import BlockForward, ExpertsForward
from fusedmoe.integrations.transformers.device_hooks import (
    WRAPPED,
    has_own_forward,
    is_offloaded,
)
from fusedmoe.integrations.transformers.families import Family, at, find_family
from fusedmoe.integrations.transformers.generic import (
    TransformersFusedMoE,
    put_back,
    recursive_replace,
)
from fusedmoe.integrations.transformers.make_block import make_replacements
from fusedmoe.integrations.transformers.packed import PackedExperts
from fusedmoe.integrations.transformers.ranks import BlockRanks
from fusedmoe.integrations.transformers.replacement import Replacement
from fusedmoe.integrations.transformers.static_caches import (
    keep_static_caches,
    release_static_caches,
)
from fusedmoe.runner.replay import MAX_REPLAYED_ROWS
from fusedmoe.selection import check_forced_names

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from fusedmoe.distributed.peer_memory import PeerMemory

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class PlannedBlock:
    """One block of a known kind: its row, or the reason why it is left alone."""

    path: str
    module: nn.Module
    family: Family | None
    reason: str | None = None


def plan(model: nn.Module) -> list[PlannedBlock]:
    """Every block of a known kind in ``model``, in order, but for those already replaced."""
    blocks = []
    for path, module in model.named_modules():
        found = None if _replacement(module) is not None else find_family(module)
        if isinstance(found, Family):
            reason = _obstacle(module)
            blocks.append(PlannedBlock(path, module, None if reason else found, reason))
        elif found is not None:
            blocks.append(PlannedBlock(path, module, None, found))
    return blocks


def accelerate(
    model: Model,
    *,
    options: MoEOptions | None = None,
    replay_rows: int = MAX_REPLAYED_ROWS,
    ep_group: ProcessGroup | DeviceMesh | None = None,
    same_tokens: bool = False,
    peers: PeerMemory | None = None,
) -> Model:
    """Run the MoE blocks of a Transformers model through fusedmoe; returns the same model.

    A block of a known family is replaced as a whole: our router with the model's own gate, our
    experts on the model's own Parameters (nothing is copied), its shared experts. Where the family
    is unknown, modules called ``experts`` are (``recursive_replace``). What cannot be replaced
    without changing a result is left as it is, and the log says why. Names in the state_dict stay
    Hugging Face's.

    On a GPU, whole blocks called with up to ``replay_rows`` tokens are replayed as CUDA graphs from
    the third such call on (0: never), which spares a decode step, and a prompt as long as others
    before it, most of its time on the host. Static caches of ``generate`` come to lie where those
    before them lay (``keep_static_caches``): the compiled step's graph need not be recorded again.

    Training with gradients runs the original forwards, and so does a block whose weights are
    offloaded; in eval mode a backward pass through an accelerated block raises. Device hooks that
    only move inputs, as ``device_map`` puts them on every module of a model over several GPUs, are
    no obstacle. Calling it again adds what was not replaced yet. Any number of threads may call the
    model.

    With ``ep_group``, each of its ranks runs its share of the experts of whole blocks (linear
    placement) and sends tokens to the others': every rank accelerates the same model, and every
    forward is a call on all of them. Ranks have batches of their own, of any size, or with
    ``same_tokens`` all have the same one; then what each rank's experts make of it is added up.
    Transformers' ``generate`` has ``synced_gpus`` for batches that end at different steps. On GPUs
    of one host tokens go through ``peers``, if these are given.
    Blocks that cannot be spread run on each rank by themselves. A model that ``from_pretrained``
    has spread needs no ``ep_group`` here.

    Raises ValueError for ``options`` that force an implementation that does not exist, for what is
    no model, and where ranks have different models.
    """
    ranks = BlockRanks.make(ep_group, same_tokens, peers)
    blocks = _planned_together(model, options, ranks)
    for block in blocks:
        reason = _replace(block, options, replay_rows, ranks)
        if reason:
            logger.warning("%s is left as it is: %s", block.path, reason)
    handled = [block.path for block in blocks] + [
        path for path, module in model.named_modules() if _replacement(module) is not None
    ]
    recursive_replace(model, options=options, leave=handled)
    if accelerated_blocks(model):
        keep_static_caches(model)
    elif not any(isinstance(module, PackedExperts) for module in model.modules()):
        logger.warning("nothing in this %s runs through fusedmoe", type(model).__name__)
    return model


def _planned_together(
    model: nn.Module, options: MoEOptions | None, ranks: BlockRanks | None
) -> list[PlannedBlock]:
    """``plan``, the same on all ranks; ValueError on each of them where it is not."""
    groups = ParallelGroups() if ranks is None else ranks.groups
    with failures_told(groups, "the model"):
        check_forced_names(options)
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"accelerate takes a model, not a {type(model).__name__}; "
                "fusedmoe.from_pretrained loads a folder"
            )
        blocks = plan(model)
    facts = {one.path: one.family.name if one.family else str(one.reason) for one in blocks}
    check_agreement(facts, groups, "the model")
    return blocks


def _replace(
    block: PlannedBlock, options: MoEOptions | None, replay_rows: int, ranks: BlockRanks | None
) -> str | None:
    """Run ``block`` ourselves, on all ranks or on none; returns why it cannot be, if so."""
    if block.family is None:
        return block.reason
    groups = ParallelGroups() if ranks is None else ranks.groups
    made: list[Replacement] = []
    reason = ""
    with failures_told(groups, block.path):
        try:
            made = make_replacements(block.module, block.family, options, replay_rows, ranks)
        except RanksDisagreeError:
            raise
        except ValueError as error:
            reason = str(error)
    try:
        check_agreement({FAILURE: reason} if reason else {}, groups, block.path)
    except ValueError:
        for replacement in made:
            replacement.release()
        raise
    for replacement in made:
        _install(replacement)
    if not reason:
        logger.info("%s runs through fusedmoe as %s", block.path, block.family.name)
    return reason


def run_whole_blocks(
    model: nn.Module, options: MoEOptions | None, ranks: BlockRanks | None
) -> None:
    """Replace the blocks whose packed experts run no other way. ValueError where one cannot be."""
    for block in plan(model):
        experts = None if block.family is None else at(block.module, block.family.experts.at)
        if not _runs_whole(experts):
            continue
        assert block.family is not None
        for replacement in make_replacements(
            block.module, block.family, options, MAX_REPLAYED_ROWS, ranks
        ):
            _install(replacement)


def _runs_whole(experts: Any) -> bool:
    return isinstance(experts, PackedExperts) and experts.seat.whole


def restore(model: Model) -> Model:
    """Undo ``accelerate`` and ``recursive_replace``: every module has its own forward again.

    Blocks stay whose packed experts run in no other way (Llama 4's, say). Returns the same model.
    """
    for module in list(model.modules()):
        replacement = _replacement(module)
        if replacement is not None and not any(map(_runs_whole, module.children())):
            _remove(replacement)
    put_back(model)
    release_static_caches(model)
    return model


def accelerated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """By path: what runs each replaced module, our ``MoERunner`` or ``RoutedExperts``."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        replacement = _replacement(module)
        if isinstance(replacement, BlockForward):
            found[path] = replacement.runner
        elif isinstance(replacement, ExpertsForward):
            found[path] = replacement.experts
        elif isinstance(module, TransformersFusedMoE):
            found[path] = module.routed_experts
    return found


def _replacement(module: nn.Module) -> Replacement | None:
    # A replacement that device hooks wrapped was registered: it is a module.
    own = vars(module)
    for found in (own.get(WRAPPED), module._modules.get(WRAPPED), own.get("forward")):
        if isinstance(found, Replacement):
            return found
    return None


def _install(replacement: Replacement) -> None:
    module = replacement.module
    slot = WRAPPED if WRAPPED in vars(module) else "forward"
    replacement.original = getattr(module, slot)
    vars(module)[slot] = replacement


def _remove(replacement: Replacement) -> None:
    module = replacement.module
    replacement.release()
    if module._modules.get(WRAPPED) is replacement:
        del module._modules[WRAPPED]
        vars(module)[WRAPPED] = replacement.original
    elif vars(module).get(WRAPPED) is replacement:
        vars(module)[WRAPPED] = replacement.original
    else:
        del vars(module)["forward"]


def _obstacle(block: nn.Module) -> str | None:
    """What else than the row speaks against running ``block`` ourselves."""
    if not has_own_forward(block):
        return "its forward was replaced by something else"
    if any(map(is_offloaded, block.modules())):
        return "its weights are offloaded: they are on the device only while it is called"
    return None
