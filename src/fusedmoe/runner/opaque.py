"""What torch.compile sees of a part of a model that is one operator: its number and its tensors.

An operator takes tensors and numbers, so what runs it is found by a number that it alone has, for
as long as it lives. Its parameters and buffers are given with each call: a compiler has to know
which memory a graph reads.

What is looked at while a call is traced becomes guards, which the host checks before each call of
the compiled program. Those below a module are skipped until a dictionary there changes, if they are
about nothing but modules, dictionaries, numbers and names; a second path to an object is a guard of
Python, dearer than ten others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import nn

# Modules by a key, and by the same key the names of the tensors that each holds itself. Modules in
# a tuple would be guarded again before each call.
Owners = dict[str, nn.Module]
Names = tuple[tuple[str, tuple[str, ...]], ...]


class Opaque(Protocol):
    """What can run as one operator."""

    def can_be_opaque(self) -> bool:
        """Whether a call depends on nothing but its inputs and the tensors given with it."""


_numbers = itertools.count()
_parts: WeakValueDictionary[int, Any] = WeakValueDictionary()


def new_number(part: Opaque) -> int:
    """A new number by which ``part`` is found for as long as it lives."""
    number = next(_numbers)
    _parts[number] = part
    return number


def part_of(number: int) -> Any:
    """What has this number."""
    return _parts[number]


def can_be_opaque(number: int) -> bool:
    """Asked once, while a call is traced: the answer is a constant without guards.

    An exported program outlives the numbers. (Traced itself, ``is_exporting`` is always true in
    torch 2.11.)
    """
    return not torch.compiler.is_exporting() and bool(_parts[number].can_be_opaque())


# What ``torch.compiler.assume_constant_result`` does; but that imports the whole compiler and
# Triton, which costs everybody who builds a layer more than a second.
can_be_opaque._dynamo_marked_constant = True  # type: ignore[attr-defined]


def owners_in(*modules: nn.Module) -> tuple[Owners, Names]:
    """The modules that hold parameters or buffers, among ``modules`` and those below them."""
    everyone = (owner for module in modules for owner in module.modules())
    held = {
        str(index): (owner, (*owner._parameters, *owner._buffers))
        for index, owner in enumerate(everyone)
    }
    owners = {key: owner for key, (owner, names) in held.items() if names}
    return owners, tuple((key, held[key][1]) for key in owners)


def tensors_of(owners: Owners, names: Names) -> list[torch.Tensor | None]:
    """The parameters and buffers, without the cost of a module's own attribute look-up."""
    return [
        owner._parameters[name] if name in owner._parameters else owner._buffers.get(name)
        for key, own in names
        for owner in (owners[key],)
        for name in own
    ]


def are_plain(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether none is of a subclass of Tensor, whose calls may do more than an operator can."""
    return all(type(tensor) in (torch.Tensor, nn.Parameter, type(None)) for tensor in tensors)


def _places(owners: Owners, names: Names) -> list[tuple[nn.Module, str]]:
    return [(owners[key], name) for key, own in names for name in own]


@contextmanager
def in_place(
    owners: Owners, names: Names, tensors: Sequence[torch.Tensor | None]
) -> Iterator[bool]:
    """Put ``tensors`` in the place of those of ``owners`` meanwhile, as a functional call does;
    yields whether any is another one."""
    changed: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    places = _places(owners, names)
    for (owner, name), own, given in zip(places, tensors_of(owners, names), tensors, strict=True):
        if given is None or own is None or given.data_ptr() == own.data_ptr():
            continue
        kept: Any = owner._parameters if name in owner._parameters else owner._buffers
        changed.append((kept, name, own))
        kept[name] = given
    try:
        yield bool(changed)
    finally:
        for kept, name, own in changed:
            kept[name] = own
