"""``from_pretrained(..., ep_group=...)`` on the ranks of a RankPool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_layers import Layout, make_groups

import fusedmoe
from fusedmoe.distributed.agreement import RanksDisagreeError
from fusedmoe.integrations.transformers.accelerate import accelerated_blocks
from fusedmoe.integrations.transformers.packed import PackedExperts
from fusedmoe.integrations.transformers.sources import FolderSource
from fusedmoe.quantization.keys import FP8_DYNAMIC_TOKEN
from fusedmoe.weights.expert_map import ExpertMapManager

NEW_TOKENS = 4


def prompt(seed: int, length: int) -> torch.Tensor:
    return torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(seed))


def prompts(ranks: int, same_tokens: bool) -> list[torch.Tensor]:
    """One for each rank."""
    return [prompt(0, 6) if same_tokens else prompt(rank, 3 + rank) for rank in range(ranks)]


@torch.inference_mode()
def tokens(model: Any, ids: torch.Tensor, new: int = NEW_TOKENS) -> list[int]:
    count = {"max_new_tokens": new, "min_new_tokens": new}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **count)
    return found[0].tolist()


def group_of(ranks: int) -> tuple[Any, int]:
    groups, rank = make_groups(Layout(dp=ranks, ep=True))
    return groups.dp, rank


def load_counted(folder: Path, **arguments: Any) -> tuple[Any, int]:
    """The model, and how many bytes of experts were read for it."""
    counts: list[int] = []
    original = FolderSource.read

    def counted(self: FolderSource, name: str, rows: range | None = None) -> torch.Tensor:
        tensor = original(self, name, rows)
        if ".experts." in name:
            counts.append(tensor.nbytes)
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderSource, "read", counted)
        return fusedmoe.from_pretrained(folder, **arguments), sum(counts)


def check(
    folder: str,
    ranks: int,
    same_tokens: bool,
    expected: list[list[int]],
    quantize: str | None = None,
) -> int:
    """This rank generates its prompt's ``expected`` tokens; bytes of experts read."""
    group, rank = group_of(ranks)
    arguments = {"ep_group": group, "same_tokens": same_tokens, "dtype": torch.float32}
    model, nbytes = load_counted(Path(folder), quantize=quantize, **arguments)
    packed = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert packed
    for module in packed:
        experts = module.routed_experts
        assert experts is not None
        placed = ExpertMapManager(module.num_experts, 0, ranks, rank)
        own = [e for e in range(module.num_experts) if placed.local_row(e) >= 0]
        assert experts.w13_weight.shape[0] == experts.w2_weight.shape[0] == len(own)
    ids = prompts(ranks, same_tokens)[rank]
    assert tokens(model, ids) == expected[rank]
    names = set(model.state_dict())
    fusedmoe.accelerate(model)
    assert len(accelerated_blocks(model)) == len(packed)
    assert tokens(model, ids, 2) == expected[rank][: ids.shape[1] + 2]
    assert set(model.state_dict()) == names
    return nbytes


def check_bad_file_on_one_rank(good: str, bad: str) -> None:
    """That rank names the tensor; the others say that it has failed, and do not wait for it."""
    group, rank = group_of(4)
    error = ValueError if rank == 2 else RanksDisagreeError
    words = r"lacks .*up_proj\.scales" if rank == 2 else r"nothing, nothing, .*lacks .*, nothing"
    with pytest.raises(error, match=words):
        fusedmoe.from_pretrained(bad if rank == 2 else good, ep_group=group)


def check_different_arguments(folder: str) -> None:
    group, rank = group_of(4)
    quantize = "int8" if rank == 1 else "int4_g32"
    with pytest.raises(RanksDisagreeError, match="format is int4_g32, int8_channel, int4_g32, int"):
        fusedmoe.from_pretrained(folder, quantize=quantize, ep_group=group)
    rounded = fusedmoe.OnlineQuantization.of("fp8", activation=FP8_DYNAMIC_TOKEN)
    with pytest.raises(RanksDisagreeError, match="rows is as they come, float8"):
        fusedmoe.from_pretrained(folder, quantize=rounded if rank == 1 else "fp8", ep_group=group)


def check_packed_stays_where_it_is(folder: str) -> None:
    """A model that was read whole is not spread afterwards, and one that was spread stays so."""
    group, _ = group_of(4)
    whole = fusedmoe.from_pretrained(folder)
    fusedmoe.accelerate(whole, ep_group=group)
    assert accelerated_blocks(whole) == {}
    spread = fusedmoe.from_pretrained(folder, ep_group=group)
    fusedmoe.accelerate(spread, ep_group=group, same_tokens=True)
    assert accelerated_blocks(spread) == {}
    fusedmoe.accelerate(spread, ep_group=group)
    assert len(accelerated_blocks(spread)) == 2
    dist.barrier(group)
