"""What Transformers itself loads: a model of floats, or all of a model but its packed experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fusedmoe.checkpoint import Checkpoint, CheckpointError
from fusedmoe.integrations.transformers.packed_quantizer import (
    QUANT_METHOD,
    mismatched,
    register_packed_experts,
)
from fusedmoe.integrations.transformers.sources import Source, is_linear, not_loaded
from fusedmoe.weights.checkpoint_experts import CheckpointExperts
from fusedmoe.weights.families import family_of


def check_floats(checkpoint: Checkpoint) -> None:
    """CheckpointError for weights that are packed where config.json names no quantization.

    Transformers would take numbers in fp8 for the weights themselves.
    """
    if family_of(checkpoint.config) is not None:
        experts = CheckpointExperts.read(checkpoint)
        for layer in experts.model_layers.values():
            experts.check(layer, None)
        experts.check_floats(name for name in checkpoint.tensors if is_linear(name))


def load_by_transformers(folder: Path, dtype: torch.dtype | None, **how: Any) -> Any:
    """The model in a checked ``folder``, as Transformers loads it: local safetensors only, no code.

    ``how`` are further arguments of its ``from_pretrained``. CheckpointError where it refuses, and
    where the files do not fill the model.
    """
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, info = _model_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            **how,
        )
    except Exception as error:
        # A config.json that makes no sense fails in as many ways as there are models.
        raise not_loaded(folder, error) from error
    _check_complete(info, folder)
    return model


def load_rest(source: Source, config: Any, dtype: torch.dtype) -> Any:
    """The model with all but its experts, on the CPU."""
    register_packed_experts()
    from transformers.utils.quantization_config import QuantizationConfigMixin

    state = source.rest(dtype)
    try:
        model, info = _model_class(config).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            quantization_config=QuantizationConfigMixin(quant_method=QUANT_METHOD),
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
        info["mismatched_keys"].update(mismatched(model))
        _read_generation_config(model, source.where)
    except Exception as error:
        raise not_loaded(source.where, error) from error
    _check_complete(info, source.where)
    if source.strict and info["unexpected_keys"]:
        more = ", ".join(sorted(str(key) for key in info["unexpected_keys"])[:4])
        raise CheckpointError(f"{source.where}: the model has no place for {more}")
    model.config.name_or_path = str(source.where)
    return model


def _read_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    path = (folder if folder.is_dir() else folder.parent) / "generation_config.json"
    if model.can_generate() and path.is_file():
        model.generation_config = GenerationConfig.from_dict(json.loads(path.read_text("utf-8")))


def _model_class(config: Any) -> Any:
    """The class that config.json names, if it is one of Transformers', else the usual one."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModelForCausalLM._model_mapping[type(config)]


def _check_complete(info: Any, where: Path) -> None:
    """CheckpointError where the files do not fill the model.

    ``info`` is what Transformers' loader says: names that are missing, and (name, shape of the
    files, shape of the model) of what does not fit, which it has been told to leave out.
    """
    missing = sorted(str(key) for key in info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} tensors of the model are missing in the files, "
            f"{missing[0]!r} among them"
        )
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        name, found, expected = wrong[0]
        more = f" ({len(wrong) - 1} more do not fit)" if wrong[1:] else ""
        raise CheckpointError(
            f"{where}: {name}: expected shape {tuple(expected)}, found {tuple(found)}{more}"
        )
