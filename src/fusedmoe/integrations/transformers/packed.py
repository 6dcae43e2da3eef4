"""PackedExperts: experts as their files store them, in the place of a model's own experts module.

e of E experts, H hidden, I intermediate, S = 2 where gated, else 1; T tokens, K picks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fusedmoe.config import MoEOptions
from fusedmoe.integrations.transformers.borrowed import BlockDemands, experts_config
from fusedmoe.integrations.transformers.families import is_fp8
from fusedmoe.integrations.transformers.gates import gate_of
from fusedmoe.integrations.transformers.gradients import PACKED, NoBackward
from fusedmoe.integrations.transformers.ranks import BlockRanks
from fusedmoe.integrations.transformers.seats import ExpertsSeat
from fusedmoe.integrations.transformers.sources import Source
from fusedmoe.quantization.dialects import LayerSchemes
from fusedmoe.quantization.keys import GroupShape, fp8_dynamic_group
from fusedmoe.quantization.quantized import QuantizedFusedMoEMethod
from fusedmoe.quantization.tensor import QuantFormat
from fusedmoe.quantization.unquantized import UnquantizedFusedMoEMethod
from fusedmoe.weights.checkpoint_experts import ExpertLayer, ExpertTensor
from fusedmoe.weights.routed_experts import RoutedExperts


class PackedExperts(nn.Module):
    """Called as the module that it replaces: (hidden_states, ids [T, K], weights [T, K]).

    ``stands_for`` is the (Python module, class) of that one. The parameters, those of
    ``routed_experts``, come with ``load``; gradients do not pass through. Where ``ranks`` was set
    before, they are those of this rank, and every call is one on all ranks.
    """

    def __init__(self, seat: ExpertsSeat) -> None:
        super().__init__()
        cls = type(seat.module)
        self.seat = seat
        self.ranks: BlockRanks | None = None
        self.stands_for = (cls.__module__, cls.__name__)
        self.num_experts = seat.E
        self.schemes: LayerSchemes | None = None
        self.routed_experts: RoutedExperts | None = None
        self.followers: list[HeldExperts] = []
        for name, value in vars(seat.module).items():  # counts that blocks ask it for
            if isinstance(value, int | float | str) and not hasattr(self, name):
                setattr(self, name, value)
        for name in ("config", "act_fn", "has_gate", "has_bias", "is_transposed"):
            value = getattr(seat.module, name, None)
            if value is not None and not isinstance(value, nn.Module):
                setattr(self, name, value)

    def make_experts(
        self,
        dtype: torch.dtype,
        device: torch.device,
        demands: BlockDemands,
        tensors: dict[str, Any] | None = None,
    ) -> HeldExperts:
        """Experts of this scheme: new ones, or over existing ``tensors``."""
        seat, ranks = self.seat, self.ranks
        config = experts_config(
            seat.gate,
            seat.top_k,
            (seat.E, seat.H, seat.I),
            dtype,
            device,
            demands,
            has_bias=seat.has_bias,
        )
        placed = None
        if ranks is not None:
            placed, config = ranks.share(config)
        method = (
            UnquantizedFusedMoEMethod(config)
            if self.schemes is None
            else QuantizedFusedMoEMethod.of_stored(self.schemes, config)
        )
        method.groups = None if ranks is None else ranks.groups
        return HeldExperts(
            config,
            method,
            params_dtype=dtype,
            expert_map_manager=placed,
            prefix=seat.path,
            device=device,
            **(tensors or {}),
        )

    def load(
        self,
        layer: ExpertLayer,
        schemes: LayerSchemes | None,
        source: Source,
        dtype: torch.dtype,
        device: torch.device,
        options: MoEOptions | None = None,
    ) -> None:
        """Fill from the tensors of ``layer``, one at a time. Raises ValueError naming the tensor.

        Of experts that live on other ranks nothing is read.
        """
        self.schemes = schemes
        experts = self.make_experts(dtype, device, BlockDemands(options=options))
        gated = experts.moe_config.is_act_and_mul
        for tensor in layer.tensors:
            for expert, value in self._read(tensor, source):
                experts.load_part(
                    tensor.name,
                    value,
                    expert=expert,
                    shards=tensor.shards(gated),
                    suffix=tensor.suffix or "weight",
                )
        experts.check_loaded()
        experts.process_weights_after_loading()
        self.routed_experts = experts

    def _read(
        self, tensor: ExpertTensor, source: Source
    ) -> Iterator[tuple[int | None, torch.Tensor]]:
        """What this rank needs of a tensor, and whose it is (None: everybody's)."""
        first = self.num_experts
        if tensor.expert is not None and first <= tensor.expert < first + self.seat.unused:
            return
        if self.ranks is None:
            yield tensor.expert, source.read(tensor.name)
            return
        own = self.ranks.own_experts(self.num_experts)
        if tensor.expert is not None:
            if tensor.expert in own:
                yield tensor.expert, source.read(tensor.name)
        elif not source.shape(tensor.name):  # one number for all experts
            value = source.read(tensor.name)
            yield from ((expert, value) for expert in own)
        elif source.shape(tensor.name)[:1] != (self.num_experts,):
            yield None, source.read(tensor.name)  # rows of all experts below each other
        elif own:
            yield from zip(own, source.read(tensor.name, own).unbind(0), strict=True)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        for follower in self.followers:
            assert self.routed_experts is not None
            follower.follow(self.routed_experts)
        return result

    def held(self, demands: BlockDemands) -> HeldExperts:
        """The same experts once more, over the same Parameters, for a layer with ``demands``.

        They move and are cast with this module until they are released.
        """
        experts = self.routed_experts
        if experts is None:
            raise ValueError(f"{self.seat.path}: these experts were not loaded")
        # One kernel's prepacked copy is enough; this one makes its own again if it is called.
        experts.quant_method.forget_kernel()
        weight = experts.w13_weight
        held = self.make_experts(
            experts.moe_config.in_dtype,
            weight.device,
            replace(demands, options=demands.options or experts.moe_config.options),
            {name: getattr(experts, name) for name in experts.param_specs},
        )
        held.process_weights_after_loading()
        self.followers.append(held)
        held.leaders = (self,)
        return held

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        experts = self.routed_experts
        if experts is None:
            raise ValueError(f"{self.seat.path}: these experts were not loaded")
        if self.seat.whole or top_k_index is None or top_k_weights is None:
            raise ValueError(
                f"{self.seat.path}: packed, these experts run with their whole block alone: in "
                "eval mode, outside of autocast, without hooks on its modules"
            )
        if experts.w13_weight.is_meta:
            raise ValueError(
                f"{self.seat.path}: packed experts cannot be offloaded, and these are on the meta "
                "device; load the model anew, and leave it on one device"
            )
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids = top_k_index.masked_fill(top_k_index == self.num_experts, -1)
        rows = x.to(experts.moe_config.in_dtype)  # under autocast they come in another one
        with torch.no_grad():
            output = experts.forward_modular(rows, top_k_weights.float(), ids)
            if self.ranks is not None:
                rank_sum = self.ranks.rank_sum
                output = rank_sum.reduced(rank_sum.partial(output)).value
        if torch.is_grad_enabled():
            output = NoBackward.apply(output, x, PACKED)
        return output.view(hidden_states.shape).to(hidden_states.dtype)


class HeldExperts(RoutedExperts):
    """``RoutedExperts`` over the Parameters of a module of the model, which keeps them."""

    leaders: tuple[PackedExperts, ...] = ()  # in a tuple, for they are no submodules

    def weights_loaded(self, module: nn.Module, incompatible_keys: Any) -> None:
        """The hook for after ``load_state_dict``: what was derived from the weights is out of date.

        Made anew at once, in place, for captured graphs read it.
        """
        if self.quant_method.groups is None:
            self.process_weights_after_loading()
        else:
            self.quant_method.weights_changed()

    def follow(self, experts: RoutedExperts) -> None:
        """Be where ``experts`` are now, and take rows in their dtype."""
        for name in self.param_specs:
            self._parameters[name] = experts._parameters[name]
        for name in experts._buffers:
            self._buffers[name] = experts._buffers[name]
        self.moved(experts.moe_config.in_dtype)

    def release(self) -> None:
        """They are not used any more."""
        for leader in self.leaders:
            leader.followers.remove(self)
        self.leaders = ()


def is_packed(experts: Any) -> bool:
    """Whether a module holds quantized experts that ``hold_experts`` can run."""
    return isinstance(experts, PackedExperts) or is_fp8(experts)


def hold_experts(experts: Any, top_k: int, demands: BlockDemands) -> HeldExperts:
    """Our experts over the tensors of a module of quantized ones; nothing is copied.

    Raises ValueError where they cannot be run so.
    """
    if isinstance(experts, PackedExperts):
        return experts.held(demands)
    if getattr(experts, "block_size", None) is None or not experts.has_gate:
        raise ValueError("fp8 experts without blocks or without a gate are left to Transformers")
    w13, w2 = experts.gate_up_proj, experts.down_proj
    E, H, I = w2.shape  # noqa: E741
    config = experts_config(
        gate_of(experts),
        top_k,
        (E, H, I),
        torch.bfloat16 if w2.device.type == "meta" else _activation_dtype(experts),
        w2.device,
        demands,
    )
    fmt = QuantFormat(element="e4m3", group=GroupShape(*experts.block_size))
    activation = fp8_dynamic_group(fmt.group.col)
    method = QuantizedFusedMoEMethod(config, fmt, activation=activation)
    tensors: dict[str, Any] = {
        "w13_weight": w13,
        "w13_weight_scale": experts.gate_up_proj_scale_inv,
        "w2_weight": w2,
        "w2_weight_scale": experts.down_proj_scale_inv,
    }
    held = HeldExperts(config, method, **tensors)
    held.process_weights_after_loading()
    return held


def _activation_dtype(experts: Any) -> torch.dtype:
    """The dtype of the rows that the model passes, which one-byte weights do not tell."""
    found = getattr(getattr(experts, "config", None), "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16
