"""Weights that are held only in the layout that a kernel made of them, not as numbers, too.

A packed weight is the same Parameter as before, of another class. What is asked about it (shape,
dtype, device) is answered as ever. Whatever reads or writes its numbers, be it indexing, a
state_dict, a move to another device or a load of new values, puts them back first, bit by bit as
they were; it is then a plain Parameter again, until it is packed anew. So there is one copy at a
time, and every reader finds the layout of ``QuantizedTensor``.

Several threads may run a layer. Reading its numbers meanwhile is as unsafe as writing them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fusedmoe.experts.copies import Source

CPU_QUANTIZED = "cpu_quantized"
"""The implementation that knows packed weights."""
packing = threading.RLock()
"""Held while numbers come or go."""

_ABOUT_IT = ("shape", "dtype", "device", "layout", "ndim", "nbytes", "itemsize", "grad", "is_leaf")
_DESCRIPTIONS = frozenset(
    getattr(torch.Tensor, name).__get__
    for name in (*_ABOUT_IT, "is_cpu", "is_cuda", "is_meta", "requires_grad")
) | {
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.element_size),
    *(torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.is_inference),
    *(torch.Tensor.requires_grad_, torch.Tensor.__len__),
}
_OPS = ("fusedmoe.fused_experts.default", "fusedmoe.fused_experts")
"""Ops that take packed weights. What runs inside them is not noticed here: it has to ``unpack``."""


class Packed:
    """What a kernel made of a weight [e, N, K]: ``weights``, one for each expert.

    ``unpack`` gives one expert's numbers back. ``sources`` are the other tensors that went into
    them, such as scales: where they change, ``weights`` are out of date, the numbers are not.
    """

    def __init__(
        self,
        weights: Sequence[Any],
        unpack: Callable[[Any], torch.Tensor],
        sources: tuple[Source, ...],
    ) -> None:
        self.weights, self.sources = weights, sources
        self._unpack = unpack
        self._gives_back: bool | None = None

    def gives_back(self, weight: torch.Tensor) -> bool:
        """Whether the first expert comes back as it was in ``weight``: all have one layout."""
        if self._gives_back is None:
            self._gives_back = torch.equal(self._unpack(self.weights[0]), weight[0])
        return self._gives_back

    def numbers(self, like: torch.Tensor) -> torch.Tensor:
        """All of them again, in the shape and dtype of ``like``."""
        out = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        for one, weight in zip(out, self.weights, strict=True):
            one.copy_(self._unpack(weight))
        return out


class PackedWeight(nn.Parameter):
    """A Parameter whose numbers are kept as ``packed``; ``pack`` makes one of a plain Parameter.

    Its storage is one repeated element: what goes around the class reads that and nothing else.
    """

    packed: Packed

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _DESCRIPTIONS or str(func) in _OPS:
            return super().__torch_function__(func, types, args, kwargs or {})
        if torch.compiler.is_dynamo_compiling():
            raise RuntimeError(f"{func} of packed weights in compiled code: read them outside")
        if torch.compiler.is_compiling():  # a compiler looks at what it was given
            return super().__torch_function__(func, types, args, kwargs or {})
        with packing:
            for leaf in tree_leaves((args, kwargs)):
                unpack(leaf)
            return super().__torch_function__(func, types, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        unpack(self)
        return self.__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        unpack(self)
        return self.__reduce_ex__(protocol)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether ``weight`` is a Parameter whose memory can be given up: no view and no other process
    has it."""
    if type(weight) is not nn.Parameter or weight.is_shared():
        return False
    return weight.numel() > 0 and _owners(weight) == _owners(torch.empty(0, device="cpu"))


def _owners(tensor: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def pack(weight: torch.Tensor, packed: Packed) -> bool:
    """Keep ``weight`` as ``packed``, and free the memory of its numbers.

    Does nothing and returns False for weights that cannot be packed, and where unpacking would not
    give the same numbers back.
    """
    # Numbers that lie elsewhere are inference tensors where they were before, and only there.
    with packing, torch.inference_mode(weight.is_inference()):
        if not (can_pack(weight) and packed.gives_back(weight)):
            return False
        repeated = torch.zeros(1, dtype=weight.dtype, device="cpu").expand(weight.shape)
        with torch._C.DisableTorchFunctionSubclass():
            weight.packed = packed  # type: ignore[attr-defined]
            weight.was_packed = True  # type: ignore[attr-defined]
            # The class first: another thread then reads either the numbers or what replaces them.
            weight.__class__ = PackedWeight
            weight.data = repeated
    return True


def unpack(weight: Any) -> None:
    """Put the numbers of a packed weight back; anything else stays as it is."""
    if type(weight) is not PackedWeight:
        return
    with packing, torch.inference_mode(weight.is_inference()):
        if type(weight) is PackedWeight:
            with torch._C.DisableTorchFunctionSubclass():
                weight.data = weight.packed.numbers(weight)
            weight.__class__ = nn.Parameter  # type: ignore[assignment]
            del weight.packed


def packed_of(weight: Any) -> Packed | None:
    """What ``weight`` is packed as; None for one that holds its numbers."""
    return getattr(weight, "packed", None) if type(weight) is PackedWeight else None


def was_packed(weight: torch.Tensor) -> bool:
    """Whether ``weight`` is or was packed: it may be again."""
    return getattr(weight, "was_packed", False)
