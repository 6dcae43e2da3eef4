"""``route``: the one routing function, checked, on any device, opaque to torch.compile."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from fusedmoe.forward_only import forward_only
from fusedmoe.kernels.routing import routing
from fusedmoe.router.spec import RoutingResult, RoutingSpec, RoutingTensors

INDEX_DTYPES = (torch.int16, torch.int32, torch.int64)
_NO_TENSORS = RoutingTensors()


@forward_only
def route(
    logits: torch.Tensor,
    spec: RoutingSpec,
    tensors: RoutingTensors | None = None,
    *,
    input_ids: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
    indices_dtype: torch.dtype | None = None,
) -> RoutingResult:
    """Choose experts by the rule ``spec``: logits [T, E + Z] -> weights fp32, ids [T, K + N].

    Logits may have any float dtype and any strides; the arithmetic is fp32. Slots come in
    descending order of the choice score (equal scores: lower id first), then the N fused shared
    experts. ``input_ids`` int [T] are needed by hash routing and the vision bias; rows where
    ``is_padding`` bool [T] is True get id -1 and weight 0 everywhere. ids are int32 or
    ``indices_dtype``, a signed integer dtype, because -1 marks the empty slot. No gradient flows.

    Raises ValueError for shapes, dtypes or devices that do not fit; on the CPU also for input ids
    outside the hash table, which on a GPU yield -1.
    """
    tensors = tensors or _NO_TENSORS
    indices_dtype = indices_dtype or torch.int32
    _check(logits, spec, tensors, input_ids, is_padding, indices_dtype)
    if torch.compiler.is_compiling():
        weights, ids, zero_expert_weight = torch.ops.fusedmoe.route(
            logits,
            *_tensor_arguments(tensors),
            input_ids,
            is_padding,
            indices_dtype,
            *_spec_arguments(spec),
        )
        return RoutingResult(weights, ids, zero_expert_weight if spec.num_zero_experts else None)
    return routing(
        logits,
        spec,
        tensors,
        input_ids=input_ids,
        is_padding=is_padding,
        indices_dtype=indices_dtype,
    )


def _check(
    logits: torch.Tensor,
    spec: RoutingSpec,
    tensors: RoutingTensors,
    input_ids: torch.Tensor | None,
    is_padding: torch.Tensor | None,
    indices_dtype: torch.dtype,
) -> None:
    candidates = spec.num_experts + spec.num_zero_experts
    if logits.dim() != 2 or logits.shape[1] != candidates or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating point [T, {candidates}], got {logits.dtype} "
            f"{tuple(logits.shape)}"
        )
    if indices_dtype not in INDEX_DTYPES:
        raise ValueError(f"ids hold -1, so {indices_dtype} is not one of {INDEX_DTYPES}")
    last_id = spec.num_experts + spec.num_fused_shared_experts - 1
    if indices_dtype is torch.int16 and last_id > 32767:
        raise ValueError(f"expert id {last_id} does not fit torch.int16")
    num_tokens = logits.shape[0]
    _check_rows("input_ids", input_ids, num_tokens, logits.device)
    _check_rows("is_padding", is_padding, num_tokens, logits.device)
    if input_ids is not None and (input_ids.is_floating_point() or input_ids.dtype is torch.bool):
        raise ValueError(f"input_ids must be integers, got {input_ids.dtype}")
    if is_padding is not None and is_padding.dtype is not torch.bool:
        raise ValueError(f"is_padding must be torch.bool, got {is_padding.dtype}")
    if tensors is not _NO_TENSORS:
        _check_tensors(tensors, spec, logits.device)
    wants_input_ids = tensors.hash_indices_table is not None or (
        tensors.vision_bias is not None and spec.image_sentinel_lo > 0
    )
    if wants_input_ids and input_ids is None:
        raise ValueError("this rule routes by token id: input_ids [T] are needed")


def _check_rows(
    name: str, rows: torch.Tensor | None, num_tokens: int, device: torch.device
) -> None:
    if rows is None:
        return
    if rows.dim() != 1 or rows.shape[0] != num_tokens:
        raise ValueError(f"{name} must be [T = {num_tokens}], got {tuple(rows.shape)}")
    if rows.device != device:
        raise ValueError(f"{name} is on {rows.device}, the logits are on {device}")


def _check_tensors(tensors: RoutingTensors, spec: RoutingSpec, device: torch.device) -> None:
    tensors.check(spec)
    for name in _TENSOR_FIELDS:
        tensor = getattr(tensors, name)
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the logits are on {device}")


_TENSOR_FIELDS = tuple(field.name for field in fields(RoutingTensors))
_SPEC_FIELDS = tuple(field.name for field in fields(RoutingSpec))
_SCHEMA_TYPES = {bool: "bool", int: "int", float: "float", str: "str"}


def _tensor_arguments(tensors: RoutingTensors) -> tuple[torch.Tensor | None, ...]:
    return tuple(getattr(tensors, name) for name in _TENSOR_FIELDS)


def _spec_arguments(spec: RoutingSpec) -> tuple[Any, ...]:
    return tuple(getattr(spec, name) for name in _SPEC_FIELDS)


def _schema() -> str:
    """An operator takes no dataclasses: the two records are spelled out, field by field."""
    types = _SCHEMA_TYPES
    sample = RoutingSpec(top_k=1, num_experts=1)
    spec = [f"{types[type(getattr(sample, name))]} {name}" for name in _SPEC_FIELDS]
    tensors = [f"Tensor? {name}" for name in _TENSOR_FIELDS]
    call = ["Tensor? input_ids", "Tensor? is_padding", "ScalarType indices_dtype"]
    return f"({', '.join(['Tensor logits', *tensors, *call, *spec])}) -> (Tensor, Tensor, Tensor)"


def _parse(arguments: tuple[Any, ...]) -> tuple[RoutingSpec, RoutingTensors, dict[str, Any]]:
    split = len(_TENSOR_FIELDS)
    tensors = RoutingTensors(**dict(zip(_TENSOR_FIELDS, arguments[:split], strict=True)))
    call = ("input_ids", "is_padding", "indices_dtype")
    options = dict(zip(call, arguments[split : split + 3], strict=True))
    spec = RoutingSpec(**dict(zip(_SPEC_FIELDS, arguments[split + 3 :], strict=True)))
    return spec, tensors, options


@torch.library.custom_op("fusedmoe::route", mutates_args=(), schema=_schema())
def _route_op(
    logits: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    spec, tensors, options = _parse(arguments)
    result = routing(logits, spec, tensors, **options)
    zero_expert_weight = result.zero_expert_weight
    if zero_expert_weight is None:
        zero_expert_weight = logits.new_empty(0, dtype=torch.float32)
    return result.topk_weights, result.topk_ids, zero_expert_weight


@_route_op.register_fake
def _(logits: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    spec, _, options = _parse(arguments)
    num_tokens = logits.shape[0]
    shape = (num_tokens, spec.top_k + spec.num_fused_shared_experts)
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=options["indices_dtype"]),
        logits.new_empty(num_tokens if spec.num_zero_experts else 0, dtype=torch.float32),
    )
