"""Static caches in memory of their own: which layers ask for it, and that nothing else changes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import fusedmoe
from fusedmoe.integrations.transformers import static_caches
from fusedmoe.integrations.transformers.static_caches import keep_static_caches

pytest.importorskip("transformers")
from transformers import StaticCache

from hf import tiny_models

# The tensors' makers: one a layer, sliding windows, two (keys and an indexer's keys), two (a linear
# layer's states) and one, a decoder's two caches.
NAMES = {
    "qwen3_moe": 2,
    "gpt_oss": 2,
    "deepseek_v32": 4,
    "qwen3_next": 3,
    "nllb_moe": 4,
}


def build(name="qwen3_moe"):
    return tiny_models.build(tiny_models.by_name(name)).eval()


@torch.no_grad()
def generate(model, cache="static", tokens=6, batch=2):
    prompt = torch.arange(8 * batch).reshape(batch, 8) % 16 + 2
    return model.generate(
        prompt,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        cache_implementation=cache,
        return_dict_in_generate=True,
    )


@pytest.fixture
def allocations(monkeypatch):
    """(the pools, the device) of each allocation that was asked for from memory of its own."""
    seen = []

    @contextmanager
    def seen_pool(device, pools):
        seen.append((pools, device))
        yield

    monkeypatch.setattr(static_caches, "_pool_of", seen_pool)
    return seen


def pools_in(allocations):
    return len({id(pools) for pools, _ in allocations})


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_asks_and_tokens_are_the_same(name, allocations):
    model = build(name)
    wanted = generate(model).sequences
    keep_static_caches(model)
    assert torch.equal(generate(model).sequences, wanted)
    assert len(allocations) == NAMES[name]
    assert pools_in(allocations) == 1


def test_memory_is_kept_for_two_batch_sizes_of_the_last_length(allocations):
    model = build()
    keep_static_caches(model)

    def memory(tokens, batch):
        allocations.clear()
        generate(model, tokens=tokens, batch=batch)
        assert pools_in(allocations) == 1
        return allocations[0][0]

    of_two, of_one = memory(6, 2), memory(6, 1)
    assert of_two is not of_one
    assert memory(4, 2) is of_two  # as long as the one before: no cache is shorter
    assert memory(6, 1) is of_one
    memory(6, 3)
    assert memory(6, 1) is of_one
    assert memory(6, 2) is not of_two
    longer = memory(9, 1)
    assert longer is not of_one
    assert memory(6, 1) is longer


def test_caches_of_another_kind_are_left_alone(allocations):
    model = build()
    keep_static_caches(model)
    generate(model, None)
    assert allocations == []
    offloaded = SimpleNamespace(offloading=True, layers=[object()])
    assert list(static_caches._layers_on_device(offloaded)) == []


def test_a_cache_dies_with_its_call(monkeypatch):
    """One that waited for the garbage collector would keep the next one from its place."""
    made = []
    init = StaticCache.__init__

    def remembered(cache, *args, **kwargs):
        init(cache, *args, **kwargs)
        made.append(weakref.ref(cache))

    monkeypatch.setattr(StaticCache, "__init__", remembered)
    model = build()
    keep_static_caches(model)
    gc.collect()
    gc.disable()
    try:
        generate(model)
        assert [ref() for ref in made] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_of_models_and_of_caches(twin_of, allocations):
    model = build()
    keep_static_caches(model)
    result = generate(model)
    twin = twin_of(model)
    assert torch.equal(generate(twin).sequences, result.sequences)
    assert pools_in(allocations) == 2
    unfilled = twin_of(model._prepare_static_cache("static", 2, 16, None, {}))
    unfilled.update(torch.ones(2, 2, 1, 16), torch.ones(2, 2, 1, 16), 0)
    assert unfilled.layers[0].keys.sum() == 2 * 2 * 16
    filled = twin_of(result.past_key_values)
    torch.testing.assert_close(filled.layers[0].keys, result.past_key_values.layers[0].keys)


def test_a_compiled_prompt(allocations):
    """Traced, a layer makes its tensors as it would alone."""
    model = build()
    keep_static_caches(model)
    tokens = torch.arange(8)[None] + 2
    torch._dynamo.reset()

    @torch.no_grad()
    def logits(call):
        cache = model._prepare_static_cache("static", 1, 16, None, {})
        return call(tokens, past_key_values=cache, use_cache=True).logits

    wanted = logits(model)
    asked = len(allocations)
    got = logits(torch.compile(model, backend="eager"))
    torch.testing.assert_close(got, wanted)
    assert len(allocations) == asked


def test_accelerate_keeps_caches_and_restore_does_not(allocations):
    model = fusedmoe.accelerate(build())
    generate(model)
    assert len(allocations) == 2
    generate(fusedmoe.restore(model))
    assert len(allocations) == 2
    assert "_prepare_static_cache" not in vars(model)
