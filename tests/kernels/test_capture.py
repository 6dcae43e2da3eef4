"""The first launch of a kernel inside a capture: code is loaded in another mode of the thread."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from fusedmoe.kernels import capture
from fusedmoe.kernels.cuda import program

GLOBAL, RELAXED = 0, 2
NO_CONTEXT = 201


@pytest.fixture
def modes(monkeypatch):
    """What the thread's mode was set to, one after the other."""
    seen = [GLOBAL]

    def exchange(mode):
        value = ctypes.cast(mode, ctypes.POINTER(ctypes.c_int))
        seen.append(value[0])
        value[0] = seen[-2]
        return 0

    monkeypatch.setattr(capture, "_exchange_mode", lambda: exchange)
    return seen


def test_the_mode_is_given_back_whatever_happens(modes):
    with capture.loads_code():
        assert modes[-1] == RELAXED
    assert modes[-1] == GLOBAL
    with pytest.raises(KeyError), capture.loads_code():
        raise KeyError
    assert modes == [GLOBAL, RELAXED, GLOBAL, RELAXED, GLOBAL]


def test_a_driver_that_refuses_and_none_at_all(monkeypatch):
    monkeypatch.setattr(capture, "_exchange_mode", lambda: lambda mode: 3)
    with pytest.raises(RuntimeError, match="CUDA error 3"), capture.loads_code():
        pass
    monkeypatch.setattr(capture, "_exchange_mode", lambda: None)
    with capture.loads_code():
        pass


def test_a_cuda_program_is_loaded_once_for_the_current_device(modes, monkeypatch):
    calls, answers = [], {"cuLaunchKernelEx": [0, NO_CONTEXT, 0]}

    def driver_call(name):
        def call(*_):
            calls.append((name, modes[-1]))
            return (answers[name].pop(0),) if name in answers else (0, 1)

        return call

    attributes = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    bind = ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    load = ["cuLibraryLoadData", "cuLibraryGetKernel", "cuDeviceGet", "cuKernelSetAttribute"]
    load.append("cuKernelGetFunction")
    driver = SimpleNamespace(
        CUfunction_attribute=attributes,
        CUresult=SimpleNamespace(CUDA_ERROR_INVALID_CONTEXT=NO_CONTEXT),
        **{name: driver_call(name) for name in {*bind, *load, "cuLaunchKernelEx"}},
    )
    monkeypatch.setattr(program, "_driver", lambda: driver)
    monkeypatch.setattr(program, "_config", lambda *_: None)
    monkeypatch.setattr(program, "compiled", lambda *_: b"")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    kernel = program.CudaKernel("", "entry", (), 32, 0)

    class Nothing(ctypes.Structure):
        pass

    with pytest.raises(RuntimeError, match="device 0 is not current, 1 is"):
        kernel.launch(1, Nothing(), 0)
    for _ in range(2):
        kernel.launch(1, Nothing(), 1)
    first = [(name, RELAXED) for name in bind + load]
    # The second launch comes from a thread that has not used the GPU.
    second = [(name, GLOBAL) for name in ["cuLaunchKernelEx", *bind, "cuLaunchKernelEx"]]
    assert calls == [*first, ("cuLaunchKernelEx", GLOBAL), *second]
