"""Functions that torch.compile sees as one operator, whatever records they take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, get_type_hints

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.tuning.table_file import table_from_text
from fusedmoe.tuning.tuned_table import TunedTable

Given = ParamSpec("Given")


class _Kind(NamedTuple):
    """What a schema calls a type, and how its values become what an operator takes, and back."""

    schema: str
    there: Callable[[Any], Any] = lambda value: value
    back: Callable[[Any], Any] = lambda value: value


_KINDS: dict[Any, _Kind] = {
    torch.Tensor: _Kind("Tensor"),
    torch.Tensor | None: _Kind("Tensor?"),
    bool: _Kind("bool"),
    int: _Kind("SymInt"),
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
    """A parameter of the function that the operator has, too; ``place`` among the function's."""

    name: str
    place: int
    default: Any
    kind: _Kind

    def schema(self, written: bool) -> str:
        kind = self.kind.schema
        text = f"{f'{kind}({self.name}!)' if written else kind} {self.name}"
        return text if self.default is inspect.Parameter.empty else f"{text}={self.default}"


def opaque(
    name: str, writes: tuple[str, ...]
) -> Callable[[Callable[Given, None]], Callable[Given, None]]:
    """Make a function that writes into its arguments ``writes`` the operator ``name``.

    Compiled code calls the operator, everybody else the function. Parameters of types that no
    operator takes are left at their defaults there.
    """

    def decorate(run: Callable[Given, None]) -> Callable[Given, None]:
        hints = get_type_hints(run)
        arguments = [
            _Argument(one.name, place, one.default, _KINDS[hints[one.name]])
            for place, one in enumerate(inspect.signature(run).parameters.values())
            if hints[one.name] in _KINDS
        ]

        def operate(*values: Any) -> None:
            pairs = zip(arguments, values, strict=False)  # less those that are left at defaults
            run(**{one.name: one.kind.back(value) for one, value in pairs})  # type: ignore[call-arg]

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
            values = []
            for argument, place, default, kind in arguments:
                value = args[place] if place < len(args) else kwargs.get(argument, default)
                values.append(kind.there(value))
            operator(*values)

        return call

    return decorate
