"""The Triton experts compile for GPUs before and after Hopper, within the memory of those."""

import pytest

from hopper_compiler import TESTS, run_program


@pytest.mark.parametrize("capability", [80, 120])
def test_they_compile_as_they_are_launched(capability):
    run_program(TESTS / "compile_for_other_gpus.py", str(capability), gluon=False)
