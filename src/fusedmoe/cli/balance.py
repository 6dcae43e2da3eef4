"""``fusedmoe balance``: how even the load of ranks would be, before and after balancing."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusedmoe.checkpoint import CheckpointError
from fusedmoe.cli.arguments import add_device, add_dtype, as_options, refuse_unused
from fusedmoe.cli.models import (
    PROMPT,
    check_model,
    check_transformers,
    greedy,
    load_tokenizer,
    prompt_tokens,
)
from fusedmoe.cli.output import check_writable, print_json, print_table, progress, steps
from fusedmoe.cli.plot import check_can_draw, write_load_plot
from fusedmoe.eplb.maps import imbalance, rank_loads
from fusedmoe.eplb.planner import rebalance_experts
from fusedmoe.testing.routing import ROUTINGS, routing_logits
from fusedmoe.words import device_named, dtype_named

COLUMNS = ("ranks", "redundant", "in order", "balanced")
OF_MODELS = ("prompt", "max_new_tokens", "dtype", "device")
OF_SIZES = ("routing", "num_experts", "top_k", "tokens", "layers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", nargs="?", help="a folder or GGUF file; or give the sizes")
    parser.add_argument("--prompt", default=PROMPT, help="whose picks are counted")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    add_dtype(parser)
    add_device(parser)
    parser.add_argument("--routing", choices=ROUTINGS, default="power_law_1.2", help="by sizes")
    parser.add_argument("--num-experts", type=int, metavar="E")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--tokens", type=int, default=4096, metavar="T")
    parser.add_argument("--layers", type=int, default=1, metavar="L")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8], metavar="N")
    parser.add_argument("--redundant-experts", type=int, default=0, metavar="N", help="copies")
    parser.add_argument("--plot", metavar="FILE", help="draw the load of each rank; png, svg, ...")


def run(args: argparse.Namespace) -> int:
    if min(args.ranks) < 1 or args.redundant_experts < 0:
        raise ValueError(
            f"ranks {args.ranks} must be positive, {args.redundant_experts} redundant experts not "
            "be less than none"
        )
    if args.plot is not None:
        check_can_draw(args.plot)
        check_writable(args.plot)
    load = _simulated(args) if args.checkpoint is None else _of_model(args)
    E = load.shape[1]
    P = E + args.redundant_experts
    loads = {}
    for ranks in dict.fromkeys(args.ranks):
        placements = {
            "in order": (torch.arange(P, device=load.device) % E).expand(load.shape[0], P),
            "balanced": rebalance_experts(load, P, ranks),
        }
        loads[ranks] = {name: rank_loads(load, one, ranks) for name, one in placements.items()}
    rows = [
        [ranks, args.redundant_experts, *(imbalance(one) for one in found.values())]
        for ranks, found in loads.items()
    ]
    if args.plot is not None:
        write_load_plot(loads, args.plot)
    if args.json:
        names = [column.replace(" ", "_") for column in COLUMNS]
        picks = {"layers": load.shape[0], "experts": E, "picks": int(load.sum())}
        print_json(picks | {"rows": [dict(zip(names, row, strict=True)) for row in rows]})
        return 0
    print(
        f"{int(load.sum())} picks of {E} experts in {load.shape[0]} layers; max / mean rank load:"
    )
    print_table(COLUMNS, rows)
    return 0


def _simulated(args: argparse.Namespace) -> torch.Tensor:
    """Picks of each expert [L, E], of logits with the distribution asked for."""
    refuse_unused(args, OF_MODELS, "without a checkpoint")
    missing = [name for name in ("num_experts", "top_k") if getattr(args, name) is None]
    if missing:
        raise ValueError(f"give a checkpoint, or the sizes: {as_options(missing)}")
    E, K, T, L = args.num_experts, args.top_k, args.tokens, args.layers
    if min(K, T, L) < 1 or K > E:
        raise ValueError(f"{T} tokens, {L} layers and top {K} of {E} experts make no load")
    _check_divides(args, E)
    found = []
    for layer in range(L):
        logits = routing_logits(args.routing, T, E, K, seed=layer)
        found.append(torch.bincount(logits.topk(K).indices.flatten(), minlength=E))
    return torch.stack(found)


def _of_model(args: argparse.Namespace) -> torch.Tensor:
    """Picks of each expert [L, E] while the model reads the prompt and goes on from it."""
    import fusedmoe
    from fusedmoe.integrations.transformers.accelerate import accelerated_blocks

    refuse_unused(args, OF_SIZES, "with a checkpoint")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    folder, device = Path(args.checkpoint), device_named(args.device)
    dtype = dtype_named(args.dtype) or "auto"
    check_transformers("balance")
    check_model(folder)
    tokenizer = load_tokenizer(folder)
    with steps("reading") as show:
        model = fusedmoe.from_pretrained(folder, dtype=dtype, device=device, progress=show)
    fusedmoe.accelerate(model)
    blocks: list[Any] = list(accelerated_blocks(model).values())
    if not blocks or any(getattr(block, "router", None) is None for block in blocks):
        raise CheckpointError(f"{folder}: not all of its MoE layers route by a router of their own")
    E = max(block.moe_config.num_experts for block in blocks)
    _check_divides(args, E)
    load = torch.zeros(len(blocks), E, dtype=torch.int64, device="cpu")
    for index, block in enumerate(blocks):
        block.router.set_capture_fn(_counting(load[index]))
    prompt = prompt_tokens(tokenizer, args.prompt, device)
    with progress(args.max_new_tokens, "generating") as bar:
        greedy(model, prompt, args.max_new_tokens, bar)
    return load


def _check_divides(args: argparse.Namespace, E: int) -> None:
    slots = E + args.redundant_experts
    for ranks in args.ranks:
        if slots % ranks:
            raise ValueError(
                f"{slots} slots ({E} experts and their copies) do not divide over {ranks}"
            )
        if slots > E * ranks:
            raise ValueError(f"{ranks} ranks with {E} experts each have no room for {slots} slots")


def _counting(load: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A capture function that adds ids [T, K] to ``load`` [E]."""

    def capture(topk_ids: torch.Tensor) -> None:
        ids = topk_ids.flatten().long().cpu()
        load.add_(torch.bincount(ids[(ids >= 0) & (ids < load.numel())], minlength=load.numel()))

    return capture
