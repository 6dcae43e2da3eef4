"""Whatever a quantization_config holds, it is read, or it is a ValueError."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from writers import CASES

from fusedmoe.quantization.dialects import read_quantization

MODULE = "model.layers.0.mlp.experts.0.up_proj"
LAYER = {MODULE: {"bits": 8, "group_size": 32, "sym": False, "desc_act": True}}
ROWS = {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16}
RICH: dict[str, dict[str, Any]] = {
    "auto-round": {
        **{"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": True},
        **{"data_type": "int", "act_bits": 16, "extra_config": LAYER | {".*x": {"bits": 16}}},
    },
    "gptq": {
        **{"quant_method": "gptq", "bits": 4, "group_size": 64, "pack_dtype": "int32"},
        **{"dynamic": {f"+:{name}": own for name, own in LAYER.items()} | {"-:.*x": {}}},
    },
    "modelopt": {
        "quant_method": "modelopt",
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {MODULE: {"quant_algo": "NVFP4", "group_size": 16}},
            "exclude_modules": ["lm_head"],
        },
    },
    "quark": {
        **{"quant_method": "quark", "exclude": ["lm_head"], "layer_type_quant_config": {}},
        "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}},
        "layer_quant_config": {
            MODULE: {
                "weight": {"dtype": "int8", "qscheme": "per_channel", "ch_axis": 0},
                "input_tensors": {"dtype": "int8", "qscheme": "per_channel", "is_dynamic": True},
            }
        },
    },
    "compressed-tensors": {
        **{"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        **{"ignore": ["re:.*gate$"], "sparsity_config": {}, "transform_config": {}},
        "config_groups": {
            "group_0": {
                "format": "nvfp4-pack-quantized",
                "targets": ["re:.*experts.*", "Linear"],
                "weights": ROWS | {"symmetric": True},
                "input_activations": ROWS | {"dynamic": "local"},
                "output_activations": None,
            }
        },
    },
}
VALUES = (None, -1, 0, 3, 2.5, 1e300, 10**30, "x", "", [], [1], [[]], {}, {"a": 1}, True)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside ``value``."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, found in inside:
        yield (*path, key)
        if isinstance(found, (dict, list)):
            yield from places(found, (*path, key))


def with_value(config: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    inner: Any = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


CONFIGS = {name: case.config for name, case in CASES.items()} | {
    f"rich {name}": config for name, config in RICH.items()
}


@pytest.mark.parametrize("name", RICH)
def test_rich_configs_are_read(name: str) -> None:
    assert read_quantization(RICH[name]).scheme(MODULE) is not None


@pytest.mark.parametrize("name", CONFIGS)
def test_any_value_in_any_place(name: str) -> None:
    config = CONFIGS[name]
    for path in places(config):
        for value in VALUES:
            changed = with_value(config, path, value)
            try:
                read_quantization(changed).scheme(MODULE)
            except ValueError:
                pass
            except Exception as error:
                raise AssertionError(f"{changed} is a {error!r}") from error


@pytest.mark.parametrize(
    "config", [{}, {"quant_method": []}, {"quant_method": {}}, {"quantization": 3}, {"x": "y"}]
)
def test_no_known_method(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="unknown quant_method"):
        read_quantization(config)
