"""Shared experts: every token's experts, computed before, beside or inside the routed ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum

import torch

# Up to so many tokens a second stream was never slower than one after the other, for the layers of
# DeepSeek-V3 and Qwen2-MoE on an H200 (benchmarks/shared_experts.py). Beyond, it gains 0.3 to 4 %
# in bf16 (benchmarks/results/h200/notes_layer.md); quantized layers have not been measured there.
OVERLAP_TOKENS = 1024


class SharedExpertsOrder(Enum):
    """When the shared experts run."""

    NO_OVERLAP = "no_overlap"  # before the routed experts, on the same stream
    MK_INTERNAL_OVERLAPPED = "mk_internal_overlapped"  # while the combine is on the wire
    MULTI_STREAM_OVERLAPPED = "multi_stream_overlapped"  # on a second CUDA stream


def choose_order(
    *,
    on_cuda: bool,
    num_tokens: int,
    token_limit: int,
    combine_is_async: bool,
    launches_the_wire: bool = False,
    one_stream: bool = False,
) -> SharedExpertsOrder:
    """Few tokens leave the GPU idle, so a second stream helps up to ``token_limit`` of them.

    A compiler orders the whole graph itself and gets no second stream. A backend that moves rows on
    a stream of its own needs no other beside it; where our launches move them, an async combine
    hides only the wait for the other ranks.
    """
    on_the_side = on_cuda and not one_stream and 0 < num_tokens <= token_limit
    if combine_is_async and not (launches_the_wire and on_the_side):
        return SharedExpertsOrder.MK_INTERNAL_OVERLAPPED
    if on_the_side:
        return SharedExpertsOrder.MULTI_STREAM_OVERLAPPED
    return SharedExpertsOrder.NO_OVERLAP


@functools.cache
def _side_stream(device: torch.device, captured_on: int | None) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The second stream of a device, one for all layers: they run one after the other anyway.

    A stream that is being captured has one of its own. cuBLAS keeps scratch memory for each stream:
    what it allocated for one outside of a capture may be freed under a graph that uses it.
    """
    if not torch.cuda.is_current_stream_capturing():
        return _side_stream(device, None)
    return _side_stream(device, torch.cuda.current_stream(device).cuda_stream)


class SharedExpertsRun:
    """The shared experts of one forward: computed once, in the given order.

    ``start`` before the routed experts, call it (with the input) while the combine is in flight,
    take ``output`` after them; each does only what the order leaves to it.
    """

    def __init__(
        self,
        compute: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        order: SharedExpertsOrder,
    ) -> None:
        self._compute = compute
        self._x = x
        self.order = order
        self._with_gradients = torch.is_grad_enabled()
        self._output: torch.Tensor | None = None

    def start(self) -> None:
        if self.order is SharedExpertsOrder.NO_OVERLAP:
            self._output = self._compute(self._x)
        elif self.order is SharedExpertsOrder.MULTI_STREAM_OVERLAPPED:
            stream = side_stream(self._x.device)
            stream.wait_stream(torch.cuda.current_stream(self._x.device))
            # Freed early (an exception before the join), x must outlive the work that reads it.
            self._x.record_stream(stream)
            with torch.cuda.stream(stream):
                self._output = self._compute(self._x)

    def __call__(self, x: torch.Tensor) -> None:
        if self._output is None:
            with torch.set_grad_enabled(self._with_gradients):  # the routed experts run without
                self._output = self._compute(x)

    def output(self) -> torch.Tensor:
        if self._output is None:
            self._output = self._compute(self._x)
        elif self.order is SharedExpertsOrder.MULTI_STREAM_OVERLAPPED:
            current = torch.cuda.current_stream(self._x.device)
            current.wait_stream(side_stream(self._x.device))
            # Its memory belongs to the side stream, which must not reuse it while we read.
            self._output.record_stream(current)
        return self._output
