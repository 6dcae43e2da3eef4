"""``from_pretrained(path)``: a Transformers model whose experts stay as packed as their files.

Transformers builds the model and loads everything but the experts; those are replaced while the
model has no storage yet (``PackedExperts``), and read layer by layer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusedmoe.checkpoint import CONFIG_NAME, CheckpointError, read_checkpoint
from fusedmoe.config import MoEOptions
from fusedmoe.integrations.transformers.gguf_source import GgufSource, is_gguf
from fusedmoe.integrations.transformers.packed import PackedExperts, find_seats
from fusedmoe.integrations.transformers.sources import DTYPE_NAMES, FolderSource, Source
from fusedmoe.quantization.dialects.online import OnlineQuantization
from fusedmoe.selection import check_forced_names
from fusedmoe.weights.checkpoint_experts import CheckpointExperts

QUANT_METHOD = "fusedmoe"


def from_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    quantize: str | None = None,
    options: MoEOptions | None = None,
) -> Any:
    """The model in ``path``, a checkpoint folder or a GGUF file, in eval mode.

    Quantized experts stay as they are stored, in any dialect that ``fusedmoe inspect`` names;
    quantized layers outside the experts become ``dtype``. ``quantize`` names a format
    ("fp8_channel", "int8_channel", "int4_g128", "mxfp4", ...) to which experts stored as floats are
    rounded while they are read, one matrix at a time. ``dtype`` "auto" is the checkpoint's;
    ``device`` None is the CPU.

    Nothing is downloaded, no code from the folder runs, pickles are refused. Raises CheckpointError
    (a ValueError) naming the tensor that is missing, unexpected or malformed.
    """
    check_forced_names(options or MoEOptions())
    source = open_source(path, quantize)
    schemes = {key: source.schemes(layer) for key, layer in source.layers.items()}
    config = source.config()
    model_dtype = _dtype(config, dtype)
    model = _load_rest(source, config, model_dtype)
    target = torch.device(device or "cpu")
    model.to(target)
    for name, module in model.named_modules():
        if not isinstance(module, PackedExperts):
            continue
        key = _layer_key(name, source)
        try:
            module.load(source.layers[key], schemes[key], source.read, model_dtype, target, options)
        except ValueError as error:
            raise CheckpointError(f"{source.where}: {error}") from error
    return model.eval()


def open_source(path: str | Path, quantize: str | None = None) -> Source:
    """The checked folder or GGUF file ``path``; a folder with nothing but one GGUF file is that."""
    path = Path(path)
    inside = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(inside) == 1 and not (path / CONFIG_NAME).is_file():
        path = inside[0]
    if is_gguf(path):
        if quantize is not None:
            raise CheckpointError(f"{path}: is quantized already (gguf)")
        return GgufSource(path)
    experts = CheckpointExperts.read(read_checkpoint(path))
    return FolderSource(experts, None if quantize is None else OnlineQuantization.of(quantize))


def _layer_key(path: str, source: Source) -> tuple[str, int]:
    """Which layer of the files belongs to the module called ``path``: by number, then by prefix."""
    numbers = [int(part) for part in path.split(".") if part.isdigit()]
    found = [key for key in source.layers if key[1] == numbers[0]] if numbers else []
    if len(found) > 1:
        found = [key for key in found if path.startswith(key[0])] or found
    if len(found) != 1:
        names = ", ".join(source.layers[key].name for key in found) or "no layer"
        raise CheckpointError(f"{source.where}: {names} of the files fits {path}")
    return found[0]


def _dtype(config: Any, dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        raise ValueError(f"dtype must be 'auto' or a torch.dtype, got {dtype!r}")
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return found if found in DTYPE_NAMES else torch.bfloat16


def _model_class(config: Any) -> Any:
    """The class that config.json names, if it is one of Transformers', else the usual one."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModelForCausalLM._model_mapping[type(config)]


def _load_rest(source: Source, config: Any, dtype: torch.dtype) -> Any:
    """The model with all but its experts, on the CPU."""
    _register()
    from transformers.utils.quantization_config import QuantizationConfigMixin

    state = source.rest(dtype)
    try:
        model, info = _model_class(config).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            quantization_config=QuantizationConfigMixin(quant_method=QUANT_METHOD),
            output_loading_info=True,
        )
        _read_generation_config(model, source.where)
    except Exception as error:
        raise CheckpointError(f"{source.where}: Transformers cannot load it: {error}") from error
    for what in ("missing_keys", "mismatched_keys"):
        wrong = sorted(str(key) for key in info[what])
        if wrong:
            raise CheckpointError(
                f"{source.where}: {len(wrong)} tensors of the model are {what.split('_')[0]} in "
                f"the files, {wrong[0]!r} among them"
            )
    model.config.name_or_path = str(source.where)
    return model


def _read_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    path = (folder if folder.is_dir() else folder.parent) / "generation_config.json"
    if model.can_generate() and path.is_file():
        model.generation_config = GenerationConfig.from_dict(json.loads(path.read_text("utf-8")))


def _register() -> None:
    """Tell Transformers how experts are replaced while a model is built."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
    from transformers.quantizers.base import HfQuantizer

    if QUANT_METHOD in AUTO_QUANTIZER_MAPPING:
        return

    @register_quantizer(QUANT_METHOD)
    class PackedExpertsQuantizer(HfQuantizer):  # type: ignore[misc]
        """Replaces the experts of a model on the meta device; loads nothing itself."""

        def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
            for seat in find_seats(model):
                parent, _, name = seat.path.rpartition(".")
                setattr(model.get_submodule(parent), name, PackedExperts(seat))

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False
