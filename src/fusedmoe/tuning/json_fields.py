"""Parsed JSON from anywhere, field by field: what is not as expected is one ValueError."""

from __future__ import annotations

import re
from typing import Any

MAX_SIZE = 1 << 24
_WORD = re.compile(r"[\w.+()\[\],-]{1,120}")


def object_of(value: Any, what: str, *names: str) -> dict[str, Any]:
    """An object with these keys and no other."""
    if not isinstance(value, dict) or set(value) != set(names):
        keys = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{what} must have the keys {', '.join(names)}, got {keys!s:.120}")
    return value


def integers_of(value: Any, what: str, most: int) -> tuple[int, ...]:
    """A list of one to ``most`` positive integers."""
    if not isinstance(value, list) or not 0 < len(value) <= most:
        raise ValueError(f"{what} must be a list of 1 to {most} entries")
    return tuple(integer_of(one, what) for one in value)


def integer_of(value: Any, what: str, most: int = MAX_SIZE) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{what} must be an integer of 1 to {most}, got {shown(value)}")
    return value


def word_of(value: Any, what: str) -> str:
    if not isinstance(value, str) or not _WORD.fullmatch(value):
        raise ValueError(f"{what} must be a word, got {shown(value)}")
    return value


def flag_of(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{what} must be true or false, got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """At most 40 characters; an integer of thousands of digits has no text at all."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a huge integer"
    return f"{value!r:.40}"
