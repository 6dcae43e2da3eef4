"""Tensors of a quantized checkpoint on their way to parameters: collected, then converted.

A dialect's rule may need several stored tensors at once, and they arrive in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from fusedmoe.weights.param_spec import ExpertSizes, ParamSpec, ShardId

if TYPE_CHECKING:
    from fusedmoe.quantization.dialects.base import LayerSchemes, Matrix, Rule, Scheme


class MatrixKey(NamedTuple):
    """One matrix of a layer; ``expert`` None: that of all experts, in one tensor."""

    expert: int | None
    shards: tuple[ShardId, ...]

    def matrix(self, name: str, sizes: ExpertSizes, names: Mapping[str, str]) -> Matrix:
        """Its logical size, which the checkpoint has whole and unpadded."""
        from fusedmoe.quantization.dialects.base import Matrix

        count = len(self.shards)
        N, K = count * sizes.intermediate, sizes.hidden
        if self.shards == ("w2",):
            N, K = sizes.hidden, sizes.intermediate
        return Matrix(name=name, N=N, K=K, shards=count, names=names)


class Waiting(NamedTuple):
    """A tensor, and the places of the rules that have not used it yet."""

    tensor: torch.Tensor
    rules: set[int]


class StoredTensors:
    """What has arrived of each matrix and is still needed.

    A matrix that is complete may come again: with its weight, everything that belongs to it has to
    come again, too. Other tensors may come alone.
    """

    def __init__(self, schemes: LayerSchemes) -> None:
        self.schemes = schemes
        self._pending: dict[MatrixKey, dict[str, Waiting]] = {}
        # The tensors that have come of a matrix, and those that came again without its weight.
        self._seen: dict[MatrixKey, tuple[set[str], set[str]]] = {}
        self._names: dict[MatrixKey, dict[str, str]] = {}
        self._bases: dict[MatrixKey, str] = {}

    def scheme(self, key: MatrixKey) -> Scheme:
        return self.schemes.w2 if key.shards == ("w2",) else self.schemes.w13

    def names(self, key: MatrixKey) -> Mapping[str, str]:
        """Full names of the tensors that have come of a matrix, by what its rules call them."""
        return self._names.get(key, {})

    def add(
        self, key: MatrixKey, base: str, suffix: str, name: str, tensor: torch.Tensor
    ) -> Iterator[tuple[Rule, tuple[torch.Tensor, ...]]]:
        """The rules that ``tensor`` completes, with what they need. ``base`` is the matrix's name,
        ``name`` the tensor's.

        Raises ValueError for a tensor that the dialect does not know.
        """
        scheme = self.scheme(key)
        suffix = scheme.suffix(suffix)
        if suffix not in scheme.known:
            raise ValueError(
                f"{name}: {scheme.dialect} {scheme.name} weights are stored as "
                f"{', '.join(sorted(scheme.known))}, not {suffix}"
            )
        self._bases[key] = base
        self._names.setdefault(key, {})[suffix] = name
        self._note(key, scheme, suffix)
        pending = self._pending.setdefault(key, {})
        users = {i for i, rule in enumerate(scheme.rules) if suffix in rule.needs}
        pending[suffix] = Waiting(tensor, users)
        for i in sorted(users):
            rule = scheme.rules[i]
            if all(need in pending and i in pending[need].rules for need in rule.needs):
                yield rule, tuple(pending[need].tensor for need in rule.needs)
                for need in rule.needs:
                    pending[need].rules.discard(i)
        self._pending[key] = {name: kept for name, kept in pending.items() if kept.rules}

    def _note(self, key: MatrixKey, scheme: Scheme, suffix: str) -> None:
        seen, again = self._seen.setdefault(key, (set(), set()))
        if suffix in seen and not scheme.missing(frozenset(seen)):
            again.add(suffix)
            if suffix in scheme.weight_needs:
                self._seen[key] = again, set()
        seen.add(suffix)

    def missing(self) -> list[str]:
        """Full names of the stored tensors that matrices which arrived in part still lack."""
        from fusedmoe.quantization.dialects.base import stored_name

        return [
            stored_name(self._bases[key], suffix, self._names[key].values())
            for key, (seen, _) in self._seen.items()
            for suffix in sorted(self.scheme(key).missing(frozenset(seen)))
        ]


def fit(part: torch.Tensor, spec: ParamSpec, sizes: ExpertSizes, shards: int) -> torch.Tensor:
    """``part`` in the shape that the parameter has for one expert: axes of one unit come and go."""
    shape = spec.joined(spec.checkpoint_shape(sizes), shards)
    same = [size for size in part.shape if size != 1] == [size for size in shape if size != 1]
    return part.reshape(shape) if same else part
