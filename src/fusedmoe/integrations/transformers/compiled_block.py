"""What torch.compile sees of an accelerated block: one operator.

Traced through, a block leaves some 450 guards, which the host checks before each call of the
compiled program: a tenth of a millisecond for each block, more than a decode step's experts take on
a GPU. The operator leaves a tenth of them. What is looked at while tracing is looked at on one path
only: a second one to the same object is a guard of Python, dearer than ten others.

T tokens, H hidden, N the width of what is beside.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import nn

# Modules, each with the names of the parameters and buffers that it holds itself.
Owners = tuple[tuple[nn.Module, tuple[str, ...]], ...]


class OpaqueBlock(Protocol):
    """A block that can run as one operator."""

    owners: Owners

    def can_be_opaque(self) -> bool:
        """Whether a call depends on nothing but x and the tensors of ``owners``."""

    def compute(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, H] -> [T, H], and what stands beside it, [T, N]; neither is a view of x."""

    def beside_like(self, x: torch.Tensor) -> torch.Tensor:
        """An uninitialised [T, N] of the dtype that ``compute`` gives."""


# An operator takes tensors and numbers, so a block goes by its number. Blocks that are gone leave.
_numbers = itertools.count()
_blocks: WeakValueDictionary[int, OpaqueBlock] = WeakValueDictionary()


def number_block(block: OpaqueBlock) -> int:
    """A new number by which ``block`` is found for as long as it lives."""
    number = next(_numbers)
    _blocks[number] = block
    return number


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def can_be_opaque(number: int) -> bool:
    """Asked once, while a call is traced: the answer is a constant without guards.

    An exported program outlives the numbers. (Traced itself, ``is_exporting`` is always true in
    torch 2.11.)
    """
    return not torch.compiler.is_exporting() and _blocks[number].can_be_opaque()


def tensors_of(owners: Owners) -> list[torch.Tensor | None]:
    """The parameters and buffers, without the cost of a module's own attribute look-up."""
    return [
        owner._parameters[name] if name in owner._parameters else owner._buffers.get(name)
        for owner, names in owners
        for name in names
    ]


@torch.library.custom_op("fusedmoe::accelerated_block", mutates_args=())
def accelerated_block(
    x: torch.Tensor, tensors: Sequence[torch.Tensor | None], number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block ``number`` of x [T, H], with ``tensors`` in the place of those of its owners."""
    block = _blocks[number]
    with _in_place(block.owners, tensors):
        return block.compute(x)


@accelerated_block.register_fake
def _(
    x: torch.Tensor, tensors: Sequence[torch.Tensor | None], number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), _blocks[number].beside_like(x)


@contextmanager
def _in_place(owners: Owners, tensors: Sequence[torch.Tensor | None]) -> Iterator[None]:
    """``tensors`` stand where ``owners`` keep theirs, as those of a functional call do."""
    places = [(owner, name) for owner, names in owners for name in names]
    changed: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for (owner, name), own, given in zip(places, tensors_of(owners), tensors, strict=True):
        if given is None or own is None or given.data_ptr() == own.data_ptr():
            continue
        kept: Any = owner._parameters if name in owner._parameters else owner._buffers
        changed.append((kept, name, own))
        kept[name] = given
    try:
        yield
    finally:
        for kept, name, own in changed:
            kept[name] = own
