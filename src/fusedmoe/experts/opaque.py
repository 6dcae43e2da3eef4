"""Functions that torch.compile sees as one operator, whatever records they take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, get_type_hints

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.modular_kernel.records import ExpertsWork
from fusedmoe.tuning.table_file import table_from_text
from fusedmoe.tuning.tuned_table import TunedTable

Given = ParamSpec("Given")


class _Kind(NamedTuple):
    """A type's name in a schema, and how its values become an operator's arguments and back."""

    schema: str
    there: Callable[[Any], Any] = lambda value: value
    back: Callable[[Any], Any] = lambda value: value


_KINDS: dict[Any, _Kind] = {
    torch.Tensor: _Kind("Tensor"),
    torch.Tensor | None: _Kind("Tensor?"),
    Sequence[torch.Tensor | None]: _Kind("Tensor?[]"),
    bool: _Kind("bool"),
    int: _Kind("SymInt"),
    str: _Kind("str"),
    MoEActivation: _Kind("str", lambda activation: activation.value, MoEActivation),
    ApplyMoEActivationConfig: _Kind(
        "float[]", lambda config: config.numbers(), ApplyMoEActivationConfig.from_numbers
    ),
    TunedTable | None: _Kind(
        "str?",
        lambda table: None if table is None else table.text,
        lambda text: None if text is None else table_from_text(text),
    ),
}


class _Argument(NamedTuple):
    """An argument of the operator: a parameter of the function, or a field of its record."""

    name: str
    default: Any
    kind: _Kind
    of_record: bool

    def schema(self, written: bool) -> str:
        kind = self.kind.schema
        return f"{kind.replace('Tensor', f'Tensor({self.name}!)') if written else kind} {self.name}"


def _arguments(
    given: Callable[..., Any] | type[ExpertsWork], *, of_record: bool = False
) -> Iterator[_Argument]:
    hints = get_type_hints(given)
    for one in inspect.signature(given).parameters.values():
        hint = hints[one.name]
        if hint is ExpertsWork:
            yield from _arguments(ExpertsWork, of_record=True)
        elif hint in _KINDS:
            yield _Argument(one.name, one.default, _KINDS[hint], of_record)


def opaque(
    name: str, writes: tuple[str, ...]
) -> Callable[[Callable[Given, None]], Callable[Given, None]]:
    """Make a function of ``work`` and more, which writes into what ``writes`` names, the operator
    ``name``.

    Compiled code calls the operator, everybody else the function. Parameters and fields of types
    that no operator takes are left at their defaults there.
    """

    def decorate(run: Callable[Given, None]) -> Callable[Given, None]:
        arguments = list(_arguments(run))
        places = dict(enumerate(inspect.signature(run).parameters))

        def operate(*values: Any) -> None:
            work: dict[str, Any] = {}
            rest: dict[str, Any] = {}
            for one, value in zip(arguments, values, strict=True):
                (work if one.of_record else rest)[one.name] = one.kind.back(value)
            run(ExpertsWork(**work), **rest)  # type: ignore[arg-type]

        schema = ", ".join(one.schema(one.name in writes) for one in arguments)
        operator = torch.library.custom_op(
            name, operate, mutates_args=writes, schema=f"({schema}) -> ()"
        )
        operator.register_fake(lambda *values: None)

        @wraps(run)
        def call(*args: Given.args, **kwargs: Given.kwargs) -> None:
            if not torch.compiler.is_compiling():
                run(*args, **kwargs)
                return
            given = kwargs | {places[place]: value for place, value in enumerate(args)}
            work = given["work"]
            values = []
            for one in arguments:
                value = (
                    getattr(work, one.name) if one.of_record else given.get(one.name, one.default)
                )
                values.append(one.kind.there(value))
            operator(*values)

        return call

    return decorate
