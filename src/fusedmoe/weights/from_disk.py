"""A layer's experts from a checkpoint folder, each rank reading the bytes of its own alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fusedmoe.checkpoint import Checkpoint, TensorReader

if TYPE_CHECKING:
    from fusedmoe.weights.routed_experts import RoutedExperts


def load_local_experts(
    layer: RoutedExperts, checkpoint: Checkpoint | TensorReader, prefix: str | None = None
) -> int:
    """Load this rank's experts from a checkpoint folder; returns how many bytes were read.

    They are the tensors called ``prefix.<...>`` (None: the layer's own prefix). Tensors of experts
    that live on other ranks are not read; of one that holds all experts, [experts, ...], only the
    rows of this rank's. Raises ValueError for names that fit nothing and where something is missing
    afterwards; the layer then refuses to run, as after ``load_weights``.
    """
    reader = checkpoint if isinstance(checkpoint, TensorReader) else TensorReader(checkpoint)
    start = f"{layer.prefix if prefix is None else prefix}."
    names = [name for name in reader.checkpoint.tensors if name.startswith(start)]
    if not names:
        raise ValueError(f"{reader.checkpoint.folder} has no tensor called {start}...")
    layer.loading_begins()
    with layer.unusable_on_error():
        count = sum(_load(layer, reader, name, name.removeprefix(start)) for name in names)
    layer.loading_done()
    layer.check_loaded()
    return count


def _load(layer: RoutedExperts, reader: TensorReader, name: str, short: str) -> int:
    """Bytes read of one tensor of the file."""
    experts, is_stack = layer.local_experts_of(short)
    if not experts:
        return 0
    shape = reader.checkpoint.tensors[name].shape
    by_expert = len(shape) >= 1 and shape[0] == layer.expert_map_manager.num_logical_experts
    if not (is_stack and by_expert):
        tensor = reader(name)  # one expert's, one for all, or rows of all below each other
        for expert in experts if is_stack and not shape else (None,):
            layer.load_tensor(short, tensor, expert=expert)
        return _bytes(tensor)
    unread, count = reader.slice(name), 0
    for expert in experts:
        tensor = unread[expert : expert + 1]
        layer.load_tensor(short, tensor[0], expert=expert)
        count += _bytes(tensor)
    return count


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
