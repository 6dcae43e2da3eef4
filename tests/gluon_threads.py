"""Runs a Gluon kernel's own source on CPU tensors: a thread for each role of a program, TMA as
copies that come later, barriers with phases. What it shows is whether roles wait for each other as
they must: shared memory is poisoned, and a wait that nobody ends is an error.

A block of values is one tensor; layouts mean nothing. Only what the kernels that use it need is
here.
"""

from __future__ import annotations

import random
import threading
import time
import types
from typing import Any

import torch
from triton.experimental.gluon import language as real
from triton.runtime.jit import ConstexprFunction, JITFunction

PATIENCE = 20.0
DTYPES = {
    real.float32: torch.float32,
    real.bfloat16: torch.bfloat16,
    real.int32: torch.int32,
    real.int64: torch.int64,
    real.int8: torch.int8,
    real.int1: torch.bool,
}


class Block(torch.Tensor):
    """A tensor with the methods that a block of values has."""

    # Blocks are values: nothing changes them in place.
    def __iadd__(self, other: Any) -> Block:  # type: ignore[override,misc]
        return self + other

    def __imul__(self, other: Any) -> Block:  # type: ignore[override,misc]
        return self * other

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=None)

    def to(self, dtype: Any, bitcast: bool = False) -> Block:
        dtype = DTYPES.get(dtype, dtype)
        return self.view(dtype) if bitcast and self.dtype != dtype else super().to(dtype)


def block(value: Any) -> Block:
    return torch.as_tensor(value).as_subclass(Block)


class Pointer:
    """Element ``at`` of a flat tensor, or a block of such."""

    def __init__(self, memory: torch.Tensor, at: Any = 0) -> None:
        self.memory, self.at = memory, at
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.memory, self.at + step)

    def unsqueeze(self, axis: int) -> Pointer:
        return Pointer(self.memory, self.at.unsqueeze(axis))


