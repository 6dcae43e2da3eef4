"""Device helpers of routing: one function per step of a ``RoutingSpec``, for a block of tokens.

Blocks are [BLOCK_T, C]: one row per token, one column per candidate (see ``routing.py``). A
candidate that cannot be chosen has a choice of -inf; NaN has been replaced before the choice.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from fusedmoe.kernels.triton.launch import power_of_2
from fusedmoe.router.spec import RoutingSpec

# Keys are fp32 values as integers of the same order: REMOVED < MINUS_INFINITY < any finite value.
REMOVED = tl.constexpr(-(2**31))
MINUS_INFINITY = tl.constexpr(-2139095041)
NO_ID = tl.constexpr(2**31 - 1)


@dataclass(frozen=True, eq=False)
class RoutingCase:
    """What is constant in a launch: the rule, whether there is a ``vision`` bias, and how many
    tokens a program takes at a time. ``routing_case`` makes one for each rule, so that launches
    compare no fields.

    Beside the numbers of candidates, of groups and of a group's members stand the powers of two
    that their blocks have; BLOCK_K is that of a token's slots.
    """

    spec: RoutingSpec
    vision: bool
    BLOCK_T: int

    @property
    def CANDIDATES(self) -> int:
        return self.spec.num_experts + self.spec.num_zero_experts

    @property
    def GROUPS(self) -> int:
        return max(self.spec.num_expert_group, 1)

    @property
    def GROUP_SIZE(self) -> int:
        return self.CANDIDATES // self.GROUPS

    @property
    def BLOCK_G(self) -> int:
        return power_of_2(self.GROUPS)

    @property
    def BLOCK_S(self) -> int:
        return power_of_2(self.GROUP_SIZE)

    @property
    def BLOCK_K(self) -> int:
        return power_of_2(self.spec.top_k + self.spec.num_fused_shared_experts)

    @property
    def per_group(self) -> int:
        """How many are chosen in each group; 0: of all candidates together."""
        return self.spec.top_k // self.GROUPS if self.spec.selection == "topk_per_group" else 0

    @property
    def vision_lo(self) -> int:
        """The first token id with the vision bias; 0: none has it."""
        return self.spec.image_sentinel_lo if self.vision else 0


@triton.jit
def finite_or(x, other):
    return tl.where(tl.abs(x) < float("inf"), x, other)


@triton.jit
def softcap(x, SOFTCAP: tl.constexpr):
    if SOFTCAP == 0.0:
        return x
    decay = tl.exp(-2.0 * tl.abs(x / SOFTCAP))
    magnitude = SOFTCAP * (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 without losing a small x to the rounding of 1 + x."""
    total = 1.0 + x
    return tl.where(total == 1.0, x, tl.log(total) * (x / (total - 1.0)))


@triton.jit
def score(x, row_max, row_sum, SCORE: tl.constexpr):
    """Scores of logits [BLOCK_T, ...]; NaN and infinities become 0."""
    if SCORE == "softmax":
        s = tl.exp(x - row_max[:, None]) / row_sum[:, None]
    elif SCORE == "sigmoid":
        s = 1.0 / (1.0 + tl.exp(-x))
    elif SCORE == "sqrtsoftplus":
        s = tl.sqrt(tl.where(x > 20.0, x, _log1p(tl.exp(x))))
    else:
        s = x
    return finite_or(s, 0.0)


@triton.jit
def ordered(x):
    """fp32 -> int32 of the same order; -0.0 and 0.0 are one value."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(keys):
    """The inverse of ``ordered``."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def take_best(keys, column_ids):
    """keys [BLOCK_T, C], column_ids [1, C] -> id of the best (lower among equals), its key, and the
    keys without it."""
    best = tl.max(keys, axis=1)
    ids = tl.min(tl.where(keys == best[:, None], column_ids, NO_ID), axis=1)
    rest = tl.where(column_ids == ids[:, None], REMOVED, keys)
    return tl.where(best > MINUS_INFINITY, ids, -1), best, rest


