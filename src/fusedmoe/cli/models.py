"""Models of Transformers for the command line: local files only, no code from the folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch

from fusedmoe.checkpoint import CheckpointError
from fusedmoe.cli.ranks import Ranks
from fusedmoe.integrations.transformers.gguf_source import gguf_of

_HERE = "fusedmoe.cli."


def quiet_transformers(*, bars: bool) -> None:
    """Errors only; its bars for loading and writing only where that takes a while."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


def load_tokenizer(folder: Path) -> Any:
    """Of the folder, or of a GGUF file: local files only, no code.

    What stands beside such a file comes before what is in it, which Transformers reads with the
    format's package, and not for every architecture.
    """
    from transformers import AutoTokenizer

    gguf, inside = gguf_of(folder), {}
    if gguf is not None:
        folder = gguf.parent
        inside = {} if (folder / "tokenizer.json").is_file() else {"gguf_file": gguf.name}
    try:
        return AutoTokenizer.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            **inside,
        )
    except Exception as error:
        raise CheckpointError(f"{folder}: Transformers cannot load it: {error}") from error


def load_whole(
    folder: Path, dtype: torch.dtype | None, device: torch.device, *, tp: bool = False
) -> Any:
    """The model; local files only, safetensors only, no code from the folder.

    ``tp``: cut over all processes as the model's own plan says, each part where it belongs.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **({"tp_plan": "auto"} if tp else {}),
        )
    except Exception as error:
        # A config.json that makes no sense fails in as many ways as there are models.
        raise CheckpointError(f"{folder}: Transformers cannot load it: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder}: lacks {len(missing)} tensors of its model, {missing[0]!r} among them"
        )
    return model.eval() if tp else model.to(device).eval()


@contextmanager
def failing_in_words() -> Iterator[None]:
    """CheckpointError where the model's own code fails: numbers in config.json that fit no model.

    What our code raises, and too little memory, stay what they are.
    """
    try:
        yield
    except Exception as error:
        modules = [f.f_globals.get("__name__", "") for f, _ in walk_tb(error.__traceback__)]
        ours = [m for m in modules if m.startswith("fusedmoe.") and not m.startswith(_HERE)]
        if ours or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        raise CheckpointError(f"the model that config.json describes fails: {error}") from error


def with_fusedmoe(model: Any, route: str, ranks: Ranks | None) -> Any:
    """``model`` with its experts, or its whole MoE blocks, run by this library.

    All ``ranks`` run the same prompt, each its share of the experts; packed ones are so already.
    """
    import fusedmoe
    from fusedmoe.integrations.transformers.packed import PackedExperts

    packed = any(isinstance(module, PackedExperts) for module in model.modules())
    if ranks is not None and not packed:
        return fusedmoe.accelerate(model, ep_group=ranks.group, same_tokens=True)
    if route == "accelerate" or ranks is not None:
        return fusedmoe.accelerate(model)
    if packed:
        return model
    fusedmoe.register()
    model.set_experts_implementation("fusedmoe")
    return model
