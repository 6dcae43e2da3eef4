"""RoutedExperts: the weights of one layer's experts on this rank."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusedmoe.activation import MoEActivation
from fusedmoe.config import FusedMoEConfig
from fusedmoe.quantization.method_base import FusedMoEMethodBase, SharedExpertsCallback
from fusedmoe.weights.expert_map import ExpertMapManager
from fusedmoe.weights.loadable import LoadableExperts
from fusedmoe.weights.loading import ExpertLoader
from fusedmoe.weights.param_spec import ExpertSizes
from fusedmoe.weights.params_mapping import (
    DEFAULT_CHECKPOINT_NAMES,
    CheckpointNames,
    fused_moe_make_expert_params_mapping,
)

if TYPE_CHECKING:
    from fusedmoe.router.base import FusedMoERouter


class RoutedExperts(LoadableExperts):
    """Expert weights, how they load, and their execution by the format's method.

    ``w13_weight`` [e, S * I, H] (gate and up; S = 1 without a gate) and ``w2_weight`` [e, H, I],
    plus what the format adds. ``w13_weight=``, ``w2_weight=``, ``w13_bias=``, ``w2_bias=`` take
    existing tensors instead of creating any: Parameters are registered, not copied, and may have
    any strides. A subclass may also override ``create_parameters`` and offer properties of these
    names.

    ``intermediate_size`` is the whole expert's; None means it is not sharded and not padded.
    """

    w13_weight: torch.Tensor
    w2_weight: torch.Tensor
    w13_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None
    expert_map: torch.Tensor | None
    expert_local_to_global: torch.Tensor | None
    expert_physical_to_global: torch.Tensor | None

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_method: FusedMoEMethodBase,
        *,
        params_dtype: torch.dtype | None = None,
        intermediate_size: int | None = None,
        expert_map_manager: ExpertMapManager | None = None,
        ckpt_names: CheckpointNames = DEFAULT_CHECKPOINT_NAMES,
        expert_mapping: Sequence[tuple[str, str, int, str]] | None = None,
        is_fused_checkpoint_transposed: bool = False,
        is_fused_checkpoint_interleaved: bool | None = None,
        prefix: str = "",
        device: torch.device | str | None = None,
        **tensors: torch.Tensor,
    ) -> None:
        super().__init__()
        self.moe_config = moe_config
        self.quant_method = quant_method
        self.prefix = prefix
        self.expert_map_manager = expert_map_manager or ExpertMapManager(moe_config.num_experts)
        self.sizes = expert_sizes(moe_config, intermediate_size)
        self.param_specs = {spec.name: spec for spec in quant_method.param_specs()}
        self._router: tuple[FusedMoERouter | None] = (None,)
        self._register_maps(device)
        for name in ("w13_bias", "w2_bias"):
            if name not in self.param_specs and not hasattr(type(self), name):
                self.register_parameter(name, None)
        self.create_parameters(params_dtype or moe_config.in_dtype, device, tensors)
        self._loader = ExpertLoader(
            self,
            ckpt_names=ckpt_names,
            expert_mapping=expert_mapping,
            transposed=is_fused_checkpoint_transposed,
            interleaved=self.sizes.interleaved
            if is_fused_checkpoint_interleaved is None
            else is_fused_checkpoint_interleaved,
        )
        quant_method.choose_kernel(self)

    def create_parameters(
        self,
        params_dtype: torch.dtype,
        device: torch.device | str | None,
        tensors: dict[str, torch.Tensor],
    ) -> None:
        """Register ``tensors`` (name -> existing tensor), or create all parameters if empty."""
        if not tensors:
            self.quant_method.create_weights(
                self,
                self.moe_config.num_local_experts,
                self.moe_config.hidden_dim,
                self.moe_config.intermediate_size_per_partition,
                params_dtype,
                device=device,
                weight_loader=self.weight_loader,
            )
            return
        if tensors.keys() != self.param_specs.keys():
            raise ValueError(
                f"existing tensors must be {sorted(self.param_specs)}, got {sorted(tensors)}"
            )
        for name, tensor in tensors.items():
            expected = (
                self.moe_config.num_local_experts,
                *self.param_specs[name].expert_shape(self.sizes),
            )
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name} must be {expected}, got {tuple(tensor.shape)}")
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor, persistent=False)

    def _maps(self) -> dict[str, torch.Tensor | None]:
        tables = self.expert_map_manager.routing_tables
        return {
            "expert_map": self.expert_map_manager.expert_map,
            "expert_local_to_global": tables and tables.local_to_global,
            "expert_physical_to_global": tables and tables.physical_to_global,
        }

    def _register_maps(self, device: torch.device | str | None) -> None:
        where = torch.get_default_device() if device is None else torch.device(device)
        for name, table in self._maps().items():
            buffer = None if table is None else table.to(where)
            self.register_buffer(name, buffer, persistent=False)

    @property
    def router(self) -> FusedMoERouter | None:
        """The layer's router, for experts that route by themselves (not a submodule)."""
        return self._router[0]

    def set_router(self, router: FusedMoERouter | None) -> None:
        """Who experts that route by themselves ask from now on."""
        self._router = (router,)

    @property
    def activation(self) -> MoEActivation:
        return self.moe_config.activation

    def forward_modular(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: SharedExpertsCallback | None = None,
        shared_experts_input: torch.Tensor | None = None,
        **ranks: Any,
    ) -> torch.Tensor:
        """Routed output [T, H] of x [T, H] for weights fp32 [T, K] and global ids [T, K].

        ``tokens_per_rank=`` says how many tokens the other ranks bring, where that is known.
        """
        return self.quant_method.apply(
            self, x, topk_weights, topk_ids, shared_experts, shared_experts_input, **ranks
        )

    def forward_monolithic(
        self,
        x: torch.Tensor,
        router_logits: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        **ranks: Any,
    ) -> torch.Tensor:
        """Routed output [T, H] of x [T, H]; the experts route by the logits [T, E]."""
        if router_logits is None:
            raise ValueError("experts that route by themselves need router_logits, got None")
        return self.quant_method.apply_monolithic(self, x, router_logits, input_ids, **ranks)

    make_expert_params_mapping = staticmethod(fused_moe_make_expert_params_mapping)

    def get_expert_weights(self) -> list[torch.Tensor]:
        """Every parameter as [e, -1], one row per local expert, for moving experts between ranks.

        Views where the parameter is contiguous, else ValueError.
        """
        rows = []
        for name in self.param_specs:
            tensor = getattr(self, name)
            if not tensor.is_contiguous():
                raise ValueError(f"{name} with strides {tensor.stride()} has no flat view")
            rows.append(tensor.view(tensor.shape[0], tensor.shape[1:].numel()))
        return rows

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        had_values = self.w13_weight.device.type != "meta"
        result = super()._apply(self._keeping_formats(fn), recurse)
        # to_empty() leaves every tensor without its values; these are not in a checkpoint.
        for name, table in self._maps().items():
            if table is not None and not getattr(self, name).is_meta:
                getattr(self, name).copy_(table)
        self._bind_weight_loader()
        if not had_values:
            self.nothing_is_loaded()
        self.moved(fn(torch.empty(0, dtype=self.moe_config.in_dtype)).dtype)
        return result

    def moved(self, rows: torch.dtype) -> None:
        """The same values lie elsewhere, or rows enter and leave in another dtype."""
        method = self.quant_method
        if rows != self.moe_config.in_dtype:
            self.moe_config = replace(self.moe_config, in_dtype=rows)
            method.rows_change_to(rows)
        method.weights_moved()
        if method.groups is None:  # else all ranks choose together, in their next forward
            with suppress(ValueError):  # nothing runs it here, which its next forward says
                method.choose_kernel(self)

    def _keeping_formats(self, fn: Any) -> Any:
        """``fn``, except that it changes no dtype which a format prescribes (``layer.half()``)."""
        fixed = {
            id(self._parameters[name])
            for name, spec in self.param_specs.items()
            if spec.dtype is not None and self._parameters.get(name) is not None
        }

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = fn(tensor)
            kept = id(tensor) in fixed and result.dtype != tensor.dtype
            return tensor.detach().to(result.device) if kept else result

        return apply

    def extra_repr(self) -> str:
        moe = self.moe_config
        return (
            f"experts={moe.num_local_experts}/{moe.num_experts}, hidden={moe.hidden_dim}, "
            f"intermediate={moe.intermediate_size_per_partition}, activation="
            f"{moe.activation.value}, method={type(self.quant_method).__name__}"
        )


def expert_sizes(moe_config: FusedMoEConfig, intermediate_size: int | None) -> ExpertSizes:
    """The sizes of one expert's tensors; ``intermediate_size`` None: what this rank has is all."""
    parallel = moe_config.moe_parallel_config
    stored = moe_config.intermediate_size_per_partition
    return ExpertSizes(
        hidden=moe_config.hidden_dim_unpadded,
        hidden_stored=moe_config.hidden_dim,
        intermediate=stored * parallel.tp_size if intermediate_size is None else intermediate_size,
        intermediate_stored=stored,
        num_w13_shards=moe_config.w13_num_shards,
        interleaved=moe_config.activation is MoEActivation.SWIGLUOAI,
        tp_size=parallel.tp_size,
        tp_rank=parallel.tp_rank,
    )
