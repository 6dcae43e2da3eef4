"""Ranks that build the same layer differently are found when it is built, not when it hangs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from fusedmoe.config import FusedMoEConfig, ParallelGroups
from fusedmoe.distributed.collectives import all_gather_rows, gather_vectors
from fusedmoe.distributed.groups import TokenRanks, communication_device

if TYPE_CHECKING:
    from fusedmoe.quantization.method_base import FusedMoEMethodBase

# What may differ from rank to rank, or follows from what is compared.
_OWN = {"num_local_experts", "moe_parallel_config", "device", "options"}
_OWN_OF_PARALLEL = {"tp_rank", "pcp_rank", "dp_rank", "ep_rank"}
_LONGEST = 200


class RanksDisagreeError(ValueError):
    """Ranks that should build the same thing build different ones."""


def facts_of(moe: FusedMoEConfig) -> dict[str, str]:
    """The fields of a layer's config that must be the same on all of its ranks, as text."""
    parallel, options = moe.moe_parallel_config, moe.options
    facts = {f.name: str(getattr(moe, f.name)) for f in fields(moe) if f.name not in _OWN}
    facts |= {
        f.name: str(getattr(parallel, f.name))
        for f in fields(parallel)
        if f.name not in _OWN_OF_PARALLEL
    }
    facts["micro_batch_tokens"] = str(options.micro_batch_tokens)
    facts["batch_invariant"] = str(options.batch_invariant)
    facts["debug_checks"] = str(options.debug_checks)
    facts["experts"] = _name_of(options.experts)
    facts["device"] = moe.device.type
    facts["prepare_finalize"] = _name_of(options.prepare_finalize)
    return facts


def facts_of_groups(groups: ParallelGroups) -> dict[str, str]:
    """Which ways are open to tokens, as text."""
    return {
        "ep group": str(groups.ep is not None),
        "peers": str(groups.peers is not None),
        "deep_ep": str(groups.deep_ep is not None),
    }


def _name_of(forced: str | type | None) -> str:
    return forced if isinstance(forced, str) else getattr(forced, "__name__", "")


def check_agreement(facts: Mapping[str, str], groups: ParallelGroups, what: str) -> None:
    """Raise RanksDisagreeError, on every rank, where ``facts`` are not the same on all of them.

    A collective over the dp, pcp and tp groups that are given: every rank has to come here. The
    message names each fact that differs and every rank's value. Nothing is sent but text.
    """
    axes = [ParallelGroups.process_group(group) for group in (groups.dp, groups.pcp, groups.tp)]
    ranks = TokenRanks(tuple(axis for axis in axes if axis is not None and axis.size() > 1))
    if ranks.size == 1:
        return
    text = json.dumps(dict(facts), sort_keys=True).encode()
    digest = int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
    told = gather_vectors([len(text), digest], ranks)
    if all(values == told[0] for values in told):
        return
    lengths = [length for length, _ in told]
    mine = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    mine = mine[:, None].to(communication_device(ranks.axes[0]))
    everyones = bytes(all_gather_rows(mine, lengths, ranks)().flatten().tolist())
    texts, start = [], 0
    for length in lengths:
        texts.append(json.loads(everyones[start : start + length]))
        start += length
    raise RanksDisagreeError(f"{what} is not the same on all ranks: {_differences(texts)}")


def check_layer_agreement(
    method: FusedMoEMethodBase, groups: ParallelGroups, around: Mapping[str, object], what: str
) -> None:
    """``check_agreement`` of a layer whose experts ``method`` runs, and of what is ``around``."""
    facts = facts_of(method.moe_config) | facts_of_groups(groups)
    facts["method"] = type(method).__name__
    facts["weights and rows"] = f"{method.weight_key}, {method.activation_key}"
    facts |= {name: str(value) for name, value in around.items()}
    check_agreement(facts, groups, what)


def _differences(facts: list[dict[str, str]]) -> str:
    found = []
    for name in sorted({name for one in facts for name in one}):
        values = [one.get(name, "missing") for one in facts]
        if len(set(values)) > 1:
            found.append(f"{name} is {', '.join(value[:_LONGEST] for value in values)}")
    return "; ".join(found)
