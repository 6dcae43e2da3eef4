"""What torch.compile sees of an accelerated block: one operator.

Traced through, a block leaves some 450 guards, which the host checks before each call of the
compiled program: a tenth of a millisecond for each block, more than a decode step's experts take on
a GPU. The operator leaves a tenth of them, below a module, so that torch.compile skips them until a
dictionary there changes. For that they are about nothing but modules, dictionaries, numbers and
names; a second path to an object would be a guard of Python, dearer than ten others.

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

# Modules by a key, and by the same key the names of the tensors that each holds itself. A module in
# a tuple would be looked at anew before each call.
Owners = dict[str, nn.Module]
Names = tuple[tuple[str, tuple[str, ...]], ...]


class OpaqueBlock(Protocol):
    """A block that can run as one operator."""

    owners: Owners
    names: Names

    def can_be_opaque(self) -> bool:
        """Whether a call depends on nothing but x and the tensors of ``owners``."""

    def compute(self, x: torch.Tensor, *, one_stream: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, H] -> [T, H], and what stands beside it, [T, N]; neither is a view of x.

        ``one_stream``: the compiler's CUDA graphs do not know the memory of another one.
        """

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


def owners_in(block: nn.Module) -> tuple[Owners, Names]:
    """``block`` and the modules below it that hold parameters or buffers."""
    held = {
        str(index): (module, (*module._parameters, *module._buffers))
        for index, module in enumerate(block.modules())
    }
    owners = {key: module for key, (module, names) in held.items() if names}
    return owners, tuple((key, held[key][1]) for key in owners)


def tensors_of(owners: Owners, names: Names) -> list[torch.Tensor | None]:
    """The parameters and buffers, without the cost of a module's own attribute look-up."""
    return [
        owner._parameters[name] if name in owner._parameters else owner._buffers.get(name)
        for owner, name in _places(owners, names)
    ]


def _places(owners: Owners, names: Names) -> list[tuple[nn.Module, str]]:
    return [(owners[key], name) for key, own in names for name in own]


@torch.library.custom_op("fusedmoe::accelerated_block", mutates_args=())
def accelerated_block(
    x: torch.Tensor, tensors: Sequence[torch.Tensor | None], number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block ``number`` of x [T, H], with ``tensors`` in the place of those of its owners."""
    block = _blocks[number]
    with _in_place(block.owners, block.names, tensors):
        return block.compute(x, one_stream=True)


@accelerated_block.register_fake
def _(
    x: torch.Tensor, tensors: Sequence[torch.Tensor | None], number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), _blocks[number].beside_like(x)


@contextmanager
def _in_place(
    owners: Owners, names: Names, tensors: Sequence[torch.Tensor | None]
) -> Iterator[None]:
    """``tensors`` stand where ``owners`` keep theirs, as those of a functional call do."""
    changed: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    places = _places(owners, names)
    for (owner, name), own, given in zip(places, tensors_of(owners, names), tensors, strict=True):
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
