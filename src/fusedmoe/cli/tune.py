"""``fusedmoe tune``: measure which tiles a layer should use on this GPU, and write them as a table.

An interrupted run goes on where it stopped when it is started again with the same words.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusedmoe.cli.arguments import SIZES, add_dtype, refuse_unused
from fusedmoe.cli.layer_config import add_layer_arguments, shapes_asked
from fusedmoe.cli.output import check_writable, print_json, print_table, steps
from fusedmoe.tuning.hopper_tiles import DirectTiles, PrefillTiles
from fusedmoe.tuning.tiles import TileConfig
from fusedmoe.tuning.tuned_kernels import HOPPER, KERNELS, TRITON
from fusedmoe.words import device_named, dtype_named

if TYPE_CHECKING:
    from fusedmoe.bench import LayerShape
    from fusedmoe.tuning.tile_records import Tile
    from fusedmoe.tuning.tuned_table import TunedTable
    from fusedmoe.tuning.tuner.run import LayerTimer
    from fusedmoe.tuning.tuner.tunable import Tunable

PARTIAL = ".partial"
_NOT_SHOWN = (
    *("checkpoint", "shapes", "activation", "bias", "dtype", "device"),
    *("experts", "output", "again", "report", "measurements"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", nargs="?", help="tune for the layer of this folder")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="layers of known models")
    add_layer_arguments(parser)
    add_dtype(parser)
    parser.add_argument(
        "--experts",
        choices=sorted(KERNELS),
        help="whose tiles (those that selection prefers here)",
    )
    parser.add_argument("--tokens", nargs="+", type=int, metavar="T", help="1, 2, 4, ... 8192")
    parser.add_argument("--device", help="cuda, cuda:1, ...")
    parser.add_argument(
        "--output", default="tuned", metavar="FOLDER", help="where tables are written (tuned)"
    )
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
    parser.add_argument(
        "--report", metavar="FILE", help="also compare table and default tiles, as JSON"
    )
    parser.add_argument("--measurements", metavar="FILE", help="write all that was measured, JSON")
    parser.add_argument(
        "--show", metavar="FILE", help="print what a table chooses, also another engine's"
    )


def run(args: argparse.Namespace) -> int:
    if args.show is not None:
        return _show(args)
    from fusedmoe.tuning.choice import device_facts
    from fusedmoe.tuning.tuner.run import TUNABLES, checked_tokens
    from fusedmoe.tuning.tuner.search import DEFAULT_TOKENS

    tokens = checked_tokens(args.tokens or DEFAULT_TOKENS)
    shapes, stored = shapes_asked(args)
    dtype, device = dtype_named(args.dtype) or stored, device_named(args.device)
    if device.type != "cuda":
        raise ValueError("tuning measures a GPU, and none is here (tables for it can be shown)")
    check_writable(args.report, args.measurements)
    layers = [
        TUNABLES[_kernel_of(args.experts, shape, dtype, device)](shape, dtype) for shape in shapes
    ]
    facts = device_facts(device)
    report: list[dict[str, Any]] = []
    measured: dict[str, list[dict[str, Any]]] = {}
    header = _header(device, dtype) if args.report else {}
    with ExitStack() as stack:
        compilers = stack.enter_context(start_compilers())
        for layer in layers:
            timer = make_timer(layer, device, compilers)
            table, measurements = _tuned(args, layer, facts, timer, tokens)
            measured[layer.shape.name] = measurements
            if args.report:
                report += _compared(layer, facts, timer, table, tokens, header)
            del timer
            torch.cuda.empty_cache()
            if not args.json:
                _print_table(layer.shape.name, table, tokens)
            _write_json(args.measurements, measured)
            _write_json(args.report, header | {"rows": report, "notes": []})
    if args.json:
        print_json({"tables": [str(_path(args, layer)) for layer in layers]})
    elif report:
        _print_report(report)
    return 0


def _kernel_of(
    asked: str | None, shape: LayerShape, dtype: torch.dtype, device: torch.device
) -> str:
    """The kernel whose tiles are tuned: what is asked for, or what selection prefers of those with
    tables. ValueError where the Hopper experts are asked for and cannot run the layer."""
    if asked == TRITON.name:
        return asked
    reason = _unmet_by_hopper(shape, dtype, device)
    if asked is not None and reason is not None:
        raise ValueError(f"the {asked} experts cannot run the layer {shape.name}: {reason}")
    return HOPPER.name if reason is None else TRITON.name


def _unmet_by_hopper(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the Hopper experts cannot run a layer; None: they can."""
    from fusedmoe.activation import MoEActivation
    from fusedmoe.config import FusedMoEConfig
    from fusedmoe.experts.hopper import HopperExperts

    if not torch.cuda.is_available():
        return "no GPU"
    config = FusedMoEConfig(
        num_experts=shape.num_experts,
        num_local_experts=shape.E,
        experts_per_token=shape.k,
        hidden_dim=shape.H,
        intermediate_size_per_partition=shape.I,
        activation=MoEActivation.from_str(shape.activation),
        in_dtype=dtype,
        device=device,
        has_bias=shape.bias,
    )
    rows = HopperExperts.activation_format()
    return HopperExperts.is_supported_config(config, None, None, rows)[1]


