"""LoadableExperts: how RoutedExperts load, and whether they may run afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fusedmoe.quantization.method_base import FusedMoEMethodBase
from fusedmoe.weights.expert_map import ExpertMapManager
from fusedmoe.weights.loading import ExpertLoader, LoadReport
from fusedmoe.weights.param_spec import ParamSpec, ShardId, check_dtype
from fusedmoe.weights.params_mapping import ExpertTensorName

if TYPE_CHECKING:
    from fusedmoe.weights.routed_experts import RoutedExperts

NamedTensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
"""Checkpoint names with their tensors; what is iterated over is read one after the other."""


def named_tensors(weights: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of everything in ``weights``, which may be a mapping of them.

    Raises ValueError for an item that is no such pair.
    """
    for pair in weights.items() if isinstance(weights, Mapping) else weights:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError(f"weights are (name, tensor) pairs, got a {type(pair).__name__}")
        name, tensor = pair
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name}: expected a tensor, found a {type(tensor).__name__}")
        yield name, tensor


def own_name(name: str, prefix: str) -> str:
    """``name`` without ``prefix``, where it begins with that.

    Raises ValueError for experts of another layer than ``prefix``: other numbers lead to them.
    """
    if not prefix or name.startswith(f"{prefix}."):
        return name.removeprefix(f"{prefix}.")
    numbers = zip(_numbers(_path_to_experts(name)), _numbers(prefix), strict=False)
    if any(found != own for found, own in numbers):
        raise ValueError(f"{name} belongs to another layer than {prefix}")
    return name


def _path_to_experts(name: str) -> str:
    """What stands in front of ``experts`` in ``name``, nothing where it has none."""
    path, *inside = re.split(r"(?:^|\.)(?:routed_)?experts\.", name, maxsplit=1)
    return path if inside else ""


def _numbers(path: str) -> list[str]:
    """Those between its dots, the last one first."""
    return [part for part in reversed(path.split(".")) if part.isdecimal()]


