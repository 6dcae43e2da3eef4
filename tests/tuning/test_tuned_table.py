"""Tuned tables as records: the choice between batch sizes, and who may use a table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.config import MoEOptions
from fusedmoe.experts.functional import fused_experts
from fusedmoe.experts.functional_call import option_words, options_of
from fusedmoe.experts.triton import triton_experts
from fusedmoe.layer import FusedMoE
from fusedmoe.modular_kernel import ExpertsWork
from fusedmoe.quantization.dialects.online import OnlineQuantization
from fusedmoe.tuning.choice import (
    DeviceFacts,
    PlainLayer,
    checked_table,
    packaged_table,
    tiles_for,
    tokens_here,
)
from fusedmoe.tuning.table_file import make_table, table_from_text
from fusedmoe.tuning.tiles import LayerTiles, TileConfig, layer_tiles
from fusedmoe.tuning.tuned_kernels import TRITON
from fusedmoe.tuning.tuned_table import (
    SIXTEEN_BIT,
    Curve,
    LayerKey,
    TunedTable,
    gemm1_form,
    interpolated,
)

LOW, HIGH = TileConfig(16, 64, 128, 1, 4, 4), TileConfig(128, 64, 64, 8, 8, 3)
SIZES: dict[str, Any] = {"K": 8, "E": 128, "H": 2048, "I": 768}
LAYER = LayerKey(weights="bf16", form="halves", **SIZES)
CPU = DeviceFacts("cpu", 227 * 1024, None)
H200 = DeviceFacts("NVIDIA_H200", 227 * 1024, "3.6.0")


def table_of(*curves: Curve, tokens: tuple[int, ...], **changes: Any) -> TunedTable:
    given: dict[str, Any] = {
        "device": "NVIDIA_H200",
        "kernel": "triton",
        "kernel_version": TRITON.version,
        "triton": "3.6.0",
        "layer": LAYER,
    }
    return make_table(**(given | changes), tokens=tokens, curves=curves)


def two_tiles() -> TunedTable:
    """The low tile wins below 64 tokens, the high one above; they meet at 64."""
    return table_of(
        Curve("gemm1", LOW, (10.0, 40.0, 160.0)),
        Curve("gemm2", LOW, (10.0, 40.0, 160.0)),
        Curve("gemm1", HIGH, (40.0, 40.0, 40.0)),
        Curve("gemm2", HIGH, (40.0, 40.0, 40.0)),
        tokens=(16, 64, 256),
    )


def test_which_layers_a_key_is_for() -> None:
    """What it leaves out is any; tables of other engines say no more of weights than 16 bits."""
    key = LayerKey(E=128, I=768, weights=SIXTEEN_BIT)
    assert key.mismatch(LAYER) is None
    assert key.mismatch(replace(LAYER, weights="fp16", K=2, H=64, form="plain")) is None
    assert key.mismatch(replace(LAYER, weights="fp32")) == (
        "it is for weights 16bit, the layer has fp32"
    )
    assert LAYER.mismatch(replace(LAYER, K=2)) == "it is for K 8, the layer has 2"


@pytest.mark.parametrize(
    ("activation", "form"),
    [("silu", "halves"), ("swigluoai", "interleaved"), ("relu2_no_mul", "plain")],
)
def test_how_the_first_gemm_reads_its_weights(activation: str, form: str) -> None:
    assert gemm1_form(MoEActivation.from_str(activation)) == form


def test_the_lowest_curve_is_chosen_for_every_batch() -> None:
    table = two_tiles()
    chosen = {T: table.tiles(T) for T in (1, 16, 63, 65, 256, 10**6)}
    assert {T for T, tiles in chosen.items() if tiles == (LOW, LOW)} == {1, 16, 63}
    assert {T for T, tiles in chosen.items() if tiles == (HIGH, HIGH)} == {65, 256, 10**6}


@pytest.mark.parametrize("costs", [(10.0, 20.0), (20.0, 10.0), (10.0, 10.0)])
def test_of_tiles_that_go_together_the_cheapest_counts_or_the_first(
    costs: tuple[float, float],
) -> None:
    other = replace(LOW, num_warps=8)
    both = [Curve("gemm1", tile, (cost,)) for tile, cost in zip((LOW, other), costs, strict=True)]
    table = table_of(*both, Curve("gemm2", LOW, (5.0,)), tokens=(16,))
    assert table.tiles(16) == (other if costs[1] < costs[0] else LOW, LOW)
    assert table.cost(16) == 15.0


def test_both_gemms_share_their_alignment() -> None:
    """The best tile of each GEMM alone is of no use where their blocks differ."""
    table = table_of(
        Curve("gemm1", LOW, (10.0,)),
        Curve("gemm1", HIGH, (20.0,)),
        Curve("gemm2", LOW, (50.0,)),
        Curve("gemm2", HIGH, (30.0,)),
        Curve("gemm2", replace(HIGH, block_n=128), (25.0,)),
        Curve("gemm1", replace(HIGH, block_m=64), (1.0,)),
        tokens=(8,),
    )
    assert table.tiles(8) == (HIGH, replace(HIGH, block_n=128))
    assert table.cost(8) == 45.0


costs = st.lists(st.floats(1.0, 1e4), min_size=4, max_size=4).map(tuple)


@given(st.lists(costs, min_size=1, max_size=4), st.lists(costs, min_size=1, max_size=4))
def test_the_chosen_time_never_jumps(up: Any, down: Any) -> None:
    """One token more changes the time by no more than the steepest curve does, whatever the
    choice does."""
    tokens = (1, 16, 300, 4096)
    tiles = [replace(LOW, group_m=group + 1) for group in range(4)]
    curves = [Curve("gemm1", tile, cost) for tile, cost in zip(tiles, up, strict=False)]
    curves += [Curve("gemm2", tile, cost) for tile, cost in zip(tiles, down, strict=False)]
    table = table_of(*curves, tokens=tokens)
    for T in (2, 15, 16, 17, 100, 299, 300, 301, 2000, 4095, 4096):
        slack = max(
            abs(interpolated(tokens, c.cost, T + 1) - interpolated(tokens, c.cost, T))
            for c in curves
        )
        assert abs(table.cost(T + 1) - table.cost(T)) <= 2 * slack + 1e-6


def test_between_two_counts_times_follow_a_power_law() -> None:
    assert interpolated((10, 1000), (5.0, 500.0), 100) == pytest.approx(50.0)
    assert interpolated((10, 1000), (5.0, 500.0), 1) == 5.0
    assert interpolated((10, 1000), (5.0, 500.0), 5000) == 500.0


def test_a_table_is_its_text() -> None:
    table = two_tiles()
    again = table_from_text(table.text)
    assert again == table
    assert hash(again) == hash(table)
    assert again.curves == table.curves
    assert MoEOptions(tuned_table=table) == MoEOptions(tuned_table=again)
    assert table != table_of(*table.curves[:2], tokens=(16, 64, 256))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"I": 384}, "it is for I 768, the layer has 384"),
        ({"K": 4}, "for K 8, the layer has 4"),
        ({"weights": "fp16"}, "for weights bf16"),
        ({"form": "plain"}, "for form halves"),
        ({}, None),
    ],
)
def test_a_table_is_for_one_layer(changes: dict[str, Any], reason: str | None) -> None:
    found = two_tiles().unfit(replace(LAYER, **changes))
    assert found is None if reason is None else reason in str(found)


def test_a_table_of_another_kernel_or_version_is_refused() -> None:
    table = two_tiles()
    with pytest.raises(ValueError, match="hopper has tiles direct, decode, prefill, got TileC"):
        table_of(*table.curves, tokens=table.tokens, kernel="hopper")
    old = table_of(*table.curves, tokens=table.tokens, kernel_version=99)
    assert "version 99" in str(old.unfit(LAYER))


def asked(table: TunedTable | None, **changes: Any) -> TunedTable | None:
    sizes = SIZES | changes
    layer = PlainLayer(**sizes, dtype=torch.bfloat16, activation=MoEActivation.SILU)
    return checked_table(table, layer, torch.device("cpu"))


def test_a_table_that_was_asked_for_must_serve_the_layer() -> None:
    assert asked(None) is None
    assert asked(two_tiles()) is not None
    with pytest.raises(ValueError, match=r"does not serve this layer: it is for E 128"):
        asked(two_tiles(), E=64)
    huge = replace(HIGH, block_n=256, block_k=128, num_stages=5)
    table = table_of(Curve("gemm1", huge, (1.0,)), Curve("gemm2", huge, (1.0,)), tokens=(1,))
    with pytest.raises(ValueError, match=r"needs \d{6} bytes of shared memory, cpu has 232448"):
        asked(table)


def chosen(T: int, **how: Any) -> LayerTiles:
    sizes = tuple(SIZES[name] for name in "KEHI")
    return tiles_for(T, *sizes, torch.bfloat16, MoEActivation.SILU, how.pop("facts", CPU), **how)


def test_without_a_table_the_shape_decides() -> None:
    for T in (1, 16, 4096):
        assert chosen(T) == layer_tiles(T, 8, 128, 2048, 768, torch.bfloat16)


def test_a_given_table_comes_first_and_batch_invariance_before_all() -> None:
    table = two_tiles()
    assert chosen(16, table=table) == (LOW, LOW)
    fixed = {chosen(T, table=table, batch_invariant=True) for T in (1, 16, 100, 5000)}
    assert fixed == {layer_tiles(7, 8, 128, 2048, 768, torch.bfloat16, batch_invariant=True)}


def test_packaged_tables_are_for_their_device_and_release_of_triton(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedmoe.tuning import choice

    folder = tmp_path / "NVIDIA_H200" / f"triton-{TRITON.version}"
    folder.mkdir(parents=True)
    (folder / choice.table_name(LAYER)).write_text(two_tiles().text)
    monkeypatch.setattr(
        choice,
        "table_folder",
        lambda device, kernel: tmp_path / device / f"{kernel.name}-{kernel.version}",
    )
    packaged_table.cache_clear()
    found = {
        facts: packaged_table(LAYER, facts)
        for facts in (
            H200,
            H200._replace(triton="3.6.4+git1"),
            H200._replace(triton="3.7.0"),
            H200._replace(name="NVIDIA_H100"),
            CPU,
        )
    }
    packaged_table.cache_clear()
    assert [table is not None for table in found.values()] == [True, True, False, False, False]


def test_a_rank_counts_the_rows_that_come_to_it() -> None:
    """Of eight ranks each gets an eighth of the picks, so its tiles are those of fewer tokens."""
    assert tokens_here(4096, 16, 16) == 4096
    assert tokens_here(4096, 16, 128) == 512
    assert tokens_here(3, 16, 128) == 1


def small_layer() -> tuple[dict[str, Any], TunedTable]:
    """A layer of 4 experts, 2 picks, H 32, I 48, and a table for it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) * size[-1] ** -0.5

    given = {"hidden_states": normal(5, 32), "w1": normal(4, 96, 32), "w2": normal(4, 32, 48)}
    ids = torch.tensor([[0, 1], [1, 3], [2, 0], [3, -1], [0, 2]], dtype=torch.int32)
    given |= {"topk_weights": torch.full((5, 2), 0.5), "topk_ids": ids}
    layer = LayerKey(E=4, K=2, H=32, I=48, weights="fp32", form="halves")
    tile = TileConfig(64, 16, 32, 4, 4, 2)
    curves = Curve("gemm1", tile, (1.0,)), Curve("gemm2", tile, (1.0,))
    return given, table_of(*curves, tokens=(1,), layer=layer)


