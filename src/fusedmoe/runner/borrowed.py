"""Tensors that the router borrows from other parts of the layer, as a gate's correction bias.

Moving a layer, materialising it or loading it by assignment may put new tensors in the place of the
old ones, in each module by itself: the router is then given its owner's again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from fusedmoe.router.routers import SpecRouter

logger = logging.getLogger(__name__)


class BorrowedTensors:
    """Of a layer's ``router``: names of tensors, and the paths in the layer that lead to them."""

    def __init__(self, layer: nn.Module) -> None:
        own = {id(tensor): name for name, tensor in _held_by(layer.router)}
        everyones = chain(
            layer.named_parameters(remove_duplicate=False),
            layer.named_buffers(remove_duplicate=False),
        )
        self.paths = {
            own[id(tensor)]: path
            for path, tensor in everyones
            if id(tensor) in own and not path.startswith("router.")
        }

    def renew(self, layer: nn.Module) -> None:
        """Give the router what the owners hold now."""
        router: Any = layer.router
        for name, path in self.paths.items():
            owner, _, key = path.rpartition(".")
            held = router._parameters if name in router._parameters else router._buffers
            held[name] = getattr(layer.get_submodule(owner), key)

    @contextmanager
    def renewed(self, layer: nn.Module) -> Iterator[None]:
        """``renew`` after what is done inside. Says so where memory has come to a tensor of the
        rule that no ``state_dict`` of the layer will fill."""
        names = [name for name, tensor in _held_by(layer.router) if tensor.is_meta]
        yield
        self.renew(layer)
        if not isinstance(layer.router, SpecRouter):
            return
        for name in names:
            if name not in self.paths and not getattr(layer.router, name).is_meta:
                logger.warning(
                    "the router's %s has memory without values: no part of the layer owns it, so "
                    "give it its owner's again, as in layer.router.%s = gate.bias",
                    name,
                    name,
                )


def _held_by(router: Any) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers of the router itself, by name."""
    if not isinstance(router, nn.Module):
        return []
    return [*router.named_parameters(recurse=False), *router.named_buffers(recurse=False)]


def renew_borrowed(layer: Any, _incompatible_keys: object) -> None:
    """A hook for after ``load_state_dict``."""
    layer.borrowed.renew(layer)
