"""Models of Transformers for the command line: local files only, no code from the folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch

from fusedmoe.checkpoint import CheckpointError, read_checkpoint, read_quantization_config
from fusedmoe.cli.facts import check_activation, model_facts
from fusedmoe.cli.layers import check_counts
from fusedmoe.cli.output import Progress
from fusedmoe.cli.ranks import Ranks
from fusedmoe.integrations.transformers.gguf import GgufSource, gguf_of
from fusedmoe.integrations.transformers.sources import not_loaded

PROMPT = "A mixture of experts"
# Below this a checkpoint loads in no time, and Transformers' own loading bar is only noise.
QUIET_BYTES = 1 << 30

_HERE = "fusedmoe.cli."


def check_transformers(verb: str) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(f"{verb} needs Transformers: pip install 'fusedmoe[hf]'")


def check_model(folder: Path) -> bool:
    """Whether the experts in a checkpoint folder or GGUF file are packed; quiets Transformers.

    CheckpointError where its config.json promises what the files do not have, or the other way
    round.
    """
    from fusedmoe.integrations.transformers.loading import check_floats

    gguf = gguf_of(folder)
    if gguf is not None:
        quiet_transformers(bars=GgufSource(gguf).file.nbytes >= QUIET_BYTES)
        return True
    checkpoint = read_checkpoint(folder)
    facts = model_facts(checkpoint)
    check_activation(facts, folder)
    check_counts(checkpoint, facts)
    quiet_transformers(bars=checkpoint.nbytes >= QUIET_BYTES)
    packed = read_quantization_config(folder, checkpoint.config) is not None
    if not packed:
        check_floats(checkpoint)
    return packed


def quiet_transformers(*, bars: bool) -> None:
    """Errors only; its bars for loading and writing only where that takes a while."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder or of a GGUF file, from local files and without running their code.

    Files beside a GGUF file come first: to read the tokenizer inside, Transformers needs the
    package ``gguf``, and it does not do so for every architecture.
    """
    from transformers import AutoTokenizer

    gguf, inside = gguf_of(folder), {}
    if gguf is not None:
        folder = gguf.parent
        inside = {} if (folder / "tokenizer.json").is_file() else {"gguf_file": gguf.name}
    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **inside
        )
    except Exception as error:
        if not inside and not any(map(_is_of_tokenizer, folder.iterdir())):
            raise CheckpointError(
                f"{folder}: holds no tokenizer; put that of the original there "
                "(tokenizer.json and tokenizer_config.json)"
            ) from error
        hint = "; put the tokenizer.json of the original beside the file" if inside else ""
        raise not_loaded(folder, error, hint) from error


def _is_of_tokenizer(path: Path) -> bool:
    return path.suffix == ".model" or any(word in path.name for word in ("token", "vocab"))


def load_whole(
    folder: Path, dtype: torch.dtype | None, device: torch.device, *, tp: bool = False
) -> Any:
    """The model of floats in ``folder``, with Transformers' own experts.

    ``tp``: cut over all processes as the model's own plan says, each part where it belongs.
    """
    from fusedmoe.integrations.transformers.loading import load_by_transformers

    if not tp:
        return load_by_transformers(folder, dtype).to(device).eval()
    from transformers.distributed import DistributedConfig

    plan = DistributedConfig(tp_plan="auto")
    return load_by_transformers(folder, dtype, distributed_config=plan).eval()


def prompt_tokens(tokenizer: Any, prompt: str, device: torch.device) -> torch.Tensor:
    """The ids [1, T] of ``prompt``."""
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
    if ids.shape[1] == 0:
        raise ValueError("the prompt has no tokens")
    return ids


def greedy(model: Any, prompt: torch.Tensor, max_new_tokens: int, bar: Progress) -> list[int]:
    """The tokens that ``model`` goes on with after the prompt [1, T], each a step of the bar."""
    from transformers.generation.streamers import BaseStreamer

    class Count(BaseStreamer):  # type: ignore[misc]
        """Moves the bar by one for every token; the prompt comes first and does not count."""

        prompt_seen = False

        def put(self, value: torch.Tensor) -> None:
            if self.prompt_seen:
                bar.update()
            self.prompt_seen = True

        def end(self) -> None:
            pass

    with torch.inference_mode(), _failing_in_words():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            streamer=Count(),
        )
    # .tolist() waits for the device: who takes the time around this takes the whole time.
    tokens: list[int] = output[0, prompt.shape[1] :].tolist()
    return tokens


@contextmanager
def _failing_in_words() -> Iterator[None]:
    """CheckpointError where the model's own code fails, on numbers in config.json that fit no
    model. Errors of our own code and of too little memory pass through.
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
    from fusedmoe.integrations.transformers.experts_function import takes_implementation
    from fusedmoe.integrations.transformers.packed import PackedExperts

    packed = any(isinstance(module, PackedExperts) for module in model.modules())
    if ranks is not None and not packed:
        return fusedmoe.accelerate(model, ep_group=ranks.group, same_tokens=True)
    if route == "accelerate" or ranks is not None:
        return fusedmoe.accelerate(model)
    if packed:
        return model
    if not takes_implementation(model):
        raise ValueError(
            f"the experts of {type(model).__name__} cannot be replaced alone; --route accelerate "
            "replaces whole blocks"
        )
    fusedmoe.register()
    model.set_experts_implementation("fusedmoe")
    return model
