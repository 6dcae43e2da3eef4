"""What torch.compile sees of an accelerated block: one operator.

Traced through, a block leaves some 450 guards, which the host checks before each call of the
compiled program: a tenth of a millisecond for each block, more than a decode step's experts take on
a GPU. The operator leaves a tenth of them, and those are skipped.

T tokens, H hidden, N the width of what is beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from fusedmoe.runner.opaque import Names, Opaque, Owners, in_place, part_of


class OpaqueBlock(Opaque, Protocol):
    """A block that can run as one operator, on the tensors of ``owners``."""

    owners: Owners
    names: Names

    def compute(self, x: torch.Tensor, *, one_stream: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, H] -> [T, H], and what stands beside it, [T, N]; neither is a view of x.

        ``one_stream``: the compiler's CUDA graphs do not know the memory of another one.
        """

    def beside_like(self, x: torch.Tensor) -> torch.Tensor:
        """An uninitialised [T, N] of the dtype that ``compute`` gives."""


@torch.library.custom_op("fusedmoe::accelerated_block", mutates_args=())
def accelerated_block(
    x: torch.Tensor, tensors: Sequence[torch.Tensor | None], number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of block ``number`` for x [T, H], with ``tensors`` in place of its owners' own."""
    block: OpaqueBlock = part_of(number)
    with in_place(block.owners, block.names, tensors):
        output, beside = block.compute(x, one_stream=True)
    return output.contiguous(), beside.contiguous()


@accelerated_block.register_fake
def _(
    x: torch.Tensor, tensors: Sequence[torch.Tensor | None], number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    block: OpaqueBlock = part_of(number)
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    return output, block.beside_like(x)
