"""What a failed CUDA graph capture leaves behind, and how to be rid of it."""

from __future__ import annotations

import torch


def recover_from_failed_capture(device: torch.device) -> None:
    """Make random numbers work again on ``device`` after a capture that did not end well.

    PyTorch's generator still believes in the capture and refuses to draw; a capture that does end
    tells it otherwise.
    """
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=device)
        graph.capture_end()
