"""What is done to tensors that converters store in another order than Transformers has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fusedmoe.checkpoint import CheckpointError
from fusedmoe.integrations.transformers.gguf.header import Header

Turn = Callable[[Header, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Join:
    """Tensors of a layer, under their names in the file, that are one in Transformers."""

    parts: tuple[str, ...]
    make: Callable[..., torch.Tensor]


def as_row(header: Header, tensor: torch.Tensor) -> torch.Tensor:
    """[E] -> [1, E]"""
    return tensor[None] if tensor.dim() == 1 else tensor


def stacked(header: Header, *parts: torch.Tensor) -> torch.Tensor:
    """Rows of one below those of another."""
    return torch.cat(parts)


def keys_and_values(header: Header, k_b: torch.Tensor, v_b: torch.Tensor) -> torch.Tensor:
    """What makes keys and values of the latent, as one: [heads * (K + V), R].

    From [heads, R, K], which files keep ready to be applied to queries, and [heads, V, R].
    """
    return torch.cat([k_b.mT, v_b], 1).flatten(0, 1)


def from_pairs(heads: str) -> Turn:
    """Rows of heads that turn with their neighbour, to heads whose halves turn with each other.

    ``heads`` is the key that counts them. Rows [heads * D, ...] or a bias [heads * D].
    """

    def turn(header: Header, rows: torch.Tensor) -> torch.Tensor:
        count = int(header.number(heads))
        if rows.shape[0] % (2 * count):
            raise CheckpointError(
                f"{header.file.path}: {rows.shape[0]} rows of {count} heads do not come in pairs"
            )
        return rows.unflatten(0, (count, -1, 2)).transpose(1, 2).reshape(rows.shape)

    return turn
