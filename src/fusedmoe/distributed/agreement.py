"""Ranks that build the same layer differently are found when it is built, not when it hangs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

from fusedmoe.config import FusedMoEConfig, ParallelGroups
from fusedmoe.distributed.collectives import all_gather_rows, gather_vectors
from fusedmoe.distributed.groups import TokenRanks, communication_device

if TYPE_CHECKING:
    from fusedmoe.quantization.method_base import FusedMoEMethodBase

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")

# What may differ from rank to rank, or follows from what is compared.
_OWN = {"num_local_experts", "moe_parallel_config", "device", "options"}
_OWN_OF_PARALLEL = {"tp_rank", "pcp_rank", "dp_rank", "ep_rank"}
_LONGEST = 200
FAILURE = "what went wrong"
"""A fact in the place of all others, where a rank has none."""


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
    ValueError where the groups are no dimensions of one grid: a rank would stand for several.
    """
    axes = [ParallelGroups.process_group(group) for group in (groups.dp, groups.pcp, groups.tp)]
    ranks = TokenRanks(tuple(axis for axis in axes if axis is not None and axis.size() > 1))
    if ranks.size == 1:
        return
    text = json.dumps(dict(facts), sort_keys=True).encode()
    digest = int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
    told = gather_vectors([len(text), digest, ranks.rank], ranks)
    places = [place for *_, place in told]
    if sorted(places) != list(range(ranks.size)):
        raise ValueError(
            f"the dp, pcp and tp groups have sizes {[axis.size() for axis in ranks.axes]}, but of "
            f"{ranks.size} ranks only {sorted(set(places))} are there: the groups overlap"
        )
    if all(values[:2] == told[0][:2] for values in told):
        return
    lengths = [length for length, *_ in told]
    mine = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    mine = mine[:, None].to(communication_device(ranks.axes[0]))
    everyones = bytes(all_gather_rows(mine, lengths, ranks)().flatten().tolist())
    texts, start = [], 0
    for length in lengths:
        texts.append(json.loads(everyones[start : start + length]))
        start += length
    raise RanksDisagreeError(f"{what} is not the same on all ranks: {_differences(texts)}")


@contextlib.contextmanager
def failures_told(groups: ParallelGroups, what: str) -> Iterator[None]:
    """What is raised in this block is told to the other ranks, which come to ``check_agreement``
    next: they raise RanksDisagreeError instead of waiting for this one."""
    try:
        yield
    except RanksDisagreeError:
        raise
    except Exception as error:
        # What went wrong may be the groups themselves: then the other ranks cannot be told.
        with contextlib.suppress(Exception):
            check_agreement({FAILURE: f"{type(error).__name__}: {error}"}, groups, what)
        raise


def built_together(build: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """``build(..., parallel=groups)``, which succeeds on all ranks of the groups or on none.

    A rank that fails raises its own error, the others RanksDisagreeError.
    """

    @functools.wraps(build)
    def together(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
        groups = kwargs.get("parallel")
        if not isinstance(groups, ParallelGroups) or not groups.connected:
            return build(*args, **kwargs)
        with failures_told(groups, "this layer"):
            made = build(*args, **kwargs)
        check_agreement({}, groups, "this layer")
        return made

    return together


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
    failed = any(FAILURE in one for one in facts)
    names = {FAILURE} if failed else {name for one in facts for name in one}
    for name in sorted(names):
        values = [one.get(name, "nothing" if failed else "missing") for one in facts]
        if len(set(values)) > 1:
            found.append(f"{name} is {', '.join(value[:_LONGEST] for value in values)}")
    return "; ".join(found)
