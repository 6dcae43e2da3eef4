"""Loading machine code while a stream is captured for a CUDA graph."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@contextmanager
def loads_code() -> Iterator[None]:
    """The context of a kernel's first launch. The driver refuses to load code on a thread that
    captures, because a graph would not repeat it; it need not be repeated. Launches inside are
    captured as ever."""
    exchange = _exchange_mode()
    if exchange is None:
        yield
        return
    mode = ctypes.c_int(_RELAXED)
    _checked(exchange(ctypes.byref(mode)))
    try:
        yield
    finally:
        # It now holds the mode that was there before.
        _checked(exchange(ctypes.byref(mode)))


@lru_cache
def _exchange_mode() -> Callable[..., int] | None:
    """The driver's function that swaps this thread's mode, None without such a driver."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None
    return function  # type: ignore[no-any-return]


def _checked(code: int) -> None:
    if code:
        raise RuntimeError(f"cuThreadExchangeStreamCaptureMode: CUDA error {code}")
