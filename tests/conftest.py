"""Without a GPU, Triton's bodies run under its interpreter; it must be asked for before import."""

import os
from importlib.util import find_spec

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if find_spec("hypothesis") is not None:
    from hypothesis import settings

    # How long an example takes is the machine's business.
    settings.register_profile("fusedmoe", deadline=None)
    settings.load_profile("fusedmoe")
