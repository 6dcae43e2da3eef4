"""What a Mixture-of-Experts block of Transformers is, as data: one row per kind of block.

A row names the classes it was read from and where their parts are. Values that a model can
configure are read off the modules (``read``), never off config.json, which says less than the code
does. ``find_family`` gives the row of a module, or the reason why it must be left alone.

Paths are attribute paths from the block. T tokens, K picks, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from fusedmoe.integrations.transformers.device_hooks import has_own_forward
from fusedmoe.router.spec import RoutingSpec

# A value, or a function of the block that finds it.
Setting = Any
read = attrgetter
# In ``Router.arguments``: the token ids that the block was called with.
INPUT_IDS = "input_ids"
TORCH_CLASSES = {"Linear": nn.Linear, "ModuleList": nn.ModuleList}

Returns = Literal[
    "hidden",  # in the shape that came in
    "hidden_and_weights",  # and the chosen weights [T, K] in the logits' dtype
    "hidden_and_logits",  # and the logits [T, E]
    "flat_and_logits",  # [T, H] and the logits
    "flattened_and_logits",  # [T * H] and [T * E]
]


@dataclass(frozen=True, kw_only=True)
class Router:
    """The module that chooses, and how: ``rule`` are the fields of a ``RoutingSpec``.

    ``logits = x @ weight^T (+ bias)``, in fp32 if ``fp32_logits``, else in the weight's dtype;
    ``transform(router, x)`` prepares x. ``returned`` are the positions of (logits, weights, ids)
    in what the module itself returns, None where it returns none; a bare tensor is the logits.
    ``arguments`` are paths of what it takes beside x, ``takes_3d`` says that it wants [1, T, H].
    ``decides`` True leaves the choice to the module; the rule is then its top_k and num_experts.
    """

    cls: str
    at: str = "gate"
    rule: Mapping[str, Setting] = field(default_factory=dict)
    weight: str = "weight"
    bias: str | None = None
    fp32_logits: bool = False
    correction_bias: str | None = None
    per_expert_scale: str | None = None
    hash_table: str | None = None
    transform: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    returned: tuple[int | None, int | None, int | None] = (0, 1, 2)
    arguments: tuple[str, ...] = ()
    takes_3d: bool = False
    decides: bool = False

    def spec(self, block: nn.Module) -> RoutingSpec:
        """The rule with the block's own numbers; a number that is None keeps its default.

        Raises ValueError where they make no valid rule.
        """
        values = {name: resolve(value, block) for name, value in self.rule.items()}
        return RoutingSpec(**{name: value for name, value in values.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The module that computes, and its tensors.

    ``w13`` is [E, S * I, H] and ``w2`` [E, H, I], or transposed [E, H, S * I] and [E, I, H].
    ``rows``: w13 names two 2-D parameters, gate and up, [E * I, H] each, and w2 is [E * I, H] too,
    not transposed (DBRX). ``list``: one module per expert.
    ``activation`` finds what is between the GEMMs; None asks the module's ``_apply_gate``.
    """

    cls: str
    at: str = "experts"
    w13: str | tuple[str, str] = "gate_up_proj"
    w2: str = "down_proj"
    w13_bias: str | None = None
    w2_bias: str | None = None
    layout: Literal["stacked", "transposed", "rows", "list"] = "stacked"
    activation: Callable[[Any], Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Block:
    """A class of block. ``module`` is the folder in ``transformers.models``, or a file's name."""

    module: str
    block: str

    @property
    def name(self) -> str:
        return f"{self.module}.{self.block}"

    @property
    def home(self) -> str:
        """The Python module of its classes, or the last component of one not in Transformers."""
        module = self.module
        is_file = module.startswith("modeling_")
        return module if is_file else f"transformers.models.{module}.modeling_{module}"


@dataclass(frozen=True, kw_only=True)
class Family(Block):
    """One kind of block, and how it is run.

    ``whole`` False: the block's own forward stays (it does more than MoE), and the experts module,
    with the router where it has a rule, are run by us one by one.
    ``when``: (path, allowed values) pairs that must hold for the row to be the right one.
    ``noisy``: in training mode the block draws random numbers.
    """

    router: Router
    experts: Experts
    shared: str | None = None
    shared_gate: str | None = None
    input_projection: str | None = None
    output_projection: str | None = None
    output_scale: Setting = 1.0
    output_bias: str | None = None
    output_norm: str | None = None
    weights_on_input: bool = False
    takes_input_ids: bool = False
    returns: Returns = "hidden"
    whole: bool = True
    noisy: bool = False
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Unsupported(Block):
    """One that is left alone, and why."""

    reason: str


def family(
    module: str,
    prefix: str,
    rule: Mapping[str, Setting],
    *,
    block: str = "SparseMoeBlock",
    router: str = "TopKRouter",
    experts: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> Family:
    """The row of a block, a router and experts whose classes have one ``prefix``.

    ``experts`` are fields of ``Experts``, ``more`` those of ``Router`` and of ``Family``.
    """
    of_router = {one.name: more.pop(one.name) for one in fields(Router) if one.name in more}
    return Family(
        module=module,
        block=f"{prefix}{block}",
        router=Router(cls=f"{prefix}{router}", rule=rule, **of_router),
        experts=Experts(cls=f"{prefix}Experts", **experts),
        **more,
    )


def rule_of(router: str, **fields: Setting) -> Mapping[str, Setting]:
    """A rule whose top_k and num_experts are attributes of the router, the rest as given."""
    found = {"top_k": read(f"{router}.top_k"), "num_experts": read(f"{router}.num_experts")}
    return found | fields


def by_best_groups(**fields: Setting) -> Mapping[str, Setting]:
    """``rule_of`` a gate as DeepSeek-V3's: experts of the groups whose two best scores sum highest,
    weights renormalized where ``fields`` say so."""
    return rule_of(
        "gate",
        renormalize_epsilon=1e-20,
        num_expert_group=read("gate.num_group"),
        topk_group=read("gate.topk_group"),
        group_score="top2_sum",
        **fields,
    )


def resolve(value: Setting, block: nn.Module) -> Any:
    return value(block) if callable(value) else value


def at(block: Any, path: str | None) -> Any:
    """What ``path`` leads to from ``block``; None where a part of it is missing or None."""
    if path is None:
        return None
    for name in path.split(".") if path else ():
        block = getattr(block, name, None)
    return block


def find_family(module: nn.Module) -> Family | str | None:
    """The row of ``module``; the reason why a block of a known kind is left alone; None: unknown.

    A subclass belongs to its parent's row only if it keeps the parent's forward.
    """
    from fusedmoe.integrations.transformers.rows import BY_BLOCK, UNSUPPORTED_BLOCKS

    for cls in type(module).__mro__:
        kind: Any = cls
        key = (_home(cls), cls.__name__)
        if key in UNSUPPORTED_BLOCKS:
            return UNSUPPORTED_BLOCKS[key]
        rows = BY_BLOCK.get(key)
        if rows is None:
            continue
        if type(module).forward is not kind.forward:
            return f"{type(module).__name__} overrides the forward of {cls.__name__}"
        reasons = [_mismatch(row, module, cls.__module__) for row in rows]
        if None in reasons:
            return rows[reasons.index(None)]
        return next(reason for reason in reversed(reasons) if reason is not None)
    return None


def _home(cls: type) -> str:
    """A class's module; outside Transformers, where packages change, its last component."""
    name = cls.__module__
    return name if name.startswith("transformers.models.") else name.rpartition(".")[2]


def _mismatch(row: Family, block: nn.Module, home: str) -> str | None:
    """Why ``row`` does not describe ``block``, whose classes live in ``home``; None: it does."""
    for name, part in (("router", row.router), ("experts", row.experts)):
        found = at(block, part.at)
        own = (home, part.cls) == _class_of(found) or (part is row.experts and is_fp8(found))
        if not own and type(found) is not TORCH_CLASSES.get(part.cls):
            return f"its {name} is {_describe(found)}, not {part.cls}"
        if found is not block and not has_own_forward(found):
            return f"the forward of its {name} was replaced"
    for path, allowed in row.when:
        value = at(block, path)
        if value not in allowed:
            return f"{path} is {value!r}, not {' or '.join(map(repr, allowed))}"
    return None


def _class_of(module: Any) -> tuple[str, str]:
    """(Python module, class), those of the module that a replacement stands for."""
    stands_for: tuple[str, str] | None = getattr(module, "stands_for", None)
    return stands_for or (type(module).__module__, type(module).__name__)


def is_fp8(experts: Any) -> bool:
    """Whether Transformers' fp8 quantizer has put its own experts there, whatever was before."""
    return any(
        (cls.__module__, cls.__name__)
        == ("transformers.integrations.finegrained_fp8", "FP8Experts")
        for cls in type(experts).__mro__
    )


def _describe(found: Any) -> str:
    cls = type(found)
    return "missing" if found is None else f"{cls.__module__}.{cls.__name__}"
