"""The releases of Triton whose Gluon and calling convention the kernels are written for."""

from __future__ import annotations

KNOWN_RELEASES = ("3.6.", "3.7.", "3.8.", "3.9.")


def is_known(version: str) -> bool:
    """Whether a ``triton.__version__`` is of one of them."""
    return version.startswith(KNOWN_RELEASES)


def known() -> str:
    """All of them in words: "3.6.x, 3.7.x"."""
    return ", ".join(f"{release}x" for release in KNOWN_RELEASES)
