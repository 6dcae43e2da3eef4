"""The whole routing rule for one block of tokens: from logits to scores and ids of the chosen.

A device function, for ``routing.py`` and for kernels that go on with the ids. A token's candidates
are laid out as BLOCK_G groups of BLOCK_S columns (powers of two; the padding columns can never be
chosen). fp32 arithmetic; other rows and their number change no bit of a row; no id outside
[0, CANDIDATES) is ever used as an address.
"""

import triton
import triton.language as tl

from fusedmoe.kernels.triton.routing_steps import (
    NO_ID,
    biased,
    choose,
    finite_or,
    hash_ids,
    keep_best_groups,
    score,
    softcap,
)
from fusedmoe.router.spec import NUM_VISION_TOKEN_IDS

VISION_IDS = tl.constexpr(NUM_VISION_TOKEN_IDS)


@triton.jit
def route_rows(
    logits_ptr,
    bias_ptr,
    vision_bias_ptr,
    table_ptr,
    input_ids_ptr,
    rows,
    row_mask,
    stride_row,
    stride_expert,
    stride_input_id,
    num_table_rows,
    stride_table_row,
    stride_table_slot,
    CASE: tl.constexpr,
):
    """Scores and ids [BLOCK_T, BLOCK_K] of the chosen, before ``finish_rows``."""
    SPEC: tl.constexpr = CASE.spec
    SCORE: tl.constexpr = SPEC.score_function
    AFTER_TOPK: tl.constexpr = SPEC.score_after_topk
    SOFTCAP: tl.constexpr = SPEC.logit_softcap
    VISION_LO: tl.constexpr = CASE.vision_lo
    BLOCK_T: tl.constexpr = CASE.BLOCK_T
    BLOCK_S: tl.constexpr = CASE.BLOCK_S
    GROUP_SIZE: tl.constexpr = CASE.GROUP_SIZE
    column = tl.arange(0, CASE.BLOCK_G * BLOCK_S)[None, :]
    member = column % BLOCK_S
    column_ids = column // BLOCK_S * GROUP_SIZE + member
    candidate = (member < GROUP_SIZE) & (column_ids < CASE.CANDIDATES)
    column_ids = tl.where(candidate, column_ids, NO_ID)
    row_ptr = logits_ptr + rows[:, None] * stride_row
    x = tl.load(
        row_ptr + column_ids.to(tl.int64) * stride_expert,
        mask=row_mask[:, None] & candidate,
        other=float("-inf"),
    ).to(tl.float32)
    if SOFTCAP != 0.0:
        x = tl.where(candidate, softcap(x, SOFTCAP), float("-inf"))
    row_max = tl.max(x, axis=1)
    row_sum = tl.sum(tl.exp(x - row_max[:, None]), axis=1)
    if AFTER_TOPK:  # noqa: SIM108 (a compile-time branch)
        scores = finite_or(x, float("-inf"))
    else:
        scores = score(x, row_max, row_sum, SCORE)
    choice = biased(scores, bias_ptr, column_ids, candidate)
    is_vision = tl.zeros([BLOCK_T], dtype=tl.int1)
    token_ids = rows
    if input_ids_ptr is not None:
        token_ids = tl.load(input_ids_ptr + rows * stride_input_id, mask=row_mask, other=-1)
        token_ids = token_ids.to(tl.int64)
    if VISION_LO > 0:
        is_vision = (token_ids >= VISION_LO) & (token_ids < VISION_LO + VISION_IDS)
        vision_choice = biased(scores, vision_bias_ptr, column_ids, candidate)
        choice = tl.where(is_vision[:, None], vision_choice, choice)
    choice = tl.where(candidate, choice, float("-inf"))
    if CASE.GROUPS > 1 and SPEC.topk_group < CASE.GROUPS:
        choice = keep_best_groups(choice, CASE)
    if table_ptr is None:
        ids, chosen = choose(choice, column_ids, CASE)
        if bias_ptr is None and VISION_LO == 0:
            # What was chosen by is the score (or the logit) itself.
            if not AFTER_TOPK:
                return chosen, ids
            chosen = tl.where(ids >= 0, chosen, float("-inf"))
            row_max = tl.max(chosen, axis=1)
            row_sum = tl.sum(tl.exp(chosen - row_max[:, None]), axis=1)
            return score(chosen, row_max, row_sum, SCORE), ids
    else:
        ids = hash_ids(
            table_ptr,
            token_ids,
            row_mask,
            num_table_rows,
            stride_table_row,
            stride_table_slot,
            CASE,
        )
        if VISION_LO > 0:
            best, _ = choose(choice, column_ids, CASE)
            ids = tl.where(is_vision[:, None], best, ids)
    chosen = tl.load(
        row_ptr + ids.to(tl.int64) * stride_expert,
        mask=row_mask[:, None] & (ids >= 0),
        other=float("-inf"),
    ).to(tl.float32)
    chosen = tl.where(ids >= 0, softcap(chosen, SOFTCAP), float("-inf"))
    if AFTER_TOPK:
        chosen = finite_or(chosen, float("-inf"))
        row_max = tl.max(chosen, axis=1)
        row_sum = tl.sum(tl.exp(chosen - row_max[:, None]), axis=1)
    return score(chosen, row_max, row_sum, SCORE), ids
