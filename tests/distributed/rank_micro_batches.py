"""Forwards in two halves, compared with whole ones; runs inside a RankPool."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from rank_layers import SPREADS, Layout, build, linear, make_groups, rows, token_counts

from fusedmoe import MoEOptions
from fusedmoe.modular_kernel import FusedMoEKernel


def kernel_of(layer: torch.nn.Module) -> FusedMoEKernel:
    kernel = layer.routed_experts.quant_method.kernel(layer.routed_experts)
    assert isinstance(kernel, FusedMoEKernel)
    return kernel


def check_halves(layout: Layout, mover: str, given: bool) -> None:
    """The same bits: experts compute a row alike in any batch, and sums are per token."""
    groups, token_rank = make_groups(layout)
    layers = [
        build(
            parallel=groups,
            is_sequence_parallel=layout.sp,
            options=MoEOptions(
                prepare_finalize=mover,
                experts="torch",
                batch_invariant=True,
                micro_batch_tokens=from_tokens,
            ),
            shared_experts=linear(1),
            has_bias=True,
        )
        for from_tokens in (None, 2)
    ]
    for spread in (*SPREADS, "one_token"):
        ranks = layout.token_ranks
        counts = [1] * ranks if spread == "one_token" else token_counts(spread, ranks)
        x, logits = rows(counts[token_rank], 10 + token_rank)
        known = {"tokens_per_rank": counts} if given else {}
        whole, halved = (layer(x, logits, **known) for layer in layers)
        assert torch.equal(whole, halved), spread
        splits = kernel_of(layers[1])._halves(len(x), counts)
        assert (splits is None) == (max(counts) < 2), spread


def check_room() -> None:
    """More tokens than the layer allows are refused as in a whole forward."""
    groups, token_rank = make_groups(Layout(dp=4, ep=True))
    layer = build(
        parallel=groups,
        options=MoEOptions(prepare_finalize="naive_dp_ep", micro_batch_tokens=1),
        max_num_tokens=3,
    )
    x, logits = rows(4 if token_rank == 2 else 1, 0)
    with pytest.raises(ValueError, match=r"\[1, 1, 4, 1\] tokens, but max_num_tokens is 3"):
        layer(x, logits)


def check_adapters_keep_it_whole(mover: str) -> None:
    """A LoRA context has room for the ids of one forward."""
    groups, _ = make_groups(Layout(dp=4, ep=True))
    layer = build(parallel=groups, options=MoEOptions(prepare_finalize=mover, micro_batch_tokens=1))
    kernel = kernel_of(layer)
    assert kernel._halves(4, [4] * 4) is not None
    ids = torch.zeros(4, dtype=torch.int32)
    kernel.prepare_finalize.set_lora_context(SimpleNamespace(token_lora_mapping=ids))
    assert kernel._halves(4, [4] * 4) is None


def check_disagreement() -> None:
    groups, _ = make_groups(Layout(dp=4, ep=True))
    options = MoEOptions(micro_batch_tokens=8 if dist.get_rank() else None)
    with pytest.raises(ValueError, match="micro_batch_tokens is None, 8, 8, 8"):
        build(parallel=groups, options=options)
