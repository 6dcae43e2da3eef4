from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "dialects"))

from rank_pool import RankPool


@pytest.fixture(scope="session")
def gpu_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """A process for each of 2 or 4 GPUs, over NCCL and gloo."""
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("needs two GPUs")
    pool = RankPool(4 if count >= 4 else 2, str(tmp_path_factory.mktemp("gpus")), "cuda")
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks_on_one_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four processes that take turns on the GPU."""
    if torch.cuda.device_count() != 1:
        pytest.skip("needs one GPU; several have a rank each")
    pool = RankPool(4, str(tmp_path_factory.mktemp("one_gpu")), "cuda")
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four processes over gloo, for all tests here; groups of two are halves of them."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    pool = RankPool(4, str(tmp_path_factory.mktemp("ranks")))
    yield pool
    pool.close()
