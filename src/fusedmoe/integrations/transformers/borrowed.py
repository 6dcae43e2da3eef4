"""Our experts on weights that stay where they are: Parameters of a module of Transformers.

Nothing is copied and nothing registered twice: tensors are read off their module at each use, so
moving, casting, loading and saving the model keep working under its own names.

E experts, H hidden, I intermediate, S = 2 where gated, else 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import nn

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.config import FusedMoEConfig, MoEOptions
from fusedmoe.distributed.agreement import check_agreement, facts_of, facts_of_groups
from fusedmoe.integrations.transformers.families import Experts, at
from fusedmoe.integrations.transformers.gates import Gate, gate_of, recognise_gate
from fusedmoe.integrations.transformers.ranks import BlockRanks, RankWeights
from fusedmoe.quantization.unquantized import UnquantizedFusedMoEMethod
from fusedmoe.weights.routed_experts import RoutedExperts
from fusedmoe.words import DTYPE_NAMES


class ExpertWeights(Protocol):
    """The source of a layer's tensors; each is looked up again at each use."""

    def w13(self) -> torch.Tensor:
        """[E, S * I, H]"""

    def w2(self) -> torch.Tensor:
        """[E, H, I]"""

    def w13_bias(self) -> torch.Tensor | None:
        """[E, S * I]"""

    def w2_bias(self) -> torch.Tensor | None:
        """[E, H]"""


