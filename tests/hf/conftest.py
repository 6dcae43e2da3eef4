"""Nothing here reaches for the network, and one thread is enough for models this small."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

pytest.importorskip("transformers")


@pytest.fixture(scope="session", autouse=True)
def _registered():
    import fusedmoe

    fusedmoe.register()
