"""Replacement: a forward in the place of a module's own, and when it steps aside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fusedmoe.integrations.transformers.block_router import is_hooked
from fusedmoe.integrations.transformers.borrowed import BorrowedExperts
from fusedmoe.integrations.transformers.device_hooks import is_offloaded
from fusedmoe.integrations.transformers.gradients import PACKED, TRAINABLE, NoBackward
from fusedmoe.integrations.transformers.packed import HeldExperts


class Replacement(nn.Module, ABC):
    """A forward that replaces ``module``'s own, which is kept as ``original``.

    The original still runs where ours would not do the same: in training, under autocast, while
    someone listens to a module that we do not call (``listened``), after a submodule was replaced
    or offloaded.

    A module itself, without children: what torch.compile looks at below a module it skips, call
    after call, until a dictionary there changes; below any other object it looks anew each time.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        noisy: bool = False,
        listened: tuple[nn.Module, ...] = (),
        experts: BorrowedExperts | HeldExperts | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.original: Callable[..., Any] = module.forward
        self.noisy = noisy
        self.listened = listened
        self.parts = tuple(module.named_children())
        self.load_hook = None
        self.held = experts if isinstance(experts, HeldExperts) else None
        if experts is not None:
            self.load_hook = module.register_load_state_dict_post_hook(experts.weights_loaded)

    def __setattr__(self, name: str, value: Any) -> None:
        # Not registered: what is behind it belongs to the model.
        self.__dict__[name] = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Without a module's own hooks: who listens, listens to the block.
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.arguments(args, kwargs)
        if arguments is None or self._is_out_of_place(arguments[0]):
            return self.original(*args, **kwargs)
        if not torch.is_grad_enabled():
            return self.run(*arguments)
        with torch.no_grad():
            result = self.run(*arguments)
        advice = TRAINABLE if self.held is None else PACKED
        if isinstance(result, tuple):
            return tuple(NoBackward.apply(tensor, arguments[0], advice) for tensor in result)
        return NoBackward.apply(result, arguments[0], advice)

    def _is_out_of_place(self, x: torch.Tensor) -> bool:
        module = self.module
        if module.training and (self.noisy or torch.is_grad_enabled()):
            return True
        if torch.is_autocast_enabled(x.device.type) or is_hooked(self.listened):
            return True
        return self._has_other_parts()

    def _has_other_parts(self) -> bool:
        """Whether a submodule was replaced, or has its tensors only while it is called."""
        children = self.module._modules
        for name, child in self.parts:
            if children.get(name) is not child or is_offloaded(child):
                return True
        return False

    def release(self) -> None:
        """Undo everything but the forward itself."""
        if self.load_hook is not None:
            self.load_hook.remove()
        if self.held is not None:
            self.held.release()

    @abstractmethod
    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """What ``run`` takes, a tensor first; None for a call that is not the usual one."""

    @abstractmethod
    def run(self, *arguments: Any) -> Any:
        """What the original returns."""
