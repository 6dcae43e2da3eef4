"""Peer memory where four ranks take turns on one GPU: the same launches, without the wire.

Not rows that come late: copies within a GPU may want a multiprocessor, and find none.
"""

from __future__ import annotations

import pytest
import rank_peers

pytestmark = pytest.mark.gpu

UNEVEN = [600, 513, 700, 1]
CHECKS = (
    *((rank_peers.check_kernels, key) for key in ("as they are", "fp8 blocks", "int8")),
    *((rank_peers.check_layer, UNEVEN, sent) for sent in (False, True)),
    (rank_peers.check_pushed_rows, "as they are", [70, 0, 33, 1]),
    (rank_peers.check_pushed_rows, "as they are", UNEVEN, False, True),
    (rank_peers.check_pushed_rows, "fp8 blocks", UNEVEN),
    (rank_peers.check_rounded_layer, "fp8 blocks", UNEVEN),
    (rank_peers.check_batched, "as they are", [33, 0, 5, 1]),
    (rank_peers.check_layouts, "dp_tp"),
    (rank_peers.check_layouts, "sp_pairs", "peer_batched"),
    (rank_peers.check_model,),
    (rank_peers.check_missing_rank, 2.0),
    (rank_peers.check_disagreement,),
)


def test_what_ranks_of_several_gpus_do(ranks_on_one_gpu):
    """One test: the processes take longer to start than most of it, and start once a worker."""
    for check, *arguments in CHECKS:
        ranks_on_one_gpu.run(check, *arguments)
