"""Tables of the Hopper experts: their tiles, the search for them, who may use one and when."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_layers import Layer
from fusedmoe.activation import MoEActivation
from fusedmoe.bench.shapes import SHAPES, LayerShape
from fusedmoe.config import MoEOptions
from fusedmoe.experts import hopper
from fusedmoe.experts.hopper import HopperExperts, hopper_experts, scratch_rows
from fusedmoe.experts.triton import TritonExperts
from fusedmoe.modular_kernel import ExpertsWork, FusedMoEActivationFormat, ProblemSize
from fusedmoe.quantization.config import FUSED_MOE_UNQUANTIZED_CONFIG
from fusedmoe.tuning import choice
from fusedmoe.tuning.choice import (
    DeviceFacts,
    PlainLayer,
    checked_table,
    hopper_table,
    hopper_tiles_for,
)
from fusedmoe.tuning.hopper_space import hopper_candidates, hopper_space, serves
from fusedmoe.tuning.hopper_tiles import (
    DecodeTiles,
    DirectTiles,
    HopperTiles,
    PrefillTiles,
    decode_tiles_of,
    direct_tiles,
    hopper_tiles,
    may_be_direct,
)
from fusedmoe.tuning.table_file import make_table, table_from_json, table_from_text
from fusedmoe.tuning.tile_records import tile_from_json, tile_to_json
from fusedmoe.tuning.tiles import TileConfig
from fusedmoe.tuning.tuned_kernels import HOPPER
from fusedmoe.tuning.tuned_table import Curve, LayerKey, TunedTable
from fusedmoe.tuning.tuner.hopper_layer import HopperBatch, HopperLayer
from fusedmoe.tuning.tuner.run import tune
from fusedmoe.tuning.tuner.search import between

SIZES: dict[str, int] = {"K": 8, "E": 128, "H": 2048, "I": 768}
WHOLE = (8, 128, 128, 2048, 768)  # K, all experts, those here, H, I
DIRECT = direct_tiles(1, 8, 2048, 768)
SMALL, LARGE = decode_tiles_of(8, 32, 256), decode_tiles_of(32, 64, 128)
PREFILL = PrefillTiles(group=8)
CPU = torch.device("cpu")


def table_of(
    *curves: tuple[HopperTiles | TileConfig, tuple[float, ...]],
    tokens: tuple[int, ...],
    sizes: dict[str, int] = SIZES,
    **changes: Any,
) -> TunedTable:
    given: dict[str, Any] = {
        "device": "NVIDIA_H200",
        "kernel": HOPPER.name,
        "kernel_version": HOPPER.version,
        "triton": "3.6.0",
        "layer": LayerKey(weights="bf16", form="halves", **sizes),  # type: ignore[arg-type]
        "curves": tuple(Curve("layer", tile, cost) for tile, cost in curves),
    }
    return make_table(**(given | changes), tokens=tokens)


def three_kernels() -> TunedTable:
    return table_of(
        (DIRECT, (10.0, 100.0, math.inf, math.inf)),
        (SMALL, (20.0, 50.0, 400.0, math.inf)),
        (LARGE, (30.0, 60.0, 200.0, 900.0)),
        (PREFILL, (math.inf, math.inf, 600.0, 300.0)),
        tokens=(1, 4, 64, 1024),
    )


def chosen(table: TunedTable | None, T: int, sizes: tuple[int, ...] = WHOLE, **how: Any) -> Any:
    return hopper_tiles_for(T, *sizes, table=table, **how)  # type: ignore[misc]


def test_a_table_chooses_kernel_and_tiles() -> None:
    table = three_kernels()
    found = {T: chosen(table, T) for T in (1, 4, 64, 1024, 10**6)}
    assert found == {1: DIRECT, 4: SMALL, 64: LARGE, 1024: PREFILL, 10**6: PREFILL}


def test_tiles_are_not_chosen_where_they_have_no_time() -> None:
    """Between a count that has one and a count that has none there is none either."""
    table = three_kernels()
    assert {type(chosen(table, T)) for T in range(5, 64)} == {DecodeTiles}
    assert {chosen(table, T) for T in range(65, 1024)} >= {LARGE}


def test_without_a_table_sizes_decide() -> None:
    for T in (1, 7, 300, 5000):
        assert chosen(None, T) == hopper_tiles(T, *WHOLE)


def test_batch_invariance_takes_no_table() -> None:
    for T in (1, 64):
        found = chosen(three_kernels(), T, batch_invariant=True)
        assert found == hopper_tiles(T, *WHOLE, batch_invariant=True)


def test_a_rank_of_eight_looks_up_an_eighth_of_the_tokens() -> None:
    sizes = (8, 1024, 128, 2048, 768)
    table = three_kernels()
    assert chosen(table, 512, sizes) == LARGE
    assert chosen(table, 8192, sizes) == PREFILL
    assert chosen(table, 8, sizes) == hopper_tiles(8, *sizes), "one token's worth, of eight tokens"


def test_the_kernel_without_tables_gets_no_more_than_it_takes() -> None:
    """Whatever a table says, and beyond its last count."""
    table = table_of((DIRECT, (1.0, 1.0)), tokens=(1, 8192))
    for T in (1, 4, 5, 100, 8192, 10**6):
        found = chosen(table, T)
        assert isinstance(found, DirectTiles) == may_be_direct(T, 8)


@pytest.mark.parametrize("tile", [DIRECT, SMALL, LARGE, PREFILL, TileConfig(16, 64, 64, 1, 4, 3)])
def test_tiles_of_every_kind_survive_a_file(tile: Any) -> None:
    assert tile_from_json(json.loads(json.dumps(tile_to_json(tile)))) == tile


def test_a_table_is_its_text_with_gaps() -> None:
    table = three_kernels()
    again = table_from_text(table.text)
    assert again == table
    assert again.curves == table.curves
    assert "null" in table.text
    assert "Infinity" not in table.text


def edited(change: Any) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(three_kernels().text)
    change(value)
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["curves"][1]["tile"].pop("block"), "a tile must have the keys block"),
        (lambda v: v["curves"][1]["tile"].update(draws_up=1), "draws_up must be true or false"),
        (lambda v: v["curves"][1]["tile"].update(up=7), "a tile must have the keys rows"),
        (lambda v: v["curves"][1]["tile"]["up"].update(rows=True), "rows must be an integer"),
        (lambda v: v["curves"][1]["tile"]["up"].update(rows=1 << 20), "rows must be an integer"),
        (lambda v: v["curves"][1]["tile"].update(type="tile"), "a tile must have the keys block_m"),
        (lambda v: v["curves"][1]["tile"].update(type=["decode"]), "type must be one of tile, "),
        (lambda v: v["curves"][1].update(stage="gemm1"), "stage must be one of layer"),
        (lambda v: v.update(curves=v["curves"][:2]), "no tiles of layer go together at 65 tokens"),
        (lambda v: v.update(kernel="triton"), "stage must be one of gemm1, gemm2"),
    ],
)
def test_a_broken_table_is_one_error(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table_from_json(edited(change))


def test_a_table_has_tiles_of_its_kernel_alone() -> None:
    with pytest.raises(ValueError, match="hopper has tiles direct, decode, prefill, got Tile"):
        table_of((TileConfig(16, 64, 64, 1, 4, 3), (1.0,)), tokens=(1,))
    with pytest.raises(ValueError, match="triton has tiles tile, got PrefillTiles"):
        table_of((PREFILL, (1.0,)), tokens=(1,), kernel="triton", kernel_version=1)


def asked(table: TunedTable | None, **changes: int) -> TunedTable | None:
    sizes = SIZES | changes
    layer = PlainLayer(**sizes, dtype=torch.bfloat16, activation=MoEActivation.SILU)
    return checked_table(table, layer, CPU)


@pytest.mark.parametrize(
    "tile",
    [
        replace(SMALL, block=24),
        replace(SMALL, up=replace(SMALL.up, stages=SMALL.up.stages + 40)),
        replace(LARGE, down=replace(LARGE.down, rows=4096)),
        PrefillTiles(stages=9),
        PrefillTiles(group=7),
        replace(DIRECT, up_valid=DIRECT.up_valid + 8),
    ],
)
def test_tiles_that_no_launch_has_are_refused(tile: HopperTiles) -> None:
    """So nothing that a file says reaches a kernel that was not made for it."""
    with pytest.raises(ValueError, match="has tiles no layer of these sizes has"):
        asked(table_of((tile, (1.0,)), tokens=(1,)))


def test_a_table_of_the_hopper_experts_is_for_one_layer() -> None:
    assert asked(three_kernels()) is not None
    with pytest.raises(ValueError, match="it is for I 768, the layer has 1024"):
        asked(three_kernels(), I=1024)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_all_that_may_be_measured_may_stand_in_a_table(name: str) -> None:
    shape = SHAPES[name]
    K, E, H, I = shape.k, shape.E, shape.H, shape.I  # noqa: E741
    space = hopper_space(K, H, I)
    for T in (1, 2, 3, 5, 8, 17, 64, 200, 1024, 16384):
        found = hopper_candidates(T, K, E, H, I)
        assert 3 <= len(found) == len(set(found)) <= 80
        assert {hopper_tiles(T, K, E, E, H, I), *found} <= space
        assert all(serves(tiles, T, K, E) for tiles in found)


def test_the_kernel_that_a_batch_runs_is_among_the_candidates() -> None:
    for T in (1, 2, 8, 64, 512, 8192):
        kinds = {type(tiles) for tiles in hopper_candidates(T, 8, 128, 2048, 768)}
        assert type(hopper_tiles(T, *WHOLE)) in kinds


SHAPE = LayerShape("small", 16, 2, 64, 48)
FACTS = DeviceFacts("NVIDIA_H200", 227 * 1024, "3.6.0")


class FakeTimer:
    """Each kernel is best in its range; of streaming tiles one is the favourite."""

    def __init__(self) -> None:
        self.prepared: list[Any] = []
        self.calls, self.stop_after = 0, 10**9

    def prepare(self, stage: str, tiles: Sequence[Any]) -> None:
        assert stage == "layer"
        self.prepared = list(tiles)

    def time(self, stage: str, T: int, tiles: Sequence[Any], samples: int) -> list[float]:
        assert set(tiles) <= set(self.prepared)
        self.calls += 1
        if self.calls > self.stop_after:
            raise KeyboardInterrupt
        return [self.us(T, tile) for tile in tiles]

    def us(self, T: int, tile: HopperTiles) -> float:
        if not serves(tile, T, SHAPE.k, SHAPE.E):
            return math.inf
        if isinstance(tile, DirectTiles):
            return 3.0 * T + (tile.up_valid != 48)
        if isinstance(tile, PrefillTiles):
            return 300.0 + T / 10 + abs(tile.group - 16)
        return 10.0 + T + (tile.up.rows != 128) + (tile.block != 16)


def test_a_search_over_all_kernels_makes_one_table(tmp_path: Path) -> None:
    layer, tokens, timer = HopperLayer(SHAPE, torch.bfloat16), (1, 16, 256, 4096), FakeTimer()
    table = tune(layer, FACTS, timer, tokens, tmp_path / "journal").table
    assert table_from_text(table.text) == table
    assert (table.kernel, table.tokens) == ("hopper", between(tokens))
    for T in between(tokens):
        (tiles,) = table.tiles(T)
        best = min(timer.us(T, one) for one in hopper_space(SHAPE.k, SHAPE.H, SHAPE.I))
        assert timer.us(T, tiles) <= best * 1.006
    assert {curve.tile for curve in table.curves} <= hopper_space(SHAPE.k, SHAPE.H, SHAPE.I)


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    layer, tokens, whole = HopperLayer(SHAPE, torch.bfloat16), (1, 64), FakeTimer()
    expected = tune(layer, FACTS, whole, tokens, tmp_path / "whole").table
    first, second = FakeTimer(), FakeTimer()
    first.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        tune(layer, FACTS, first, tokens, tmp_path / "j")
    assert tune(layer, FACTS, second, tokens, tmp_path / "j").table == expected
    assert first.calls - 1 + second.calls == whole.calls


def test_journals_of_two_kernels_are_not_mixed_up(tmp_path: Path) -> None:
    layer = HopperLayer(SHAPE, torch.bfloat16)
    tune(layer, FACTS, FakeTimer(), (1,), tmp_path / "j")
    record = json.loads((tmp_path / "j").read_text())
    record["subject"]["kernel"] = "triton"
    (tmp_path / "j").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="cannot be resumed"):
        tune(layer, FACTS, FakeTimer(), (1,), tmp_path / "j")


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launchers compute the definition where there is no Hopper."""
    monkeypatch.setattr(hopper, "multiprocessors_of", lambda device: 132)
    monkeypatch.setattr(hopper, "device_of", lambda tensor: nullcontext())


