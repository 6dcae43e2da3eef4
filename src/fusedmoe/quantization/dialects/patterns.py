"""Which linear layers a checkpoint's lists of names mean."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from fusedmoe.quantization.dialects.expressions import matches


def is_listed(module: str, names: Iterable[str]) -> bool:
    """Whether ``names`` mean the linear layer ``module``.

    A name means itself and everything below it, also where a model's outer prefix ("model.",
    "language_model.") is left out or added. "re:..." is a regular expression from the start of the
    name; a name with * or ? is a pattern for the whole of it.
    """
    return any(_means(name, module) for name in names)


def _means(name: str, module: str) -> bool:
    if name.startswith("re:"):
        return matches(name[3:], module)
    if any(character in name for character in "*?["):
        return fnmatchcase(module, name) or fnmatchcase(module, f"{name}.*")
    return f".{name}." in f".{module}." or name.endswith(f".{module}")