@triton.jit
def keep_best_groups(choice, CASE: tl.constexpr):
    """choice [BLOCK_T, BLOCK_G * BLOCK_S] with -inf outside the best ``topk_group`` groups."""
    BLOCK_T: tl.constexpr = CASE.BLOCK_T
    BLOCK_G: tl.constexpr = CASE.BLOCK_G
    BLOCK_S: tl.constexpr = CASE.BLOCK_S
    TOPK_GROUP: tl.constexpr = CASE.spec.topk_group
    grouped = tl.reshape(choice, [BLOCK_T, BLOCK_G, BLOCK_S])
    group_score = tl.max(grouped, axis=2)
    if CASE.spec.group_score == "top2_sum" and CASE.GROUP_SIZE > 1:
        member = tl.arange(0, BLOCK_S)[None, None, :]
        first = tl.min(tl.where(grouped == group_score[:, :, None], member, BLOCK_S), axis=2)
        others = tl.where(member == first[:, :, None], float("-inf"), grouped)
        group_score += tl.max(others, axis=2)
        group_score = tl.where(group_score == group_score, group_score, float("-inf"))
    group = tl.arange(0, BLOCK_G)[None, :]
    keys = tl.where(group < CASE.GROUPS, ordered(group_score), REMOVED)
    keep = tl.zeros([BLOCK_T, BLOCK_G], dtype=tl.int1)
    for _ in range(TOPK_GROUP):
        best = tl.max(keys, axis=1)
        kept = tl.min(tl.where(keys == best[:, None], group, NO_ID), axis=1)
        keep = keep | (group == kept[:, None])
        keys = tl.where(group == kept[:, None], REMOVED, keys)
    grouped = tl.where(keep[:, :, None], grouped, float("-inf"))
    return tl.reshape(grouped, [BLOCK_T, BLOCK_G * BLOCK_S])


@triton.jit
def choose(choice, column_ids, CASE: tl.constexpr):
    """The K best ids [BLOCK_T, BLOCK_K], -1 where none is left, and their choice; NO_ID columns
    are no candidates."""
    BLOCK_T: tl.constexpr = CASE.BLOCK_T
    BLOCK_K: tl.constexpr = CASE.BLOCK_K
    BLOCK_S: tl.constexpr = CASE.BLOCK_S
    K: tl.constexpr = CASE.spec.top_k
    PER_GROUP: tl.constexpr = CASE.per_group
    keys = tl.where(column_ids == NO_ID, REMOVED, ordered(choice))
    slot = tl.arange(0, BLOCK_K)[None, :]
    ids = tl.full([BLOCK_T, BLOCK_K], -1, dtype=tl.int32)
    chosen = tl.full([BLOCK_T, BLOCK_K], MINUS_INFINITY, dtype=tl.int32)
    for pick in range(K):
        if PER_GROUP > 0:
            column = tl.arange(0, keys.shape[1])[None, :]
            inside = column // BLOCK_S == pick // PER_GROUP
            best, key, _ = take_best(tl.where(inside, keys, REMOVED), column_ids)
            keys = tl.where(column_ids == best[:, None], REMOVED, keys)
        else:
            best, key, keys = take_best(keys, column_ids)
        ids = tl.where(slot == pick, best[:, None], ids)
        chosen = tl.where(slot == pick, key[:, None], chosen)
    return ids, from_ordered(chosen)


@triton.jit
def biased(scores, bias_ptr, column_ids, candidate):
    choice = scores
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column_ids, mask=candidate, other=0.0).to(tl.float32)
        choice = scores + bias
        choice = tl.where(choice == choice, choice, float("-inf"))
    return choice


