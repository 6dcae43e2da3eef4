"""For a model of no known family: whatever is called ``experts`` is replaced by our layer.

The model's own router has chosen already; ids and weights are used as given. Each candidate is
checked on random rows against the module that it replaces, and left alone where they differ.

T tokens, K picks, E experts, H hidden, I intermediate, S = 2 where gated, else 1.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.config import MoEOptions
from fusedmoe.integrations.transformers.borrowed import BlockDemands, ExpertWeights, borrow_experts
from fusedmoe.integrations.transformers.containers import disagreement, read_experts
from fusedmoe.integrations.transformers.device_hooks import has_own_forward
from fusedmoe.integrations.transformers.experts_function import ExpertTensors, run_experts
from fusedmoe.integrations.transformers.gates import Gate
from fusedmoe.integrations.transformers.gradients import NoBackward
from fusedmoe.integrations.transformers.stacked import StackedWeights
from fusedmoe.selection import check_forced_names
from fusedmoe.weights.families import SIZE_KEYS, config_value, read_sizes
from fusedmoe.weights.params_mapping import ExpertParamEntry, fused_moe_make_expert_params_mapping

logger = logging.getLogger(__name__)

EXPERTS_NAME = "experts"


@dataclass(frozen=True, kw_only=True)
class GenericSettings:
    """What a model's config and modules say about its experts.

    ``reduce_results`` False: the enclosing block adds shared experts, and sums over ranks itself.
    """

    top_k: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_shared_experts: int
    renormalize: bool
    num_expert_group: int | None
    topk_group: int | None
    has_bias: bool
    reduce_results: bool


class TransformersFusedMoE(nn.Module):
    """Takes the place of a module called ``experts``, with its parameters under their names.

    ``original`` is a module list, one module per expert, or a module of 3-D parameters
    (``gate_up_proj`` or ``up_proj``, and ``down_proj``). A list's parameters are stacked: their
    data become views of one tensor. Indexing and iterating give the original's experts. Raises
    ValueError where the experts cannot be run, naming what prevents it.
    """

    def __init__(
        self,
        original: nn.Module,
        top_k: int,
        *,
        hidden_size: int | None = None,
        options: MoEOptions | None = None,
    ) -> None:
        super().__init__()
        self.__dict__["original"] = original
        self.training = original.training
        # The same dictionaries, not copies: what is set on one is seen by the other.
        self._parameters, self._buffers = original._parameters, original._buffers
        self._modules = original._modules
        gate, weights = read_experts(original, self, hidden_size)
        self.__dict__.update(gate=gate, weights=weights)
        try:
            routed_experts = borrow_experts(weights, gate, top_k, BlockDemands(options=options))
        except ValueError:
            self.release()
            raise
        self.__dict__["routed_experts"] = routed_experts
        self.register_load_state_dict_post_hook(routed_experts.weights_loaded)

    original: nn.Module
    gate: Gate
    weights: ExpertWeights
    routed_experts: Any
    settings: GenericSettings

    @property
    def num_experts(self) -> int:
        return self.weights.w2().shape[0]

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """hidden_states [..., H], top_k_index int [T, K], top_k_weights [T, K] -> as hidden_states.

        Other keywords are dropped. Index E marks a slot that counts as nothing. In training with
        gradients, and under autocast, the original runs; where it has no forward of its own, the
        former is an error and the latter changes nothing.
        """
        autocast = torch.is_autocast_enabled(hidden_states.device.type)
        if (self.training and torch.is_grad_enabled()) or (autocast and self._has_own_forward):
            return self.original(hidden_states, top_k_index, top_k_weights, **kwargs)
        if isinstance(self.weights, StackedWeights) and not torch.compiler.is_compiling():
            self.weights.stack.refresh()
        if not torch.is_grad_enabled():
            return transformers_moe_forward(hidden_states, top_k_index, top_k_weights, self)
        with torch.no_grad():
            output = transformers_moe_forward(hidden_states, top_k_index, top_k_weights, self)
        return NoBackward.apply(output, hidden_states)

    @property
    def _has_own_forward(self) -> bool:
        return type(self.original).forward is not nn.ModuleList.forward

    def get_expert_mapping(self) -> list[ExpertParamEntry]:
        """``get_expert_mapping`` for this layer's experts."""
        return get_expert_mapping(self.num_experts)

    def release(self) -> None:
        """Give a list's parameters storage of their own again."""
        weights = self.__dict__.get("weights")
        if isinstance(weights, StackedWeights):
            weights.stack.release()

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, index: int) -> nn.Module:
        return self.original[index]  # type: ignore[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.original)  # type: ignore[call-overload]

    def __getattr__(self, name: str) -> Any:
        """Attributes that others read off the experts (num_experts, config, act_fn, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__:
                raise
            return getattr(self.original, name)


def transformers_moe_forward(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    layer: TransformersFusedMoE,
) -> torch.Tensor:
    """``layer``'s experts for a choice that was made: as ``TransformersFusedMoE.forward``.

    Opaque to torch.compile, which sees ``fusedmoe::transformers_moe_forward``.
    """
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    ids = top_k_index.reshape(-1, top_k_index.shape[-1])
    ids = ids.masked_fill(ids == layer.num_experts, -1)
    topk_weights = top_k_weights.reshape(ids.shape).float()
    if not torch.compiler.is_compiling():
        output = layer.routed_experts.forward_modular(x, topk_weights, ids)
        return output.view(hidden_states.shape)
    weights, gate = layer.weights, layer.gate
    assert gate.activation is not None
    return torch.ops.fusedmoe.transformers_moe_forward(
        x,
        ids,
        topk_weights,
        weights.w13(),
        weights.w2(),
        weights.w13_bias(),
        weights.w2_bias(),
        gate.activation.value,
        gate.config.numbers(),
    ).view(hidden_states.shape)


@torch.library.custom_op("fusedmoe::transformers_moe_forward", mutates_args=())
def _transformers_moe_forward(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    activation: str,
    numbers: Sequence[float],
) -> torch.Tensor:
    config = ApplyMoEActivationConfig.from_numbers(numbers)
    gate = Gate(activation=MoEActivation(activation), config=config)
    tensors = ExpertTensors(w13, w2, w13_bias, w2_bias)
    return run_experts(hidden_states, tensors, top_k_weights, top_k_index, gate)


@_transformers_moe_forward.register_fake
def _(hidden_states: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return torch.empty_like(hidden_states)


def get_expert_mapping(num_experts: int, num_redundant_experts: int = 0) -> list[ExpertParamEntry]:
    """(param_name, weight_name, expert_id, shard_id) for every naming style of one expert.

    gate_proj / down_proj / up_proj; w1 / w2 / w3 (Mixtral, Phi); linear / linear_1 / linear_v
    (Grok-1).
    """
    entries: list[ExpertParamEntry] = []
    for gate, down, up in (
        ("gate_proj", "down_proj", "up_proj"),
        ("w1", "w2", "w3"),
        ("linear", "linear_1", "linear_v"),
    ):
        entries += fused_moe_make_expert_params_mapping(
            None, gate, down, up, num_experts, num_redundant_experts, routed_experts_prefix=""
        )
    return entries


def recursive_replace(
    model: nn.Module, *, options: MoEOptions | None = None, leave: Collection[str] = ()
) -> dict[str, TransformersFusedMoE]:
    """Replace every module called ``experts`` that we can run; returns the new ones by path.

    Sizes come from the model's text config, under whatever names it has. Modules at and below the
    paths in ``leave`` are not touched. The log names each replacement and each refusal. Raises
    ValueError for ``options`` that force an implementation that does not exist.
    """
    check_forced_names(options)
    config = getattr(model, "config", None)
    replaced: dict[str, TransformersFusedMoE] = {}
    for parent_path, parent in list(model.named_modules()):
        child = parent._modules.get(EXPERTS_NAME)
        path = f"{parent_path}.{EXPERTS_NAME}".lstrip(".")
        if child is None or isinstance(child, TransformersFusedMoE):
            continue
        if any(f"{path}.".startswith(f"{left}." if left else "") for left in leave):
            continue
        top_k = read_sizes(config).top_k or getattr(parent, "top_k", None) or 1
        try:
            layer = replacement_of(child, int(top_k), config, options)
        except ValueError as error:
            logger.warning("%s (%s) is left as it is: %s", path, type(child).__name__, error)
            continue
        layer.settings = settings_of(layer, parent, config, int(top_k))
        parent._modules[EXPERTS_NAME] = layer
        replaced[path] = layer
        logger.info("%s (%s) is replaced: %s", path, type(child).__name__, layer.settings)
    return replaced


def replacement_of(
    experts: nn.Module, top_k: int, config: Any, options: MoEOptions | None
) -> TransformersFusedMoE:
    """A checked layer for ``experts``. Raises ValueError where there is none."""
    if not has_own_forward(experts):
        raise ValueError("its forward was replaced by something else")
    hidden_size = read_sizes(config).hidden_size
    layer = TransformersFusedMoE(experts, top_k, hidden_size=hidden_size, options=options)
    try:
        difference = disagreement(experts, layer, top_k)
        if difference is not None:
            raise ValueError(difference)
    except Exception:
        layer.release()
        raise
    return layer


def settings_of(
    layer: TransformersFusedMoE, parent: nn.Module, config: Any, top_k: int
) -> GenericSettings:
    """What the config says, with the sizes of the tensors themselves."""
    E, H, I = layer.weights.w2().shape  # noqa: E741
    num_shared = config_value(config, SIZE_KEYS["num_shared_experts"])
    names = (name for name, _ in parent.named_parameters())
    has_shared = bool(num_shared) or any("shared_expert" in name for name in names)
    renormalize = config_value(config, ("norm_topk_prob",))
    return GenericSettings(
        top_k=top_k,
        hidden_size=H,
        intermediate_size=I,
        num_experts=E,
        num_shared_experts=int(num_shared or has_shared),
        renormalize=top_k > 1 if renormalize is None else bool(renormalize),
        num_expert_group=config_value(config, ("n_group",)),
        topk_group=config_value(config, ("topk_group",)),
        has_bias=any("bias" in name for name, _ in layer.named_parameters()),
        reduce_results=not has_shared,
    )


def put_back(model: nn.Module) -> None:
    """Undo ``recursive_replace``."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, TransformersFusedMoE):
                child.release()
                child.original.train(child.training)
                parent._modules[name] = child.original
