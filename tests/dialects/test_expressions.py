"""Expressions of a checkpoint: those of Python's ``re``, in bounded time, or refused."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedmoe.quantization.dialects import expressions
from fusedmoe.quantization.dialects.expressions import matches
from fusedmoe.quantization.dialects.patterns import LayerNames

NAMES = [
    "lm_head",
    "model.layers.3.mlp.gate",
    "model.layers.13.mlp.experts.7.down_proj",
    "model.layers.0.self_attn.q_proj",
    "language_model.model.layers.61.block_sparse_moe.gate",
]
PUBLISHED = [
    ".*lm_head",
    ".*self_attn.*",
    r"model\.layers\.\d+\.mlp\.gate$",
    r".*\.mlp\.experts\.\d{1,3}\.(gate|up|down)_proj$",
    r".*layers\.(0|1|2|61)\..*",
    r"^(?!.*experts).*$",
    r".*\.(?!0\.)[0-9]+\.mlp\.gate",
    r".*(?<=layers)\.3\b",
    r"(?:model\.)?lm_head$",
    r"(?P<outer>language_model\.)model[.]layers[^a-z]+\w+",
    r".*?_proj",
    r"model.layers.[0-2].self_attn.(q|k|v|o)_proj",
]


@pytest.mark.parametrize("expression", PUBLISHED)
def test_expressions_as_checkpoints_have_them(expression: str) -> None:
    for name in NAMES:
        assert matches(expression, name) == (re.match(expression, name) is not None), name


ATOMS = st.sampled_from(
    ["a", "b", ".", "[ab]", "[^a]", "(?:a|b)", "(ab|a)", "(a?b)", r"\w", "(|b)"]
)
COUNTS = st.sampled_from(["", "*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "*?"])
EDGES = st.sampled_from(["^", "$", r"\b", "(?=a)", "(?!b)", "(?<=a)", "(?<!b)", r"\B", "|"])
EXPRESSIONS = st.lists(st.tuples(ATOMS, COUNTS).map("".join) | EDGES, max_size=7).map("".join)


@given(EXPRESSIONS, st.text("ab.", min_size=1, max_size=8))
@settings(max_examples=400, deadline=None)
def test_the_answer_is_that_of_re(expression: str, text: str) -> None:
    assert matches(expression, text) == (re.match(expression, text) is not None)


HOSTILE = [
    "(a+)+$",
    "(a|a)*$",
    "(a|aa)+$",
    "(.*a){20}$",
    ".*" * 30 + "b",
    "a?" * 100 + "a" * 100 + "b",
    "(a{1,1000}){1,1000}b",
    "(?!(a|a)*b)" * 20,
    "((((((a?)?)?)?)?)?)?b" * 10,
    "(" * 300,
]


@pytest.mark.parametrize("expression", HOSTILE)
def test_no_expression_takes_long(expression: str) -> None:
    text = "a" * 300
    start = time.process_time()
    with contextlib.suppress(ValueError):
        matches(expression, text)
    assert time.process_time() - start < 1.0


def test_a_hostile_name_takes_no_long_time_either() -> None:
    start = time.process_time()
    assert "a" * expressions.MAX_TEXT not in LayerNames(["*a" * 40 + "b", "re:" + ".*a" * 40 + "b"])
    assert time.process_time() - start < 1.0
    with pytest.raises(ValueError, match="name has 1025 characters"):
        matches("a", "a" * 1025)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("(a", "a missing parenthesis"),
        ("a)", "unbalanced parenthesis at character 1"),
        ("[a", "it ends"),
        ("[b-a]", "the range b-a"),
        ("*a", "nothing to repeat"),
        ("a**", "repetition of a repetition"),
        ("(a*)*", "repetition within repetition"),
        ("^*", "repetition of nothing"),
        ("a{3,2}", "repetition 3 to 2 times"),
        ("a{2000}", "repetition 2000 to 2000"),
        (r"(a)\1", r"the unknown escape \\1"),
        ("(?i)a", "an unknown kind of group"),
        ("(?>a)", "an unknown kind of group"),
        ("(?(1)a|b)", "an unknown kind of group"),
        ("\\", "it ends"),
        ("a" * 600, "pattern of 600 characters"),
    ],
)
def test_what_is_not_known_is_refused(expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matches(expression, "a")
