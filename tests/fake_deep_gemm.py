"""deep_gemm as its documentation describes it, in plain torch: the functions that are called, with
what they demand of their arguments checked, and the products computed as they are defined.

Put in ``sys.modules["deep_gemm"]`` it stands for the package where that cannot run. ``calls`` has
the name and the hints of each call. Stricter than the package in one point: it rearranges scales
that do not lie as its loads want them, here that is an error.
"""

from __future__ import annotations

from typing import Any

import torch

ALIGNMENT = 128
BLOCK = 128
calls: list[tuple[str, dict[str, Any]]] = []

Pair = tuple[torch.Tensor, torch.Tensor]


def get_mk_alignment_for_contiguous_layout() -> int:
    return ALIGNMENT


def _check_rows(a: Pair) -> None:
    q, scale = a
    *lead, rows, K = q.shape
    assert q.dtype == torch.float8_e4m3fn
    assert q.is_contiguous()
    assert K % BLOCK == 0
    assert scale.dtype == torch.float32
    assert scale.shape == (*lead, rows, K // BLOCK)
    room = -(-rows // 4) * 4  # columns of fp32 begin at 16 bytes
    strides = (1, room) if len(lead) == 0 else (room * (K // BLOCK), 1, room)
    assert scale.stride() == strides, (scale.stride(), strides)


def _check_weights(b: Pair, K: int) -> None:
    w, scale = b
    groups, N, depth = w.shape
    assert w.dtype == torch.float8_e4m3fn
    assert w.is_contiguous()
    assert depth == K
    assert N % 8 == 0
    assert scale.dtype == torch.float32
    assert scale.is_contiguous()
    assert scale.shape == (groups, -(-N // BLOCK), -(-K // BLOCK))


def _product(q: torch.Tensor, scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor):
    """[rows, K] x [N, K]: each 128 columns are summed first, then scaled and added up."""
    total = torch.zeros(q.shape[0], w.shape[0])
    wide = w_scale.repeat_interleave(BLOCK, 0)[: w.shape[0]]
    for block in range(q.shape[1] // BLOCK):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        dot = q[:, part].float() @ w[:, part].float().T
        total += dot * scale[:, block, None] * wide[:, block]
    return total.to(torch.bfloat16)


def m_grouped_fp8_gemm_nt_contiguous(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    m_indices: torch.Tensor,
    recipe: tuple[int, int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    calls.append(("contiguous", {"disable_ue8m0_cast": disable_ue8m0_cast, "rows": a[0].shape[0]}))
    _check_rows(a)
    _check_weights(b, a[0].shape[1])
    rows, groups = a[0].shape[0], b[0].shape[0]
    assert d.shape == (rows, b[0].shape[1])
    assert d.dtype == torch.bfloat16
    assert d.is_contiguous()
    assert m_indices.shape == (rows,)
    assert m_indices.dtype == torch.int32
    assert m_indices.is_contiguous()
    assert rows % ALIGNMENT == 0
    for start in range(0, rows, ALIGNMENT):
        tile = slice(start, start + ALIGNMENT)
        found = m_indices[tile]
        live = found >= 0
        assert found.unique().numel() - int(not live.all()) <= 1, "a tile of several experts"
        assert bool(live[: int(live.sum())].all()), "rows that carry nothing stand last"
        if not live[0]:
            continue
        assert int(found[0]) < groups
        expert = int(found[0])
        made = _product(a[0][tile], a[1][tile], b[0][expert], b[1][expert])
        made[~live] = torch.nan  # what stands there is not promised
        d[tile] = made


def m_grouped_fp8_gemm_nt_masked(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    recipe: tuple[int, int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    hints = {"disable_ue8m0_cast": disable_ue8m0_cast, "expected_m": expected_m}
    calls.append(("masked", hints))
    _check_rows(a)
    _check_weights(b, a[0].shape[2])
    groups, room, _ = a[0].shape
    assert b[0].shape[0] == groups
    assert d.shape == (groups, room, b[0].shape[1])
    assert d.dtype == torch.bfloat16
    assert d.is_contiguous()
    assert masked_m.shape == (groups,)
    assert masked_m.dtype == torch.int32
    assert masked_m.is_contiguous()
    assert isinstance(expected_m, int)
    assert 0 < expected_m <= room
    for group, count in enumerate(masked_m.tolist()):
        assert 0 <= count <= room
        part = slice(0, count)
        d[group, part] = _product(a[0][group, part], a[1][group, part], b[0][group], b[1][group])
