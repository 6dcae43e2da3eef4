"""Which of our activations a Transformers experts module applies, found by asking the module.

A module's class does not say what its ``_apply_gate`` computes, and neither does its config
(gpt-oss has ``hidden_act="silu"`` and is not a plain SwiGLU). So the module's own function is
evaluated once on a grid and compared with every activation its attributes allow.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation, activation_reference

logger = logging.getLogger(__name__)

_CACHE = "_fusedmoe_gate"


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What lies between a module's two GEMMs; ``activation`` None: nothing that we know."""

    activation: MoEActivation | None
    config: ApplyMoEActivationConfig = field(default_factory=ApplyMoEActivationConfig)


def gate_of(experts: Any) -> Gate:
    """The gate of an experts module, recognised at first use and kept on the module.

    ``experts`` has ``has_gate`` and either ``_apply_gate`` or (without a gate) ``act_fn``. Changing
    those, or the limits they read, after the first call needs ``forget_gate``.
    """
    gate: Gate | None = getattr(experts, _CACHE, None)
    if gate is not None:
        return gate
    if torch.compiler.is_compiling():
        return _gate_of_traced(experts)
    return _recognise_and_keep(experts)


def forget_gate(experts: Any) -> None:
    """Make the next call recognise the module's gate anew."""
    experts.__dict__.pop(_CACHE, None)


def _recognise_and_keep(experts: Any) -> Gate:
    gate = recognise_gate(experts)
    setattr(experts, _CACHE, gate)
    return gate


def recognise_gate(experts: Any) -> Gate:
    """Compare the module's function with our activations in fp32 on the CPU; the first that agrees.

    A function that cannot run on a CPU tensor is not known.
    """
    if getattr(experts, "has_post_expert_norm", False):
        _warn_unknown(
            type(experts).__name__, "what an expert gives is normalised before its weight"
        )
        return Gate(activation=None)
    # While a program is exported, tensors have values only outside its modes.
    with _disable_current_modes(), torch.no_grad():
        x = _probe()
        try:
            wanted = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
        except Exception as error:
            _warn_unknown(
                type(experts).__name__, f"it raised {type(error).__name__} on a CPU tensor"
            )
            return Gate(activation=None)
        for gate in _candidates(experts):
            assert gate.activation is not None
            ours = activation_reference(gate.activation, x, gate.config)
            if ours.shape == wanted.shape and torch.allclose(
                ours, wanted.float(), rtol=1e-5, atol=1e-6
            ):
                return gate
    _warn_unknown(type(experts).__name__, "its values are those of no activation here")
    return Gate(activation=None)


# Where tracing can ask about a module, the answer is a constant of the graph and the module stays
# as it was. In torch 2.11 it cannot: the first graph ends there, and the module keeps the answer.
_gate_of_traced: Callable[[Any], Gate] = (
    torch.compiler.disable(_recognise_and_keep)
    if torch.__version__ < "2.13"
    else torch.compiler.assume_constant_result(recognise_gate)  # type: ignore[no-untyped-call]
)


def _probe() -> torch.Tensor:
    """fp32 [32, 64]: a fine grid around zero and both signs up to 1e4, in a fixed random order."""
    near = torch.linspace(-16, 16, 1792, dtype=torch.float32, device="cpu")
    far = torch.logspace(1.2, 4, 128, dtype=torch.float32, device="cpu")
    values = torch.cat([near, far, -far])
    order = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(0), device="cpu")
    return values[order].view(32, 64)


def _candidates(experts: Any) -> Iterator[Gate]:
    """Every activation that the module's attributes could mean, the plain ones first."""
    if not experts.has_gate:
        for plain in ("relu2", "silu", "gelu", "gelu_tanh"):
            yield Gate(activation=MoEActivation(f"{plain}_no_mul"))
        return
    glu = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)
    for activation in glu:
        yield Gate(activation=activation)
    limit = _number(experts, "limit", "swiglu_limit")
    if limit is None or limit <= 0:  # no gate means anything with such a limit
        return
    alpha = _number(experts, "alpha", "swiglu_alpha")
    for activation in (*glu, MoEActivation.SWIGLUSTEP):
        yield Gate(activation=activation, config=ApplyMoEActivationConfig(clamp_limit=limit))
    if alpha is None:
        return
    numbers = ApplyMoEActivationConfig(clamp_limit=limit, alpha=alpha, beta=1.0)
    yield Gate(activation=MoEActivation.SWIGLUOAI, config=numbers)
    yield Gate(activation=MoEActivation.SWIGLUOAI_UNINTERLEAVE, config=numbers)


def _number(experts: Any, *names: str) -> float | None:
    for name in names:
        value = getattr(experts, name, None)
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    return None


@functools.cache
def _warn_unknown(class_name: str, why: str) -> None:
    logger.warning(
        "%s: what its experts compute is not known to fusedmoe (%s); "
        "Transformers' grouped_mm runs them",
        class_name,
        why,
    )