class LoadableExperts(nn.Module):
    """Takes tensors of checkpoints in any order, and refuses to run what they filled in part."""

    w13_weight: torch.Tensor
    prefix: str
    quant_method: FusedMoEMethodBase
    expert_map_manager: ExpertMapManager
    param_specs: dict[str, ParamSpec]
    load_error: str | None = None
    _loaded_in_part = False
    _was_filled = False
    # Where the tensors that are being loaded come from, for a layer without a prefix.
    _source = ""
    _loader: ExpertLoader

    def process_weights_after_loading(self) -> None:
        """Prepack for the kernel; call it after writing weights by hand."""
        self._loaded_in_part, self._was_filled = False, True
        self.quant_method.process_weights_after_loading(cast("RoutedExperts", self))

    def weight_loader(
        self,
        param: torch.Tensor,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: ShardId,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Write one whole checkpoint tensor of physical expert ``expert_id`` into ``param``.

        ``shard_id``: w1 gate, w3 up, w2 down. The part of this rank is cut out here. With
        ``return_success`` returns whether the expert lives on this rank.
        """
        loaded = self._loader.load_one(param, loaded_weight, weight_name, shard_id, expert_id)
        return loaded if return_success else None

    def load_weights(self, weights: NamedTensors) -> set[str]:
        """Load (checkpoint name, tensor) pairs, then prepack; returns the parameters written.

        Understands one tensor per expert, gate and up joined or apart, all experts in one 3-D
        tensor or in one of stacked rows [E * I, H]. Raises ValueError for a name or shape that
        fits nothing; the layer then refuses to run until another call has succeeded. It also does
        while some tensors were loaded and others were not; ``check_loaded`` tells which.
        """
        self.loading_begins()
        with self.unusable_on_error():
            written = {name for pair in named_tensors(weights) for name in self.load_tensor(*pair)}
        self.loading_done()
        return written

    def load_tensor(self, name: str, tensor: torch.Tensor, expert: int | None = None) -> set[str]:
        """Load one tensor as ``load_weights`` does, without prepacking afterwards.

        ``expert``: ``tensor`` is what the tensor ``name`` [experts, ...] holds of that one.
        """
        with self.unusable_on_error():
            if self.prefix:
                name = own_name(name, self.prefix)
            else:
                self._source = self._source or _path_to_experts(name)
                own_name(name, self._source)
            if expert is not None:
                return self._loader.load_from_stack(name, expert, tensor)
            return self._loader.load(name, tensor)

    def local_experts_of(self, name: str) -> tuple[list[int], bool]:
        """Logical experts of tensor ``name`` with a copy on this rank; whether it holds them all.

        A rank needs to read nothing of a tensor that has none, and of one that holds all experts
        only these rows.
        """
        name = own_name(name, self.prefix)
        experts = self._loader.experts_of(name)
        every = range(self.expert_map_manager.num_logical_experts)
        found = filter(self._loader.is_local, every if experts is None else experts)
        return list(found), experts is None

    def load_part(
        self,
        name: str,
        tensor: torch.Tensor,
        *,
        expert: int | None,
        shards: tuple[ShardId, ...],
        suffix: str,
    ) -> set[str]:
        """As ``load_tensor``, where the caller knows what the tensor called ``name`` is.

        ``expert`` None: all experts in one tensor. ``shards``: ("w1",), ("w3",), ("w1", "w3") for
        both in one, or ("w2",). ``suffix`` is what the format calls it ("weight", "qweight", ...).
        """
        with self.unusable_on_error():
            return self._loader.load_part(ExpertTensorName(expert, shards, suffix), name, tensor)

    @contextmanager
    def unusable_on_error(self) -> Iterator[None]:
        """What is loaded in part must not run."""
        try:
            yield
        except Exception as error:
            self.load_error = str(error)
            raise

    def check_usable(self) -> None:
        """ValueError where a tensor could not be loaded, or has not been while others have."""
        if self.load_error is not None:
            raise ValueError(f"these experts were not loaded: {self.load_error}")
        if self._loaded_in_part:
            self._raise_if_missing()

    def loading_begins(self) -> None:
        """Forget the error of a load before; what comes from now on is of one layer.

        Raises ValueError while balancing moves experts, which would be put over what is loaded.
        """
        if self.expert_map_manager.is_moving:
            raise ValueError("experts are on their way: call the balancer's finish() before a load")
        self.load_error, self._source = None, ""

    def loading_done(self) -> None:
        """Prepack if every tensor has a value by now; else the layer waits for the rest."""
        self._source = ""
        filled = self._was_filled and not self._loader.missing_stored()
        if self._loader.is_complete or filled:
            self.process_weights_after_loading()
        else:
            self._loaded_in_part = True
            self.quant_method.weights_changed()

    def nothing_is_loaded(self) -> None:
        """The parameters have new memory, with nothing in it."""
        self._was_filled = False
        self._loader.forget()
        self.quant_method.weights_changed()

    def load_report(self) -> LoadReport:
        """Which experts' shards were loaded so far, and which were not."""
        return self._loader.report()

    def check_loaded(self) -> None:
        """Raise ValueError naming what no checkpoint tensor has filled."""
        with self.unusable_on_error():
            self._raise_if_missing()

    def _raise_if_missing(self) -> None:
        missing = self._loader.missing_stored()
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"the checkpoint lacks {missing[0]}{more}")
        self._loader.report().raise_if_missing(self.prefix)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        """What was derived from the old values is out of date; a whole state makes up for a load
        that failed, and one that fails is a load that failed."""
        errors = rest[-1]
        before = len(errors)
        for name in self.param_specs:
            given = state_dict.get(f"{prefix}{name}")
            if given is None:
                continue
            if not self.w13_weight.is_meta:
                self.quant_method.before_writing(cast("RoutedExperts", self), name, None)
            try:
                check_dtype(f"{prefix}{name}", given.dtype, name, getattr(self, name).dtype)
            except ValueError as error:
                errors.append(str(error))
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)
        held = [f"{prefix}{n}" for n, tensor in self._parameters.items() if tensor is not None]
        missing = [name for name in held if name not in state_dict]
        if len(errors) > before:
            self.load_error = errors[before]
        elif not missing:
            self.load_error, self._loaded_in_part = None, False
        elif len(missing) < len(held) and not self._was_filled:
            self.load_error = f"the state_dict lacks {missing[0]}"
        self._bind_weight_loader()
        self.quant_method.weights_changed()
        if self.quant_method.groups is not None:  # all ranks prepack together, in a forward
            return
        if self.load_error is None and not self._loaded_in_part:
            with self.unusable_on_error():
                self.process_weights_after_loading()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind_weight_loader()  # which copies of Parameters lack

    def _bind_weight_loader(self) -> None:
        """Give Parameters that replaced others the attributes that those were created with."""
        for name in self.param_specs:
            parameter = self._parameters.get(name)
            if parameter is not None:
                parameter.weight_loader = self.weight_loader  # type: ignore[attr-defined]
