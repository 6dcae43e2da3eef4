"""Fields of a ``quantization_config``, which comes from anywhere: each is checked as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]


def one_of(config: Config, key: str, *allowed: Any) -> Any:
    """``config[key]`` (None where missing); ValueError unless it is one of ``allowed``."""
    value = config.get(key)
    if isinstance(value, str):
        value = value.lower()
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        known = ", ".join(repr(choice) for choice in allowed if choice is not None)
        raise ValueError(f"quantization_config: {key} is {value!r}; known: {known}")
    return value


def flag(config: Config, key: str, default: bool) -> bool:
    """A boolean; ValueError for anything else."""
    value = config.get(key, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"quantization_config: {key} must be true or false, got {value!r}")
    return value


def integer(config: Config, key: str, default: int | None = None) -> int:
    """An integer; ValueError for anything else, and where it is missing without a default."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"quantization_config: {key} must be an integer, got {value!r}")
    return value


def group_size_of(config: Config, key: str = "group_size", default: int | None = None) -> int:
    """Columns that share a scale, -1 for the whole row."""
    size = integer(config, key, default)
    if size < 1 and size != -1:
        raise ValueError(f"quantization_config: {key} must be positive or -1, got {size}")
    return size


def sizes_of(config: Config, key: str, count: int) -> tuple[int, ...] | None:
    """A list of ``count`` positive integers, or None."""
    value = config.get(key)
    if value is None:
        return None
    good = isinstance(value, list | tuple) and len(value) == count
    if not good or not all(type(size) is int and size > 0 for size in value):
        raise ValueError(
            f"quantization_config: {key} must be {count} positive integers, got {value!r}"
        )
    return tuple(value)


def names_of(config: Config, *keys: str) -> tuple[str, ...]:
    """The list of strings under the first of ``keys`` that is there; () where none is."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise ValueError(f"quantization_config: {key} must be a list of names, got {value!r}")
        return tuple(value)
    return ()


def section(config: Config, key: str) -> dict[str, Any]:
    """An object; {} where missing."""
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"quantization_config: {key} must be an object, got {value!r}")
    return value
