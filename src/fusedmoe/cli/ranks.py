"""Processes that torchrun started: their group, their device, and which of them speaks."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Ranks:
    """This process among those of one torchrun."""

    group: ProcessGroup
    device: torch.device

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()


def check_launched(option: str) -> None:
    """Raise ValueError where nothing started several processes."""
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"{option} runs in several processes: torchrun --nproc-per-node N -m fusedmoe.cli ..."
        )


def is_first_rank() -> bool:
    """Whether this process is the one that speaks, also where it is alone."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def launched_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks of this torchrun, for as long as the block lasts; only rank 0 prints.

    ``device`` "cuda" becomes the GPU of this process's local rank; NCCL carries its messages, gloo
    those of CPUs. Raises ValueError for a rank without a GPU.
    """
    backend = "gloo"
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local} has no GPU of its own: torch sees {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    own = not dist.is_initialized()
    if own:
        dist.init_process_group(backend)
    group = dist.group.WORLD
    assert group is not None
    with contextlib.ExitStack() as stack:
        if own:
            stack.callback(dist.destroy_process_group)
        if group.rank() > 0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield Ranks(group, device)
        # Nobody leaves while another is still listening; what layers hold of the group goes first.
        dist.barrier(group)
        gc.collect()
