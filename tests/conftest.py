"""Without a GPU, Triton's bodies run under its interpreter; it must be asked for before import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
