"""RoutedExpertsCapturer: which experts each token met, layer by layer."""

from __future__ import annotations

import torch

from fusedmoe.router.base import CaptureFunction


class RoutedExpertsCapturer:
    """Keeps the logical ids of one forward pass on the device, and copies them out on request.

    ``device_ids`` int32 [max_tokens, num_layers, top_k]; rows not written hold -1. Each layer's
    router gets ``hook(layer)`` by ``set_capture_fn``; a capture is one copy on the device, so it
    may sit in a CUDA graph.

    A snapshot is uint8 for up to 256 experts, else uint16, where -1 (an identity expert, an
    unselectable slot) becomes the largest value. ``empty_slots`` keeps that value free of
    experts, by taking the wider dtype one expert earlier.
    """

    def __init__(
        self,
        max_tokens: int,
        num_layers: int,
        top_k: int,
        num_experts: int,
        device: torch.device | str,
        *,
        empty_slots: bool = False,
    ) -> None:
        if min(max_tokens, num_layers, top_k) < 1:
            raise ValueError(
                f"max_tokens {max_tokens}, num_layers {num_layers} and top_k {top_k} must be at "
                "least 1"
            )
        codes = num_experts + int(empty_slots)
        if num_experts < 1 or codes > 65536:
            raise ValueError(f"cannot number {num_experts} experts in 16 bits")
        self.num_experts = num_experts
        self.snapshot_dtype = torch.uint8 if codes <= 256 else torch.uint16
        self.device_ids = torch.full(
            (max_tokens, num_layers, top_k), -1, dtype=torch.int32, device=device
        )

    def hook(self, layer: int, rows: slice | None = None) -> CaptureFunction:
        """The function for one layer's router.

        ``rows`` picks this rank's tokens where the router sees those of several.
        """
        self._check_layer(layer)

        def capture(topk_ids: torch.Tensor) -> None:
            self.capture(layer, topk_ids if rows is None else topk_ids[rows])

        return capture

    def capture(self, layer: int, topk_ids: torch.Tensor) -> None:
        """Keep topk_ids int [T, >= top_k] of ``layer``; slots beyond top_k are left out."""
        self._check_layer(layer)
        max_tokens, _, top_k = self.device_ids.shape
        fits = topk_ids.dim() == 2 and topk_ids.shape[0] <= max_tokens
        if not fits or topk_ids.shape[1] < top_k:
            raise ValueError(
                f"topk_ids must be [T <= {max_tokens}, K >= {top_k}], got {tuple(topk_ids.shape)}"
            )
        self.device_ids[: topk_ids.shape[0], layer].copy_(topk_ids[:, :top_k])

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.device_ids.shape[1]:
            raise ValueError(f"layer {layer} does not lie in [0, {self.device_ids.shape[1]})")

    def snapshot(self, num_tokens: int) -> torch.Tensor:
        """Host copy [num_tokens, num_layers, top_k] of what the layers captured last.

        Waits for the device. Raises ValueError where a slot is empty and no value is free to say
        so.
        """
        if not 0 <= num_tokens <= self.device_ids.shape[0]:
            raise ValueError(
                f"num_tokens {num_tokens} does not lie in [0, {self.device_ids.shape[0]}]"
            )
        ids = self.device_ids[:num_tokens].cpu()
        largest = torch.iinfo(self.snapshot_dtype).max
        empty = ids < 0
        if self.num_experts > largest and bool(empty.any()):
            raise ValueError(
                f"a slot is empty, and all {largest + 1} values of {self.snapshot_dtype} name "
                "experts: make the capturer with empty_slots=True"
            )
        return ids.masked_fill(empty, largest).to(self.snapshot_dtype)

    def clear(self) -> None:
        """Forget everything, on the device, without waiting."""
        self.device_ids.fill_(-1)
