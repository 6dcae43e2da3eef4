"""What travels with rows: weights, ids, scales, adapter ids; and how rows are made to travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch

from fusedmoe.distributed.collectives import pack_rows, unpack_rows
from fusedmoe.kernels.quantize import quantize_rows
from fusedmoe.quantization.config import FusedMoEQuantConfig

QuantizeInput = Callable[
    [torch.Tensor, FusedMoEQuantConfig], tuple[torch.Tensor, torch.Tensor | None]
]
"""Rows [T, H] as the experts take them, and their scales: [T, n], or one number for all rows."""


class LoRAContext(Protocol):
    """Which adapter each token uses: int32 [T or more], -1 for none.

    Between prepare and finalize it holds the ids of the rows that the experts get; before and
    after, those of this rank's tokens.
    """

    token_lora_mapping: torch.Tensor


def quantize_input(
    a1: torch.Tensor, quant_config: FusedMoEQuantConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows in the activation format of ``quant_config``; as they are where it has none.

    One scale for all rows, found from this rank's rows alone, becomes one per row.
    """
    key = quant_config.a1.key
    if key is None:
        return a1, None
    rows, scale = quantize_rows(a1, key, quant_config.a1.scale)
    if quant_config.a1.scale is None and scale.dim() < 2:
        scale = scale.reshape(1, 1).expand(a1.shape[0], 1)
    return rows, scale


class Luggage(NamedTuple):
    """Tensors [T, ...] that travel beside the activations; ``scale`` is among them if per row."""

    tensors: list[torch.Tensor]
    scale: torch.Tensor | None
    has_lora_ids: bool

    def packed(self) -> torch.Tensor:
        return pack_rows(self.tensors)


def is_per_row(scale: torch.Tensor | None) -> bool:
    """Whether a scale travels with its rows ([T, n]); one number for all rows does not.

    Decided by dimensions alone, so that ranks with one row or none decide alike.
    """
    return scale is not None and scale.dim() >= 2


class CarriesLuggage:
    """Packs what goes with this rank's tokens, and unpacks what came with those of others."""

    name: ClassVar[str]
    carries_lora_ids: ClassVar[bool] = True
    lora_context: LoRAContext | None = None
    _lora_ids_before: torch.Tensor | None = None

    def set_lora_context(self, ctx: LoRAContext | None) -> None:
        """Send the adapter ids of ``ctx`` along with the tokens; None stops it.

        Raises ValueError where there is no room for them.
        """
        if ctx is not None and not self.carries_lora_ids:
            raise ValueError(f"{self.name} cannot send adapter ids along with the tokens")
        self.lora_context = ctx

    def luggage(self, tensors: Sequence[torch.Tensor], scale: torch.Tensor | None) -> Luggage:
        """What travels beside the activations: ``tensors`` [T, n], scales, and adapter ids last."""
        beside = list(tensors)
        if is_per_row(scale):
            assert scale is not None
            beside.append(scale)
        lora_ids = self._local_lora_ids(tensors[0].shape[0])
        if lora_ids is not None:
            beside.append(lora_ids)
        return Luggage(beside, scale, lora_ids is not None)

    def unpacked(
        self, luggage: Luggage, packed: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """The tensors and the scale of the rows that arrived; tells the LoRA context their ids."""
        found = unpack_rows(packed, luggage.tensors)
        if luggage.has_lora_ids:
            assert self.lora_context is not None
            self._lora_ids_before = self.lora_context.token_lora_mapping
            self.lora_context.token_lora_mapping = found.pop()
        scale = found.pop() if is_per_row(luggage.scale) else luggage.scale
        return found, scale

    def restore_lora_ids(self) -> None:
        """This rank's own adapter ids again, once the experts have run."""
        if self.lora_context is not None and self._lora_ids_before is not None:
            self.lora_context.token_lora_mapping = self._lora_ids_before
            self._lora_ids_before = None

    def _local_lora_ids(self, num_tokens: int) -> torch.Tensor | None:
        if self.lora_context is None:
            return None
        ids = self.lora_context.token_lora_mapping
        if ids.dim() != 1 or ids.shape[0] < num_tokens or ids.dtype is not torch.int32:
            raise ValueError(
                f"token_lora_mapping must be int32 [{num_tokens} or more], got {ids.dtype} "
                f"{tuple(ids.shape)}"
            )
        return ids[:num_tokens]
