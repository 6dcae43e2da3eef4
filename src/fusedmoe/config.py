"""Frozen records that say what a layer is: its sizes, its parallelism, its options.

Nothing here looks at a device, an environment variable or a process group's default.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import IntEnum
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from fusedmoe.distributed.peer_memory import PeerMemory
    from fusedmoe.tuning.tuned_table import TunedTable


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

    ``experts`` and ``prepare_finalize`` force an implementation: a name that
    ``fusedmoe.explain`` prints, or a class of your own. ``tuned_table`` are measured tiles for this
    layer in place of the packaged ones: a file that ``fusedmoe tune`` wrote, or another engine's;
    it is read here, once, and implementations of other kernels than the table's do not look at it.

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


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """The process groups a layer uses, given explicitly; ``None`` is a group of one rank.

    ``peers``: memory that the ranks of one host share, where they have made some; one for all
    layers. Tokens then go through it. ``deep_ep``: a ``deep_ep.Buffer``, likewise, for the
    prepare/finalize of that package.
    """

    tp: ProcessGroup | DeviceMesh | None = None
    dp: ProcessGroup | DeviceMesh | None = None
    pcp: ProcessGroup | DeviceMesh | None = None
    ep: ProcessGroup | DeviceMesh | None = None
    enable_expert_parallel: bool = False
    peers: PeerMemory | None = None
    deep_ep: Any = None

    @staticmethod
    def size_and_rank(group: ProcessGroup | DeviceMesh | None) -> tuple[int, int]:
        """Size of a group and this process's rank in it; (1, 0) for ``None``."""
        if group is None:
            return 1, 0
        process_group = ParallelGroups.process_group(group)
        assert process_group is not None
        return process_group.size(), process_group.rank()

    @staticmethod
    def process_group(group: ProcessGroup | DeviceMesh | None) -> ProcessGroup | None:
        """The process group itself, also of a one-dimensional DeviceMesh."""
        get_group: Any = getattr(group, "get_group", None)
        return cast("ProcessGroup | None", group if get_group is None else get_group())

    @property
    def connected(self) -> bool:
        """Whether any group is given; else sizes describe ranks that do not communicate here."""
        return any(group is not None for group in (self.tp, self.dp, self.pcp, self.ep))


class ParallelSettings(Protocol):
    """What ``FusedMoEParallelConfig.make`` reads of its last argument."""

    @property
    def enable_expert_parallel(self) -> bool: ...


def _rank_of(settings: Any, name: str) -> int:
    return int(getattr(settings, name, 0) or 0)


