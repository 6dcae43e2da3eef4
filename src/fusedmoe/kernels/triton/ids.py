"""Device helper: from a routed id to the expert stored here, the same rule in every kernel."""

import triton
import triton.language as tl


@triton.jit
def local_expert(ids, map_ptr, num_mapped, num_local):
    """Local expert of each id as int32, -1 where there is none.

    ids: a block of int32 or int64. map_ptr: int32 [num_mapped] global -> local id or -1, or None
    where ids are local already. Ids (and mapped ids) outside their range count as -1.
    """
    if map_ptr is not None:
        inside = (ids >= 0) & (ids < num_mapped)
        ids = tl.load(map_ptr + tl.where(inside, ids, 0), mask=inside, other=-1)
    return tl.where((ids >= 0) & (ids < num_local), ids, -1).to(tl.int32)
