"""Parameters that a module keeps apart, over one storage that our experts read as a whole.

The Parameter objects stay, under their names; only their data become views of the stack, one layer
at a time, so that a state_dict looks as before and memory holds each weight once.

E experts, H hidden, I intermediate, S = 2 where gated, else 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fusedmoe.integrations.transformers.borrowed import check_tensors
from fusedmoe.integrations.transformers.gates import Gate, recognise_gate

Index = tuple[Any, ...]


@dataclass(frozen=True)
class Slot:
    """Parameter ``name`` of ``module`` is ``stack[key][index]``."""

    module: nn.Module
    name: str
    key: str
    index: Index

    @property
    def parameter(self) -> nn.Parameter:
        return self.module._parameters[self.name]  # type: ignore[return-value]


class ParameterStack:
    """The storage behind ``slots``, all of them below the module ``owner``.

    ``shapes`` are those of the stacked tensors by key. Moves and casts of the owner move the stack
    and set the views anew; ``refresh`` does so after Parameters were replaced.
    """

    def __init__(
        self, owner: nn.Module, shapes: Mapping[str, tuple[int, ...]], slots: Sequence[Slot]
    ) -> None:
        if "_apply" in vars(owner):
            raise ValueError(f"the parameters of this {type(owner).__name__} are stacked already")
        check_tensors({slot.name: slot.parameter for slot in slots})
        self.owner = owner
        self.shapes = dict(shapes)
        self.slots = tuple(slots)
        self.tensors: dict[str, torch.Tensor] = {}
        self._gather()
        owner.__dict__["_apply"] = self._apply
        self._hook = owner.register_state_dict_post_hook(_save_contiguous)

    @torch.no_grad()
    def _gather(self) -> None:
        """Copy the parameters into new storage, tensor by tensor, and make them views of it."""
        for key, shape in self.shapes.items():
            slots = [slot for slot in self.slots if slot.key == key]
            self.tensors[key] = slots[0].parameter.new_empty(shape, requires_grad=False)
            for slot in slots:
                view = self.tensors[key][slot.index]
                slot.parameter.data = view.copy_(slot.parameter)

    def refresh(self) -> None:
        """Gather again if Parameters were replaced since; costs two comparisons if not."""
        for slot in (self.slots[0], self.slots[-1]):
            view, found = self.tensors[slot.key][slot.index], slot.parameter
            if view.data_ptr() != found.data_ptr() or view.dtype != found.dtype:
                self._gather()
                return

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """``nn.Module._apply`` of the owner, for the stack as a whole."""
        moved = {key: fn(tensor) for key, tensor in self.tensors.items()}
        views = {id(slot.parameter): moved[slot.key][slot.index] for slot in self.slots}
        result = type(self.owner)._apply(
            self.owner,
            lambda tensor: views[id(tensor)] if id(tensor) in views else fn(tensor),
            recurse,
        )
        self.tensors = moved
        return result

    def release(self) -> None:
        """Give each Parameter storage of its own again."""
        for slot in self.slots:
            slot.parameter.data = slot.parameter.data.clone(memory_format=torch.contiguous_format)
        self._hook.remove()
        del self.owner.__dict__["_apply"]


def _save_contiguous(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """Views with gaps overlap in memory, which no file format can keep: save their values."""
    for name, tensor in state_dict.items():
        if name.startswith(prefix) and not isinstance(tensor, nn.Parameter):
            state_dict[name] = tensor.contiguous()


@dataclass(frozen=True, kw_only=True)
class StackedWeights:
    """Expert tensors out of a stack; ``w2_rows``: w2 is this 2-D parameter [E * I, H] instead."""

    stack: ParameterStack
    w13_shape: tuple[int, int, int]
    w2_rows: tuple[nn.Module, str] | None = None

    def w13(self) -> torch.Tensor:
        return self.stack.tensors["w13"].view(self.w13_shape)

    def w2(self) -> torch.Tensor:
        if self.w2_rows is None:
            return self.stack.tensors["w2"]
        module, name = self.w2_rows
        E, _, H = self.w13_shape
        return getattr(module, name).view(E, -1, H).transpose(1, 2)

    def w13_bias(self) -> torch.Tensor | None:
        return self.stack.tensors.get("w13_bias")

    def w2_bias(self) -> torch.Tensor | None:
        return self.stack.tensors.get("w2_bias")


def stack_rows(
    module: nn.Module, gate: str, up: str, down: str, num_experts: int
) -> StackedWeights:
    """gate, up and down [E * I, H] of ``module``: w13 with gate and up rows in turn (DBRX).

    Only alternating rows leave each of gate and up a matrix with one stride.
    """
    rows, H = module._parameters[gate].shape  # type: ignore[union-attr]
    slots = [Slot(module, name, "w13", (slice(None), i)) for i, name in enumerate((gate, up))]
    return StackedWeights(
        stack=ParameterStack(module, {"w13": (rows, 2, H)}, slots),
        w13_shape=(num_experts, 2 * rows // num_experts, H),
        w2_rows=(module, down),
    )


@dataclass(frozen=True)
class ListNames:
    """How one expert of a list names its linear layers; gate None: there is none."""

    gate: str | None
    up: str
    down: str


LIST_NAMES = (
    ListNames("gate_proj", "up_proj", "down_proj"),
    ListNames("w1", "w3", "w2"),
    ListNames("linear", "linear_v", "linear_1"),
    ListNames(None, "up_proj", "down_proj"),
    ListNames(None, "fc1", "fc2"),
)


def list_names(expert: nn.Module) -> ListNames:
    """How ``expert`` names its layers. Raises ValueError where it is not two or three of them."""
    linear = {name for name, child in expert.named_children() if type(child) is nn.Linear}
    for names in LIST_NAMES:
        if linear == {names.up, names.down, names.gate} - {None}:
            return names
    raise ValueError(f"the linear layers of a {type(expert).__name__} are {sorted(linear)}")


class _Half(nn.Module):
    """Stands for a linear layer: the ``index``-th of ``count`` equal parts of what comes in."""

    def __init__(self, index: int, count: int) -> None:
        super().__init__()
        self.index, self.count = index, count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.chunk(self.count, dim=-1)[self.index]


def gate_of_list(expert: nn.Module) -> Gate:
    """What ``expert`` does between its linear layers, found by running it without them.

    Raises ValueError where that is none of our activations.
    """
    names = list_names(expert)
    layers = [name for name in (names.gate, names.up) if name is not None]
    bare = copy.copy(expert)
    bare._modules = dict(expert._modules)
    bare._modules[names.down] = nn.Identity()
    for index, name in enumerate(layers):
        bare._modules[name] = _Half(index, len(layers))
    has_gate = names.gate is not None
    numbers = {name: getattr(expert, name, None) for name in ("limit", "swiglu_limit", "alpha")}
    probe = SimpleNamespace(has_gate=has_gate, _apply_gate=bare, act_fn=bare, **numbers)
    gate = recognise_gate(probe)
    if gate.activation is None:
        raise ValueError(f"the activation of {type(expert).__name__} is none of ours")
    return gate


def stack_list(experts: nn.ModuleList, owner: nn.Module | None = None) -> StackedWeights:
    """The experts of a module list; ``owner`` is the module that holds them (the list itself).

    Raises ValueError unless all are alike.
    """
    if len(experts) == 0:
        raise ValueError("there are no experts in the list")
    names = list_names(experts[0])
    layers = [name for name in (names.gate, names.up) if name is not None]
    up, down = getattr(experts[0], names.up), getattr(experts[0], names.down)
    E, S, I, H = len(experts), len(layers), up.out_features, down.out_features  # noqa: E741
    shapes: dict[str, tuple[int, ...]] = {"w13": (E, S * I, H), "w2": (E, H, I)}
    biases = {name: getattr(experts[0], name).bias is not None for name in (*layers, names.down)}
    if len(set(biases.values())) > 1:
        raise ValueError(f"only some of an expert's layers have a bias: {biases}")
    if biases[names.down]:
        shapes |= {"w13_bias": (E, S * I), "w2_bias": (E, H)}
    slots = []
    for e, expert in enumerate(experts):
        if type(expert) is not type(experts[0]):
            raise ValueError(f"expert {e} is a {type(expert).__name__}, not as the first one")
        for i, name in enumerate(layers):
            part = (e, slice(i * I, (i + 1) * I))
            slots += _slots(getattr(expert, name), "w13", part, (I, H), biases[name])
        slots += _slots(getattr(expert, names.down), "w2", (e,), (H, I), biases[names.down])
    stack = ParameterStack(experts if owner is None else owner, shapes, slots)
    return StackedWeights(stack=stack, w13_shape=(E, S * I, H))


def _slots(
    linear: nn.Linear, key: str, index: Index, shape: tuple[int, int], has_bias: bool
) -> list[Slot]:
    found = tuple(linear.weight.shape)
    if found != shape or (linear.bias is not None) != has_bias:
        raise ValueError(
            f"experts differ: a layer is {found} where the first expert's is {shape}, or one has "
            "a bias and the other has not"
        )
    slots = [Slot(linear, "weight", key, index)]
    return [*slots, Slot(linear, "bias", f"{key}_bias", index)] if has_bias else slots
