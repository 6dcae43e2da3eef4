"""Static caches that come back to their place, where a compiled step's CUDA graph looks for them.

``generate(cache_implementation="static")`` makes a cache on each call, layer by layer, between the
prompt's own tensors, and torch.compile's graph of a step knows it by its addresses. Where one of
them is new the graph is recorded again, which takes as long as many steps, and the old one is kept.
Tensors from memory that is the caches' own lie where those of the cache before them lay.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

# What Transformers calls to make a static cache, and what a layer of it calls to make its tensors.
_PREPARE = "_prepare_static_cache"
_ALLOCATORS = ("lazy_initialization", "lazy_initialization_indexer")
# Whose memory is kept.
_MOST_BATCHES = 2

Pools = dict[torch.device, Any]


def keep_static_caches(model: nn.Module) -> None:
    """Let each ``generate`` of ``model``, and below it, make static caches in memory of their own.

    The memory of a freed cache is kept for the next one of its length, for two batch sizes at a
    time, and given to other tensors only where nothing else is left. A cache that is still held
    stays as it is.
    """
    for module in _generating(model):
        if not isinstance(vars(module).get(_PREPARE), CacheMaker):
            vars(module)[_PREPARE] = CacheMaker(module)


def release_static_caches(model: nn.Module) -> None:
    """Undo ``keep_static_caches``."""
    for module in _generating(model):
        if isinstance(vars(module).get(_PREPARE), CacheMaker):
            del vars(module)[_PREPARE]


def _generating(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(type(module), _PREPARE)]


class CacheMaker:
    """Takes the place of ``model``'s method that makes a static cache."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._reset()

    def _reset(self) -> None:
        self._kept: dict[tuple[Any, ...], Pools] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A cache whose layers will ask for their tensors in this one's memory."""
        cache = getattr(type(self.model), _PREPARE)(self.model, *args, **kwargs)
        layers = list(_layers_on_device(cache))
        lengths = tuple(getattr(layer, "max_cache_len", None) for layer in layers)
        pools = self._pools(kwargs.get("batch_size"), lengths)
        for layer in layers:
            for name in _ALLOCATORS:
                if hasattr(layer, name):
                    vars(layer)[name] = _FromPool(layer, name, pools)
        return cache

    def _pools(self, batch: int | None, lengths: tuple[int | None, ...]) -> Pools:
        """The pools of these sizes, by device. After a longer cache no shorter one is made."""
        sizes = batch, lengths
        pools = self._kept.pop(sizes, {})
        others = [kept for kept in self._kept.items() if kept[0][1] == lengths]
        self._kept = {**dict(others[1 - _MOST_BATCHES :]), sizes: pools}
        return pools


def _layers_on_device(cache: Any) -> Iterator[Any]:
    """The layers of a cache, but for one that is kept on the host between its uses."""
    if hasattr(cache, "self_attention_cache"):
        yield from _layers_on_device(cache.self_attention_cache)
        yield from _layers_on_device(cache.cross_attention_cache)
    elif not cache.offloading:
        yield from cache.layers


class _FromPool:
    """Takes the place of a cache layer's method that allocates; it does not keep the layer alive.

    That of a copied layer allocates as ever.
    """

    def __init__(self, layer: Any, name: str, pools: Pools | None) -> None:
        self.layer = weakref.ref(layer)
        self.name = name
        self.pools = pools

    def __reduce__(self) -> tuple[Any, ...]:
        return _FromPool, (self.layer(), self.name, None)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        layer = self.layer()
        allocate = getattr(type(layer), self.name)
        if self.pools is None or torch.compiler.is_compiling():
            allocate(layer, *args, **kwargs)
            return
        given = (*args, *kwargs.values())
        device = next(value.device for value in given if isinstance(value, torch.Tensor))
        with _pool_of(device, self.pools):
            allocate(layer, *args, **kwargs)


def _pool_of(device: torch.device, pools: Pools) -> AbstractContextManager[None]:
    """Allocations of this thread on ``device`` go to its pool; elsewhere nothing changes.

    Nor in a capture, which has a pool of its own.
    """
    if (
        device.type != "cuda"
        or torch.cuda.get_allocator_backend() != "native"
        or torch.cuda.is_current_stream_capturing()
    ):
        return nullcontext()
    if device not in pools:
        with torch.cuda.device(device):
            pools[device] = torch.cuda.MemPool(use_on_oom=True)
    return torch.cuda.use_mem_pool(pools[device], device)
