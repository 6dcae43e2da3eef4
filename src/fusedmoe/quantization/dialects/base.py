"""What a dialect is: how a checkpoint says that it is quantized, and how its tensors are read.

A dialect reads the ``quantization_config`` of a checkpoint (``CheckpointQuantization``) and says,
for the name of a linear layer, what is stored there (``Scheme``): the format in our terms, and a
table of ``Rule``s that turn the stored tensors of one matrix into the parts of a
``QuantizedTensor``. Nothing else knows the dialect: what comes out is the one canonical layout.

N output features, K input features of one matrix; S shards (gate, up) stacked along N.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fusedmoe.quantization.dialects.patterns import LayerNames
from fusedmoe.quantization.keys import QuantKey
from fusedmoe.quantization.tensor import QuantFormat, QuantizedTensor

if TYPE_CHECKING:
    from fusedmoe.config import FusedMoEConfig
    from fusedmoe.quantization.method_base import FusedMoEMethodBase

Leaves = Mapping[str, torch.dtype]
"""dtype of the expert tensors in a checkpoint's files, by the last part of their names."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """The matrix that stored tensors belong to: its name in the files and its logical size.

    N rows in all, of ``shards`` matrices stacked (gate and up in one tensor). ``names`` are the
    full names of its tensors by suffix, where they are known.
    """

    name: str
    N: int
    K: int
    shards: int = 1
    names: Mapping[str, str] = field(default_factory=dict)

    def path(self, suffix: str) -> str:
        """The full name of a stored tensor, for messages."""
        return self.names.get(suffix) or stored_name(self.name, suffix, self.names.values())


def stored_name(matrix: str, suffix: str, others: Iterable[str] = ()) -> str:
    """What a tensor of ``matrix`` is called, for messages, beside ``others`` of the same matrix.

    Of all experts in one tensor the names may be bare: gate_up_proj, gate_up_proj_scales.
    """
    if all(name.startswith(f"{matrix}.") for name in others):
        return f"{matrix}.{suffix}"
    return matrix if suffix == "weight" else f"{matrix}_{suffix.removeprefix('weight_')}"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """``convert(matrix, *tensors)`` makes the part ``gives`` of the stored tensors ``needs``.

    Tensors are those of one matrix. ``gives`` is a parameter's name without its owner ("weight",
    "weight_scale", ...); several make ``convert`` return as many, "" drops what it returns: it was
    a check. ``optional``: the tensors may be absent, all of them. ``size`` finds (N, K) from the
    shapes of the tensors, or, ``size_in_values``, from the tensors.
    """

    needs: tuple[str, ...]
    gives: str | tuple[str, ...]
    convert: Callable[..., Any]
    optional: bool = False
    size: Callable[..., tuple[int, int]] | None = None
    size_in_values: bool = False

    def parts(self, matrix: Matrix, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What it gives, by name. Raises ValueError naming the tensor that is wrong."""
        made = self.convert(matrix, *tensors)
        if not self.gives:
            return {}
        if isinstance(self.gives, str):
            return {self.gives: made}
        return {name: part for name, part in zip(self.gives, made, strict=True) if part is not None}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the experts of a layer are stored, and what they become.

    ``activation`` None leaves activations as they are. ``ignored`` tensors are known and not
    needed. ``floats``: weights and biases are stored as those of unquantized experts.
    """

    dialect: str
    format: QuantFormat
    rules: tuple[Rule, ...]
    activation: QuantKey | None = None
    ignored: tuple[str, ...] = ()
    floats: bool = False

    @property
    def required(self) -> frozenset[str]:
        """Suffixes that every matrix has in the files."""
        return frozenset(n for rule in self.rules if not rule.optional for n in rule.needs)

    @property
    def weight_needs(self) -> frozenset[str]:
        """Suffixes of the tensors that the numbers themselves are made of."""
        gives = (
            (rule, (rule.gives,) if isinstance(rule.gives, str) else rule.gives)
            for rule in self.rules
        )
        return frozenset(n for rule, parts in gives if "weight" in parts for n in rule.needs)

    @property
    def known(self) -> frozenset[str]:
        return frozenset(n for rule in self.rules for n in rule.needs) | frozenset(self.ignored)

    @property
    def name(self) -> str:
        return self.format.name

    def suffix(self, found: str) -> str:
        """What the rules call a suffix of a tensor that holds all experts under a bare name.

        ``gate_up_proj`` and ``gate_up_proj_scale_inv`` are weight and weight_scale_inv.
        """
        if found in self.known:
            return found
        longer = f"weight_{found}" if found else "weight"
        return longer if longer in self.known else found

    def split(self, name: str) -> tuple[str, str] | None:
        """(matrix, suffix) of a tensor's full name; None where its ending is none of the scheme."""
        for suffix in sorted(self.known, key=len, reverse=True):
            base = name.removesuffix(suffix)
            if base != name and base[-1:] in ("", ".", "_"):
                return base[:-1], suffix
        return None

    def size(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], torch.Tensor] | None = None,
    ) -> tuple[int, int] | None:
        """(N, K) of a matrix stored in tensors of these ``shapes``, which ``read`` reads.

        None where they do not say.
        """
        for rule in self.rules:
            if rule.size is None or not all(need in shapes for need in rule.needs):
                continue
            if not rule.size_in_values:
                return rule.size(*(shapes[need] for need in rule.needs))
            if read is not None:
                return rule.size(*(read(need) for need in rule.needs))
        return None

    def describe(self) -> dict[str, Any]:
        """Plain values, for tools that print them."""
        return {
            "dialect": self.dialect,
            "format": self.format.name,
            "activation": None if self.activation is None else str(self.activation),
        }

    def missing(self, suffixes: frozenset[str]) -> frozenset[str]:
        """What a matrix with these stored tensors lacks; optional rules are all or nothing."""
        partly = (
            set(rule.needs) for rule in self.rules if rule.optional and suffixes & set(rule.needs)
        )
        return (self.required | frozenset().union(*partly)) - suffixes


