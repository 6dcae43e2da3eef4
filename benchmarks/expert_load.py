"""Load of ranks before and after balancing, in simulation: a table, and a picture.

    python benchmarks/expert_load.py --out benchmarks/results/cpu/expert_load.json --plot

256 experts, 8 picks per token, popularity falling as a power law (exponent 1.2), a fixed seed per
layer. For each number of ranks: max over mean rank load with experts in order, with the published
algorithm and with ours, on the tokens that were planned for and on as many later ones.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from fusedmoe.bench.report import make_header
from fusedmoe.cli.plot import write_load_plot
from fusedmoe.eplb.maps import imbalance, rank_loads
from fusedmoe.eplb.planner import published_placement, rebalance_experts
from fusedmoe.testing.routing import routing_logits

E, K, TOKENS, LAYERS = 256, 8, 16384, 4
CASES = ((8, 24), (16, 16), (32, 32), (64, 64), (128, 128))
BOUNDS = {8: 1.05, 16: 1.10, 32: 1.15, 64: 1.15, 128: 1.15}


def loads(part: int) -> torch.Tensor:
    """Picks of each expert [LAYERS, E], of the first or the second half of a layer's tokens."""
    found = []
    for layer in range(LAYERS):
        logits = routing_logits("power_law_1.2", 2 * TOKENS, E, K, seed=layer)
        half = logits[part * TOKENS : (part + 1) * TOKENS]
        found.append(torch.bincount(half.topk(K).indices.flatten(), minlength=E))
    return torch.stack(found)


def measure(ranks: int, redundant: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    planned_for, later, P = loads(0), loads(1), E + redundant
    start = time.perf_counter()
    ours = rebalance_experts(planned_for, P, ranks)
    seconds = (time.perf_counter() - start) / LAYERS
    theirs = torch.tensor(
        [
            [e for node in published_placement(one, P, ranks, 1, 1) for rank in node for e in rank]
            for one in planned_for.double().tolist()
        ]
    )
    in_order = torch.arange(E).repeat(LAYERS, 1)
    per_rank = {
        "in order": rank_loads(later, in_order, ranks),
        "published": rank_loads(later, theirs, ranks),
        "ours": rank_loads(later, ours, ranks),
    }
    row = {
        "ranks": ranks,
        "redundant_experts": redundant,
        "bound": BOUNDS[ranks],
        "in_order": imbalance(rank_loads(planned_for, in_order, ranks)),
        "published": imbalance(rank_loads(planned_for, theirs, ranks)),
        "ours": imbalance(rank_loads(planned_for, ours, ranks)),
        "published_later": imbalance(per_rank["published"]),
        "ours_later": imbalance(per_rank["ours"]),
        "planning_ms_per_layer": 1e3 * seconds,
    }
    row = {name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}
    return row, per_rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--plot", action="store_true", help="also draw FILE.png")
    args = parser.parse_args()
    rows, pictures = [], {}
    for ranks, redundant in CASES:
        row, pictures[ranks] = measure(ranks, redundant)
        rows.append(row)
        print(row)
    header = make_header(torch.device("cpu"), {})
    routing = {"routing": "power_law_1.2", "E": E, "k": K, "tokens": TOKENS, "layers": LAYERS}
    routing["seeds"] = list(range(LAYERS))
    Path(args.out).write_text(json.dumps(header | routing | {"rows": rows}, indent=1) + "\n")
    if args.plot:
        write_load_plot(pictures, Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
    main()
