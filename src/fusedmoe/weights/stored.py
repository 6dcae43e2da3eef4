"""Tensors of a quantized checkpoint on their way to parameters: collected, then converted.

A dialect's rule may need several stored tensors at once, and they arrive in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from fusedmoe.weights.param_spec import ExpertSizes, ParamSpec, ShardId

if TYPE_CHECKING:
    from fusedmoe.quantization.dialects.base import LayerSchemes, Matrix, Rule, Scheme


class MatrixKey(NamedTuple):
    """One matrix of a layer: ``expert`` None stands for all of them in one tensor."""

    expert: int | None
    shards: tuple[ShardId, ...]

    def matrix(self, name: str, sizes: ExpertSizes) -> Matrix:
        """Its logical size, which the checkpoint has whole and unpadded."""
        from fusedmoe.quantization.dialects.base import Matrix

        if self.shards == ("w2",):
            return Matrix(name=name, N=sizes.hidden, K=sizes.intermediate)
        count = len(self.shards)
        return Matrix(name=name, N=count * sizes.intermediate, K=sizes.hidden, shards=count)


class StoredTensors:
    """What has arrived of each matrix and is still needed."""

    def __init__(self, schemes: LayerSchemes) -> None:
        self.schemes = schemes
        self._pending: dict[MatrixKey, dict[str, torch.Tensor]] = {}
        self._seen: dict[MatrixKey, set[str]] = {}
        self._names: dict[MatrixKey, str] = {}

    def scheme(self, key: MatrixKey) -> Scheme:
        return self.schemes.w2 if key.shards == ("w2",) else self.schemes.w13

    def add(
        self, key: MatrixKey, base: str, suffix: str, tensor: torch.Tensor
    ) -> Iterator[tuple[Rule, tuple[torch.Tensor, ...]]]:
        """The rules that ``tensor`` completes, with what they need. ``base`` is the matrix's name.

        Raises ValueError for a tensor that the dialect does not know.
        """
        scheme = self.scheme(key)
        suffix = scheme.suffix(suffix)
        if suffix not in scheme.known:
            raise ValueError(
                f"{base}.{suffix}: {scheme.dialect} {scheme.name} weights are stored as "
                f"{', '.join(sorted(scheme.known))}, not {suffix}"
            )
        self._names[key] = base
        self._seen.setdefault(key, set()).add(suffix)
        pending = self._pending.setdefault(key, {})
        pending[suffix] = tensor
        complete = [
            rule
            for rule in scheme.rules
            if suffix in rule.needs and pending.keys() >= {*rule.needs}
        ]
        for rule in complete:
            yield rule, tuple(pending[need] for need in rule.needs)
        waiting = [rule.needs for rule in scheme.rules if not self._is_seen(key, rule)]
        self._pending[key] = {
            name: kept for name, kept in pending.items() if any(name in needs for needs in waiting)
        }

    def _is_seen(self, key: MatrixKey, rule: Rule) -> bool:
        return self._seen[key] >= {*rule.needs}

    def missing(self) -> list[str]:
        """Full names of the stored tensors that matrices which arrived in part still lack."""
        return [
            f"{self._names[key]}{'' if key.expert is None else '.'}{suffix}"
            for key, seen in self._seen.items()
            for suffix in sorted(self.scheme(key).missing(frozenset(seen)))
        ]


def fit(part: torch.Tensor, spec: ParamSpec, sizes: ExpertSizes, shards: int) -> torch.Tensor:
    """``part`` in the shape that the parameter has for one expert: axes of one unit come and go."""
    shape = spec.checkpoint_shape(sizes)
    axis = spec.intermediate_axis
    if shards > 1 and axis is None:
        shape = (shards, *shape)
    elif shards > 1:
        assert axis is not None
        shape = (*shape[:axis], shards * shape[axis], *shape[axis + 1 :])
    same = [size for size in part.shape if size != 1] == [size for size in shape if size != 1]
    return part.reshape(shape) if same else part
