"""deep_ep's Buffer as its documentation describes it, moving rows over gloo.

Arguments are checked for shapes, dtypes and order; what the package leaves open (rows past a
count, rows before the hook) is NaN. ``low_latency_dispatch`` hands back scales column by column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

BLOCK = 128
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


class Config(NamedTuple):
    """Sizes that a buffer should have."""

    factor: int

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return self.factor * hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class Event:
    """Waiting for it makes what was promised true."""

    def __init__(self, arrive: Callable[[], None] | None = None) -> None:
        self._arrive = arrive

    def current_stream_wait(self) -> None:
        if self._arrive is not None:
            self._arrive()
            self._arrive = None


class Buffer:
    num_sms = 20

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        **others: Any,
    ) -> None:
        assert not others
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.num_qps_per_rank = low_latency_mode, num_qps_per_rank
        self.sent: list[torch.dtype] = []

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config(6)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config(9)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        return num_max_dispatch_tokens_per_rank * num_experts * (hidden * 2 + 16)

    def _check_ids(self, topk_idx: torch.Tensor, num_experts: int) -> None:
        assert topk_idx.dtype is torch.int64
        assert topk_idx.is_contiguous()
        assert num_experts % self.group_size == 0
        assert ((topk_idx >= -1) & (topk_idx < num_experts)).all()

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor, Event]:
        assert not self.low_latency_mode
        self._check_ids(topk_idx, num_experts)
        e = num_experts // self.group_size
        per_expert = torch.stack([(topk_idx == i).sum() for i in range(num_experts)]).int()
        rank_of = torch.where(topk_idx >= 0, topk_idx // e, -1)
        goes = torch.stack([(rank_of == r).any(1) for r in range(self.group_size)], 1)
        return goes.sum(0).int(), None, per_expert, goes, Event()

    def _exchange(self, x: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        width = x.shape[1] * x.element_size()
        rows = x.contiguous().view(torch.uint8).view(x.shape[0], width)
        found = rows.new_empty(sum(received), width)
        dist.all_to_all_single(found, rows, received, sent, group=self.group)
        return found.view(x.dtype).view(-1, x.shape[1])

    def _counts(self, sent: list[int]) -> list[int]:
        mine = torch.tensor(sent)
        found = torch.empty_like(mine)
        dist.all_to_all_single(found, mine, group=self.group)
        return found.tolist()

    def dispatch(
        self,
        x: Any,
        handle: Any = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        config: Any = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, torch.Tensor, torch.Tensor, list[int], Any, Event]:
        data, scale = x if isinstance(x, tuple) else (x, None)
        T, H = data.shape
        assert data.is_contiguous()
        assert data.dtype is (BF16 if scale is None else FP8)
        assert H * 2 % 512 == 0
        assert scale is None or (scale.shape, scale.dtype) == ((T, H // BLOCK), torch.float32)
        assert topk_weights.dtype is torch.float32
        assert topk_weights.shape == topk_idx.shape
        assert is_token_in_rank.shape == (T, self.group_size)
        assert num_tokens_per_rank.dtype is num_tokens_per_expert.dtype is torch.int32
        self._check_ids(topk_idx, num_tokens_per_expert.shape[0])
        self.sent.append(data.dtype)
        e = num_tokens_per_expert.shape[0] // self.group_size
        tokens = [is_token_in_rank[:, r].nonzero()[:, 0] for r in range(self.group_size)]
        token, sent = torch.cat(tokens), [len(part) for part in tokens]
        assert sent == num_tokens_per_rank.tolist()
        received = self._counts(sent)
        rows = self._exchange(data[token], sent, received)
        if scale is not None:
            rows = (rows, self._exchange(scale[token], sent, received))
        ids = self._exchange(topk_idx[token], sent, received) - self.rank * e
        here = (ids >= 0) & (ids < e)
        ids = torch.where(here, ids, -1)
        weights = self._exchange(topk_weights[token], sent, received).masked_fill(~here, 0)
        counts = [int((ids == i).sum()) for i in range(e)]
        handle = (token, sent, received, T)
        return rows, ids, weights, counts, handle, Event()

    def combine(
        self,
        x: torch.Tensor,
        handle: Any,
        topk_weights: torch.Tensor | None = None,
        bias: Any = None,
        config: Any = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, None, Event]:
        token, sent, received, T = handle
        assert x.dtype is BF16
        assert x.is_contiguous()
        assert x.shape[0] == sum(received)
        back = self._exchange(x, received, sent).float()
        total = torch.full((T, x.shape[1]), torch.nan, dtype=BF16)
        made = torch.zeros(T, x.shape[1]).index_add_(0, token, back).to(BF16)
        event = Event(lambda: total.copy_(made))
        if not async_finish:
            event.current_stream_wait()
        return total, None, event

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Any = None,
        dispatch_wait_recv_cost_stats: Any = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, torch.Tensor, Any, Event, Callable[[], None]]:
        (T, H), most = x.shape, num_max_dispatch_tokens_per_rank
        assert self.low_latency_mode
        assert x.dtype is BF16
        assert x.is_contiguous()
        assert most >= T
        assert not use_ue8m0
        self._check_ids(topk_idx, num_experts)
        e = num_experts // self.group_size
        slots = [(topk_idx.flatten() == i).nonzero()[:, 0] for i in range(num_experts)]
        slot, counts = torch.cat(slots), torch.tensor([len(part) for part in slots])
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self.group)
        sent = counts.view(-1, e).sum(1).tolist()
        received = theirs.view(-1, e).sum(1).tolist()
        arrived = self._exchange(x[slot // topk_idx.shape[1]], sent, received)
        # Row i of what arrived is the next free row of its expert.
        expert = torch.arange(e).repeat(self.group_size).repeat_interleave(theirs)
        chosen = torch.nn.functional.one_hot(expert, e)
        place = (chosen.cumsum(0) - 1).gather(1, expert[:, None])[:, 0]
        count = torch.zeros(e, dtype=torch.int32)
        packed = torch.full(
            (e, self.group_size * most, H), torch.nan, dtype=FP8 if use_fp8 else BF16
        )
        room = packed.shape[1]
        scales = torch.full((e, H // BLOCK, room), torch.nan).transpose(1, 2)
        self.sent.append(packed.dtype)

        def hook() -> None:
            count.copy_(torch.bincount(expert, minlength=e))
            if not use_fp8:
                packed[expert, place] = arrived
                return
            groups = arrived.float().unflatten(-1, (-1, BLOCK))
            scale = groups.abs().amax(-1).clamp(min=1e-4) / 448
            if round_scale:
                scale = torch.exp2(scale.log2().ceil())
            q = (groups / scale[..., None]).flatten(-2).to(FP8)
            packed.view(torch.uint8)[expert, place] = q.view(torch.uint8)
            scales[expert, place] = scale

        if not return_recv_hook:
            hook()
        handle = (slot, sent, received, expert, place, T, most, H)
        return (packed, scales) if use_fp8 else packed, count, handle, Event(), hook

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Any,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: Any = None,
    ) -> tuple[torch.Tensor, Event, Callable[[], None]]:
        slot, sent, received, expert, place, T, most, H = handle
        assert x.dtype is BF16
        assert x.is_contiguous()
        assert x.shape == (x.shape[0], self.group_size * most, H)
        assert topk_idx.dtype is torch.int64
        assert topk_weights.dtype is torch.float32
        assert topk_weights.is_contiguous()
        assert topk_weights.shape == topk_idx.shape == (T, topk_idx.shape[1])
        back = self._exchange(x[expert, place], received, sent).float()
        weighted = back * topk_weights.flatten()[slot, None]
        made = torch.zeros(T, H).index_add_(0, slot // topk_idx.shape[1], weighted)
        total = torch.empty(T, H, dtype=BF16) if out is None else out
        assert (total.shape, total.dtype) == ((T, H), BF16)
        assert total.is_contiguous()
        hook = lambda: total.copy_(made)  # noqa: E731
        if not return_recv_hook:
            hook()
        return total, Event(), hook