class Barrier:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.pending = self.bytes = self.done = 0

    def move(self, arrivals: int, size: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += size
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.done += 1
                self.pending = self.count
                self.changed.notify_all()

    def wait(self, phase: Any) -> None:
        with self.changed:
            passed = self.changed.wait_for(lambda: self.done % 2 != int(phase), PATIENCE)
            assert passed, "a wait that nobody ended"


class Barriers(list):
    shape: Any = property(lambda self: [len(self), 1])

    def index(self, i: Any) -> Barrier:  # type: ignore[override]
        return self[int(i)]


class Shared:
    """A view of shared memory."""

    layout = None

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.shape, self.dtype = data, list(data.shape), data.dtype

    def index(self, i: Any) -> Shared:
        return Shared(self.data[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, layout: Any) -> Block:
        return block(self.data.clone())

    def store(self, value: torch.Tensor) -> None:
        assert list(value.shape) == self.shape
        assert value.dtype == self.dtype
        self.data.view(torch.uint8).copy_(value.contiguous().view(torch.uint8))

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        return Shared(self.data.view(-1).view(DTYPES.get(dtype, dtype)).view(shape))


class Matrix:
    """What a tensor descriptor says of ``memory``, as bytes."""

    def __init__(self, view: Any, memory: torch.Tensor) -> None:
        first = view.base.data_ptr() - memory.data_ptr()
        self.block_shape, self.dtype, self.layout = view.block_shape, memory.dtype, None
        self.size = memory.element_size()
        flat = memory.view(-1).view(torch.uint8)
        rows, columns = view.shape
        strides = view.strides[0] * self.size, 1
        self.data = flat.as_strided((rows, columns * self.size), strides, first)

    def part(self, row: int, column: int) -> torch.Tensor:
        rows, columns = self.block_shape
        first, last = column * self.size, (column + columns) * self.size
        return self.data[max(row, 0) : row + rows, first:last]

    def read(self, row: int, column: int) -> torch.Tensor:
        rows, columns = self.block_shape
        out = torch.zeros(rows, columns * self.size, dtype=torch.uint8)
        part = self.part(row, column)
        out[: part.shape[0], : part.shape[1]] = part
        return out

    def write(self, row: int, column: int, tile: torch.Tensor) -> None:
        part = self.part(row, column)
        part.copy_(tile.contiguous().view(torch.uint8)[: part.shape[0], : part.shape[1]])


class Program(threading.local):
    number = count = warps = 0


PROGRAM = Program()


def tma_copy(matrix: Matrix, at: list[Any], bar: Barrier, to: Shared, pred: Any = True) -> None:
    row, column = (int(x) for x in at)
    if not pred:
        return

    def arrive() -> None:
        time.sleep(random.random() * 2e-3)
        to.data.view(torch.uint8).copy_(matrix.read(row, column))
        bar.move(0, -to.data.numel())

    threading.Thread(target=arrive).start()


def tma_store(matrix: Matrix, at: list[Any], source: Shared) -> None:
    matrix.write(int(at[0]), int(at[1]), source.data)


def gather(to: Shared, ptr: Pointer, mask: Any = None) -> None:
    to.store(load(ptr, mask))


def gathered(bar: Barrier, increment_count: bool) -> None:
    bar.move(32 * PROGRAM.warps, 0)


def multiply(a: Shared, b: Shared, total: torch.Tensor, use_acc: bool = True, **_: Any) -> Block:
    product = a.data.double() @ b.data.double()
    return block(((total.double() if use_acc else 0.0) + product).to(total.dtype))


def load(ptr: Pointer, mask: Any = None, other: Any = 0, **_: Any) -> Block:
    at = torch.as_tensor(ptr.at)
    live = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    at, live = torch.broadcast_tensors(at, live)
    reached = at[live]
    assert not reached.numel() or 0 <= int(reached.min()) <= int(reached.max()) < len(ptr.memory)
    found = torch.full(at.shape, other).to(ptr.memory.dtype)
    found[live] = ptr.memory[reached.long()]
    return block(found)


def store(ptr: Pointer, value: Any, mask: Any = True, **_: Any) -> None:
    at, value, mask = torch.broadcast_tensors(
        torch.as_tensor(ptr.at), torch.as_tensor(value), torch.as_tensor(mask)
    )
    ptr.memory[at[mask].long()] = value[mask].to(ptr.memory.dtype)


def raise_to(ptr: Pointer, value: torch.Tensor, mask: torch.Tensor, sem: str) -> None:
    for at, bits in zip(ptr.at[mask].tolist(), value[mask].tolist(), strict=True):
        ptr.memory[at] = max(int(ptr.memory[at]), bits)


def add_to(ptr: Pointer, value: int, sem: str, scope: str = "gpu") -> int:
    before = int(ptr.memory[int(ptr.at)])
    ptr.memory[int(ptr.at)] += value
    return before


def exchange(ptr: Pointer, expected: int, value: Any, sem: str, scope: str) -> int:
    before = int(ptr.memory[int(ptr.at)])
    if before == expected:
        ptr.memory[int(ptr.at)] = int(value)
    return before


def read_clock(asm: str, *_: Any, **__: Any) -> int:
    """Or only ask for what is not read."""
    assert "%globaltimer" in asm or "prefetch" in asm
    return time.monotonic_ns()


def specialize(roles: list[Any], warps: list[int], registers: list[int]) -> None:
    errors: list[BaseException] = []
    number, count = PROGRAM.number, PROGRAM.count

    def run(function: Any, args: Any, its_warps: int) -> None:
        PROGRAM.number, PROGRAM.count, PROGRAM.warps = number, count, its_warps
        try:
            function(*args)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(function, args, n))
        for (function, args), n in zip(roles, (8, *warps), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    if layout == "barriers":
        return Barriers(Barrier() for _ in range(shape[0]))
    dtype = DTYPES.get(dtype, dtype)
    poison = torch.full((*shape, dtype.itemsize), 0x7F, dtype=torch.uint8)
    return Shared(poison.view(dtype).view(shape))


def init(bar: Barrier, count: int) -> None:
    bar.count = bar.pending = count


def pick(function: Any) -> Any:
    return lambda a, b, **_: function(torch.as_tensor(a), torch.as_tensor(b)).as_subclass(Block)


LANGUAGE: dict[str, Any] = {
    "int8": torch.int8,
    "program_id": lambda axis: PROGRAM.number, "num_programs": lambda axis: PROGRAM.count,
    "num_warps": lambda: PROGRAM.warps, "load": load, "store": store, "atomic_max": raise_to,
    "atomic_add": add_to, "atomic_cas": exchange, "inline_asm_elementwise": read_clock,
    "max": lambda x, axis: block(x.amax(axis)), "min": lambda x, axis: block(x.amin(axis)),
    "arange": lambda first, last, layout: block(torch.arange(first, last)),
    "zeros": lambda shape, dtype, layout: block(torch.zeros(shape, dtype=DTYPES.get(dtype, dtype))),
    "full": lambda shape, value, dtype, layout: block(
        torch.full(shape, value, dtype=DTYPES.get(dtype, dtype))
    ),
    "where": lambda c, a, b: torch.where(
        torch.as_tensor(c), torch.as_tensor(a), torch.as_tensor(b)
    ).as_subclass(Block),
    "minimum": pick(torch.minimum), "maximum": pick(torch.maximum),
    "expand_dims": lambda x, axis: x.unsqueeze(axis), "static_range": range,
    "reshape": lambda x, shape: x.reshape(shape), "permute": lambda x, order: x.permute(order),
    "sum": lambda x, axis: block(x.sum(axis).to(x.dtype)),
    "split": lambda x: (x[..., 0], x[..., 1]),
    "convert_layout": lambda x, layout, assert_trivial=False: x,
    "allocate_shared_memory": allocate,
    "warp_specialize": specialize, "SliceLayout": lambda *a: None,
    "BlockedLayout": lambda *a: None, "NVMMADistributedLayout": lambda *a: None,
}  # fmt: skip
MBARRIER = types.SimpleNamespace(
    MBarrierLayout=lambda: "barriers",
    init=init,
    wait=lambda bar, phase: bar.wait(phase),
    expect=lambda bar, size, pred=True: bar.move(1, size) if pred else None,
    arrive=lambda bar, count, pred=True: bar.move(count, 0) if pred else None,
)


def wait_products(n: int, deps: tuple[Any, ...]) -> Any:
    return deps[0] if len(deps) == 1 else deps


INSTEAD: dict[str, Any] = {
    "gl": types.SimpleNamespace(**{**vars(real), **LANGUAGE}), "mbarrier": MBARRIER,
    "tma": types.SimpleNamespace(store_wait=lambda n: None),
    "async_copy": types.SimpleNamespace(mbarrier_arrive=gathered),
    "barrier": lambda: None, "tma_load": tma_copy, "tma_store": tma_store, "cp_async": gather,
    "reinterpret": lambda buffer, *seen: buffer._reinterpret(*seen),
    "warpgroup_mma": multiply, "warpgroup_mma_wait": wait_products,
    "gdc_wait": lambda: None, "gdc_launch_dependents": lambda: None,
    "fence_async_shared": lambda: None,
}  # fmt: skip


def largest_magnitude(x: torch.Tensor, axis: int) -> Block:
    return block(x.abs().amax(axis))


def scale_from(amax: torch.Tensor, dtype: torch.dtype, e8m0: bool, floor: float) -> Block:
    return block(amax.clamp(min=floor) / (127.0 if dtype == torch.int8 else 448.0))


def quantized(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Block:
    ratio = x * (1.0 / scale)
    if dtype == torch.int8:
        return block(ratio.round().clamp(-128, 127).to(dtype))
    return block(torch.Tensor.to(ratio.clamp(-448, 448), dtype))


def local_expert(ids: Any, table: Any, num_mapped: int, num_local: int) -> Block:
    ids = torch.as_tensor(ids).long()
    if table is not None:
        inside = (ids >= 0) & (ids < num_mapped)
        ids = torch.where(inside, table.memory.long()[torch.where(inside, ids, 0)], -1)
    return block(torch.where((ids >= 0) & (ids < num_local), ids, -1).int())


# What kernels with rows of 8 bits call.
ROUNDING: dict[str, Any] = {
    "hopper_activation": lambda formula, gate, up, *_: block(
        torch.nn.functional.silu(gate.float()) * up
    ),
    "float_scale": lambda x: x.float(),
    "largest_magnitude": largest_magnitude,
    "scale_from": scale_from,
    "scale_of": lambda x, axis, dtype, e8m0: scale_from(x.abs().amax(axis), dtype, e8m0, 1e-10),
    "quantized": quantized,
    "local_expert": local_expert,
    "bytes_of": lambda dtype: dtype.itemsize,
    "plain_activation": lambda formula, x: block(torch.relu(x) ** 2),
}


def interpreted(function: Any, instead: dict[str, Any]) -> Any:
    """The Python function of a kernel, with the stand-ins for what it names."""
    seen: dict[int, Any] = {}

    def convert(name: str, value: Any) -> Any:
        if name in instead or name in INSTEAD:
            return instead.get(name, INSTEAD.get(name))
        if isinstance(value, real.constexpr):
            return value.value
        if isinstance(value, ConstexprFunction):
            return value.fn
        if not isinstance(value, JITFunction):
            return value
        if id(value) not in seen:
            raw = value.fn
            names: dict[str, Any] = {}
            made = types.FunctionType(raw.__code__, names, raw.__name__, raw.__defaults__)
            seen[id(value)] = made
            for other, found in raw.__globals__.items():
                names[other] = convert(other, found)
        return seen[id(value)]

    return convert("", function)


def run(kernel: Any, programs: int, arguments: tuple[Any, ...], instead: dict[str, Any]) -> None:
    """Run the programs one after the other. Tensors among the arguments are passed by pointer."""
    function = interpreted(kernel, instead)
    passed = [
        Pointer(value.detach().view(-1)) if isinstance(value, torch.Tensor) else value
        for value in arguments
    ]
    for number in range(programs):
        PROGRAM.number, PROGRAM.count, PROGRAM.warps = number, programs, 8
        function(*passed)
