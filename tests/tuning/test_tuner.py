"""The tuner without a GPU: its candidates, its search with a made-up timer, its journal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedmoe.bench.shapes import SHAPES, LayerShape
from fusedmoe.kernels.align import LoneSlots
from fusedmoe.tuning.choice import DeviceFacts
from fusedmoe.tuning.table_file import table_from_text
from fusedmoe.tuning.tiles import HOPPER_SHARED_MEMORY, TileConfig, layer_tiles
from fusedmoe.tuning.tuned_kernels import TRITON
from fusedmoe.tuning.tuned_table import Curve, choice_at
from fusedmoe.tuning.tuner.journal import Journal
from fusedmoe.tuning.tuner.run import checked_tokens, tune
from fusedmoe.tuning.tuner.search import between, search, without_the_negligible
from fusedmoe.tuning.tuner.space import H200, candidates, plausible_blocks, predicted_us
from fusedmoe.tuning.tuner.triton_layer import TritonLayer, nothing_to_do
from fusedmoe.tuning.tuner.tunable import is_refusal

FACTS = DeviceFacts("NVIDIA_H200", HOPPER_SHARED_MEMORY, "3.6.0")
SHAPE = SHAPES["qwen3-30b"]
TUNABLE = TritonLayer(SHAPE, torch.bfloat16)
LAYER, SPACE, STAGES = TUNABLE.gemms, TUNABLE.space(FACTS), TRITON.stages
TOKENS = (1, 16, 256, 4096)


class FakeTimer:
    """Times by the model, but with a favourite: ``bonus`` makes tiles faster that it likes."""

    def __init__(self, shape: LayerShape = SHAPE, refuses: Any = None) -> None:
        self.layer = TritonLayer(shape, torch.bfloat16).gemms
        self.refuses = refuses or (lambda tile: False)
        self.asked: list[tuple[str, int, int, int]] = []
        self.prepared: dict[str, list[TileConfig]] = {}
        self.stop_after = 10**9

    def prepare(self, stage: str, tiles: Sequence[TileConfig]) -> None:
        self.prepared[stage] = list(tiles)

    def time(self, stage: str, T: int, tiles: Sequence[TileConfig], samples: int) -> list[float]:
        if len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append((stage, T, len(tiles), samples))
        assert set(tiles) <= set(self.prepared[stage])
        return [self.us(stage, T, tile) for tile in tiles]

    def us(self, stage: str, T: int, tile: TileConfig) -> float:
        if self.refuses(tile):
            return math.inf
        favourite = 0.7 if tile.block_n == 32 and tile.num_warps == 8 else 1.0
        return favourite * predicted_us(self.layer.gemm(stage, T), tile)


def default(stage: str, T: int) -> TileConfig:
    found: TileConfig = getattr(
        layer_tiles(T, SHAPE.k, SHAPE.E, SHAPE.H, SHAPE.I, torch.bfloat16), stage
    )
    return found


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shared_memory", [HOPPER_SHARED_MEMORY, 99 * 1024])
def test_candidates_fit_and_are_few(name: str, dtype: torch.dtype, shared_memory: int) -> None:
    layer = TritonLayer(SHAPES[name], dtype).gemms
    machine = H200._replace(shared_memory=shared_memory)
    for stage in STAGES:
        for T in (1, 7, 100, 5000):
            gemm = layer.gemm(stage, T)
            found = candidates(gemm, machine)
            assert 4 <= len(found) == len(set(found)) <= 50
            for tile in found:
                assert tile.shared_memory(gemm.itemsize, gemm.weight_tiles) <= shared_memory
                assert tile.block_m in plausible_blocks(gemm)


def test_heights_follow_the_rows_of_an_expert() -> None:
    assert plausible_blocks(LAYER.gemm("gemm1", 1)) == [16, 32]
    assert plausible_blocks(LAYER.gemm("gemm1", 8192)) == [64, 128, 256]


def test_the_model_knows_what_matters() -> None:
    """Weights bound a small batch and products a large one; a low tile is bad for many rows."""
    low, high = TileConfig(16, 64, 128, 1, 4, 4), TileConfig(128, 64, 64, 8, 8, 3)
    one, many = LAYER.gemm("gemm1", 8), LAYER.gemm("gemm1", 8192)
    assert predicted_us(one, low) < predicted_us(one, high)
    assert predicted_us(many, high) < predicted_us(many, low)
    weights = LAYER.E * 2 * LAYER.I * LAYER.H * 2
    assert predicted_us(LAYER.gemm("gemm1", 64), low) > 0.9 * weights / H200.memory_rate / 1e3
    assert predicted_us(many, high) > many.rows * 4 * LAYER.I * LAYER.H / 990e6


def test_the_search_finds_the_best_pair_at_every_batch() -> None:
    timer = FakeTimer()
    curves = search(SPACE, TOKENS, timer)
    for T in TOKENS:
        place = between(TOKENS).index(T)
        pools = {stage: {*candidates(LAYER.gemm(stage, T)), default(stage, T)} for stage in STAGES}
        best = min(
            sum(min(timer.us(s, T, t) for t in pools[s] if t.block_m == height) for s in STAGES)
            for height in (16, 32, 64, 128, 256)
            if all(any(t.block_m == height for t in pools[s]) for s in STAGES)
        )
        found = min(
            a.cost[place] + b.cost[place]
            for a in curves
            for b in curves
            if (a.stage, b.stage) == STAGES and a.tile.block_m == b.tile.block_m
        )
        assert found <= best * 1.006
    assert all(len(curve.cost) == len(between(TOKENS)) for curve in curves)
    assert len(curves) < 2 * 2 * len(TOKENS)


def test_few_samples_for_many_tiles_and_many_for_few() -> None:
    timer = FakeTimer()
    search(SPACE, (64,), timer)
    (first, *_), second, final = ([n for *_, n, s in timer.asked if s == k] for k in (3, 9, 15))
    assert first > max(second) > max(final) >= 1


def test_slow_tiles_do_not_stand_between_fast_ones() -> None:
    """The precise times are of tiles that are near the best, so that none of them rests the GPU."""
    timer = FakeTimer()
    search(SPACE, TOKENS, timer)
    asked: dict[tuple[str, int, int], int] = {}
    for stage, T, count, samples in timer.asked:
        asked[stage, T, samples] = count
    for T in between(TOKENS):
        assert asked["gemm1", T, 15] <= asked["gemm1", T, 3]
    assert asked["gemm1", 4096, 15] < asked["gemm1", 4096, 3]


def test_a_choice_is_checked_between_the_token_counts_too() -> None:
    assert between((1, 2, 4, 16)) == (1, 2, 3, 4, 8, 16)
    assert between((7,)) == (7,)


def test_the_default_is_always_measured() -> None:
    """So a table is never worse than none."""
    timer = FakeTimer()
    search(SPACE, TOKENS, timer)
    for stage in STAGES:
        assert {default(stage, T) for T in TOKENS} <= set(timer.prepared[stage])


def test_tiles_that_do_not_run_are_left_out() -> None:
    timer = FakeTimer(refuses=lambda tile: tile.num_warps == 8 or tile.block_m == 16)
    curves = search(SPACE, TOKENS, timer)
    assert {curve.tile.num_warps for curve in curves} == {4}
    with pytest.raises(ValueError, match="no tiles run 1 tokens"):
        search(SPACE, TOKENS, FakeTimer(refuses=lambda tile: True))


def test_gemms_that_disagree_about_the_height_find_a_pair() -> None:
    """Each is ten times faster at a height that does not suit the other."""

    class Disagreeing(FakeTimer):
        def us(self, stage: str, T: int, tile: TileConfig) -> float:
            suits = tile.block_m == (16 if stage == "gemm1" else 32)
            return super().us(stage, T, tile) * (1 if suits else 10)

    assert search(SPACE, (1,), Disagreeing())


def test_a_tile_that_fails_at_one_batch_is_not_chosen_near_it() -> None:
    """However fast it is at the others."""

    class Partial(FakeTimer):
        def us(self, stage: str, T: int, tile: TileConfig) -> float:
            alike = tile.block_m == 16 and tile.block_n == 128
            if alike and T == 256:
                return math.inf
            return super().us(stage, T, tile) * (0.1 if alike else 1.0)

    curves, knots = search(SPACE, TOKENS, Partial()), between(TOKENS)
    places = [place for curve in curves for place, us in enumerate(curve.cost) if math.isinf(us)]
    assert set(places) == {knots.index(256)}
    for T in (65, 255, 256, 257, 1023):
        choice = choice_at(STAGES, knots, curves, T)
        assert choice is not None
        assert all((tile.block_m, tile.block_n) != (16, 128) for tile in choice.tiles)


def test_curves_that_nobody_would_miss_go() -> None:
    tile = TileConfig(16, 32, 64, 1, 4, 2)
    kept = [
        Curve("gemm1", tile, (10.0, 30.0)),
        Curve("gemm1", TileConfig(16, 64, 64, 1, 4, 2), (20.0, 20.0)),
        Curve("gemm2", tile, (5.0, 5.0)),
    ]
    close = Curve("gemm1", TileConfig(16, 64, 32, 1, 4, 2), (9.99, 31.0))
    alone = Curve("gemm2", TileConfig(64, 64, 32, 1, 4, 2), (1.0, 1.0))
    assert set(without_the_negligible(STAGES, (1, 16), [*kept, alone])) == set(kept)
    assert len(without_the_negligible(STAGES, (1, 16), [*kept, close])) == 3
    with pytest.raises(ValueError, match="no tiles that go together"):
        without_the_negligible(STAGES, (1, 16), [kept[0], alone])
    with pytest.raises(ValueError, match="no tiles that go together"):
        without_the_negligible(STAGES, (1, 16), [])


def run_tune(timer: FakeTimer, journal: Path, **changes: Any) -> Any:
    given: dict[str, Any] = {"tunable": TUNABLE, "facts": FACTS}
    given |= {"timer": timer, "tokens": TOKENS, "journal": journal}
    return tune(**(given | changes))


def of_shape(name: str) -> TritonLayer:
    return TritonLayer(SHAPES[name], torch.bfloat16)


def test_a_table_comes_out_that_can_be_read_again(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    found = run_tune(
        FakeTimer(), tmp_path / "j", progress=lambda done, total, what: steps.append((done, total))
    )
    table = found.table
    assert table_from_text(table.text) == table
    assert (table.device, table.triton, table.tokens) == ("NVIDIA_H200", "3.6.0", between(TOKENS))
    assert table.layer == TUNABLE.key
    assert [done for done, _ in steps] == list(range(steps[-1][1] + 1))
    assert {total for _, total in steps} == {len(steps) - 1}
    assert {one["stage"] for one in found.measurements} == set(STAGES)


@pytest.mark.parametrize("stop_after", [0, 1, 7, 12])
def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path: Path, stop_after: int) -> None:
    whole = FakeTimer()
    expected = run_tune(whole, tmp_path / "whole").table
    first, second = FakeTimer(), FakeTimer()
    first.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        run_tune(first, tmp_path / "j")
    assert run_tune(second, tmp_path / "j").table == expected
    assert first.asked + second.asked == whole.asked


def test_a_journal_about_something_else_is_refused(tmp_path: Path) -> None:
    run_tune(FakeTimer(), tmp_path / "j")
    for changes in (
        {"tokens": (1, 2)},
        {"tunable": of_shape("olmoe"), "timer": FakeTimer(SHAPES["olmoe"])},
        {"facts": FACTS._replace(triton="3.7.0")},
        {"facts": FACTS._replace(name="NVIDIA_H100")},
    ):
        with pytest.raises(ValueError, match="cannot be resumed"):
            run_tune(**({"timer": FakeTimer(), "journal": tmp_path / "j"} | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record.pop("measurements"),
        lambda record: record.update(measurements=7),
        lambda record: record["measurements"][0].update(us="fast"),
        lambda record: record["measurements"][0].update(us=0),
        lambda record: record["measurements"][0].update(us=10**400),
        lambda record: record["measurements"][0].update(T=7.5),
        lambda record: record["measurements"][0]["tile"].update(block_m=17),
        lambda record: record["measurements"][0].pop("T"),
    ],
)
def test_a_damaged_journal_is_one_error(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "j"
    run_tune(FakeTimer(), path)
    record = json.loads(path.read_text())
    damage(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="cannot be resumed"):
        run_tune(FakeTimer(), path)


def test_a_journal_measures_together_what_is_compared(tmp_path: Path) -> None:
    """One unknown tile, and all of the request are measured again."""
    timer = FakeTimer()
    journal = Journal(timer, tmp_path / "j", {})
    tiles = candidates(LAYER.gemm("gemm1", 8))[:4]
    journal.prepare("gemm1", tiles)
    for asked, measured in ((tiles[:2], 2), (tiles[:2], None), (tiles, 4), (tiles[1:], None)):
        timer.asked.clear()
        journal.time("gemm1", 8, asked, 3)
        assert [count for _, _, count, _ in timer.asked] == ([measured] if measured else [])


def test_token_counts_are_checked() -> None:
    assert checked_tokens([16, 1, 16]) == (1, 16)
    for wrong in ([], [0], [1, 1 << 21]):
        with pytest.raises(ValueError, match="token counts must lie in"):
            checked_tokens(wrong)


def test_a_rank_of_a_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tune the 16 it stores"):
        run_tune(FakeTimer(), tmp_path / "j", tunable=of_shape("qwen3-235b-rank"))


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("stage", STAGES)
def test_compiling_ahead_launches_what_is_measured_later(name: str, stage: str) -> None:
    """On nothing: no slot is written, whatever the kind of blocks."""
    shape = {
        "mixtral": LayerShape("small", 8, 2, 64, 48),
        "gpt-oss": LayerShape("small", 32, 4, 48, 32, activation="swigluoai", bias=True),
    }[name]
    tiles = [TileConfig(16, 32, 32, 1, 4, 2), TileConfig(64, 32, 32, 1, 4, 2)]
    assert TritonLayer(shape, torch.float32).compile(torch.device("cpu"), stage, tiles) == {}
    kinds = [
        [
            isinstance(blocks, LoneSlots)
            for blocks in nothing_to_do(shape, tile, torch.device("cpu"))
        ]
        for tile in tiles
    ]
    assert kinds == [[False, True], [False]]


def test_only_tritons_own_errors_are_refusals() -> None:
    triton_errors = pytest.importorskip("triton.runtime.errors")
    assert is_refusal(triton_errors.OutOfResources(300_000, 232_448, "shared memory"))
    assert not is_refusal(RuntimeError("CUDA error: an illegal memory access was encountered"))