def start_compilers() -> Any:
    """Processes that compile ahead."""
    from fusedmoe.tuning.tuner.precompile import compilers

    return compilers()


def make_timer(layer: Tunable, device: torch.device, compilers: Any) -> LayerTimer:
    """What measures: a GPU."""
    from fusedmoe.tuning.tuner.measure import GpuTimer

    return GpuTimer(layer, device, compilers)


def _header(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    from fusedmoe.bench.ceilings import measure_ceilings
    from fusedmoe.bench.report import make_header

    return make_header(device, measure_ceilings(device, (dtype,)))


def _tuned(
    args: argparse.Namespace,
    layer: Tunable,
    facts: Any,
    timer: LayerTimer,
    tokens: tuple[int, ...],
) -> tuple[TunedTable, list[dict[str, Any]]]:
    """The table of one layer: the one that is there already, if it was measured here and at these
    token counts, or a new one, written."""
    from fusedmoe.tuning.foreign import read_table
    from fusedmoe.tuning.table_file import write_atomically
    from fusedmoe.tuning.tuner.run import tune

    path = _path(args, layer)
    if path.exists() and not args.again:
        table = read_table(path)
        made = table.device, table.triton, table.kernel
        here = made == (facts.name, facts.triton, layer.kernel.name)
        if here and table.unfit(layer.key) is None and set(tokens) <= set(table.tokens):
            return table, []
    journal = path.with_name(path.name + PARTIAL)
    with steps(layer.shape.name, 0.0, lines=True) as show:
        found = tune(layer, facts, timer, tokens, journal, show)
    write_atomically(path, found.table.text)
    journal.unlink(missing_ok=True)
    return found


def _path(args: argparse.Namespace, layer: Tunable) -> Path:
    """The file of a layer's table."""
    from fusedmoe.tuning.choice import table_name

    return Path(args.output) / table_name(layer.key, layer.kernel)


def _compared(
    layer: Tunable,
    facts: Any,
    timer: LayerTimer,
    table: TunedTable,
    tokens: tuple[int, ...],
    header: dict[str, Any],
) -> list[dict[str, Any]]:
    from fusedmoe.tuning.tuner.run import compare
    from fusedmoe.tuning.tuner.search import between

    with steps(layer.shape.name, 0.0, lines=True) as show:
        return compare(layer, facts, timer, table, between(between(tokens)), header, show)


def _write_json(path: str | None, value: Any) -> None:
    import json

    from fusedmoe.tuning.table_file import write_atomically

    if path is not None:
        write_atomically(path, json.dumps(value, indent=1) + "\n")


def _show(args: argparse.Namespace) -> int:
    from fusedmoe.tuning.foreign import read_table
    from fusedmoe.tuning.tuner.run import checked_tokens

    refuse_unused(args, (*SIZES, *_NOT_SHOWN), "with --show")
    table = read_table(args.show)
    tokens = checked_tokens(args.tokens) if args.tokens else table.tokens
    if args.json:
        chosen = {T: [str(tile) for tile in table.tiles(T)] for T in tokens}
        print_json({"layer": vars(table.layer), "device": table.device, "tiles": chosen})
        return 0
    what = ", ".join(f"{k} {v}" for k, v in vars(table.layer).items() if v is not None)
    print(f"{what}, on {table.device} with Triton {table.triton or 'of unknown release'}")
    _print_table("", table, tokens)
    return 0


def _print_table(name: str, table: TunedTable, tokens: tuple[int, ...]) -> None:
    if name:
        print(name)
    columns = ["T", "us" if table.measured else "ratio", *table.tuned_kernel.stages]
    rows = [[T, table.cost(T), *map(_words, table.tiles(T))] for T in tokens]
    print_table(columns, rows)


def _words(tile: Tile) -> str:
    if isinstance(tile, TileConfig):
        sizes = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
        return f"{sizes} group {tile.group_m} warps {tile.num_warps} stages {tile.num_stages}"
    if isinstance(tile, DirectTiles):
        up, down = f"{tile.up_valid}/{tile.up_stages}", f"{tile.down_valid}/{tile.down_stages}"
        return f"direct up {up} down {down} rows/stages"
    if isinstance(tile, PrefillTiles):
        return f"prefill depth {tile.depth} stages {tile.stages} group {tile.group}"
    up, down = (f"{gemm.rows}x{gemm.depth}/{gemm.stages}" for gemm in (tile.up, tile.down))
    return f"decode {tile.block} up {up} down {down}" + " drawn" * tile.draws_up


def _print_report(rows: list[dict[str, Any]]) -> None:
    defaults = [row for row in rows if row["tiles"] == "default"]
    tables = [row for row in rows if row["tiles"] == "table"]
    print_table(
        ["shape", "T", "table us", "default us", "default loses", "of limit"],
        [
            [
                *(row["shape"], row["T"], best["us"], row["us"]),
                *(f"{row['loss']:.1%}", f"{best['fraction_of_limit']:.0%}"),
            ]
            for row, best in zip(defaults, tables, strict=True)
        ],
    )