@dataclass(frozen=True, kw_only=True)
class ModuleWeights:
    """Stacked tensors of one module, as they are or as transposed views.

    The first has ``num_experts`` experts and perhaps more rows than that, which are not used.
    """

    module: nn.Module
    names: tuple[str, str, str | None, str | None]
    transposed: bool
    num_experts: int

    def _view(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = at(self.module, name)
        if tensor.shape[0] != self.num_experts:
            tensor = tensor[: self.num_experts]
        return tensor.transpose(1, 2) if self.transposed else tensor

    def w13(self) -> torch.Tensor:
        return self._view(self.names[0])

    def w2(self) -> torch.Tensor:
        return self._view(self.names[1])

    def w13_bias(self) -> torch.Tensor | None:
        return at(self.module, self.names[2])

    def w2_bias(self) -> torch.Tensor | None:
        return at(self.module, self.names[3])


def module_weights(part: Experts, experts: nn.Module) -> ModuleWeights:
    """The tensors that a row names. Raises ValueError for tensors that our experts cannot read."""
    assert isinstance(part.w13, str)
    names = (part.w13, part.w2, part.w13_bias, part.w2_bias)
    check_tensors({name: at(experts, name) for name in names if name is not None})
    return ModuleWeights(
        module=experts,
        names=names,
        transposed=part.layout == "transposed",
        num_experts=at(experts, part.w2).shape[0],
    )


def check_tensors(tensors: dict[str, Any]) -> None:
    """ValueError for what is not plain floating-point storage on a device."""
    for name, tensor in tensors.items():
        if type(tensor) not in (nn.Parameter, torch.Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}, not a plain Parameter")
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is stored as {tensor.dtype}")
        if tensor.device.type == "meta":
            raise ValueError(f"{name} has no storage yet (it is on the meta device)")


def gate_of_experts(part: Experts, experts: nn.Module) -> Gate:
    """What an experts module does between its GEMMs. Raises ValueError where we lack it."""
    act_fn = None if part.activation is None else part.activation(experts)
    if act_fn is None and hasattr(experts, "has_gate"):
        gate = gate_of(experts)
    else:
        gate = recognise_gate(_probe(part, experts, act_fn))
    if gate.activation is None:
        raise ValueError(f"the activation of {type(experts).__name__} is none of ours")
    return interleaved(gate) if part.layout == "rows" else gate


def _probe(part: Experts, experts: nn.Module, act_fn: Any) -> SimpleNamespace:
    """What ``recognise_gate`` asks, for a class without the decorator that says it."""
    if act_fn is None:
        found = (getattr(experts, name, None) for name in ("act_fn", "activation_fn", "act"))
        act_fn = next((function for function in found if callable(function)), None)

    def act_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return act_fn(gate) * up  # type: ignore[misc]

    own = getattr(experts, "_apply_gate", None) if part.activation is None else None
    return SimpleNamespace(
        has_gate=part.w13 != "up_proj",
        _apply_gate=own or act_and_mul,
        act_fn=act_fn,
        **{name: getattr(experts, name, None) for name in ("limit", "swiglu_limit", "alpha")},
    )


def interleaved(gate: Gate) -> Gate:
    """The same gate for gate and up rows that alternate. Raises ValueError where there is none."""
    plain = ApplyMoEActivationConfig()
    if gate.activation is not MoEActivation.SILU or gate.config != plain:
        raise ValueError(f"{gate.activation} has no form for alternating gate and up rows")
    numbers = ApplyMoEActivationConfig(clamp_limit=float("inf"), alpha=1.0, beta=0.0)
    return Gate(activation=MoEActivation.SWIGLUOAI, config=numbers)


class BorrowedExperts(RoutedExperts):
    """``RoutedExperts`` without parameters of its own."""

    weights: Any

    def __init__(
        self, moe_config: FusedMoEConfig, weights: ExpertWeights, ranks: BlockRanks | None = None
    ) -> None:
        # A plain attribute: the modules behind it must not become submodules here.
        self.__dict__["weights"] = weights
        method = UnquantizedFusedMoEMethod(moe_config, None if ranks is None else ranks.groups)
        placed = None if ranks is None else ranks.place(moe_config.num_experts)
        super().__init__(moe_config, method, expert_map_manager=placed, device=weights.w13().device)

    def weights_loaded(self, module: nn.Module, incompatible_keys: Any) -> None:
        """The hook for after ``load_state_dict``: what a kernel had prepacked is out of date."""
        self.quant_method.weights_changed()

    def create_parameters(
        self,
        params_dtype: torch.dtype,
        device: torch.device | str | None,
        tensors: dict[str, torch.Tensor],
    ) -> None:
        """Nothing: the weights exist."""

    @property
    def w13_weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.weights.w13()

    @property
    def w2_weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.weights.w2()

    @property
    def w13_bias(self) -> torch.Tensor | None:  # type: ignore[override]
        return self.weights.w13_bias()

    @property
    def w2_bias(self) -> torch.Tensor | None:  # type: ignore[override]
        return self.weights.w2_bias()


@dataclass(frozen=True, kw_only=True)
class BlockDemands:
    """What a block asks of whatever runs its experts; the fields of ``FusedMoEConfig``."""

    weights_on_input: bool = False
    num_zero_experts: int = 0
    hash_routing: bool = False
    require_modular: bool = False
    options: MoEOptions | None = None


def experts_config(
    gate: Gate,
    top_k: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    demands: BlockDemands,
    *,
    has_bias: bool = False,
) -> FusedMoEConfig:
    """A block's experts with ``sizes`` (E, H, I), none of them on other ranks."""
    assert gate.activation is not None
    E, H, I = sizes  # noqa: E741
    return FusedMoEConfig(
        num_experts=E,
        num_local_experts=E,
        experts_per_token=top_k,
        hidden_dim=H,
        intermediate_size_per_partition=I,
        activation=gate.activation,
        activation_config=gate.config,
        in_dtype=dtype,
        device=device,
        has_bias=has_bias,
        apply_router_weight_on_input=demands.weights_on_input,
        has_hash_routing=demands.hash_routing,
        num_zero_experts=demands.num_zero_experts,
        require_modular=demands.require_modular,
        options=MoEOptions.of(demands.options),
    )


def borrow_experts(
    weights: ExpertWeights,
    gate: Gate,
    top_k: int,
    demands: BlockDemands,
    ranks: BlockRanks | None = None,
) -> BorrowedExperts:
    """Experts ready to run where the weights are now; after a move they choose anew.

    With ``ranks``, those of this rank among them. Raises ValueError where sizes contradict each
    other or nothing runs such a layer, and RanksDisagreeError where ranks have different ones.
    """
    assert gate.activation is not None
    w13, w2 = weights.w13(), weights.w2()
    E, H, I = w2.shape  # noqa: E741
    rows = I * (2 if gate.activation.is_gated else 1)
    if tuple(w13.shape) != (E, rows, H):
        raise ValueError(
            f"w13 is {tuple(w13.shape)}, but w2 {tuple(w2.shape)} asks for {(E, rows, H)}"
        )
    if (w13.dtype, w13.device) != (w2.dtype, w2.device):
        raise ValueError(f"w13 is {w13.dtype} on {w13.device}, w2 is {w2.dtype} on {w2.device}")
    has_bias = weights.w13_bias() is not None
    moe_config = experts_config(
        gate, top_k, (E, H, I), w13.dtype, w13.device, demands, has_bias=has_bias
    )
    if ranks is not None:
        _, moe_config = ranks.share(moe_config)
        facts = facts_of(moe_config) | facts_of_groups(ranks.groups)
        check_agreement(facts, ranks.groups, "an accelerated block")
        own = ranks.own_experts(E)
        weights = RankWeights(weights, slice(own.start, own.stop))
    experts = BorrowedExperts(moe_config, weights, ranks)
    experts.process_weights_after_loading()
    return experts
