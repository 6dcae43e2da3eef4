"""Without a GPU, Triton's bodies run under its interpreter; it must be asked for before import."""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    splat = interpreter.InterpreterBuilder.create_splat

    def splat_truth(self, shape, value):
        """Triton 3.9 copies the truth of a scalar comparison as the operands' dtype."""
        if value.data.dtype != numpy.bool_:
            return splat(self, shape, value)
        return interpreter.TensorHandle(numpy.full(shape.shape, value.data), tl.int1)

    interpreter.InterpreterBuilder.create_splat = splat_truth

if find_spec("hypothesis") is not None:
    from hypothesis import settings

    # How long an example takes is the machine's business.
    settings.register_profile("fusedmoe", deadline=None)
    settings.load_profile("fusedmoe")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Thousands of tiny products take longer by threads that wait for each other: many times as
    long where other processes have the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """How often a function may be compiled anew is not counted over tests, and gradients are on."""
    yield
    left, _ = torch.is_grad_enabled(), torch.set_grad_enabled(True)
    assert left, "this test, or what it ran, leaves gradients switched off"
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