def test_compiling_ahead_runs_every_kind_of_tile(on_a_cpu: None) -> None:
    tiles = [direct_tiles(1, 2, 64, 48), decode_tiles_of(8, 32, 64), PrefillTiles()]
    layer = HopperLayer(SHAPE, torch.bfloat16)
    assert layer.compile(CPU, "layer", tiles) == {}


def test_a_batch_runs_what_serves_it(on_a_cpu: None) -> None:
    from fusedmoe.bench.problems import Cell, Problem, random_weights

    for T in (1, 40, 300):
        problem = Problem.of(Cell(SHAPE, torch.bfloat16, "uniform", T, "experts"), 2, CPU)
        batch = HopperBatch(problem, random_weights(SHAPE, torch.bfloat16, CPU, 2))
        for tile in (direct_tiles(1, 2, 64, 48), decode_tiles_of(8, 32, 64), PrefillTiles()):
            assert batch.runs(tile) == serves(tile, T, SHAPE.k, SHAPE.E)
            if batch.runs(tile):
                batch.out.fill_(math.nan)
                assert batch.stage("layer", tile, 1).isfinite().all()
                assert 0 < batch.expected_us("layer", tile) < 1e4


LAYER = Layer(T=3, K=2, E=4, H=48, I=32, dtype=torch.bfloat16)
LAYER_SIZES = {"K": 2, "E": 4, "H": 48, "I": 32}


