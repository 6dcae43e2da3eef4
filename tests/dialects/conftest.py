"""A GPU machine without the formats' packages runs the rest; elsewhere they must be there."""

from importlib.util import find_spec

import torch

collect_ignore = []
if torch.cuda.is_available() and not (find_spec("gguf") and find_spec("compressed_tensors")):
    collect_ignore = [
        "test_compressed_tensors_dialect.py",
        "test_gguf.py",
        "test_gguf_architectures.py",
        "test_packing.py",
    ]
