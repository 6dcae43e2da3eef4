"""What ranks of a test import before they fork."""

import importlib
from importlib.util import find_spec

for name in (
    "fusedmoe.layer",
    "fusedmoe.experts.cpu",
    "fusedmoe.experts.torch_reference",
    "fusedmoe.prepare_finalize.all_to_all",
    "torch.distributed.device_mesh",
    "torch._dynamo",
):
    importlib.import_module(name)
if find_spec("transformers"):
    importlib.import_module("transformers.models.qwen2_moe.modeling_qwen2_moe")
