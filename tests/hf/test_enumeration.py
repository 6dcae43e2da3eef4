"""Every Mixture-of-Experts family that Transformers has is in the table of tiny models."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers

# Files that speak of experts and yet have no routed feed-forward experts to run.
NOT_FOR_US = {
    "bamba": "its experts are configuration left over from Jamba; every layer is dense",
    "doge": "retrieves single neurons by product keys, no expert matrices; with is_moe=True "
    "Transformers 5.17 cannot run the model itself (its layer hands a tuple to dropout)",
    "vitpose_backbone": "experts are chosen by a data set index of the caller's; no router",
}


@cache
def modeling_files() -> dict[str, str]:
    folder = Path(transformers.__file__).parent / "models"
    return {path.parent.name: path.read_text() for path in sorted(folder.glob("*/modeling_*.py"))}


def decorated_classes() -> set[tuple[str, str]]:
    found = set()
    for family, text in modeling_files().items():
        if "use_experts_implementation" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and any(
                "use_experts_implementation" in ast.unparse(d) for d in node.decorator_list
            ):
                found.add((family, node.name))
    return found


def test_every_decorated_class_has_a_row():
    rows = {(row.family, row.experts_class) for row in tiny_models.DECORATED}
    assert decorated_classes() == rows


def test_every_other_family_with_experts_has_a_row_or_a_reason():
    sizes = re.compile(r"num_experts|n_routed_experts|num_local_experts|moe_num_experts")
    decorated = {family for family, _ in decorated_classes()}
    speak = {family for family, text in modeling_files().items() if sizes.search(text)}
    rows = {row.family for row in tiny_models.UNDECORATED}
    assert speak - decorated == rows | set(NOT_FOR_US)
    assert not rows & set(NOT_FOR_US)


def test_names_are_unique():
    names = [row.name for row in tiny_models.ROWS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", [row.name for row in tiny_models.ROWS])
def test_a_wrong_expert_changes_the_logits(name):
    """Otherwise agreement of logits would show nothing about the experts."""
    row = tiny_models.by_name(name)
    model = tiny_models.build(row)
    experts = [m for m in model.modules() if type(m).__name__ == row.experts_class]
    assert experts, f"{row.experts_class} is not in the model"
    wanted, _ = tiny_models.eager_results(name)
    with torch.no_grad():
        for module in experts:
            for parameter in module.parameters():
                rows_of_one = max(1, parameter.shape[0] // tiny_models.EXPERTS)
                parameter.copy_(parameter.roll(rows_of_one, 0))
    assert tiny_models.relative_error(tiny_models.logits(row, model), wanted) > 0.05


@pytest.mark.parametrize("name", [row.name for row in tiny_models.ROWS])
def test_a_row_is_reproducible(name):
    row = tiny_models.by_name(name)
    wanted, tokens = tiny_models.eager_results(name)
    assert torch.equal(tiny_models.logits(row, tiny_models.build(row)), wanted)
    assert (tokens is None) == (row.cannot_generate is not None)
