"""What ranks of a test import before they fork."""

import importlib

for name in (
    "fusedmoe.layer",
    "fusedmoe.experts.cpu",
    "fusedmoe.experts.torch_reference",
    "fusedmoe.prepare_finalize.all_to_all",
    "torch.distributed.device_mesh",
):
    importlib.import_module(name)
