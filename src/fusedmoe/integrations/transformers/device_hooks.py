"""Accelerate's device hooks, which ``device_map=`` and offloading put on the modules of a model."""

from __future__ import annotations

from torch import nn

# Where Accelerate keeps the forward that it wraps, and the hook that it wraps it with.
WRAPPED = "_old_forward"
_HOOK = "_hf_hook"


def has_own_forward(module: nn.Module) -> bool:
    """Whether its class's forward runs, be it under device hooks or after they were removed."""
    own = vars(module)
    found = own.get(WRAPPED, own.get("forward"))
    return found is None or getattr(found, "__func__", None) is type(module).forward


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's own tensors are on the device only while it is called."""
    hook = vars(module).get(_HOOK)
    if hook is None:
        return False
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))
