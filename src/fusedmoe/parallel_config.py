"""Where one layer stands among ranks: the groups it was given, and how it is cut over them.

Nothing here takes the default group of ``torch.distributed``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from fusedmoe.distributed.peer_memory import PeerMemory


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """The process groups a layer uses, given explicitly; ``None`` is a group of one rank.

    Ranks of ``tp`` hold the same tokens (with ``is_sequence_parallel`` different ones), those of
    ``dp`` and ``pcp`` different ones. With ``enable_expert_parallel`` each expert is whole on one
    of the ``dp * pcp * tp`` ranks, else cut over all of them. ``ep``: the group of all these ranks,
    dp outermost, tp innermost, for one message in place of one per dimension; optional.

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

    @classmethod
    def of(cls, groups: ParallelGroups | None) -> ParallelGroups:
        """``groups``, where None are single ranks; ValueError for anything else."""
        if groups is not None and not isinstance(groups, cls):
            raise ValueError(
                f"parallel must be fusedmoe.ParallelGroups, as in ParallelGroups(tp=group), got a "
                f"{type(groups).__name__}"
            )
        return groups or cls()

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
        """The process group itself, also of a one-dimensional DeviceMesh.

        Raises ValueError for other meshes, and for groups that this process does not belong to.
        """
        given: Any = group
        if hasattr(given, "get_group"):
            if given.ndim != 1:
                raise ValueError(f"a DeviceMesh of {given.ndim} dimensions: give one of them")
            given = given.get_group()
        if given is not None and not callable(getattr(given, "size", None)):
            raise ValueError(f"{given!r} is no process group that this process belongs to")
        return cast("ProcessGroup | None", given)

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
    ``sp_size``: how many tensor-parallel ranks hold different tokens, 1 without sequence
    parallelism.
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
        """Whether tensor-parallel ranks hold different tokens."""
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
    def around(
        cls, place: ParallelPlace, groups: ParallelGroups, is_sequence_parallel: bool
    ) -> FusedMoEParallelConfig:
        """``make`` for one process; ValueError where the groups contradict what it works out."""
        if is_sequence_parallel and place.tp_size > 1 and not place.enable_expert_parallel:
            raise ValueError(
                f"is_sequence_parallel gives {place.tp_size} tensor-parallel ranks different "
                "tokens, which sharded experts cannot add up: it needs enable_expert_parallel"
            )
        config = cls.make(
            place.tp_size,
            place.pcp_size,
            place.dp_size,
            place.tp_size if is_sequence_parallel else 1,
            place,
        )
        ep = ParallelGroups.size_and_rank(groups.ep)
        if groups.ep is not None and ep != (config.ep_size, config.ep_rank):
            raise ValueError(
                f"the ep group has size {ep[0]} and rank {ep[1]}, but the dp, pcp and tp ranks "
                f"make expert parallelism of size {config.ep_size} and rank {config.ep_rank} "
                f"(with enable_expert_parallel={place.enable_expert_parallel}); give its ranks "
                "also as dp (they hold different tokens) or tp (the same ones)"
            )
        return config

    @classmethod
    def make_no_parallel(cls) -> FusedMoEParallelConfig:
        """One rank."""
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
        """``dp_rank``, by the name that ``make`` reads."""
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
        sizes: dict[str, int | None] | None = None,
        ranks: dict[str, int | None] | None = None,
    ) -> ParallelPlace:
        """The place that groups say, or sizes and ranks by group name where no group is given.

        A size or rank that contradicts its group is a ValueError; what is not said is 1 and 0.
        """
        sizes, ranks = sizes or {}, ranks or {}
        found: dict[str, int] = {}
        for name in ("tp", "dp", "pcp"):
            group, size, rank = getattr(groups, name), sizes.get(name), ranks.get(name)
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
