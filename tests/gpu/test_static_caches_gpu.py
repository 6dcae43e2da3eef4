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
    def filled(batch=2):
        cache = model._prepare_static_cache(
            cache_implementation="static",
            batch_size=batch,
            max_cache_len=64,
            prefill_chunk_size=None,
            model_kwargs={},
        )
        tokens = torch.arange(8 * batch, device="cuda").reshape(batch, 8)
        model(tokens, past_key_values=cache)
        return cache

    filled()
    first = places(filled())
    others = []
    for size in (64, 1 << 12, 1 << 20, 3 << 20):
        others.append(torch.zeros(size, device="cuda", dtype=torch.uint8))
        torch.cuda.empty_cache()
        filled(batch=1)
        assert places(filled()) == first
    held = filled()
    beside = filled()
    assert places(held) == first
    assert not set(sum(places(held), ())) & set(sum(places(beside), ()))
    assert held.layers[0].keys.abs().sum() > 0


def test_a_warm_model_records_no_step_again(monkeypatch):
    model = tiny_models.build(tiny_models.by_name("qwen3_moe")).to("cuda", torch.bfloat16).eval()
    fusedmoe.accelerate(model)
    recorded = []
    begin = torch.cuda.CUDAGraph.capture_begin

    def counted(graph, *args, **kwargs):
        recorded.append(graph)
        return begin(graph, *args, **kwargs)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", counted)

    def generated():
        return model.generate(
            torch.arange(8, device="cuda")[None] + 2,
            max_length=40,
            min_length=40,
            do_sample=False,
            cache_implementation="static",
        )

    wanted = generated()
    for _ in range(3):
        generated()
    recorded.clear()
    others = []
    for size in (1 << 10, 1 << 20, 1 << 25):
        others.append(torch.empty(size, device="cuda"))
        assert torch.equal(generated(), wanted)
    assert recorded == []
