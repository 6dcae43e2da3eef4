"""Whatever a quantization_config holds, it is read, or it is a ValueError."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from writers import CASES

from fusedmoe.quantization.dialects import read_quantization

MODULE = "model.layers.0.mlp.experts.0.up_proj"
VALUES = (None, -1, 0, 3, 2.5, 1e300, 10**30, "x", "", [], [1], [[]], {}, {"a": 1}, True)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside ``value``."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, found in inside:
        yield (*path, key)
        if isinstance(found, (dict, list)):
            yield from places(found, (*path, key))


def with_value(config: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    inner: Any = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@pytest.mark.parametrize("name", CASES)
def test_any_value_in_any_place(name: str) -> None:
    config = CASES[name].config
    for path in places(config):
        for value in VALUES:
            changed = with_value(config, path, value)
            try:
                read_quantization(changed).scheme(MODULE)
            except ValueError:
                pass
            except Exception as error:
                raise AssertionError(f"{changed} is a {error!r}") from error


@pytest.mark.parametrize(
    "config", [{}, {"quant_method": []}, {"quant_method": {}}, {"quantization": 3}, {"x": "y"}]
)
def test_no_known_method(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="unknown quant_method"):
        read_quantization(config)
