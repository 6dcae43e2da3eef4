"""``from_pretrained(path)``: a Transformers model whose experts stay as packed as their files.

Transformers builds the model and loads everything but the experts; those are replaced while the
model has no storage yet (``PackedExperts``), and read layer by layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusedmoe.checkpoint import CheckpointError, TensorReader, read_checkpoint
from fusedmoe.config import MoEOptions
from fusedmoe.integrations.transformers.packed import PackedExperts, find_seats
from fusedmoe.quantization.dialects import Matrix, Scheme
from fusedmoe.quantization.dialects.base import read_matrix
from fusedmoe.quantization.dialects.online import OnlineQuantization
from fusedmoe.selection import check_forced_names
from fusedmoe.weights.checkpoint_experts import FLOAT_DTYPES, CheckpointExperts

QUANT_METHOD = "fusedmoe"
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def from_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    quantize: str | None = None,
    options: MoEOptions | None = None,
) -> Any:
    """The model in the checkpoint folder ``path``, in eval mode, as Transformers would load it.

    Quantized experts stay as they are stored, in any dialect that ``fusedmoe inspect`` names;
    quantized layers outside the experts become ``dtype``. ``quantize`` names a format
    ("fp8_channel", "int8_channel", "int4_g128", "mxfp4", ...) to which experts stored as floats are
    rounded while they are read, one matrix at a time. ``dtype`` "auto" is the checkpoint's;
    ``device`` None is the CPU.

    Nothing is downloaded, no code from the folder runs, pickles are refused. Raises CheckpointError
    (a ValueError) naming the tensor that is missing, unexpected or malformed.
    """
    check_forced_names(options or MoEOptions())
    checkpoint = read_checkpoint(path)
    experts = CheckpointExperts.read(checkpoint)
    if quantize is not None:
        experts = _online(experts, quantize)
    schemes = {key: experts.schemes(layer) for key, layer in experts.layers.items()}
    for key, layer in experts.layers.items():
        experts.check(layer, None if quantize else schemes[key])
    reader = TensorReader(checkpoint)
    config = _config(checkpoint.folder)
    model_dtype = _dtype(config, dtype)
    rest = _Rest(experts, reader, model_dtype)
    model = _load_rest(config, rest.state_dict(), model_dtype, checkpoint.folder)
    target = torch.device(device or "cpu")
    model.to(target)
    for name, module in model.named_modules():
        if not isinstance(module, PackedExperts):
            continue
        key = _layer_key(name, experts)
        try:
            module.load(experts.layers[key], schemes[key], reader, model_dtype, target, options)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.folder}: {error}") from error
    return model.eval()


def _online(experts: CheckpointExperts, quantize: str) -> CheckpointExperts:
    if experts.quantization is not None:
        raise CheckpointError(
            f"{experts.checkpoint.folder}: is quantized already ({experts.quantization.dialect}); "
            f"quantize={quantize!r} is for checkpoints of floats"
        )
    return CheckpointExperts(
        experts.checkpoint, experts.family, OnlineQuantization.of(quantize), experts.layers
    )


def _layer_key(path: str, experts: CheckpointExperts) -> tuple[str, int]:
    """Which layer of the files belongs to the module called ``path``: by number, then by prefix."""
    parts = path.split(".")
    numbers = [int(part) for part in parts if part.isdigit()]
    found = [key for key in experts.layers if key[1] == numbers[0]] if numbers else []
    if len(found) > 1:
        found = [key for key in found if path.startswith(key[0])] or found
    if len(found) != 1:
        names = ", ".join(experts.layers[key].name for key in found) or "no layer"
        raise CheckpointError(f"{experts.checkpoint.folder}: {names} of the files fits {path}")
    return found[0]


@dataclass(frozen=True)
class _LazyMatrix:
    """A quantized matrix outside the experts, dequantized when it is read."""

    scheme: Scheme
    matrix: Matrix
    names: Mapping[str, str]
    reader: TensorReader
    dtype: torch.dtype

    def get_dtype(self) -> str:
        return _NAMES[self.dtype]

    def get_shape(self) -> list[int]:
        return [self.matrix.N, self.matrix.K]

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensors = {suffix: self.reader(name) for suffix, name in self.names.items()}
        return read_matrix(self.scheme, tensors, self.matrix).dequantize(self.dtype)[index]


class _Rest:
    """Everything in the files but the experts, under the files' names, unread."""

    def __init__(
        self, experts: CheckpointExperts, reader: TensorReader, dtype: torch.dtype
    ) -> None:
        self.experts, self.reader, self.dtype = experts, reader, dtype

    def state_dict(self) -> dict[str, Any]:
        """Name -> something that ``[...]`` reads. CheckpointError for what lacks its scale."""
        tensors = self.experts.checkpoint.tensors
        of_experts = {t.name for layer in self.experts.layers.values() for t in layer.tensors}
        names = [name for name in tensors if name not in of_experts]
        matrices = self._matrices(names)
        taken = {name for _, found in matrices.values() for name in found.values()}
        state: dict[str, Any] = {n: self.reader.slice(n) for n in names if n not in taken}
        for module, (scheme, found) in matrices.items():
            state[f"{module}.weight"] = self._matrix(module, scheme, found)
            if "bias" in found:
                state[f"{module}.bias"] = self.reader.slice(found["bias"])
        return state

    def _matrices(self, names: list[str]) -> dict[str, tuple[Scheme, dict[str, str]]]:
        """Linear layers that are quantized: module -> scheme and its tensors by suffix."""
        quantization, tensors = self.experts.quantization, self.experts.checkpoint.tensors
        if quantization is None or isinstance(quantization, OnlineQuantization):
            return {}
        found: dict[str, tuple[Scheme, dict[str, str]]] = {}
        schemes: dict[str, Scheme | None] = {}
        for name in names:
            module = name.rpartition(".")[0]
            if ".weight." in name:
                module = name.partition(".weight.")[0]
            if module not in schemes:
                schemes[module] = quantization.scheme(module)
            scheme = schemes[module]
            if scheme is not None and (parts := scheme.split(name)) and parts[0] == module:
                found.setdefault(module, (scheme, {}))[1][parts[1]] = name
        return {
            module: (scheme, stored)
            for module, (scheme, stored) in found.items()
            if not all(s in ("weight", "bias") for s in stored)
            or tensors[stored.get("weight", stored.get("bias", ""))].dtype not in FLOAT_DTYPES
        }

    def _matrix(self, module: str, scheme: Scheme, names: dict[str, str]) -> _LazyMatrix:
        folder = self.experts.checkpoint.folder
        missing = sorted(scheme.missing(frozenset(names)))
        if missing:
            raise CheckpointError(
                f"{folder}: lacks {module}.{missing[0]} beside {', '.join(sorted(names))} "
                f"({scheme.dialect}, {scheme.name})"
            )
        shapes = {
            suffix: self.experts.checkpoint.tensors[name].shape for suffix, name in names.items()
        }
        size = scheme.size(shapes, lambda suffix: self.reader(names[suffix]))
        if size is None:
            raise CheckpointError(f"{folder}: the shape of {module} is not in its tensors")
        matrix = Matrix(name=module, N=size[0], K=size[1])
        stored = {suffix: name for suffix, name in names.items() if suffix != "bias"}
        return _LazyMatrix(scheme, matrix, stored, self.reader, self.dtype)