@triton.jit
def hash_ids(
    table_ptr,
    token_ids,
    row_mask,
    num_table_rows,
    stride_table_row,
    stride_table_slot,
    CASE: tl.constexpr,
):
    """ids [BLOCK_T, BLOCK_K] from table [num_table_rows, K]; -1 for what does not exist."""
    slot = tl.arange(0, CASE.BLOCK_K)[None, :]
    known = row_mask & (token_ids >= 0) & (token_ids < num_table_rows)
    address = table_ptr + token_ids[:, None] * stride_table_row + slot * stride_table_slot
    ids = tl.load(address, mask=known[:, None] & (slot < CASE.spec.top_k), other=-1)
    return tl.where((ids >= 0) & (ids < CASE.CANDIDATES), ids, -1).to(tl.int32)


@triton.jit
def _renormalized(weights, SPEC: tl.constexpr):
    NORM: tl.constexpr = SPEC.renormalize_norm
    if NORM == 1.0:
        norm = tl.sum(weights, axis=1)
    elif NORM == 2.0:
        norm = tl.sqrt(tl.sum(weights * weights, axis=1))
    elif NORM == float("inf"):  # noqa: SIM300
        norm = tl.max(tl.abs(weights), axis=1)
    else:
        powers = tl.where(weights == 0.0, 0.0, tl.exp2(NORM * tl.log2(tl.abs(weights))))
        norm = tl.exp2(tl.log2(tl.sum(powers, axis=1)) / NORM)
    norm = tl.maximum(norm + SPEC.renormalize_epsilon, SPEC.renormalize_floor)
    norm = tl.where(norm > 0.0, norm, 1.0)
    return weights / norm[:, None]


@triton.jit
def finish_rows(
    weights,
    ids,
    scale_ptr,
    padding_ptr,
    weights_ptr,
    ids_ptr,
    zero_weight_ptr,
    rows,
    row_mask,
    stride_padding,
    CASE: tl.constexpr,
):
    """From the scores of the chosen, weights and ids [BLOCK_T, BLOCK_K], to the contiguous outputs
    [T, K + fused shared experts] and the zero weight."""
    SPEC: tl.constexpr = CASE.spec
    NUM_EXPERTS: tl.constexpr = SPEC.num_experts
    NUM_SHARED: tl.constexpr = SPEC.num_fused_shared_experts
    K: tl.constexpr = SPEC.top_k
    slot = tl.arange(0, CASE.BLOCK_K)[None, :]
    weights = tl.where(ids >= 0, weights, 0.0)
    if SPEC.renormalize:
        weights = _renormalized(weights, SPEC)
    weights *= SPEC.routed_scaling_factor
    real = (ids >= 0) & (ids < NUM_EXPERTS)
    if scale_ptr is not None:
        weights *= tl.load(scale_ptr + ids, mask=real, other=1.0).to(tl.float32)
    live = row_mask
    if padding_ptr is not None:
        live = live & (tl.load(padding_ptr + rows * stride_padding, mask=row_mask, other=1) == 0)
        ids = tl.where(live[:, None], ids, -1)
    weights = tl.where(ids >= 0, weights, 0.0)
    zero_weight = tl.zeros([ids.shape[0]], dtype=tl.float32)
    if SPEC.num_zero_experts > 0:
        zero_weight = tl.sum(tl.where(ids >= NUM_EXPERTS, weights, 0.0), axis=1)
        ids = tl.where(real, ids, -1)
        weights = tl.where(real, weights, 0.0)
    if NUM_SHARED > 0:
        shared = (slot >= K) & (slot < K + NUM_SHARED) & live[:, None]
        ids = tl.where(shared, NUM_EXPERTS + slot - K, ids)
        weights = tl.where(shared, SPEC.shared_expert_weight, weights)
    SLOTS: tl.constexpr = K + NUM_SHARED
    offset = rows[:, None] * SLOTS + slot
    mask = row_mask[:, None] & (slot < SLOTS)
    tl.store(weights_ptr + offset, weights, mask=mask)
    tl.store(ids_ptr + offset, ids, mask=mask)
    if zero_weight_ptr is not None:
        tl.store(zero_weight_ptr + rows, zero_weight, mask=row_mask)
