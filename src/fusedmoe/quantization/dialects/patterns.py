"""Which linear layers a checkpoint's lists of names mean."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import lru_cache

from fusedmoe.quantization.dialects.expressions import matches


def is_listed(module: str, names: Iterable[str]) -> bool:
    """Whether ``names`` mean the linear layer ``module``.

    A name means itself and everything below it, also where a model's outer prefix ("model.",
    "language_model.") is left out or added. "re:..." is a regular expression from the start of the
    name; a name with * or ? is a pattern for the whole of it.
    """
    plain, ends, patterns = _sorted(tuple(names))
    if module in ends:
        return True
    parts = module.split(".")
    count = len(parts)
    if plain and any(
        ".".join(parts[start:stop]) in plain
        for start in range(count)
        for stop in range(start + 1, count + 1)
    ):
        return True
    return any(_means(pattern, module) for pattern in patterns)


@lru_cache(maxsize=64)
def _sorted(names: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str], tuple[str, ...]]:
    """Names of single layers, what they end in behind a dot, and the patterns among them.

    Lists name hundreds of layers, and are asked for every matrix of every expert.
    """
    patterns = tuple(n for n in names if n.startswith("re:") or any(c in n for c in "*?["))
    plain = frozenset(names).difference(patterns)
    ends = (name.split(".")[start:] for name in plain for start in range(1, name.count(".") + 1))
    return plain, frozenset(map(".".join, ends)), patterns


def _means(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return matches(pattern[3:], module)
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*")
