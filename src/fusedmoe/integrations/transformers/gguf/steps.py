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


def less_one(header: Header, weight: torch.Tensor) -> torch.Tensor:
    """The weight of a norm that adds 1 to it, which files have added."""
    return weight.float() - 1


def log_of_decay(header: Header, decay: torch.Tensor) -> torch.Tensor:
    """From -exp(A)."""
    return decay.neg().log()


def with_channel(header: Header, kernel: torch.Tensor) -> torch.Tensor:
    """[C, W] -> [C, 1, W]"""
    return kernel[:, None]


def flat(header: Header, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten()


def one_after_the_other(*turns: Turn) -> Turn:
    def turn(header: Header, tensor: torch.Tensor) -> torch.Tensor:
        for one in turns:
            tensor = one(header, tensor)
        return tensor

    return turn


def by_key_head(axis: int = 0, *, behind_keys: bool = False) -> Turn:
    """Value heads in turns over key heads, to those of each key head together.

    ``behind_keys``: queries and keys come before them along ``axis``.
    """

    def turn(header: Header, tensor: torch.Tensor) -> torch.Tensor:
        keys, values = header.number("ssm.group_count"), header.number("ssm.time_step_rank")
        before = 2 * keys * header.number("ssm.state_size") if behind_keys else 0
        first, rest = tensor.split([before, tensor.shape[axis] - before], axis)
        heads = rest.unflatten(axis, (values // keys, keys, -1)).transpose(axis, axis + 1)
        return torch.cat([first, heads.flatten(axis, axis + 2)], axis)

    return turn


def of_each_key_head(header: Header, qkv: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Queries, keys, values and gates one after the other, to all four of each key head."""
    keys = header.number("ssm.group_count")
    size = keys * header.number("ssm.state_size")
    parts = (*qkv.split([size, size, qkv.shape[0] - 2 * size]), gate)
    return torch.cat([part.unflatten(0, (keys, -1)) for part in parts], 1).flatten(0, 1)


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
        count = header.count(heads)
        if rows.shape[0] % (2 * count):
            raise CheckpointError(
                f"{header.file.path}: {rows.shape[0]} rows of {count} heads do not come in pairs"
            )
        return rows.unflatten(0, (count, -1, 2)).transpose(1, 2).reshape(rows.shape)

    return turn
