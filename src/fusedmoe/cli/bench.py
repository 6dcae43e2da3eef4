"""``fusedmoe bench``: a layer's speed, against Transformers' experts and the machine's limit."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch

from fusedmoe.cli.arguments import add_device, experts_of, refuse_unused
from fusedmoe.cli.layer_config import add_layer_arguments, note_on_format, shapes_asked
from fusedmoe.cli.output import (
    check_writable,
    format_bytes,
    print_json,
    print_table,
    printable,
    progress,
)
from fusedmoe.cli.ranks import check_launched, is_first_rank, launched_ranks
from fusedmoe.config import MoEOptions
from fusedmoe.words import device_named, dtype_named

if TYPE_CHECKING:
    from fusedmoe.bench import BenchReport, LayerShape

DEFAULT_SHAPE = "olmoe"
MEMORY_SHARE = 0.9
# Over ranks, layers are timed as they are.
_NOT_OVER_RANKS = (
    *("scope", "experts", "formats", "tuned_table", "max_workspace_bytes"),
    *("peers", "no_peers", "slow_machine", "csv", "plot"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", nargs="?", help="measure the layer of this checkpoint folder")
    parser.add_argument(
        "--shapes", nargs="+", metavar="NAME", help=f"layers of known models ({DEFAULT_SHAPE})"
    )
    add_layer_arguments(parser)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256], metavar="T")
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], metavar="DTYPE")
    parser.add_argument(
        "--routings",
        nargs="+",
        default=["uniform"],
        metavar="NAME",
        help="how tokens spread over experts: balanced, uniform, power_law_1.2, one_expert",
    )
    parser.add_argument(
        "--scope", default="layer", help="layer: from router logits; experts: with the picks given"
    )
    add_device(parser)
    parser.add_argument(
        "--experts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="also these implementations, by name or module:Class",
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        default=[],
        metavar="NAME",
        help="also with experts rounded to these: int4_g32, fp8_block, mxfp4, ...",
    )
    parser.add_argument("--tuned-table", metavar="FILE", help="tiles that fusedmoe tune measured")
    parser.add_argument(
        "--max-workspace-bytes",
        type=int,
        metavar="N",
        help="bound the layer's scratch memory: tokens then run in passes",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        default=[],
        metavar="NAME",
        help="these in turns with ours: transformers_grouped_mm, torch_grouped_mm_alone, "
        "torch_reference, ...; without it Transformers' ways, and on a GPU torch's two as well",
    )
    parser.add_argument("--no-peers", action="store_true", help="measure ours alone")
    parser.add_argument(
        "--ep",
        action="store_true",
        help="under torchrun: the experts over its processes, dispatch and combine also alone",
    )
    parser.add_argument(
        "--slow-machine",
        action="store_true",
        help="go on where an H200 is slower than they are",
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="samples per implementation")
    parser.add_argument("--output", metavar="FILE", help="write the report as JSON")
    parser.add_argument("--csv", metavar="FILE", help="write its rows as CSV")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw speed against batch and the roofline (PNG)"
    )


def run(args: argparse.Namespace) -> int:
    from fusedmoe.cli.plot import check_can_draw, write_plot

    if args.repeats is not None and args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
    check_writable(args.output, args.csv, args.plot)
    if args.no_peers:
        refuse_unused(args, ("peers",), "with --no-peers")
    if args.plot:
        check_can_draw(args.plot)
    shapes, _ = shapes_asked(args, DEFAULT_SHAPE, quantized_too=True)
    device = device_named(args.device)
    dtypes = [dtype_named(name) or torch.bfloat16 for name in args.dtypes]
    if args.ep:
        return _run_over_ranks(args, shapes, dtypes, device)
    report = _measure(args, shapes, dtypes, device)
    if not report.rows:
        raise ValueError("nothing was measured: " + "; ".join(report.notes))
    if args.checkpoint and (note := note_on_format(args.checkpoint)):
        report.notes.append(f"{note} (--formats rounds them)")
    record = report.to_json()
    if args.output:
        report.write(args.output)
    if args.csv:
        report.write_csv(args.csv)
    if args.plot:
        write_plot(record, args.plot)
    if args.json:
        print_json(record)
    else:
        _print(record)
    return 0


def _measure(
    args: argparse.Namespace,
    shapes: list[LayerShape],
    dtypes: list[torch.dtype],
    device: torch.device,
) -> BenchReport:
    """The layers on one device, ours and their peers in turns."""
    from fusedmoe.bench import check_request, run_layer_bench
    from fusedmoe.selection import check_forced_names

    options = MoEOptions(tuned_table=args.tuned_table, max_workspace_bytes=args.max_workspace_bytes)
    experts = (None, *map(experts_of, args.experts))
    for one in experts:
        check_forced_names(MoEOptions(experts=one))
    peers = not args.no_peers and (args.peers or True)
    check_request(
        *(shapes, args.tokens, dtypes, args.routings, device, args.scope, args.formats, peers),
        experts=experts,
    )
    _check_memory(shapes, dtypes, device)
    total = len(shapes) * len(args.tokens) * len(dtypes) * len(args.routings)
    with progress(total, "measuring the machine", delay=0.0) as bar:

        def show(done: int, total: int, what: str) -> None:
            del total
            bar.set_description(what)
            bar.update(done - bar.n)

        return run_layer_bench(
            shapes,
            args.tokens,
            dtypes,
            args.routings,
            device,
            peers=peers,
            repeats=args.repeats,
            progress=show,
            experts=experts,
            scope=args.scope,
            options=options,
            formats=args.formats,
            slow_machine=args.slow_machine,
        )


def _run_over_ranks(
    args: argparse.Namespace,
    shapes: list[LayerShape],
    dtypes: list[torch.dtype],
    device: torch.device,
) -> int:
    """The layers with their experts spread over the processes of torchrun."""
    from fusedmoe.bench import BenchReport, check_request
    from fusedmoe.bench.over_ranks import run_ranks_bench

    refuse_unused(args, _NOT_OVER_RANKS, "with --ep")
    check_request(shapes, args.tokens, dtypes, args.routings, device, args.scope)
    check_launched("--ep")
    with launched_ranks(device) as ranks:
        reports = [
            run_ranks_bench(
                *(shape, args.tokens, dtype, ranks.group, ranks.device, routing),
                repeats=args.repeats or 20,
            )
            for shape in shapes
            for dtype in dtypes
            for routing in args.routings
        ]
        report = BenchReport(reports[0].header, [row for one in reports for row in one.rows])
        report.notes = list(dict.fromkeys(note for one in reports for note in one.notes))
        if args.checkpoint and (note := note_on_format(args.checkpoint)):
            report.notes.append(note)
        if args.output and is_first_rank():
            report.write(args.output)
        if args.json:
            print_json(report.to_json())
        else:
            columns = ["shape", "format", "ranks", "T", "impl", "scope", "us", "p10_us", "p90_us"]
            print_table(columns, [[row[name] for name in columns] for row in report.rows])
            for note in report.notes:
                print(f"note: {printable(note)}")
    return 0


def _check_memory(
    shapes: list[LayerShape], dtypes: list[torch.dtype], device: torch.device
) -> None:
    from fusedmoe.bench.measure import free_memory

    free = free_memory(device)
    for shape in shapes:
        needed = shape.weight_elements * max(dtype.itemsize for dtype in dtypes)
        if free is not None and needed > free * MEMORY_SHARE:
            raise ValueError(
                f"{shape.name} has {format_bytes(needed)} of weights, "
                f"{format_bytes(free)} are free on {device}"
            )


def _print(record: dict[str, Any]) -> None:
    rates = [
        f"{key} {value:.3g}" for key, value in record.items() if key.endswith(("gbs", "flops"))
    ]
    print(f"{record['device']}: {', '.join(rates)}\n")
    columns = ["shape", "format", "routing", "T", "implementation", "us", "p10", "p90"]
    columns += ["tokens/s", "of limit", "TFLOP/s", "error", "scratch"]
    rows = []
    for row in record["rows"]:
        scratch = row["workspace_bytes"]
        rows.append(
            [
                *(row[key] for key in ("shape", "format", "routing", "T", "impl", "us")),
                *(row["p10_us"], row["p90_us"], 1e6 * row["T"] / row["us"]),
                f"{row['fraction_of_limit']:.0%}",
                row["tflops"],
                "-" if row["error"] is None else row["error"],
                "-" if scratch is None else format_bytes(scratch),
            ]
        )
    print_table(columns, rows)
    for note in record["notes"]:
        print(f"note: {printable(note)}")
