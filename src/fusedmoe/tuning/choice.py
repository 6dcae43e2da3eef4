"""Which tiles experts take: a given table's, a packaged one's, or those that follow from sizes.

Packaged tables are data of this package, under ``tables/<device>/<kernel>-<version>/``. One is
used where device, version of the kernel, release of Triton and layer are those it was measured
with; nothing else is looked at, and nothing outside the package is read.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fusedmoe.activation import MoEActivation
from fusedmoe.tuning.foreign import device_key
from fusedmoe.tuning.hopper_space import hopper_space
from fusedmoe.tuning.hopper_tiles import DirectTiles, HopperTiles, hopper_tiles, may_be_direct
from fusedmoe.tuning.table_file import table_from_json
from fusedmoe.tuning.tiles import HOPPER_SHARED_MEMORY, LayerTiles, TileConfig, layer_tiles
from fusedmoe.tuning.tuned_kernels import HOPPER, TRITON, TunedKernel
from fusedmoe.tuning.tuned_table import LayerKey, TunedTable, gemm1_form
from fusedmoe.words import DTYPE_NAMES

if TYPE_CHECKING:
    from fusedmoe.config import FusedMoEConfig


class DeviceFacts(NamedTuple):
    """What the choice of tiles depends on beside the sizes; ``triton`` None: no tables."""

    name: str
    shared_memory: int
    triton: str | None


@lru_cache
def device_facts(device: torch.device) -> DeviceFacts:
    """Of the GPU ``device``; a CPU stands in for a Hopper that no table was measured on."""
    if device.type != "cuda":
        return DeviceFacts("cpu", HOPPER_SHARED_MEMORY, None)
    import triton

    properties: Any = torch.cuda.get_device_properties(device)
    return DeviceFacts(
        device_key(properties.name),
        int(properties.shared_memory_per_block_optin),
        triton.__version__,
    )


class PlainLayer(NamedTuple):
    """An unquantized layer of E local experts, as far as its tiles depend on it."""

    K: int
    E: int
    H: int
    I: int  # noqa: E741
    dtype: torch.dtype
    activation: MoEActivation

    @classmethod
    def of(cls, moe: FusedMoEConfig) -> PlainLayer:
        return cls(
            moe.experts_per_token,
            moe.num_local_experts,
            moe.hidden_dim,
            moe.intermediate_size_per_partition,
            moe.in_dtype,
            moe.activation,
        )

    @property
    def key(self) -> LayerKey:
        """What a table of this layer says it is for."""
        weights, form = DTYPE_NAMES.get(self.dtype, str(self.dtype)), gemm1_form(self.activation)
        return LayerKey(E=self.E, K=self.K, H=self.H, I=self.I, weights=weights, form=form)


def table_name(layer: LayerKey, kernel: TunedKernel = TRITON) -> str:
    """The file that holds a layer's table."""
    of_kernel = "" if kernel is TRITON else f"-{kernel.name}"
    sizes = f"E{layer.E}-K{layer.K}-H{layer.H}-I{layer.I}"
    return f"{sizes}-{layer.weights}-{layer.form}{of_kernel}.json"


def table_folder(device: str, kernel: TunedKernel = TRITON) -> Traversable:
    tables = files("fusedmoe.tuning").joinpath("tables")
    return tables.joinpath(device, f"{kernel.name}-{kernel.version}")


@lru_cache(maxsize=1024)
def packaged_table(
    layer: LayerKey, facts: DeviceFacts, kernel: TunedKernel = TRITON
) -> TunedTable | None:
    """The table shipped for this layer on this device, or None."""
    if facts.triton is None:
        return None
    file = table_folder(facts.name, kernel).joinpath(table_name(layer, kernel))
    if not file.is_file():
        return None
    table = table_from_json(json.loads(file.read_text()))
    fits = (table.device, release(table.triton)) == (facts.name, release(facts.triton))
    return table if fits and table.unfit(layer) is None else None


def release(version: str | None) -> str | None:
    """``"3.6.1+git"`` -> ``"3.6"``: what a compiler's schedules are stable within."""
    return None if version is None else ".".join(version.split(".")[:2])


