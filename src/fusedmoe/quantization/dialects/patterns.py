"""Which linear layers a checkpoint's lists of names mean."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase


def is_listed(module: str, names: Iterable[str]) -> bool:
    """Whether ``names`` mean the linear layer ``module``.

    A name means itself and everything below it, also where a model's outer prefix ("model.",
    "language_model.") is left out or added. "re:..." is a regular expression from the start of the
    name; a name with * or ? is a pattern for the whole of it.
    """
    return any(_means(name, module) for name in names)


def _means(name: str, module: str) -> bool:
    if name.startswith("re:"):
        return _compiled(name[3:]).match(module) is not None
    if any(character in name for character in "*?["):
        return fnmatchcase(module, name) or fnmatchcase(module, f"{name}.*")
    return f".{name}." in f".{module}." or name.endswith(f".{module}")


def matches(expression: str, module: str) -> bool:
    """Whether a regular expression of a checkpoint matches from the start of ``module``."""
    return _compiled(expression).match(module) is not None


def _compiled(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"{expression!r} in quantization_config is no pattern: {error}") from None