@dataclass(frozen=True)
class FusedMoEParallelConfig:
    """How one layer is cut over ranks. Sizes are at least 1, ranks lie in [0, size).

    With expert parallelism every expert is whole on one rank (``tp_size == 1``) and the
    ``dp * pcp * tp`` ranks share the experts; without it each expert is sharded over them all.
    """

    tp_size: int
    pcp_size: int
    dp_size: int
    ep_size: int
    tp_rank: int
    pcp_rank: int
    dp_rank: int
    ep_rank: int
    sp_size: int = 1
    use_ep: bool = False

    def __post_init__(self) -> None:
        for name in ("tp", "pcp", "dp", "ep"):
            size, rank = getattr(self, f"{name}_size"), getattr(self, f"{name}_rank")
            if size < 1 or not 0 <= rank < size:
                raise ValueError(
                    f"{name}_rank {rank} does not lie in a group of {name}_size {size}"
                )
        if self.sp_size < 1:
            raise ValueError(f"sp_size must be at least 1, got {self.sp_size}")

    @property
    def use_all2all_kernels(self) -> bool:
        """Whether tokens (not only sums) have to move between ranks."""
        return self.use_ep and (self.dp_size > 1 or self.pcp_size > 1 or self.sp_size > 1)

    @property
    def is_sequence_parallel(self) -> bool:
        return self.sp_size > 1

    @staticmethod
    def make(
        tp_size_: int,
        pcp_size_: int,
        dp_size_: int,
        sp_size_: int,
        vllm_parallel_config: ParallelSettings,
    ) -> FusedMoEParallelConfig:
        """Work out the layer's parallelism from the sizes around it.

        ``vllm_parallel_config`` is any object with ``enable_expert_parallel``; where this process
        is not rank 0 of a group it also carries ``tp_rank``, ``pcp_rank`` or
        ``data_parallel_rank``.
        """
        for name, size in (
            ("tp", tp_size_),
            ("pcp", pcp_size_),
            ("dp", dp_size_),
            ("sp", sp_size_),
        ):
            if size < 1:
                raise ValueError(f"{name}_size must be at least 1, got {size}")
        tp_rank = _rank_of(vllm_parallel_config, "tp_rank")
        pcp_rank = _rank_of(vllm_parallel_config, "pcp_rank")
        dp_rank = _rank_of(vllm_parallel_config, "data_parallel_rank")
        flat_size = dp_size_ * pcp_size_ * tp_size_
        flat_rank = (dp_rank * pcp_size_ + pcp_rank) * tp_size_ + tp_rank
        use_ep = flat_size > 1 and bool(vllm_parallel_config.enable_expert_parallel)
        return FusedMoEParallelConfig(
            tp_size=1 if use_ep else flat_size,
            tp_rank=0 if use_ep else flat_rank,
            pcp_size=pcp_size_,
            pcp_rank=pcp_rank,
            dp_size=dp_size_,
            dp_rank=dp_rank,
            ep_size=flat_size if use_ep else 1,
            ep_rank=flat_rank if use_ep else 0,
            sp_size=sp_size_,
            use_ep=use_ep,
        )

    @classmethod
    def make_no_parallel(cls) -> FusedMoEParallelConfig:
        return cls(1, 1, 1, 1, 0, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class ParallelPlace:
    """Sizes around one process and its rank in each, as ``FusedMoEParallelConfig.make`` reads."""

    tp_size: int = 1
    dp_size: int = 1
    pcp_size: int = 1
    tp_rank: int = 0
    dp_rank: int = 0
    pcp_rank: int = 0
    enable_expert_parallel: bool = False

    @property
    def data_parallel_rank(self) -> int:
        return self.dp_rank

    @property
    def size(self) -> int:
        """All ranks around this process."""
        return self.dp_size * self.pcp_size * self.tp_size

    @property
    def rank(self) -> int:
        """This process among them: dp outermost, tp innermost."""
        return (self.dp_rank * self.pcp_size + self.pcp_rank) * self.tp_size + self.tp_rank

    @classmethod
    def of(
        cls,
        groups: ParallelGroups,
        sizes: dict[str, int | None],
        ranks: dict[str, int | None],
    ) -> ParallelPlace:
        """From groups, and sizes and ranks by group name where no group is given.

        A size or rank that contradicts its group is a ValueError; what is not said is 1 and 0.
        """
        found: dict[str, int] = {}
        for name, size in sizes.items():
            group, rank = getattr(groups, name), ranks[name]
            actual = ParallelGroups.size_and_rank(group)
            if group is None:
                actual = 1 if size is None else size, 0 if rank is None else rank
            elif size not in (None, actual[0]) or rank not in (None, actual[1]):
                raise ValueError(
                    f"{name}_size {size} and {name}_rank {rank} contradict the given group "
                    f"(size {actual[0]}, rank {actual[1]})"
                )
            found[f"{name}_size"], found[f"{name}_rank"] = actual
        return cls(enable_expert_parallel=groups.enable_expert_parallel, **found)


def shard_size(size: int, ranks: int) -> int:
    """What each of ``ranks`` holds of ``size``, the last ones perhaps less."""
    return -(-size // ranks)


@dataclass(frozen=True, kw_only=True)
class FusedMoEConfig:
    """Everything about a layer that selection and the stages may depend on, except its weights.

    ``num_experts`` counts physical experts over all ranks (redundant copies included),
    ``num_logical_experts`` those of the model, ``num_local_experts`` those stored here.
    Sizes are per rank and padded; ``*_unpadded`` are what the checkpoint has.
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
    intermediate_size_per_partition_unpadded: int = -1
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
            ("intermediate_size_per_partition_unpadded", "intermediate_size_per_partition"),
        ):
            if getattr(self, name) < 0:
                object.__setattr__(self, name, getattr(self, like))
        for name in ("num_experts", "hidden_dim", "intermediate_size_per_partition"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        candidates = self.num_experts + self.num_zero_experts
        if not 1 <= self.experts_per_token <= candidates:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} does not lie in "
                f"[1, num_experts {candidates}]"
            )
        if not 0 <= self.num_local_experts <= self.num_experts:
            raise ValueError(
                f"num_local_experts {self.num_local_experts} exceeds num_experts {self.num_experts}"
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
        return self.activation.is_gated

    @property
    def w13_num_shards(self) -> int:
        """2 where w13 stacks gate and up, 1 where the activation has no gate."""
        return 2 if self.activation.is_gated else 1


def replace_fields(record: Any, **changes: Any) -> dict[str, Any]:
    """The constructor arguments of a dataclass ``record`` with ``changes`` applied."""
    return {f.name: getattr(record, f.name) for f in fields(record) if f.init} | changes