@lru_cache(maxsize=1024)
def checked_table(
    table: TunedTable | None, layer: PlainLayer, device: torch.device
) -> TunedTable | None:
    """``MoEOptions.tuned_table`` as the experts of this layer take it; None stays None.

    Raises ValueError where the table is not for this layer, or does not fit the device. The
    device's name and the release of Triton may differ: who passes a table says that it is good.
    """
    if table is None:
        return None
    key, facts = layer.key, device_facts(device)
    reason = table.unfit(key)
    if reason is not None:
        raise ValueError(f"the tuned table does not serve this layer: {reason}")
    if table.tuned_kernel is HOPPER:
        space = hopper_space(layer.K, layer.H, layer.I)
        strange = next((curve.tile for curve in table.curves if curve.tile not in space), None)
        if strange is not None:
            raise ValueError(f"the tuned table has tiles no layer of these sizes has: {strange}")
        return table
    for stage, tile, _ in table.curves:
        assert isinstance(tile, TileConfig)
        needed = tile.shared_memory(layer.dtype.itemsize, weight_tiles(stage, key.form))
        if needed > facts.shared_memory:
            raise ValueError(
                f"the tuned table's {stage} tile {tile} needs {needed} bytes of shared memory, "
                f"{facts.name} has {facts.shared_memory}"
            )
    return table


def given_table(moe: FusedMoEConfig) -> TunedTable | None:
    """``checked_table`` of an unquantized layer's options."""
    return checked_table(moe.options.table, PlainLayer.of(moe), moe.device)


def weight_tiles(stage: str, form: str | None) -> int:
    """How many tiles of weights a step of this GEMM loads: gate and up, or one."""
    return 1 if stage == "gemm2" or form == "plain" else 2


def source_of_tiles(moe: FusedMoEConfig, kernel: TunedKernel = TRITON) -> str:
    """Where the tiles of a layer on the experts of this kernel come from, in words."""
    facts, layer = device_facts(moe.device), PlainLayer.of(moe).key
    if moe.options.batch_invariant:
        if kernel is HOPPER:  # its kernels agree to the bit, all but one, whatever their tiles
            return "by the layer's shape; batch invariance asks for no table"
        return "the same for every batch, as batch invariance asks"
    if given_table(moe) is not None:
        return "the given table"
    name = f"{facts.name}/{table_name(layer, kernel)}"
    if packaged_table(layer, facts, kernel) is not None:
        return f"the packaged table {name}"
    return f"by the layer's shape; no table {name} is packaged"


@lru_cache(maxsize=8192)
def tiles_for(
    T: int,
    K: int,
    E: int,
    H: int,
    I: int,  # noqa: E741
    dtype: torch.dtype,
    activation: MoEActivation,
    facts: DeviceFacts,
    *,
    batch_invariant: bool = False,
    table: TunedTable | None = None,
) -> LayerTiles:
    """The tiles of a layer of E local experts for T tokens of K picks.

    ``table`` has been checked. ``batch_invariant`` takes no table, since tables vary with T.
    """
    if not batch_invariant:
        layer = PlainLayer(K, E, H, I, dtype, activation)
        table = table or packaged_table(layer.key, facts)
        if table is not None:
            gemm1, gemm2 = table.tiles(T)
            assert isinstance(gemm1, TileConfig)
            assert isinstance(gemm2, TileConfig)
            return LayerTiles(gemm1, gemm2)
    return layer_tiles(
        T,
        K,
        E,
        H,
        I,
        dtype,
        gated=activation.is_gated,
        interleaved=gemm1_form(activation) == "interleaved",
        batch_invariant=batch_invariant,
        shared_memory=facts.shared_memory,
    )


@lru_cache(maxsize=1024)
def hopper_table(
    table: TunedTable | None, layer: PlainLayer, device: torch.device
) -> TunedTable | None:
    """``checked_table``, else the one packaged for the Hopper experts of this layer."""
    given = checked_table(table, layer, device)
    return given or packaged_table(layer.key, device_facts(device), HOPPER)


@lru_cache(maxsize=8192)
def hopper_tiles_for(
    T: int,
    K: int,
    num_experts: int,
    num_local: int,
    H: int,
    I: int,  # noqa: E741
    *,
    batch_invariant: bool = False,
    table: TunedTable | None = None,
) -> HopperTiles:
    """The kernel and tiles for T tokens routed over ``num_experts``, ``num_local`` of them here.

    ``table`` is a ``hopper_table``; ``batch_invariant`` takes none. It is about tokens whose picks
    are all stored here: a rank of several looks up as many as would bring it its rows, and where
    those would need no tables, it goes by its sizes.
    """
    if table is not None and not batch_invariant:
        (tiles,) = table.tiles(tokens_here(T, num_local, num_experts))
        assert not isinstance(tiles, TileConfig)
        whole = num_local == num_experts and may_be_direct(T, K)
        if whole or not isinstance(tiles, DirectTiles):
            return tiles
    return hopper_tiles(T, K, num_experts, num_local, H, I, batch_invariant=batch_invariant)


def tokens_here(T: int, num_local: int, num_experts: int) -> int:
    """How many tokens would bring this rank its rows, if picks spread evenly over the ranks."""
    return max(1, T * num_local // num_experts)
