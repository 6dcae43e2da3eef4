"""The kernels of packed formats compile for Hopper without a GPU, within its memory."""

from hopper_compiler import TESTS, run_program


def test_they_compile_as_they_are_launched():
    run_program(TESTS / "compile_packed_formats.py", gluon=False)
