"""Frozen records that say what a layer is: its sizes, its options.

Nothing here looks at a device or an environment variable. How a layer is cut over ranks is in
``parallel_config.py``; its names are part of this module too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from os import PathLike
from typing import TYPE_CHECKING, cast

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.parallel_config import (
    FusedMoEParallelConfig,
    ParallelGroups,
    ParallelPlace,
    ParallelSettings,
    shard_size,
)

if TYPE_CHECKING:
    from fusedmoe.tuning.tuned_table import TunedTable

__all__ = [
    "FusedMoEConfig",
    "FusedMoEParallelConfig",
    "MoEOptions",
    "ParallelGroups",
    "ParallelPlace",
    "ParallelSettings",
    "RoutingMethodType",
    "check_integers",
    "shard_size",
]


class RoutingMethodType(IntEnum):
    """The routing rules that kernels may name; the numbers are those of the API reference."""

    Default = 0  # softmax -> top-k
    Renormalize = 1  # top-k -> softmax
    DeepSeekV3 = 2  # sigmoid + bias, grouped
    Llama4 = 3  # top-k -> sigmoid
    RenormalizeNaive = 4  # softmax -> top-k -> renormalize
    TopK = 5  # no score function
    SigmoidRenorm = 6
    MiniMax2 = 7  # sigmoid + bias -> top-k -> scaled, sum-normalised
    Sigmoid = 8
    Unspecified = 9
    DeepseekV4 = 100
    Custom = 101
    Simulated = 102


@dataclass(frozen=True, kw_only=True)
class MoEOptions:
    """How a layer may run, never what it computes (rounding order aside).

    ``batch_invariant``: a token's output has the same bits in any batch, its logits too where the
    gate is a Linear or a GateLinear (other modules answer for themselves). ``deterministic``: the
    same input gives the same bits from run to run; False also allows experts that do not promise
    that (``ExpertsCapabilities``; all of ours do). ``max_workspace_bytes`` bounds the scratch
    memory of the experts, which then take the tokens in passes. ``debug_checks``: ids out of range
    raise on a GPU too, which waits for it; ranks compare how many tokens they bring with what they
    were told, and with those that share them.

    ``experts`` and ``prepare_finalize`` force an implementation: a name that
    ``fusedmoe.explain`` prints, or a class of your own. ``tuned_table`` are measured tiles for this
    layer in place of the packaged ones: a file that ``fusedmoe tune`` wrote, or another engine's;
    it is read here, once. Building the layer raises where it is for another, and where nothing
    that can run the layer reads tables: on a CPU, with quantized weights, in batched rows.

    ``micro_batch_tokens``: where some rank brings at least so many tokens to experts on other
    ranks, the forward runs as two halves, one on the wire while the experts compute the other.
    None: never. All ranks give the same.
    """

    batch_invariant: bool = False
    deterministic: bool = True
    max_workspace_bytes: int | None = None
    experts: str | type | None = None
    prepare_finalize: str | type | None = None
    debug_checks: bool = False
    tuned_table: TunedTable | str | PathLike[str] | None = None
    micro_batch_tokens: int | None = None

    @classmethod
    def of(cls, options: MoEOptions | None) -> MoEOptions:
        """``options``, where None are the defaults; ValueError for anything else."""
        if options is not None and not isinstance(options, cls):
            raise ValueError(f"options must be fusedmoe.MoEOptions, got {options!r:.80}")
        return options or cls()

    def __post_init__(self) -> None:
        if isinstance(self.tuned_table, (str, PathLike)):
            from fusedmoe.tuning.foreign import read_table

            object.__setattr__(self, "tuned_table", read_table(self.tuned_table))
        if self.max_workspace_bytes is not None and self.max_workspace_bytes <= 0:
            raise ValueError(
                f"max_workspace_bytes must be positive, got {self.max_workspace_bytes}"
            )
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            raise ValueError(f"micro_batch_tokens must be positive, got {self.micro_batch_tokens}")

    @property
    def table(self) -> TunedTable | None:
        """``tuned_table``: whatever it was given as, it is a record by now."""
        return cast("TunedTable | None", self.tuned_table)


def check_integers(values: dict[str, object]) -> None:
    """Raise ValueError by the name of a value that is no integer."""
    for name, value in values.items():
        if not hasattr(value, "__index__"):
            raise ValueError(f"{name} must be an integer, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class FusedMoEConfig:
    """Everything about a layer that selection and the stages may depend on, except its weights.

    ``num_experts`` counts physical experts over all ranks (redundant copies included),
    ``num_logical_experts`` those of the model, ``num_local_experts`` those stored here.
    Sizes are per rank and padded; ``hidden_dim_unpadded`` is what the checkpoint has.
    ``num_zero_experts`` counts the identity experts that the logits cover beyond the real ones.
    ``require_modular`` excludes experts that route by themselves: something between routing and
    experts is needed by the layer.
    """

    num_experts: int
    experts_per_token: int
    hidden_dim: int
    intermediate_size_per_partition: int
    num_local_experts: int
    activation: MoEActivation
    in_dtype: torch.dtype
    device: torch.device
    num_logical_experts: int = -1
    routing_method: RoutingMethodType = RoutingMethodType.Unspecified
    moe_parallel_config: FusedMoEParallelConfig = field(
        default_factory=FusedMoEParallelConfig.make_no_parallel
    )
    activation_config: ApplyMoEActivationConfig = field(default_factory=ApplyMoEActivationConfig)
    router_logits_dtype: torch.dtype | None = None
    hidden_dim_unpadded: int = -1
    has_bias: bool = False
    apply_router_weight_on_input: bool = False
    has_hash_routing: bool = False
    require_modular: bool = False
    num_zero_experts: int = 0
    max_num_tokens: int | None = None
    options: MoEOptions = field(default_factory=MoEOptions)

    def __post_init__(self) -> None:
        for name, like in (
            ("num_logical_experts", "num_experts"),
            ("hidden_dim_unpadded", "hidden_dim"),
        ):
            if getattr(self, name) < 0:
                object.__setattr__(self, name, getattr(self, like))
        sizes = ("num_experts", "hidden_dim", "intermediate_size_per_partition")
        check_integers({name: getattr(self, name) for name in (*sizes, "experts_per_token")})
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not isinstance(self.in_dtype, torch.dtype):
            raise ValueError(f"the experts' dtype must be one of torch's, got {self.in_dtype!r}")
        if not self.in_dtype.is_floating_point:
            raise ValueError(f"experts compute in floating point, got {self.in_dtype}")
        MoEOptions.of(self.options)
        candidates = self.num_experts + self.num_zero_experts
        if not 1 <= self.experts_per_token <= candidates:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} does not lie in "
                f"[1, num_experts {candidates}]"
            )
        if not 0 <= self.num_local_experts <= self.num_experts:
            raise ValueError(
                f"num_local_experts {self.num_local_experts} does not lie in "
                f"[0, num_experts {self.num_experts}]"
            )
        if self.max_num_tokens is not None and self.max_num_tokens < 1:
            raise ValueError(f"max_num_tokens must be at least 1, got {self.max_num_tokens}")
        if self.apply_router_weight_on_input and self.experts_per_token != 1:
            raise ValueError(
                "apply_router_weight_on_input needs top-1 routing, got experts_per_token "
                f"{self.experts_per_token}"
            )

    @property
    def is_act_and_mul(self) -> bool:
        """Whether the activation has a gate."""
        return self.activation.is_gated

    @property
    def w13_num_shards(self) -> int:
        """S: 2 where w13 stacks gate and up, 1 where the activation has no gate."""
        return 2 if self.is_act_and_mul else 1
