"""Processes that are started once and run many cases: importing torch is what takes time.

``RankPool(4).run(function, *args)`` calls a module-level function on every rank of a gloo (or NCCL)
group and returns the results in rank order; what one rank raises fails the test with its traceback.
Where there are fewer GPUs than ranks, they share them: by turns, with gloo for what NCCL would do.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, forkserver
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

_SECONDS = 60.0
_SECONDS_AFTER_A_FAILURE = 3.0


class RankPool:
    """``size`` processes; new ones where the last test left theirs waiting for each other."""

    def __init__(self, size: int, folder: str, device: str = "cpu") -> None:
        self.size = size
        self._folder = folder
        self._device = device
        self._starts = 0
        self._ranks: list[tuple[Any, Any]] = []

    def _start(self) -> None:
        on_cpu = self._device == "cpu"
        context = multiprocessing.get_context("forkserver" if on_cpu else "spawn")
        if on_cpu:
            # Forked from a process that has imported all of it, a rank starts in no time. That
            # process knows no sys.path of ours, and passes over what it cannot import.
            context.set_forkserver_preload(["distributed_preload"])
            with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
                forkserver.ensure_running()
        self._starts += 1
        store = f"{self._folder}/store{self._starts}"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.size, store, self._device), daemon=True
            )
            process.start()
            theirs.close()
            self._ranks.append((ours, process))

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if any(not process.is_alive() for _, process in self._ranks):
            self.close()
        if not self._ranks:
            self._start()
        for pipe, _ in self._ranks:
            pipe.send((function.__module__, function.__qualname__, args))
        answers = self._answers()
        failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in answers.items() if not ok]
        silent = [str(rank) for rank in range(self.size) if rank not in answers]
        if silent:
            self.close()
            failed.append(f"no answer from rank {', '.join(silent)}")
        if failed:
            raise AssertionError("\n".join(failed))
        return [answers[rank][1] for rank in range(self.size)]

    def _answers(self) -> dict[int, tuple[bool, Any]]:
        """By rank; the others are not waited for long once one has failed."""
        waiting = {pipe: rank for rank, (pipe, _) in enumerate(self._ranks)}
        found: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + _SECONDS
        while waiting and (left := end - time.monotonic()) > 0:
            for pipe in connection.wait(list(waiting), left):
                rank = waiting.pop(pipe)
                try:
                    found[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    found[rank] = (False, "the process has ended")
                    self._ranks[rank][1].join(timeout=1)
                if not found[rank][0]:
                    end = min(end, time.monotonic() + _SECONDS_AFTER_A_FAILURE)
        return found

    def close(self) -> None:
        for pipe, _ in self._ranks:
            pipe.close()
        for _, process in self._ranks:
            process.join(timeout=1)
            if process.is_alive():
                process.kill()
        self._ranks = []


def _serve(pipe: Any, rank: int, size: int, store: str, device: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    backend = "gloo"
    if device == "cuda":
        gpus = torch.cuda.device_count()
        torch.cuda.set_device(rank % gpus)
        backend = "cpu:gloo,cuda:nccl"
        if gpus < size:
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
            backend = "cpu:gloo,cuda:gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            module, name, args = pipe.recv()
        except (EOFError, ConnectionResetError):
            break
        try:
            with torch.inference_mode():
                answer = (True, getattr(importlib.import_module(module), name)(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            break
    dist.destroy_process_group()