def small_table() -> TunedTable:
    return table_of((decode_tiles_of(64, 128, 64), (1.0, 1.0)), tokens=(1, 64), sizes=LAYER_SIZES)


def work_of(layer: Layer, tensors: dict[str, Any], rows: int) -> ExpertsWork:
    out = torch.full_like(tensors["hidden_states"], float("nan"))
    names = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")
    return ExpertsWork(
        out,
        *(tensors[name] for name in names),
        layer.activation,
        layer.E,
        workspace13=out.new_empty(rows, layer.I),
        workspace2=out.new_empty(rows, layer.H),
    )


@pytest.mark.parametrize("T", [1, 3, 130])
def test_the_experts_run_with_a_tables_tiles(
    T: int, on_a_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = replace(LAYER, T=T)
    tensors, taken = layer.tensors(), []
    launch = hopper.hopper_decode
    monkeypatch.setattr(
        hopper, "hopper_decode", lambda what, tiles: taken.append(tiles) or launch(what, tiles)
    )
    work = work_of(layer, tensors, scratch_rows(PrefillTiles(), T * 2, 4))
    hopper_experts(work, layer.numbers, None, None, table=small_table())
    assert taken == [decode_tiles_of(64, 128, 64)]
    torch.testing.assert_close(work.output.double(), layer.expected(tensors), rtol=2e-2, atol=2e-2)


def config_with(table: TunedTable | None) -> Any:
    return replace(LAYER.config(), options=MoEOptions(tuned_table=table))


def test_scratch_is_that_of_the_tiles_the_table_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of((PrefillTiles(), (1.0, 1.0)), tokens=(1, 64), sizes=LAYER_SIZES)
    experts = HopperExperts(config_with(table), FUSED_MOE_UNQUANTIZED_CONFIG)
    assert experts.table == table
    size = ProblemSize(E=4, M=3, N=64, K=48, topk=2)
    shapes = experts.shapes(size, 4, MoEActivation.SILU)
    assert shapes[0] == (scratch_rows(PrefillTiles(), 6, 4), 32)
    experts.table = small_table()
    assert experts.shapes(size, 4, MoEActivation.SILU)[0] == (6, 32)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    most = experts.shapes(size, 4, MoEActivation.SILU)[0]
    assert most == (scratch_rows(PrefillTiles(), 6, 4), 32), "whichever the numbers turn out to be"


def test_each_experts_take_tables_of_their_own_kernel() -> None:
    standard = FusedMoEActivationFormat.Standard
    for table, cls, reason in (
        (small_table(), HopperExperts, "runs on cuda"),
        (small_table(), TritonExperts, "runs on cuda"),
    ):
        assert reason in str(cls.is_supported_config(config_with(table), None, None, standard)[1])
    can = HopperExperts.capabilities()
    on_cpu = replace(can, devices=frozenset({"cpu"}), requires=(), min_capability=None)
    assert on_cpu.unmet_by(config_with(small_table()), None, None, standard) is None
    other = replace(TritonExperts.capabilities(), devices=frozenset({"cpu"}), requires=())
    reason = other.unmet_by(config_with(small_table()), None, None, standard)
    assert reason == "does not take tables of the kernel hopper"


def test_a_packaged_table_is_looked_for_in_its_kernels_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        choice,
        "table_folder",
        lambda device, kernel: tmp_path / device / f"{kernel.name}-{kernel.version}",
    )
    monkeypatch.setattr(choice, "device_facts", lambda device: FACTS)
    layer = PlainLayer(8, 128, 2048, 768, torch.bfloat16, MoEActivation.SILU)
    folder = tmp_path / "NVIDIA_H200" / f"hopper-{HOPPER.version}"
    folder.mkdir(parents=True)
    (folder / "E128-K8-H2048-I768-bf16-halves-hopper.json").write_text(three_kernels().text)
    for cached in (choice.packaged_table, hopper_table):
        cached.cache_clear()
    assert hopper_table(None, layer, CPU) == three_kernels()
    given = table_of((SMALL, (1.0,)), tokens=(1,))
    assert hopper_table(given, layer, CPU) == given
    for cached in (choice.packaged_table, hopper_table):
        cached.cache_clear()
