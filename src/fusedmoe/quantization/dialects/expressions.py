"""Regular expressions of a checkpoint, matched in bounded time whatever they and the names are.

Python's own engine tries one way after another, and takes exponential time where they are many.
Here all ways go at once: a set of positions in the text is an integer with a bit for each, and a
piece of the expression turns the positions where it may begin into those where it may end (or
back). What is known: characters, classes, groups, alternatives, repetition, anchors, looking ahead
and behind. What is not (references back, flags, repetition within repetition) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce

MAX_EXPRESSION, MAX_TEXT, MAX_REPEATS, MAX_DEPTH = 512, 1024, 1000, 20

_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}
_CONTROL = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}
_COUNT = re.compile(r"\{(\d{0,4})(,?)(\d{0,4})\}")
_LOOKS = {"(?=": (True, True), "(?!": (True, False), "(?<=": (False, True), "(?<!": (False, False)}

Is = Callable[[str], bool]


class _Text:
    """Positions 0 to len(text); bit i stands for the one before character i."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.every = (1 << len(text) + 1) - 1
        self._known: dict[Is, int] = {}

    def where(self, accepts: Is) -> int:
        """Positions whose next character is accepted."""
        if accepts not in self._known:
            bits = (1 << i for i, character in enumerate(self.text) if accepts(character))
            self._known[accepts] = reduce(int.__or__, bits, 0)
        return self._known[accepts]