def layer_with(table: TunedTable, sizes: tuple[int, int, int, int], **how: Any) -> Any:
    return FusedMoE(
        *sizes, params_dtype=torch.float32, options=MoEOptions(tuned_table=table), **how
    )


def test_a_table_for_another_layer_is_refused_wherever_it_is_built() -> None:
    _, table = small_layer()
    with pytest.raises(ValueError, match=r"does not serve this layer: it is for I 48, .* has 999"):
        layer_with(table, (4, 2, 32, 999))
    with pytest.raises(ValueError, match="it is for weights fp32, the layer has bf16"):
        FusedMoE(4, 2, 32, 48, options=MoEOptions(tuned_table=table), params_dtype=torch.bfloat16)


def test_a_table_that_nothing_reads_is_refused() -> None:
    """On a CPU no kernel has tiles, and none for quantized weights asks a table."""
    given, table = small_layer()
    reason = "triton: runs on cuda, not cpu.*cpu: does not support a tuned table"
    with pytest.raises(ValueError, match=reason):
        layer_with(table, (4, 2, 32, 48))
    with pytest.raises(ValueError, match=reason):
        fused_experts(**given, options=MoEOptions(tuned_table=table))
    with pytest.raises(
        ValueError, match=r"for weights fp32, the layer has \(.*\): no kernel for q"
    ):
        layer_with(table, (4, 2, 32, 48), quant_config=OnlineQuantization.of("fp8_channel"))


def test_a_table_survives_as_the_words_of_an_operator() -> None:
    _, table = small_layer()
    options = MoEOptions(tuned_table=table)
    assert options_of(*option_words(options)) == options


def test_the_triton_experts_run_with_a_tables_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedmoe.experts import triton

    given, table = small_layer()
    heights = []
    blocks = triton.slot_blocks
    monkeypatch.setattr(triton, "slot_blocks", lambda *a: heights.append(a[3]) or blocks(*a))
    out = torch.full((5, 32), torch.nan)
    x, w1, w2, weights, ids = given.values()
    scratch = {"workspace13": torch.empty(10, 48), "workspace2": torch.empty(10, 32)}
    silu, E = MoEActivation.SILU, w1.shape[0]
    work = ExpertsWork(out, x, w1, w2, weights, ids, silu, E, **scratch)
    triton_experts(work, ApplyMoEActivationConfig(), None, None, table=table)
    assert heights == [64]
    torch.testing.assert_close(out, fused_experts(**given), rtol=1e-5, atol=1e-5)
