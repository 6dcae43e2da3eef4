"""``from_pretrained(path)``: a Transformers model whose experts stay as packed as their files.

Transformers builds the model and loads everything but the experts; those are replaced while the
model has no storage yet (``PackedExperts``), and read layer by layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusedmoe.checkpoint import (
    Checkpoint,
    CheckpointError,
    read_checkpoint,
    read_quantization_config,
)
from fusedmoe.config import MoEOptions
from fusedmoe.distributed.agreement import facts_of, facts_of_groups
from fusedmoe.integrations.transformers.accelerate import run_whole_blocks
from fusedmoe.integrations.transformers.experts_function import takes_implementation
from fusedmoe.integrations.transformers.gguf import GgufSource, gguf_of
from fusedmoe.integrations.transformers.loading import check_floats, load_by_transformers, load_rest
from fusedmoe.integrations.transformers.packed import PackedExperts
from fusedmoe.integrations.transformers.ranks import BlockRanks, make_together
from fusedmoe.integrations.transformers.sources import FolderSource, Source
from fusedmoe.quantization.dialects.online import OnlineQuantization
from fusedmoe.selection import check_forced_names
from fusedmoe.weights.checkpoint_experts import CheckpointExperts
from fusedmoe.words import FLOATS, device_named, dtype_named

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from fusedmoe.distributed.peer_memory import PeerMemory

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]


def from_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    quantize: str | OnlineQuantization | None = None,
    options: MoEOptions | None = None,
    ep_group: ProcessGroup | DeviceMesh | None = None,
    same_tokens: bool = False,
    peers: PeerMemory | None = None,
    progress: Progress | None = None,
) -> Any:
    """The model in ``path``, a checkpoint folder or a GGUF file, in eval mode.

    Quantized experts stay as they are stored, in any dialect that ``fusedmoe inspect`` names;
    quantized layers outside the experts become ``dtype``. ``quantize`` names a format
    ("fp8_channel", "int8_channel", "int4_g128", "mxfp4", ...) to which experts stored as floats are
    rounded while they are read, one matrix at a time; ``OnlineQuantization.of(name,
    activation=...)`` in its place also has rows rounded. ``dtype`` may be a name ("bf16"), "auto"
    is the checkpoint's; ``device`` None is the CPU, ``options`` are for the experts. A checkpoint
    of floats that stays so keeps Transformers' modules, with ``experts_implementation="fusedmoe"``;
    with ``options``, which these have no place for, its experts are ours too, holding floats.

    With ``ep_group``, every rank of it calls this with the same arguments and reads its share of
    the experts alone (linear placement), packed or floats; every forward is then a call on all
    ranks. They have batches of their own, of any size, or with ``same_tokens`` all have one. On
    GPUs of one host tokens go through ``peers``, if these are given.

    ``progress(done, total, path)`` is called before each layer of packed experts is read.

    Nothing is downloaded, no code from the folder runs, pickles are refused. Raises CheckpointError
    (a ValueError) naming the tensor that is missing, unexpected or malformed; RanksDisagreeError
    where another rank has failed or has another model.
    """
    check_forced_names(options)
    target = device_named("cpu" if device is None else device)
    wanted = dtype_named(dtype) if isinstance(dtype, str) else dtype
    if wanted is not None and not wanted.is_floating_point:
        raise ValueError(f"dtype is that of rows and of layers of floats, got {wanted}")
    ranks = BlockRanks.make(ep_group, same_tokens, peers)
    if ranks is None:
        return _load(path, wanted, target, quantize, options, None, progress)
    return make_together(
        ranks, lambda: _load(path, wanted, target, quantize, options, ranks, progress), _facts
    )


def _load(
    path: str | Path,
    dtype: torch.dtype | None,
    device: torch.device,
    quantize: str | OnlineQuantization | None,
    options: MoEOptions | None,
    ranks: BlockRanks | None,
    progress: Progress | None,
) -> Any:
    source = open_source(path, quantize)
    if isinstance(source, Checkpoint):
        if ranks is None and options in (None, MoEOptions()):
            return _load_floats(source, dtype, device)
        source = FolderSource(CheckpointExperts.read(source))
    schemes = {key: source.schemes(layer) for key, layer in source.layers.items()}
    config = source.config()
    model_dtype = _dtype(config, dtype)
    model = load_rest(source, config, model_dtype)
    model.to(device)
    packed = {n: one for n, one in model.named_modules() if isinstance(one, PackedExperts)}
    for done, (name, module) in enumerate(packed.items()):
        if progress is not None:
            progress(done, len(packed), name)
        key = _layer_key(name, source)
        module.ranks = ranks
        try:
            module.load(source.layers[key], schemes[key], source, model_dtype, device, options)
        except ValueError as error:
            raise CheckpointError(f"{source.where}: {error}") from error
        logger.info(
            "%s holds %s", name, "floats" if module.schemes is None else module.schemes.name
        )
    model.eval()
    try:
        run_whole_blocks(model, options, ranks)
    except ValueError as error:
        raise CheckpointError(f"{source.where}: {error}") from error
    return model


def _facts(model: Any) -> dict[str, str]:
    """What has to be the same on all ranks that share a model's experts."""
    facts: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, PackedExperts) and module.routed_experts is not None:
            known = facts_of(module.routed_experts.moe_config)
            if module.ranks is not None:
                known |= facts_of_groups(module.ranks.groups)
            stored = module.schemes
            known["format"] = "floats" if stored is None else stored.name
            known["rows"] = str((stored and stored.activation) or "as they come")
            facts |= {f"{path}: {name}": value for name, value in known.items()}
    return facts


def open_source(
    path: str | Path, quantize: str | OnlineQuantization | None = None
) -> Source | Checkpoint:
    """The checked folder or GGUF file ``path``; a folder with nothing but one GGUF file is that.

    A Checkpoint is one of floats that are to stay so.
    """
    path = Path(path)
    gguf = gguf_of(path)
    if gguf is not None:
        if quantize is not None:
            raise CheckpointError(f"{gguf}: is quantized already (gguf)")
        return GgufSource(gguf)
    checkpoint = read_checkpoint(path)
    online = OnlineQuantization.of(quantize) if isinstance(quantize, str) else quantize
    if not isinstance(online, OnlineQuantization | None):
        raise ValueError(
            "quantize is a format's name (int8, int4_g128, mxfp4, ...) or an OnlineQuantization, "
            f"not {quantize!r}"
        )
    if online is None and read_quantization_config(path, checkpoint.config) is None:
        return checkpoint
    return FolderSource(CheckpointExperts.read(checkpoint), online)


def _load_floats(checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device) -> Any:
    """A model without packed experts, as Transformers loads it, with our experts function."""
    from fusedmoe.integrations.transformers import EXPERTS_IMPLEMENTATION, register

    check_floats(checkpoint)
    register()
    folder = checkpoint.folder
    model = load_by_transformers(folder, dtype)
    try:
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    except ValueError as error:
        logger.warning("%s: its experts run as Transformers runs them: %s", folder, error)
    else:
        if not takes_implementation(model):
            logger.warning(
                "%s: nothing in this model runs through fusedmoe; accelerate(model) finds whole "
                "blocks, if it has any",
                folder,
            )
    return model.to(device).eval()


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


def _dtype(config: Any, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return found if found in FLOATS else torch.bfloat16
