"""The measuring core: one schema, fair turns, clear notes for what was left out."""

from __future__ import annotations

import json

import pytest
import torch

from fusedmoe.bench import (
    SHAPES,
    BenchReport,
    BenchRow,
    LayerShape,
    ceilings,
    contestants,
    measure,
    peers,
    problems,
    run,
    run_layer_bench,
)
from fusedmoe.bench.contestants import Contestant, Prepared
from fusedmoe.bench.replays import FEWEST_SAMPLES, Replays, calls_per_graph
from fusedmoe.bench.report import Percentiles, limit_us
from fusedmoe.bench.timing import SLOW_RUNS, time_on_cpu
from fusedmoe.experts.torch_reference import TorchExperts

TINY = LayerShape("tiny", 8, 2, 64, 48)
REAL_LEAST = ceilings.LEAST_CEILINGS
CEILINGS = {"read_gbs": 40.0, "copy_gbs": 40.0, "fp32_tflops": 0.5, "bf16_tflops": 1.0}


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real ones need half a gigabyte."""
    monkeypatch.setattr(ceilings, "_ELEMENTS", {"cpu": 1 << 16, "cuda": 1 << 20})
    monkeypatch.setattr(ceilings, "_MATMUL", {"cpu": 64, "cuda": 256})
    monkeypatch.setattr(ceilings, "LEAST_CEILINGS", {})


def row(impl: str, us: float, **changes: object) -> BenchRow:
    values = {
        "impl": impl, "shape": "tiny", "E": 8, "num_experts": 8, "k": 2, "H": 64, "I": 48, "T": 1,
        "format": "fp32", "routing": "uniform", "active_experts": 2.0, "pairs": 2.0,
        "scope": "layer", "timed": "launches",
        "us": us, "p10_us": us, "p90_us": us, "limit_us": 1.0, "fraction_of_limit": 1 / us,
        "tflops": 0.1, "error": 1e-7, "runs": 3,
        "workspace_bytes": None,
    }  # fmt: skip
    return BenchRow(**(values | changes))


def test_a_run_on_a_cpu_fills_the_schema(tmp_path):
    seen = []
    report = run_layer_bench(
        [TINY],
        [1, 5],
        [torch.float32, torch.bfloat16],
        ["uniform", "one_expert"],
        repeats=4,
        progress=lambda done, total, what: seen.append((done, total, what)),
        experts=(None, "torch"),
    )
    assert seen[0] == (0, 8, "tiny fp32 uniform T=1")
    assert [done for done, _, _ in seen] == list(range(8))
    names = {"fusedmoe", "fusedmoe:torch"} | {
        f"transformers_{name}" for name in ("eager", "batched_mm", "grouped_mm")
    }
    assert {r["impl"] for r in report.rows} == names
    assert len(report.rows) == 8 * len(names)
    for r in report.rows:
        assert r["p10_us"] <= r["us"] <= r["p90_us"]
        assert r["error"] < (1e-5 if r["format"] == "fp32" else 1e-2)
        assert r["runs"] >= SLOW_RUNS
        assert r["scope"] == "layer"
    path = tmp_path / "a" / "report.json"
    report.write(path)
    stored = json.loads(path.read_text())
    assert stored == report.to_json()
    for key in ("device", "versions", "commit", "command", "date", "read_gbs", "fp32_tflops"):
        assert stored[key] is not None
    assert stored["rows"][0].keys() == BenchRow.__dataclass_fields__.keys()


RANK = LayerShape("rank", 4, 2, 64, 48, all_experts=8)
OSS = LayerShape("oss", 8, 2, 64, 48, activation="swigluoai", bias=True)


@pytest.mark.parametrize("scope", ["layer", "experts"])
@pytest.mark.parametrize("shape", [TINY, RANK, OSS], ids=lambda shape: shape.name)
def test_every_contestant_computes_the_same_layer(shape, scope):
    """Wrong weights, a forgotten renormalisation or other ids would show here."""
    weights = problems.random_weights(shape, torch.float32, torch.device("cpu"), 2)
    situation = problems.pick(torch.randn(5, shape.num_experts), shape.k)
    x = torch.randn(5, shape.H)
    everyone = [
        contestants.our_layer(shape, weights, None, scope),
        *(
            peers.peer(name, shape, weights, scope)
            for name in peers.PEERS
            if name != "torch_mm"
            and not (shape.bias and "alone" in name)
            # The eager loop of this family does not know ids of other ranks.
            and not (shape.ranks > 1 and name == "transformers_eager")
        ),
    ]
    outputs = []
    for copy in range(2):
        prepared = [one.prepare(copy, x, situation) for one in everyone]
        outputs = [one.finish(one.call()) for one in prepared]
        for one, output in zip(everyone[1:], outputs[1:], strict=True):
            torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-5, msg=one.name)
    first = everyone[0].prepare(0, x, situation).call()
    assert not torch.equal(first, outputs[0])


@pytest.mark.parametrize("shape", [TINY, RANK, OSS], ids=lambda shape: shape.name)
def test_the_error_is_taken_against_the_layer_itself(shape):
    weights = problems.random_weights(shape, torch.float32, torch.device("cpu"), 1)
    cell = problems.Cell(shape, torch.float32, "uniform", 40)
    problem = problems.Problem.of(cell, 2, torch.device("cpu"))
    layer = contestants.our_layer(shape, weights)
    output = layer.prepare(0, problem.x, problem.situations[0]).call()
    assert problem.error(weights[0], output) < 1e-5
    assert problem.error(weights[0], output * 1.01) > 5e-3


def test_a_rank_counts_its_own_experts_alone():
    cell = problems.Cell(RANK, torch.float32, "balanced", 16)
    problem = problems.Problem.of(cell, 3, torch.device("cpu"))
    assert problem.active_experts == RANK.E
    assert problem.pairs == 16 * RANK.k / 2
    assert problem.flops == RANK.flops(16)
    assert str(cell) == "rank fp32 balanced T=16"


def test_yardsticks_and_the_experts_scope_have_rows_of_their_own():
    report = run_layer_bench(
        [TINY],
        [4],
        [torch.float32],
        scope="experts",
        repeats=2,
        peers=["torch_reference", "torch_grouped_mm_alone", "torch_mm"],
    )
    scopes = {r["impl"]: r["scope"] for r in report.rows}
    assert scopes == {
        "fusedmoe": "experts",
        "torch_reference": "experts",
        "torch_grouped_mm_alone": "gemms",
        "torch_mm": "dense",
    }
    by_name = {r["impl"]: r for r in report.rows}
    assert by_name["torch_mm"]["error"] is None
    assert by_name["torch_grouped_mm_alone"]["error"] < 1e-5
    with pytest.raises(ValueError, match="unknown peer 'nobody'"):
        peers.peer("nobody", TINY, [])


def test_what_cannot_run_is_a_note_and_not_a_row(monkeypatch):
    monkeypatch.setattr(measure, "free_memory", lambda device: 100_000)
    report = run_layer_bench([TINY], [3], [torch.float32], repeats=1, experts=(None, "triton"))
    assert {r["impl"] for r in report.rows} == {
        "fusedmoe",
        "transformers_eager",
        "transformers_grouped_mm",
    }
    first, second = report.notes
    assert "tiny: fusedmoe:triton left out" in first
    assert "triton: runs on cuda, not cpu" in first
    assert "tiny fp32 uniform T=3: transformers_batched_mm left out: needs" in second


class Failing(TorchExperts):
    name = "failing"

    def run(self, work):
        raise KeyError("no tile")


class Unwritten(TorchExperts):
    """Leaves the last row as it was found."""

    name = "unwritten"

    def run(self, work):
        super().run(work)
        work.output[-1] = float("nan")


def test_the_last_token_is_looked_at_too():
    """A result that is no number is no row: JSON has no word for its error."""
    report = run_layer_bench(
        *([TINY], [1, 2, 13, 40], [torch.float32]), repeats=2, peers=False, experts=(Unwritten,)
    )
    assert report.rows == []
    assert [note.partition("T=")[2] for note in report.notes] == [
        f"{T}: fusedmoe:unwritten left out: its output is not finite" for T in (1, 2, 13, 40)
    ]


class Unbuilt(TorchExperts):
    name = "unbuilt"

    def __init__(self, *args, **arguments):
        raise TypeError("no such argument")


def test_experts_that_raise_cost_nobody_else_a_row():
    report = run_layer_bench(
        *([TINY], [2], [torch.float32]), repeats=2, peers=False, experts=(None, Failing, Unbuilt)
    )
    assert [row["impl"] for row in report.rows] == ["fusedmoe"]
    assert [note.partition(" left out: ")[2] for note in report.notes] == [
        "TypeError: no such argument",
        "KeyError: 'no tile'",
    ]


def test_batched_experts_have_room_for_the_largest_batch():
    names = ["torch_batched"]
    for formats in ((), ("int8_channel",)):
        report = run_layer_bench(
            *([TINY], [1, 6], [torch.float32]),
            repeats=2,
            peers=False,
            experts=[*names, "torch_quantized_batched"],
            formats=formats,
        )
        found = {(row["impl"], row["T"]) for row in report.rows}
        assert {("fusedmoe:torch_batched", T) for T in (1, 6)} <= found
        assert all(row["error"] < 0.05 for row in report.rows)
        scratch = {row["workspace_bytes"] for row in report.rows}
        assert scratch == {8 * 6 * 64 * 4}  # the output of all rows there is room for
    assert ("fusedmoe:torch_quantized_batched@int8_channel", 6) in found


def test_classes_of_one_name_are_refused():
    class Variant(Failing):
        pass

    with pytest.raises(
        ValueError, match=r"Failing.*Variant.*would both be called fusedmoe:failing"
    ):
        run_layer_bench(
            *([TINY], [1], [torch.float32]), peers=False, experts=(None, Failing, Variant)
        )


def test_a_slow_machine_is_refused_or_noted(monkeypatch: pytest.MonkeyPatch):
    least = {"H200": {"read_gbs": 4300.0, "bf16_tflops": 710.0}}
    assert least == REAL_LEAST
    monkeypatch.setattr(ceilings, "LEAST_CEILINGS", least)
    monkeypatch.setattr(ceilings, "device_name", lambda device: "NVIDIA H200 NVL")
    with pytest.raises(ValueError, match=r"read_gbs is .*, at least 4300 is asked, bf16_tf"):
        run_layer_bench([TINY], [1], [torch.bfloat16], peers=False, repeats=1)
    report = run_layer_bench(
        [TINY], [1], [torch.float32], peers=False, repeats=1, slow_machine=True
    )
    assert len(report.rows) == 1
    (note,) = report.notes
    assert note.startswith("this machine is slow: read_gbs is")
    assert "bf16" not in note, "not measured"


@pytest.mark.parametrize("sets", [2, 3])
def test_too_few_sets_of_weights_are_a_note(sets: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "_copies", lambda *_: sets)
    monkeypatch.setattr(run, "random_weights", lambda *given: [None] * given[-1])
    monkeypatch.setattr(run.Problem, "of", lambda *_: None)
    for step in ("_contestants", "measure", "_free_unused"):
        monkeypatch.setattr(run, step, lambda *_: [])
    report = BenchReport(CEILINGS)
    cell = problems.Cell(TINY, torch.bfloat16, "uniform", 1)
    list(run.run_cells([cell], report, torch.device("cuda")))
    assert ["memory holds 2 sets of weights" in note for note in report.notes] == [True] * (
        3 - sets
    )


def test_a_peer_that_fails_is_a_note_and_not_a_row():
    """grouped_mm wants rows of whole 16 bytes, which 3 numbers are not."""
    odd = LayerShape("odd", 4, 2, 64, 3)
    report = run_layer_bench([odd], [3], [torch.float32], repeats=1)
    assert "transformers_grouped_mm" not in {r["impl"] for r in report.rows}
    assert "fusedmoe" in {r["impl"] for r in report.rows}
    assert "odd fp32 uniform T=3: transformers_grouped_mm left out: strides" in report.notes[0]


def test_a_peer_that_would_take_seconds_is_left_out():
    report = BenchReport(dict(CEILINGS))
    cells = [problems.Cell(TINY, torch.float32, "uniform", 9)]
    effort = measure.Effort(repeats=1, peer_bytes=1000)
    device = torch.device("cpu")
    done = run.run_cells(
        cells, report, device, peers=lambda cell: ["transformers_batched_mm"], effort=effort
    )
    assert list(done) == cells
    assert [r["impl"] for r in report.rows] == ["fusedmoe"]
    assert "more than the" in report.notes[0]


def test_without_peers_there_are_none():
    report = run_layer_bench([TINY], [1], [torch.float32], peers=False, repeats=1)
    assert [r["impl"] for r in report.rows] == ["fusedmoe"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": []}, "needs a shape"),
        ({"tokens": [4, 0]}, "at least 1, got 0"),
        ({"dtypes": [torch.int8]}, "int8"),
        ({"routings": ["zipf"]}, "zipf"),
        ({"scope": "model"}, "model"),
        ({"device": "meta"}, "meta"),
        ({"peers": ["transformers_magic"]}, "unknown peer 'transformers_magic'; known: trans"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(changes, message):
    arguments = {"shapes": [TINY], "tokens": [1], "dtypes": [torch.float32]} | changes
    with pytest.raises(ValueError, match=message):
        run_layer_bench(**arguments)


def test_shapes_have_sizes_that_make_sense():
    assert SHAPES["mixtral-quarter"] == LayerShape("mixtral-quarter", 8, 2, 1024, 3584)
    assert all(name == shape.name for name, shape in SHAPES.items())
    with pytest.raises(ValueError, match="E4 k5"):
        LayerShape("x", 4, 5, 8, 8)
    assert TINY.flops(3) == 2 * 3 * 2 * 3 * 64 * 48


def test_the_limit_is_the_larger_of_bytes_and_flops():
    """10 GB/s and 1 TFLOP/s, all 8 experts, fp32."""
    cell = problems.Cell(TINY, torch.float32, "balanced", 16)
    problem = problems.Problem.of(cell, 1, torch.device("cpu"))
    few = 4 * (3 * 8 * 64 * 48 + 2 * 16 * 64) / 10e9 * 1e6
    assert limit_us(problem, 10.0, 1.0) == pytest.approx(few)
    assert limit_us(problem, 10.0, 1e-6) == pytest.approx(TINY.flops(16) / 1e6 * 1e6)


@pytest.mark.parametrize(("situations", "us"), [(4, 1.0), (4, 20.0), (3, 700.0), (5, 1e6)])
def test_a_graph_goes_through_whole_rounds(situations, us):
    calls = calls_per_graph(situations, us)
    assert calls % situations == 0
    assert situations <= calls <= 80
    assert calls * us >= 2000 or calls + situations > 80


def test_rows_as_a_table_of_text(tmp_path):
    report = BenchReport({})
    report.add(row("a", 1.0))
    report.add(row("b", 2.0, error=None))
    report.write_csv(tmp_path / "rows.csv")
    head, first, second = (tmp_path / "rows.csv").read_text().splitlines()
    assert head.split(",")[:3] == ["impl", "shape", "E"]
    assert first.startswith("a,tiny,8,8,2")
    assert ",2.0," in second
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_percentiles():
    found = Percentiles.of([float(v) for v in range(11, 0, -1)])
    assert (found.p10_us, found.us, found.p90_us) == (2.0, 6.0, 10.0)
    assert Percentiles.of([3.0]) == Percentiles(3.0, 3.0, 3.0)


def test_ratios_compare_with_the_fastest_peer():
    report = BenchReport({})
    for name, us in (("fusedmoe", 10.0), ("transformers_eager", 30.0), ("transformers_x", 20.0)):
        report.add(row(name, us))
    report.add(row("fusedmoe", 10.0, T=2))
    assert report.ratios() == [
        {"shape": "tiny", "format": "fp32", "routing": "uniform", "T": 1}
        | {"fastest_peer": "transformers_x", "ratio": 2.0}
    ]


def test_turns_are_shared_fairly_and_the_slow_leave_early(monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    clock = [0.0]
    monkeypatch.setattr("fusedmoe.bench.timing.time.perf_counter", lambda: clock[0])

    def call(name: str, seconds: float, situation: int):
        def run_it() -> torch.Tensor:
            order.append(f"{name}{situation}")
            clock[0] += seconds
            return torch.zeros(())

        return run_it

    callers = {
        name: [call(name, seconds, i) for i in range(2)]
        for name, seconds in (("a", 1e-3), ("b", 1e-3), ("z", 5e-2))
    }
    samples = time_on_cpu(callers, 8)
    assert len(samples["a"]) == len(samples["b"]) == 8
    assert len(samples["z"]) == SLOW_RUNS
    assert order[:3] == ["a0", "b0", "z0"]  # warm up
    # A timed call follows an untimed one of the same contestant in another situation.
    assert order[3:9] == ["a1", "a0", "b0", "b1", "z1", "z0"]
    assert order[9][0] == "b"


def test_ours_has_all_of_its_samples_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    def call() -> torch.Tensor:
        return torch.zeros(())

    def turns(contestants: dict[str, Replays], rest: float) -> dict[str, list[float]]:
        return {name: [1.0] * one.at_least for name, one in contestants.items()}

    monkeypatch.setattr(measure, "record", lambda calls, us, repeats: Replays(calls, 1, repeats))
    monkeypatch.setattr(measure, "time_in_turns", turns)
    problem = problems.Problem.of(problems.Cell(TINY, torch.bfloat16, "uniform", 2), 1, "cpu")
    running = {
        name: (Contestant(name, lambda *_: None, "layer", name != "fusedmoe"), [Prepared(call)])
        for name in ("fusedmoe", "transformers_grouped_mm")
    }
    found = measure._run_on_cuda(problem, running, measure.Effort(50), BenchReport(CEILINGS))
    assert [len(samples) for samples, _, _ in found.values()] == [50, FEWEST_SAMPLES]


def test_nobody_in_turns_takes_no_time() -> None:
    assert time_on_cpu({}, 8) == {}


@pytest.mark.gpu
def test_a_run_on_a_gpu():
    report = run_layer_bench(
        [LayerShape("small", 16, 2, 256, 128)], [1, 64], [torch.bfloat16], device="cuda", repeats=5
    )
    measured = {r["impl"] for r in report.rows}
    assert {"fusedmoe", "transformers_grouped_mm"} <= measured
    assert all(r["error"] < 1e-2 for r in report.rows)
    assert "transformers_eager" not in measured
