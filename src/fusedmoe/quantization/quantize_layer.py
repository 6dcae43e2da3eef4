"""quantize_layer: the float weights of a built layer rounded to a format, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fusedmoe.quantization.formats import format_named, quantize
from fusedmoe.quantization.keys import QuantKey
from fusedmoe.quantization.quantized import OWNERS, Owner, QuantizedFusedMoEMethod
from fusedmoe.quantization.tensor import QuantFormat
from fusedmoe.quantization.unquantized import UnquantizedFusedMoEMethod
from fusedmoe.weights.param_spec import ParamSpec

_SUFFIXES = {
    "data": "weight",
    "scale": "weight_scale",
    "scale2": "weight_scale_2",
    "zero_point": "weight_zero_point",
}


def quantize_layer(
    layer: nn.Module, format: str | QuantFormat, *, activation: QuantKey | None = None
) -> None:
    """Round the experts of ``layer`` (a MoERunner or RoutedExperts) to ``format``.

    ``format`` is a record or a name: "fp8_block", "int8_channel", "int4_g128", "mxfp4", ...
    ``activation`` is how rows are quantized as they come; None leaves them as they are. Scales are
    those of the weights that this rank holds. One expert at a time is widened, and float weights
    are given up as soon as theirs are rounded. Graphs captured or compiled before are void.

    Raises ValueError, the layer unchanged, for a layer that is not of floats or was not loaded, for
    sizes that the format cannot hold, for weights that are not finite, for formats that need
    calibration, and where nothing runs the layer in this format, as its options want it.
    """
    experts: Any = getattr(layer, "routed_experts", layer)
    if not hasattr(experts, "quant_method"):
        raise ValueError(
            f"quantize_layer takes a layer of FusedMoE or its experts, not a "
            f"{type(layer).__name__}; fusedmoe.from_pretrained(folder, quantize=...) rounds a model"
        )
    fmt = format if isinstance(format, QuantFormat) else format_named(format)
    if not isinstance(experts.quant_method, UnquantizedFusedMoEMethod):
        raise ValueError(
            f"the experts of {experts.prefix or 'this layer'} are held by "
            f"{type(experts.quant_method).__name__}: only unquantized ones can be quantized"
        )
    if fmt.act_order or (activation is not None and activation.static):
        raise ValueError(f"{fmt.name} with activations {activation} needs calibration")
    method = QuantizedFusedMoEMethod(
        experts.moe_config, fmt, activation=activation, groups=experts.quant_method.groups
    )
    specs = {spec.name: spec for spec in method.param_specs()}
    experts.check_usable()
    for owner in OWNERS:
        _check(experts, owner)
    method.select_on(experts.w13_weight.device)  # raises where nothing would run them
    for owner in OWNERS:
        _replace(experts, f"{owner}_weight", _quantized(experts, owner, method, specs))
    experts.param_specs, experts.quant_method = specs, method
    method.process_weights_after_loading(experts)


def _check(experts: Any, owner: Owner) -> None:
    name = f"{owner}_weight"
    weight = getattr(experts, name)
    if name not in experts._parameters and name not in experts._buffers:
        raise ValueError(f"{name} of {type(experts).__name__} is not its own to replace")
    if weight.is_meta:
        raise ValueError(f"{name} is on 'meta': there is nothing to quantize yet")
    for expert, one in enumerate(weight):
        if not one.isfinite().all():
            bad = int((~one.isfinite()).sum())
            raise ValueError(f"{name}: {bad} weights of local expert {expert} are not finite")


def _replace(experts: Any, name: str, parts: dict[str, torch.Tensor]) -> None:
    """Register ``parts`` in the place of the float weight ``name``."""
    (experts._parameters if name in experts._parameters else experts._buffers).pop(name)
    for part, tensor in parts.items():
        parameter: Any = nn.Parameter(tensor, requires_grad=False)
        parameter.weight_loader = experts.weight_loader
        experts.register_parameter(part, parameter)


@torch.no_grad()
def _quantized(
    experts: Any, owner: Owner, method: QuantizedFusedMoEMethod, specs: dict[str, ParamSpec]
) -> dict[str, torch.Tensor]:
    """The new parameters of one of the two weights."""
    weight, sizes = getattr(experts, f"{owner}_weight"), experts.sizes
    layout = {"shards": 1, "interleaved": False}
    if owner == "w13":
        layout = {"shards": sizes.num_w13_shards, "interleaved": sizes.interleaved}
    wanted = {
        name: spec
        for name, spec in specs.items()
        if spec.owner == owner and spec.suffix in _SUFFIXES.values()
    }
    made = {
        name: torch.empty(
            (weight.shape[0], *spec.expert_shape(sizes)), dtype=spec.dtype, device=weight.device
        )
        for name, spec in wanted.items()
    }
    for expert, one in enumerate(weight):
        q = quantize(one, method.format(owner), **layout)  # type: ignore[arg-type]
        for part, tensor in q.parts().items():
            target = made[f"{owner}_{_SUFFIXES[part]}"][expert]
            target.copy_(tensor.reshape(target.shape))
    return made