class LayerSchemes(NamedTuple):
    """How w13 and w2 of a layer are stored; both have the same activations."""

    w13: Scheme
    w2: Scheme

    @property
    def activation(self) -> QuantKey | None:
        return self.w13.activation

    @property
    def name(self) -> str:
        """The format's name, or both."""
        return " + ".join(dict.fromkeys(scheme.name for scheme in self))

    def describe(self) -> dict[str, Any]:
        """Plain values, for tools that print them."""
        dialects = dict.fromkeys(scheme.dialect for scheme in self)
        return self.w13.describe() | {"dialect": " + ".join(dialects), "format": self.name}


def read_matrix(
    scheme: Scheme,
    tensors: Mapping[str, torch.Tensor],
    matrix: Matrix,
    dtype: torch.dtype = torch.bfloat16,
) -> QuantizedTensor:
    """One matrix [N, K] from its stored ``tensors`` by suffix; ``dtype`` is what it stands for.

    Raises ValueError naming a tensor that is missing, that the scheme does not know, or whose
    shape, dtype or values are wrong.
    """
    suffixes = frozenset(tensors)
    lacking = sorted(scheme.missing(suffixes))
    if lacking:
        raise ValueError(
            f"{matrix.path(lacking[0])}: missing beside {', '.join(sorted(suffixes)) or 'nothing'}"
            f" ({scheme.dialect}, {scheme.name})"
        )
    parts: dict[str, torch.Tensor] = {}
    for rule in scheme.rules:
        if all(need in suffixes for need in rule.needs):
            parts |= rule.parts(matrix, [tensors[need] for need in rule.needs])
    for suffix in sorted(suffixes - scheme.known):
        raise ValueError(
            f"{matrix.path(suffix)}: unexpected; {scheme.dialect} {scheme.name} weights are stored "
            f"as {', '.join(sorted(scheme.known))}"
        )

    def shaped(name: str, *shape: int) -> torch.Tensor | None:
        part = parts.get(name)
        return None if part is None else part.reshape(shape or part.shape)

    per_tensor = (matrix.shards,) if scheme.format.group == (-1, -1) else ()
    return QuantizedTensor(
        format=scheme.format,
        data=parts["weight"],
        scale=shaped("weight_scale", *per_tensor),
        scale2=shaped("weight_scale_2", matrix.shards),
        zero_point=shaped("weight_zero_point"),
        group_index=shaped("weight_group_index", matrix.shards, matrix.K),
        shape=(matrix.N, matrix.K),
        shards=matrix.shards,
        dtype=dtype,
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointQuantization(ABC):
    """What a checkpoint says about its formats; ``FusedMoE(quant_config=...)`` takes one.

    ``not_converted`` names layers that are stored as floats, ``layers`` those with settings of
    their own, of which the first counts; both as ``LayerNames`` reads such lists.
    """

    dialect: str
    not_converted: tuple[str, ...] = ()
    layers: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def _floats(self) -> LayerNames:
        return LayerNames(self.not_converted)

    @cached_property
    def layer_names(self) -> LayerNames:
        """The names in ``layers``."""
        return LayerNames(self.layers)

    def scheme(self, module: str) -> Scheme | None:
        """How the linear layer called ``module`` is stored; None: as ordinary floats.

        Raises ValueError for a scheme that is not known.
        """
        return None if module in self._floats else self.converted(module)

    @abstractmethod
    def converted(self, module: str) -> Scheme | None:
        """As ``scheme``, of a layer that is not in ``not_converted``."""

    def layer_schemes(self, w13: Sequence[str], w2: Sequence[str]) -> LayerSchemes | None:
        """The schemes of the linear layers that make up w13 (gates and ups) and w2 (downs).

        None where all are unquantized. Raises ValueError where they differ within one of the two:
        a parameter has one format.
        """
        first, second = self._one_of(w13), self._one_of(w2)
        if first is None and second is None:
            return None
        if first is None or second is None or first.activation != second.activation:
            raise _mixed((w13[0], first), (w2[0], second))
        return LayerSchemes(first, second)

    def _one_of(self, modules: Sequence[str]) -> Scheme | None:
        schemes = {module: self.scheme(module) for module in modules}
        first, *rest = schemes
        for module in rest:
            if _kind(schemes[first]) != _kind(schemes[module]):
                raise _mixed((first, schemes[first]), (module, schemes[module]))
        return schemes[first]

    def get_quant_method(
        self, moe_config: FusedMoEConfig, prefix: str
    ) -> FusedMoEMethodBase | None:
        """The method for the experts under ``prefix``; None leaves them unquantized."""
        from fusedmoe.quantization.quantized import QuantizedFusedMoEMethod

        gated = moe_config.is_act_and_mul
        w13 = [f"{prefix}.0.{name}" for name in ("gate_proj", "up_proj")[not gated :]]
        schemes = self.layer_schemes(w13, [f"{prefix}.0.down_proj"])
        if schemes is None:
            return None
        return QuantizedFusedMoEMethod.of_stored(schemes, moe_config)


def _kind(scheme: Scheme | None) -> tuple[QuantFormat, QuantKey | None] | None:
    return None if scheme is None else (scheme.format, scheme.activation)


def _mixed(*stored: tuple[str, Scheme | None]) -> ValueError:
    what = ", ".join(f"{module} is {_label(scheme)}" for module, scheme in stored)
    return ValueError(f"mixed formats in one layer: {what}")


def _label(scheme: Scheme | None) -> str:
    if scheme is None:
        return "unquantized"
    rounded = "" if scheme.activation is None else f" with {scheme.activation} activations"
    return scheme.name + rounded
