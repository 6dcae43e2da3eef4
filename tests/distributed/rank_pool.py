"""Processes that are started once and run many cases: importing torch is what takes time.

``RankPool(4).run(function, *args)`` calls a module-level function on every rank of a gloo (or NCCL)
group and returns the results in rank order; what one rank raises fails the test with its traceback.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_SECONDS = 120.0


class RankPool:
    def __init__(self, size: int, folder: str, device: str = "cpu") -> None:
        context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
        if device == "cpu":
            # Forked from a process that has imported all of it, a rank starts in no time.
            context.set_forkserver_preload(["distributed_preload"])
        self.size = size
        self._pipes = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, size, folder, device), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_SECONDS):
                raise AssertionError(f"rank {rank} has not answered for {_SECONDS} s")
            answers.append(pipe.recv())
        failed = [f"rank {r}:\n{text}" for r, (ok, text) in enumerate(answers) if not ok]
        if failed:
            raise AssertionError("\n".join(failed))
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def _serve(pipe: Any, rank: int, size: int, folder: str, device: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    while True:
        try:
            module, name, args = pipe.recv()
        except EOFError:
            break
        try:
            with torch.inference_mode():
                answer = (True, getattr(importlib.import_module(module), name)(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
    dist.destroy_process_group()
