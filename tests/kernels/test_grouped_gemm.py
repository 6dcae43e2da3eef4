"""The grouped GEMM against plain matrix products, slot by slot."""

import pytest
import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation, activation_reference
from fusedmoe.kernels.activation import device_activation
from fusedmoe.kernels.align import LoneSlots, moe_align_block_size
from fusedmoe.kernels.grouped_gemm import grouped_gemm, grouped_gemm_reference
from fusedmoe.kernels.ids import local_ids
from fusedmoe.tuning.tiles import TileConfig

NAN = float("nan")
SMALL = TileConfig(16, 16, 32, 2, 4, 2)


def triton_gemm(a, b, c, blocks, tiles, *, top_k, activation=None, activation_config=None, **kw):
    from fusedmoe.kernels.triton.grouped_gemm import launch

    act = device_activation(activation, activation_config)
    launch(a, b, c, blocks, tiles, top_k, kw.get("bias"), act)
    return c


def by_slot(a, b, ids, top_k, activation=None, config=None, bias=None):
    """fp64, one slot at a time; NaN where no expert is here."""
    rows = []
    for slot, expert in enumerate(ids.flatten().tolist()):
        if not 0 <= expert < b.shape[0]:
            rows.append(torch.full((0,), NAN))
            continue
        row = b[expert].double() @ a[slot // top_k].double()
        if bias is not None:
            row = row + bias[expert].double()
        if activation is not None:
            row = activation_reference(activation, row, config)
        rows.append(row)
    width = max((len(row) for row in rows), default=0)
    return torch.stack([row if len(row) else torch.full((width,), NAN).double() for row in rows])


def case(T=5, K=2, E=4, N=24, D=40, S=1, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(0, E, (T, K), dtype=torch.int32)
    return torch.randn(T, D, dtype=dtype), torch.randn(E, S * N, D, dtype=dtype) / D**0.5, ids


def run(function, a, b, ids, N, tiles=SMALL, **options):
    alignment = moe_align_block_size(ids, tiles.block_m, b.shape[0])
    c = a.new_full((ids.numel(), N), NAN)
    return function(a, b, c, alignment, tiles, top_k=ids.shape[1], **options)


BOTH = pytest.mark.parametrize("function", [triton_gemm, grouped_gemm_reference])


@BOTH
@pytest.mark.parametrize(
    ("T", "K", "E", "N", "D"),
    [(1, 1, 1, 16, 32), (5, 2, 4, 24, 40), (33, 4, 4, 17, 7), (40, 1, 3, 64, 96), (3, 6, 6, 1, 33)],
)
def test_plain_products(function, T, K, E, N, D):
    a, b, ids = case(T, K, E, N, D)
    out = run(function, a, b, ids, N)
    torch.testing.assert_close(out.double(), by_slot(a, b, ids, K), rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize(
    "activation",
    [
        MoEActivation.SILU,
        MoEActivation.GELU_TANH,
        MoEActivation.SWIGLUOAI,
        MoEActivation.SWIGLUSTEP,
        MoEActivation.RELU2_NO_MUL,
        MoEActivation.SILU_NO_MUL,
    ],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_epilogue_is_bias_then_activation(function, activation, with_bias):
    S = 2 if activation.is_gated else 1
    a, b, ids = case(N=20, S=S)
    bias = torch.randn(4, S * 20) if with_bias else None
    config = ApplyMoEActivationConfig(clamp_limit=0.8)
    options = {"bias": bias, "activation": activation}
    out = run(function, a, b, ids, 20, activation_config=config, **options)
    expected = by_slot(a, b, ids, 2, activation, config, bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@BOTH
def test_fp16(function):
    a, b, ids = case(T=20, N=40, D=64, dtype=torch.float16)
    out = run(function, a, b, ids, 40)
    torch.testing.assert_close(out.double(), by_slot(a, b, ids, 2), rtol=2e-3, atol=2e-3)


@BOTH
@pytest.mark.parametrize("activation", [None, MoEActivation.SILU, MoEActivation.SWIGLUOAI])
def test_transposed_weights_and_strided_rows(function, activation):
    """Checkpoints that store [E, H, 2I] come as transposed views and are not copied."""
    S = 1 if activation is None else 2
    a, b, ids = case(S=S)
    stored = b.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.randn(10, 80)
    wide[::2, ::2] = a
    bias = torch.randn(S * 24, 4).t()
    out = run(function, wide[::2, ::2], stored, ids, 24, activation=activation, bias=bias)
    expected = by_slot(a, b, ids, 2, activation, bias=bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@BOTH
def test_dead_slots_keep_what_was_there(function):
    a, b, _ = case(T=4)
    ids = torch.tensor([[0, -1], [9, 3], [2, 2], [-5, 1]], dtype=torch.int32)
    out = run(function, a, b, ids, 24)
    expected = by_slot(a, b, ids, 2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@BOTH
def test_blocks_of_remote_or_impossible_experts_are_skipped(function):
    a, b, ids = case(T=4)
    alignment = moe_align_block_size(ids, 16, 4)
    labels = alignment.expert_ids.clone()
    labels[labels == int(ids[0, 0])] = -1
    labels[labels == int(ids[1, 1])] = 4
    alive = ~torch.isin(ids.flatten(), torch.stack([ids[0, 0], ids[1, 1]]))
    c = torch.full((8, 24), NAN)
    function(a, b, c, alignment._replace(expert_ids=labels), SMALL, top_k=2)
    assert (~c.isnan().any(1)).equal(alive)
    assert (~c.isnan().all(1)).equal(alive)


@BOTH
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("activation", [None, MoEActivation.SILU, MoEActivation.SWIGLUOAI])
def test_slots_on_their_own_need_no_table(function, activation, mapped):
    a, b, _ = case(T=4, S=1 if activation is None else 2)
    ids = torch.tensor([[0, -1], [9, 3], [2**40, 2], [-5, 1]])
    expert_map = torch.tensor([2, 0, -1, 3], dtype=torch.int32) if mapped else None
    blocks = LoneSlots(ids.flatten(), expert_map)
    c = torch.full((8, 24), NAN)
    function(a, b, c, blocks, SMALL, top_k=2, activation=activation)
    expected = by_slot(a, b, local_ids(ids, 4, expert_map), 2, activation)
    torch.testing.assert_close(c.double(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@BOTH
def test_a_nan_row_stays_its_own(function):
    a, b, ids = case(T=6)
    a[2] = NAN
    out = run(function, a, b, ids, 24).view(6, 2, 24)
    assert out[2].isnan().all()
    assert not out[[0, 1, 3, 4, 5]].isnan().any()


@pytest.mark.parametrize("group_m", [1, 3, 8])
def test_the_order_of_tiles_covers_every_tile_once(group_m):
    a, b, ids = case(T=60, K=2, E=3, N=50, D=32)
    out = run(triton_gemm, a, b, ids, 50, TileConfig(16, 16, 32, group_m, 4, 2))
    torch.testing.assert_close(out.double(), by_slot(a, b, ids, 2), rtol=1e-4, atol=1e-5)


def test_no_tokens():
    a, b, ids = case(T=0)
    for function in (triton_gemm, grouped_gemm_reference):
        assert run(function, a, b, ids, 24).shape == (0, 24)


@pytest.mark.parametrize(
    "broken",
    [
        {"a": torch.zeros(5, 39)},
        {"a": torch.zeros(5, 40, dtype=torch.float16)},
        {"a": torch.zeros(4, 40)},
        {"a": torch.zeros(1, 5, 40)},
        {"b": torch.zeros(4, 48, 40)},
        {"c": torch.zeros(10, 23)},
        {"bias": torch.zeros(4, 23)},
        {"top_k": 0},
        {"blocks": LoneSlots(torch.zeros(9, dtype=torch.int32))},
    ],
)
def test_disagreements_are_named_before_a_kernel_runs(broken):
    a, b, ids = case()
    alignment = moe_align_block_size(ids, 16, 4)
    sound = {"a": a, "b": b, "c": torch.zeros(10, 24), "blocks": alignment, "top_k": 2}
    with pytest.raises(ValueError, match=r"\d"):
        grouped_gemm(tiles=SMALL, **(sound | broken))
