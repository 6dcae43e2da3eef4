"""QuantizedFusedMoEMethod: experts in any weight format, with or without quantized activations.

Which parameters there are follows from the formats alone:

    w13_weight, w2_weight                  data
    w13_weight_scale, w2_weight_scale      scales
    *_weight_scale_2, *_weight_zero_point, *_weight_group_index
                                           where the format has them
    w13_input_scale, w2_input_scale        where activations have stored scales: one per expert and
                                           shard; the largest is used for all
    w13_bias, w2_bias                      where the layer has them

Shapes are those of ``QuantizedTensor``, with e for its leading dimensions, and so are the numbers,
whenever they are read or written. In between, the kernel may hold a weight in its own order only:
the Parameter is then a ``PackedWeight`` (``experts/packed_weight.py``), which puts the numbers back
as they were loaded before anything else sees them. Loads, ``state_dict``, moves of experts or of
the layer, and copies need to know nothing of it.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING, Literal, Self

import torch

from fusedmoe.config import FusedMoEConfig, FusedMoEParallelConfig, ParallelGroups
from fusedmoe.quantization.config import FusedMoEQuantConfig, FusedMoEQuantDesc
from fusedmoe.quantization.formats.act_order import unsort_columns
from fusedmoe.quantization.keys import GroupShape, QuantKey
from fusedmoe.quantization.method_base import FusedMoEMethodBase
from fusedmoe.quantization.tensor import QuantFormat, QuantizedTensor
from fusedmoe.selection import Selection, select
from fusedmoe.weights.param_spec import BIASES, Axis, Dim, ParamSpec

if TYPE_CHECKING:
    from fusedmoe.quantization.dialects.base import LayerSchemes
    from fusedmoe.weights.routed_experts import RoutedExperts

Owner = Literal["w13", "w2"]
OWNERS: tuple[Owner, Owner] = ("w13", "w2")

_LEAST_GROUP = 32


class QuantizedFusedMoEMethod(FusedMoEMethodBase):
    """Holds a layer's experts in any weight format, and has their kernel chosen.

    ``w13`` and ``w2`` are the weights' formats (w2 None: the same), as a checkpoint has them.
    ``activation`` is how the rows entering both GEMMs are quantized. Where a tensor-parallel rank
    cuts groups or blocks, the parameters have smaller ones, and scales are repeated on loading; the
    values stay the same. e8m0 and e4m3 scales belong to groups of a fixed size: there the ranks
    hold whole groups.
    """

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        w13: QuantFormat,
        w2: QuantFormat | None = None,
        *,
        activation: QuantKey | None = None,
        groups: ParallelGroups | None = None,
    ) -> None:
        super().__init__(moe_config, groups)
        self._file_formats: dict[Owner, QuantFormat] = {"w13": w13, "w2": w2 or w13}
        self.weight_key, self.activation_key = w13.key, activation
        self._activation_scales: dict[Owner, torch.Tensor] = {}
        self._specs: tuple[FusedMoEConfig, tuple[ParamSpec, ...]] | None = None

    @classmethod
    def of_stored(cls, schemes: LayerSchemes, moe_config: FusedMoEConfig) -> Self:
        """The method of experts that a checkpoint stores as ``schemes`` say, loaded so."""
        method = cls(
            moe_config, schemes.w13.format, schemes.w2.format, activation=schemes.activation
        )
        method.checkpoint_schemes = schemes
        return method

    def format(self, owner: Owner) -> QuantFormat:
        """The format in which ``w13`` or ``w2`` is held here."""
        fmt, width = self._file_formats[owner], self.moe_config.intermediate_size_per_partition
        row, col = fmt.group
        if owner == "w13":
            row = gcd(row, width) if self._is_cut(row, width) else row
        elif not fmt.act_order:
            col = gcd(col, width) if self._is_cut(col, width) else col
        return replace(fmt, group=GroupShape(row, col))

    def _is_cut(self, size: int, width: int) -> bool:
        return size > 0 and self.moe_config.moe_parallel_config.tp_size > 1 and width % size != 0

    def activation(self, owner: Owner) -> QuantKey | None:
        """How the rows entering w13 or w2 are quantized.

        Where weights and activations have groups of the same columns, they keep that in common.
        """
        key, columns = self.activation_key, self.format(owner).group.col
        if key is None or key.group_shape.col != self._file_formats[owner].group.col:
            return key
        return replace(key, group_shape=GroupShape(key.group_shape.row, columns))

    def select(self, layer: RoutedExperts) -> Selection:
        return self.select_on(layer.w13_weight.device)

    def select_on(self, device: torch.device) -> Selection:
        """What runs the layer where its weights are on ``device``."""
        moe = replace(self.moe_config, device=device)
        first, second = ((self.format(owner).key, self.activation(owner)) for owner in OWNERS)
        return select(moe, *first, self.groups, down_keys=second)

    def maybe_roundup_sizes(
        self,
        hidden_size: int,
        intermediate_size_per_partition: int,
        act_dtype: torch.dtype,
        moe_parallel_config: FusedMoEParallelConfig,
    ) -> tuple[int, int]:
        """A rank's share becomes whole groups, or where these can be refined, multiples of 32."""
        width = intermediate_size_per_partition
        if moe_parallel_config.tp_size > 1:
            for owner in OWNERS:
                fmt = self._file_formats[owner]
                size = fmt.group[0 if owner == "w13" else 1]
                fixed = fmt.scale_kind != "float" or size <= _LEAST_GROUP or size % _LEAST_GROUP
                unit = max(size, 1) if fixed else _LEAST_GROUP
                width = -(-width // unit) * unit if size > 0 and width % size else width
            values = self._file_formats["w2"].values
            width = -(-width // values) * values
        return hidden_size, width

    def param_specs(self) -> tuple[ParamSpec, ...]:
        """As the sizes in ``moe_config`` ask for; remembered, for every forward asks."""
        if self._specs is None or self._specs[0] is not self.moe_config:
            self._specs = self.moe_config, self._make_param_specs()
        return self._specs[1]

    def _make_param_specs(self) -> tuple[ParamSpec, ...]:
        self._check_sizes()
        specs = [
            spec
            for owner in OWNERS
            for spec in _weight_specs(owner, self.format(owner), self._file_formats[owner])
        ]
        if self.activation_key is not None and self.activation_key.static:
            specs += [
                ParamSpec(owner=owner, suffix="input_scale", axes=(), dtype=torch.float32, fill=1.0)
                for owner in OWNERS
            ]
        if self.moe_config.has_bias:
            specs += BIASES
        return tuple(specs)

    def _check_sizes(self) -> None:
        """Raise ValueError where the layer's sizes cannot be held in these formats."""
        moe = self.moe_config
        hidden, width = moe.hidden_dim, moe.intermediate_size_per_partition
        for owner, (N, K) in zip(OWNERS, ((width, hidden), (hidden, width)), strict=True):
            fmt = self.format(owner)
            try:
                fmt.data_columns(K)
                if not fmt.act_order:
                    fmt.scale_shape(N, K)
            except ValueError as error:
                raise ValueError(f"{owner} [{N}, {K}] in {fmt.name}: {error}") from None

    def quantized_weights(self, layer: RoutedExperts) -> tuple[QuantizedTensor, QuantizedTensor]:
        """w13 and w2 as they are in ``layer``, sharing its tensors."""
        config, sizes = self._weight_descs(layer), layer.sizes
        dtype = self.moe_config.in_dtype
        shards, interleaved = sizes.num_w13_shards, sizes.interleaved
        return (
            config["w13"].weight(layer.w13_weight, dtype, shards=shards, interleaved=interleaved),
            config["w2"].weight(layer.w2_weight, dtype),
        )

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        weights = self._weight_descs(layer)
        return FusedMoEQuantConfig(
            a1=self._activation_desc("w13", layer),
            a2=self._activation_desc("w2", layer),
            w1=weights["w13"],
            w2=weights["w2"],
        )

    def _weight_descs(self, layer: RoutedExperts) -> dict[Owner, FusedMoEQuantDesc]:
        def desc(owner: Owner) -> FusedMoEQuantDesc:
            fmt = self.format(owner)

            def part(name: str) -> torch.Tensor | None:
                return getattr(layer, f"{owner}_{name}", None)

            def by_shard(name: str) -> torch.Tensor | None:
                """The part with an axis for the shards, which a parameter of w2 lacks."""
                tensor = part(name)
                return tensor if tensor is None or owner == "w13" else tensor.unsqueeze(1)

            return FusedMoEQuantDesc.of_weight(
                fmt,
                by_shard("weight_scale") if fmt.group.row == -1 else part("weight_scale"),
                scale2=by_shard("weight_scale_2"),
                zp=part("weight_zero_point"),
                group_index=by_shard("weight_group_index"),
                bias=part("bias"),
            )

        return {"w13": desc("w13"), "w2": desc("w2")}

    def _activation_desc(self, owner: Owner, layer: RoutedExperts) -> FusedMoEQuantDesc:
        key = self.activation(owner)
        if key is None:
            return FusedMoEQuantDesc()
        scale = None
        if key.static:
            # Kernels keep the tensor: whoever asks again gets the same one, or it moved.
            held = self._activation_scales.get(owner)
            if held is None or held.is_meta:
                held = torch.ones(1, dtype=torch.float32, device=layer.w13_weight.device)
            scale = self._activation_scales[owner] = held.to(layer.w13_weight.device)
        return FusedMoEQuantDesc(
            dtype=key.dtype, shape=key.group_shape, scale=scale, scale_kind=key.scale_kind
        )

    def before_writing(self, layer: RoutedExperts, name: str, row: int | None) -> None:
        """Act-order columns that were sorted go back: either tensor may come without the other."""
        owner: Owner = "w2" if name.startswith("w2") else "w13"
        if not self._file_formats[owner].act_order:
            return
        if name.removeprefix(f"{owner}_") not in ("weight", "weight_group_index"):
            return
        index: torch.Tensor = getattr(layer, f"{owner}_weight_group_index")
        if not bool(((index if row is None else index[row]) < 0).any()):
            return
        weight = self.quantized_weights(layer)[OWNERS.index(owner)]
        for expert in range(weight.shape[0]) if row is None else (row,):
            unsort_columns(weight[expert])

    def finish_weights(self, layer: RoutedExperts) -> None:
        """Check the scales, and reduce stored activation scales to the one that is used."""
        for owner, weight in zip(OWNERS, self.quantized_weights(layer), strict=True):
            weight.check_values(f"{layer.prefix}.{owner}_weight".lstrip("."))
        for owner, scale in self._activation_scales.items():
            stored = getattr(layer, f"{owner}_input_scale")
            largest = stored.float().amax() if stored.numel() else stored.new_ones(())
            if not (largest.isfinite() and largest > 0):
                raise ValueError(
                    f"{layer.prefix}.{owner}_input_scale".lstrip(".")
                    + f": expected finite numbers above 0, found {float(largest)}"
                )
            scale.copy_(largest)

    @property
    def supports_eplb(self) -> bool:
        """Rows of experts can be moved, unless all share one activation scale."""
        return self.activation_key is None or not self.activation_key.static

    def uses_weight_scale_2_pattern(self) -> bool:
        return self._file_formats["w13"].second_scale


def _weight_specs(owner: Owner, fmt: QuantFormat, stored: QuantFormat) -> list[ParamSpec]:
    """The parameters of one operand in ``fmt``, which files hold with the groups of ``stored``."""
    rows, columns = (
        (Dim.INTERMEDIATE, Dim.HIDDEN) if owner == "w13" else (Dim.HIDDEN, Dim.INTERMEDIATE)
    )
    element = fmt.type

    def spec(suffix: str, *axes: Axis, **rest: object) -> ParamSpec:
        return ParamSpec(owner=owner, suffix=suffix, axes=axes, **rest)  # type: ignore[arg-type]

    packed = Axis(columns, element.values, element.stored)
    # Two nibbles of 8, which stand for 0.
    fill = 136.0 if fmt.element == "int4" and fmt.symmetric else 0.0
    specs = [spec("weight", Axis(rows), packed, dtype=fmt.dtype, fill=fill)]
    if fmt.scale_dtype is not None:
        row, col = fmt.group
        axes: tuple[Axis, ...] = ()
        if row != -1:
            across = Axis(rows, row, file_per=stored.group.row)
            along = Axis(Dim.ONE) if col == -1 else Axis(columns, col, file_per=stored.group.col)
            axes = (across, along)
        scale = 127.0 if fmt.scale_kind == "e8m0" else element.zeros_scale
        # Act-order columns of any rank may belong to any group.
        whole = {"sharded": False} if fmt.act_order and owner == "w2" else {}
        specs.append(spec("weight_scale", *axes, dtype=fmt.scale_dtype, fill=scale, **whole))
        if not fmt.symmetric:
            specs.append(spec("weight_zero_point", *axes, dtype=fmt.dtype, **whole))
    if fmt.second_scale:
        specs.append(spec("weight_scale_2", dtype=torch.float32, fill=1.0))
    if fmt.act_order:
        specs.append(spec("weight_group_index", Axis(columns), dtype=torch.int32))
    return specs