def _config(folder: Path) -> Any:
    """The model's configuration, which no longer says that it is quantized."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{folder}: Transformers cannot read it: {error}") from error
    for section in (config, config.get_text_config()):
        if getattr(section, "quantization_config", None) is not None:
            del section.quantization_config
    return config


def _dtype(config: Any, dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        raise ValueError(f"dtype must be 'auto' or a torch.dtype, got {dtype!r}")
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return found if found in _NAMES else torch.bfloat16


def _model_class(config: Any) -> Any:
    """The class that config.json names, if it is one of Transformers', else the usual one."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModelForCausalLM._model_mapping[type(config)]


def _load_rest(config: Any, state: dict[str, Any], dtype: torch.dtype, folder: Path) -> Any:
    """The model with all but its experts, on the CPU."""
    _register()
    from transformers.utils.quantization_config import QuantizationConfigMixin

    marker = QuantizationConfigMixin(quant_method=QUANT_METHOD)
    try:
        model, info = _model_class(config).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            quantization_config=marker,
            output_loading_info=True,
        )
        _read_generation_config(model, folder)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder}: Transformers cannot load it: {error}") from error
    for what in ("missing_keys", "mismatched_keys"):
        wrong = sorted(str(key) for key in info[what])
        if wrong:
            raise CheckpointError(
                f"{folder}: {len(wrong)} tensors of the model are {what.split('_')[0]} in the "
                f"files, {wrong[0]!r} among them"
            )
    model.config.name_or_path = str(folder)
    return model


def _read_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
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