class _Piece:
    def step(self, at: int, text: _Text, ahead: bool) -> int:
        """Positions where it ends after beginning at one of ``at``; not ``ahead``: the reverse."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Character(_Piece):
    accepts: Is

    def step(self, at: int, text: _Text, ahead: bool) -> int:
        where = text.where(self.accepts)
        return (at & where) << 1 if ahead else (at >> 1) & where


@dataclass(frozen=True)
class _Sequence(_Piece):
    pieces: tuple[_Piece, ...]

    def step(self, at: int, text: _Text, ahead: bool) -> int:
        for piece in self.pieces if ahead else reversed(self.pieces):
            at = piece.step(at, text, ahead)
        return at


@dataclass(frozen=True)
class _Either(_Piece):
    pieces: tuple[_Piece, ...]

    def step(self, at: int, text: _Text, ahead: bool) -> int:
        return reduce(int.__or__, (piece.step(at, text, ahead) for piece in self.pieces))


@dataclass(frozen=True)
class _Repeat(_Piece):
    """``most`` None: as often as there is text."""

    piece: _Piece
    least: int
    most: int | None

    def step(self, at: int, text: _Text, ahead: bool) -> int:
        for _ in range(self.least):
            at = self.piece.step(at, text, ahead)
        found = new = at
        left = len(text.text) if self.most is None else self.most - self.least
        while new and left > 0:
            new = self.piece.step(new, text, ahead) & ~found
            found |= new
            left -= 1
        return found


@dataclass(frozen=True)
class _Look(_Piece):
    """Ahead or behind: text that is there (or not), and is not taken."""

    piece: _Piece
    forwards: bool
    is_there: bool

    def step(self, at: int, text: _Text, ahead: bool) -> int:
        found = self.piece.step(text.every, text, not self.forwards)
        return at & (found if self.is_there else ~found)


@dataclass(frozen=True)
class _Edge(_Piece):
    """ "^", "$", or "b" (a word's edge) and "B" (none)."""

    kind: str

    def step(self, at: int, text: _Text, ahead: bool) -> int:
        if self.kind == "^":
            return at & 1
        if self.kind == "$":
            return at & 1 << len(text.text)
        word = text.where(_CLASSES["w"])
        edges = word ^ word << 1
        return at & (edges if self.kind == "b" else ~edges)


class _Parser:
    def __init__(self, expression: str) -> None:
        self.source, self.at, self.depth = expression, 0, 0

    def fail(self, why: str) -> ValueError:
        return ValueError(
            f"{self.source!r} in quantization_config is no pattern that can be read: {why} at "
            f"character {self.at}"
        )

    def whole(self) -> _Piece:
        found = self.either()
        if self.at < len(self.source):
            raise self.fail("unbalanced parenthesis")
        return found

    def take(self, word: str) -> bool:
        if self.source.startswith(word, self.at):
            self.at += len(word)
            return True
        return False

    def next(self) -> str:
        if self.at == len(self.source):
            raise self.fail("it ends")
        self.at += 1
        return self.source[self.at - 1]

    def either(self) -> _Piece:
        pieces = [self.sequence()]
        while self.take("|"):
            pieces.append(self.sequence())
        return pieces[0] if len(pieces) == 1 else _Either(tuple(pieces))

    def sequence(self) -> _Piece:
        pieces: list[_Piece] = []
        while self.at < len(self.source) and self.source[self.at] not in "|)":
            pieces.append(self.repeated(self.one()))
        return _Sequence(tuple(pieces))

    def repeated(self, piece: _Piece) -> _Piece:
        counts = self.counts()
        if counts is None:
            return piece
        least, most = counts
        if isinstance(piece, _Look | _Edge):
            raise self.fail("repetition of nothing")
        if max(least, most or 0) > MAX_REPEATS or (most is not None and most < least):
            raise self.fail(f"repetition {least} to {most} times")
        if (least, most) != (0, 1) and _repeats(piece):
            raise self.fail("repetition within repetition")
        self.take("?")
        if self.counts() is not None:
            raise self.fail("repetition of a repetition")
        return _Repeat(piece, least, most)

    def counts(self) -> tuple[int, int | None] | None:
        for word, counts in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(word):
                return counts
        found = _COUNT.match(self.source, self.at)
        if found is None or found[0] == "{}":
            return None
        self.at = found.end()
        least = int(found[1] or 0)
        if found[2]:
            return least, int(found[3]) if found[3] else None
        return least, least

    def one(self) -> _Piece:
        character = self.next()
        if character == "(":
            self.at -= 1
            return self.group()
        if character == "[":
            return _Character(self.members())
        if character == "\\":
            return self.escape()
        if character in "^$":
            return _Edge(character)
        if character == ".":
            return _Character(_not_a_new_line)
        if character in "*+?":
            raise self.fail("nothing to repeat")
        return _Character(character.__eq__)

    def group(self) -> _Piece:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.fail(f"more than {MAX_DEPTH} groups within each other")
        look = next((kinds for word, kinds in _LOOKS.items() if self.take(word)), None)
        if look is None and not self.take("(?:"):
            name = re.compile(r"\(\?P<[A-Za-z_]\w*>").match(self.source, self.at)
            self.at = name.end() if name else self.at + 1
            if self.source.startswith("?", self.at):
                raise self.fail("an unknown kind of group")
        inside = self.either()
        if not self.take(")"):
            raise self.fail("a missing parenthesis")
        self.depth -= 1
        return inside if look is None else _Look(inside, *look)

    def escape(self) -> _Piece:
        letter = self.next()
        if letter in "bB":
            return _Edge(letter)
        if letter in "AZ":
            return _Edge("^" if letter == "A" else "$")
        return _Character(self.escaped(letter))

    def escaped(self, letter: str) -> Is:
        if letter.lower() in _CLASSES:
            accepts = _CLASSES[letter.lower()]
            return accepts if letter.islower() else lambda c: not accepts(c)
        if letter in _CONTROL:
            return _CONTROL[letter].__eq__
        if letter.isalnum():
            raise self.fail(f"the unknown escape \\{letter}")
        return letter.__eq__

    def members(self) -> Is:
        negated, first = self.take("^"), True
        found: list[Is] = []
        while first or not self.take("]"):
            first = False
            low = self.next()
            if low == "\\":
                found.append(self.escaped(self.next()))
                continue
            ranged = re.compile(r"-([^\]\\])").match(self.source, self.at)
            if ranged is None:
                found.append(low.__eq__)
                continue
            self.at, high = ranged.end(), ranged[1]
            if high < low:
                raise self.fail(f"the range {low}-{high}")
            found.append(lambda c, low=low, high=high: low <= c <= high)  # type: ignore[misc]
        return lambda c: any(accepts(c) for accepts in found) != negated


def _not_a_new_line(character: str) -> bool:
    return character != "\n"


def _repeats(piece: _Piece) -> bool:
    """Whether anything inside is repeated, other than once or not at all."""
    if isinstance(piece, _Repeat):
        return (piece.least, piece.most) != (0, 1) or _repeats(piece.piece)
    if isinstance(piece, _Look):
        return _repeats(piece.piece)
    return isinstance(piece, _Sequence | _Either) and any(map(_repeats, piece.pieces))


@lru_cache(maxsize=256)
def _parsed(expression: str) -> _Piece:
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(
            f"quantization_config has a pattern of {len(expression)} characters, over the limit of "
            f"{MAX_EXPRESSION}"
        )
    return _Parser(expression).whole()


def matches(expression: str, text: str) -> bool:
    """Whether a regular expression matches from the start of ``text``, as ``re.match`` does.

    Raises ValueError for an expression that is too long or none that is known here, and for a text
    that is too long to be a module's name.
    """
    piece = _parsed(expression)
    if len(text) > MAX_TEXT:
        raise ValueError(f"a module's name has {len(text)} characters, over {MAX_TEXT}")
    return piece.step(1, _Text(text), True) != 0
