"""Which linear layers a checkpoint's lists of names mean."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from itertools import combinations

from fusedmoe.quantization.dialects.expressions import matches


class LayerNames:
    """A list of names: which of them means a linear layer.

    A name means itself and everything below it, also where a model's outer prefix ("model.",
    "language_model.") is left out or added. "re:..." is a regular expression from the start of the
    name; a name with * or ? is a pattern for the whole of it.

    Lists may name every matrix of every expert, and are asked for each of these: but for patterns,
    what an answer takes does not depend on how long they are.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        # The places of names, of what they end in behind a dot, and the patterns among them.
        self._plain: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        self._patterns: list[tuple[int, str]] = []
        for place, name in enumerate(self._names):
            if name.startswith("re:") or any(c in name for c in "*?["):
                self._patterns.append((place, name))
                continue
            self._plain.setdefault(name, place)
            parts = name.split(".")
            for start in range(1, len(parts)):
                self._ends.setdefault(".".join(parts[start:]), place)

    def first(self, module: str) -> str | None:
        """The first of the names that means the linear layer ``module``; None where none does."""
        found = [self._ends[module]] if module in self._ends else []
        if self._plain:
            parts = module.split(".")
            bounds = combinations(range(len(parts) + 1), 2)
            inside = (".".join(parts[start:stop]) for start, stop in bounds)
            found += [self._plain[name] for name in inside if name in self._plain]
        place = min(found, default=len(self._names))
        before = (pattern for at, pattern in self._patterns if at < place)
        pattern = next((pattern for pattern in before if _means(pattern, module)), None)
        return pattern if pattern is not None or not found else self._names[place]

    def __contains__(self, module: str) -> bool:
        return self.first(module) is not None


def _means(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return matches(pattern[3:], module)
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*")
