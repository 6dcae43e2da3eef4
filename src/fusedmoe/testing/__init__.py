"""What the library tests its implementations with, for those who write their own.

Cases (layers as data), inputs, routing distributions, one table of tolerances, NaN in unwritten
memory, and ``check_experts``, which puts them together.
"""

from fusedmoe.testing.cases import ACTIVATION_CASES, STANDARD_CASES, Case, Inputs, make_inputs
from fusedmoe.testing.check import CaseResult, check_experts
from fusedmoe.testing.poison import nan_poison
from fusedmoe.testing.routing import ROUTINGS, routing_logits
from fusedmoe.testing.tolerances import (
    NO_WORSE,
    TOLERANCES,
    Tolerance,
    assert_close,
    assert_no_worse,
    format_name,
    relative_error,
)

__all__ = [
    "ACTIVATION_CASES",
    "NO_WORSE",
    "ROUTINGS",
    "STANDARD_CASES",
    "TOLERANCES",
    "Case",
    "CaseResult",
    "Inputs",
    "Tolerance",
    "assert_close",
    "assert_no_worse",
    "check_experts",
    "format_name",
    "make_inputs",
    "nan_poison",
    "relative_error",
    "routing_logits",
]
