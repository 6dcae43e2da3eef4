"""Static caches of one call after another lie in the same place."""

from __future__ import annotations

import pytest
import torch

import fusedmoe
from fusedmoe.integrations.transformers.static_caches import keep_static_caches

pytest.importorskip("transformers")
from hf import tiny_models

pytestmark = pytest.mark.gpu


def places(cache):
    return [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]


def test_the_next_cache_lies_where_the_last_one_lay():
    """Whatever else was allocated meanwhile; one that is still held keeps its place."""
    model = tiny_models.build(tiny_models.by_name("qwen3_moe")).to("cuda").eval()
    keep_static_caches(model)

    @torch.no_grad()
    def filled():
        cache = model._prepare_static_cache(
            cache_implementation="static",
            batch_size=2,
            max_cache_len=64,
            prefill_chunk_size=None,
            model_kwargs={},
        )
        model(torch.arange(16, device="cuda").reshape(2, 8), past_key_values=cache)
        return cache

    filled()
    first = places(filled())
    others = []
    for size in (64, 1 << 12, 1 << 20, 3 << 20):
        others.append(torch.zeros(size, device="cuda", dtype=torch.uint8))
        torch.cuda.empty_cache()
        assert places(filled()) == first
    held = filled()
    beside = filled()
    assert places(held) == first
    assert not set(sum(places(held), ())) & set(sum(places(beside), ()))
    assert held.layers[0].keys.abs().sum() > 0


def test_a_compiled_step_is_recorded_for_no_call_after_the_second(monkeypatch):
    model = tiny_models.build(tiny_models.by_name("qwen3_moe")).to("cuda", torch.bfloat16).eval()
    fusedmoe.accelerate(model)
    recorded = []
    begin = torch.cuda.CUDAGraph.capture_begin

    def counted(graph, *args, **kwargs):
        recorded.append(graph)
        return begin(graph, *args, **kwargs)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", counted)

    def generated(length):
        prompt = torch.arange(length, device="cuda")[None] % 16 + 2
        model.generate(
            prompt,
            max_length=40,
            min_length=40,
            do_sample=False,
            cache_implementation="static",
        )

    for _ in range(4):
        generated(8)
    recorded.clear()
    kept = []
    for length in (8, 8, 8):
        kept.append(torch.empty(length << 16, device="cuda"))
        generated(length)
    assert recorded == []
