"""What keeps tests of Hopper's own kernels from running on other machines."""

import pytest
import torch

from fusedmoe.kernels.cuda.program import missing_nvrtc

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a GPU of compute capability 9",
)
needs_nvrtc = pytest.mark.skipif(missing_nvrtc() is not None, reason=f"{missing_nvrtc()}")
