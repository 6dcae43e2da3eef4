"""``fusedmoe generate``: text from a checkpoint folder, its experts run by this library."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fusedmoe.checkpoint import CheckpointError, read_checkpoint, read_quantization_config
from fusedmoe.cli.arguments import device_of, dtype_of
from fusedmoe.cli.facts import check_activation, model_facts
from fusedmoe.cli.layers import check_counts
from fusedmoe.cli.output import Progress, print_json, print_table, printable, progress
from fusedmoe.cli.ranks import Ranks, check_launched, is_first_rank, launched_ranks
from fusedmoe.integrations.transformers.gguf_source import GgufSource, is_gguf
from fusedmoe.presets import PRESETS, find_preset, write_preset

PROMPT = "A mixture of experts"
WARM_UP_TOKENS = 2
# Below this a checkpoint loads in no time, and Transformers' own loading bar is only noise.
QUIET_BYTES = 1 << 30
PEERS = ("eager", "grouped_mm")


@dataclass(frozen=True)
class Generation:
    """One run: the new tokens, and their speed after a warm-up (prompt included in the time)."""

    implementation: str
    tokens: list[int]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return len(self.tokens) / self.seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint folder, or a GGUF file")
    parser.add_argument(
        "--preset", metavar="NAME", help=f"write a random checkpoint first: {', '.join(PRESETS)}"
    )
    parser.add_argument(
        "--write-to", metavar="FOLDER", help="keep the preset's checkpoint in this folder"
    )
    parser.add_argument("--large", action="store_true", help="allow a preset that writes gigabytes")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), fp32, fp16, bf16")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; cuda where there is one")
    parser.add_argument(
        "--route",
        choices=("experts", "accelerate"),
        default="experts",
        help="replace the experts alone, or whole MoE blocks",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also run Transformers' eager and grouped_mm; exit code 1 if tokens differ from eager",
    )
    parser.add_argument(
        "--quantize",
        metavar="FORMAT",
        help="round experts stored as floats while they are read: fp8, int8, int4_g128, mxfp4, ...",
    )
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument(
        "--ep",
        action="store_true",
        help="spread the experts over the processes of torchrun (route accelerate)",
    )
    ranks.add_argument(
        "--tp",
        action="store_true",
        help="cut the model over the processes of torchrun, by Transformers' own plan",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the preset's random weights")


def run(args: argparse.Namespace) -> int:
    if (args.checkpoint is None) == (args.preset is None):
        raise ValueError("give either a checkpoint folder or --preset NAME")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    dtype, device = dtype_of(args.dtype), device_of(args.device)
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("generate needs Transformers: pip install 'fusedmoe[hf]'")
    if args.ep or args.tp:
        check_launched("--ep" if args.ep else "--tp")
        if args.quantize:
            raise ValueError("--quantize runs in one process")
    if args.preset is None:
        return _over_ranks(args, Path(args.checkpoint), dtype, device)
    preset = find_preset(args.preset)
    if preset.large and not args.large:
        raise ValueError(f"{args.preset} writes gigabytes; add --large if that is meant")
    _quiet_transformers(bars=preset.large)
    with tempfile.TemporaryDirectory(prefix="fusedmoe-") as scratch:
        # Every process has its own, but for the folder that is kept.
        kept = args.write_to if is_first_rank() else None
        folder = write_preset(args.preset, kept or scratch, args.seed)
        return _over_ranks(args, folder, dtype, device)


def _over_ranks(
    args: argparse.Namespace, folder: Path, dtype: torch.dtype | None, device: torch.device
) -> int:
    if not (args.ep or args.tp):
        return _generate(args, folder, dtype, device, None)
    with launched_ranks(device) as ranks:
        return _generate(args, folder, dtype, ranks.device, ranks)


def _generate(
    args: argparse.Namespace,
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    ranks: Ranks | None,
) -> int:
    packed = is_gguf(folder) or args.quantize is not None
    if is_gguf(folder):
        nbytes = GgufSource(folder).file.nbytes
    else:
        checkpoint = read_checkpoint(folder)
        facts = model_facts(checkpoint)
        check_activation(facts, folder)
        check_counts(checkpoint, facts)
        nbytes = checkpoint.nbytes
        packed = packed or read_quantization_config(folder, checkpoint.config) is not None
    if packed and ranks is not None:
        raise ValueError(f"{folder}: models with packed experts run in one process")
    _quiet_transformers(bars=nbytes >= QUIET_BYTES)
    tokenizer = _tokenizer(folder)
    model = (
        _load_packed(folder, dtype, device, args.quantize)
        if packed
        else _load(folder, dtype, device, tp=args.tp)
    )
    prompt = tokenizer(args.prompt, return_tensors="pt")["input_ids"].to(device)
    if prompt.shape[1] == 0:
        raise ValueError("the prompt has no tokens")
    runs: list[Generation] = []
    skipped: dict[str, str] = {}
    peers = PEERS if args.compare and not packed else ()
    if args.compare and packed:
        skipped = dict.fromkeys(PEERS, "these experts are packed, which only fusedmoe runs")
    total = (WARM_UP_TOKENS + args.max_new_tokens) * (1 + len(peers))
    with progress(total, "generating") as bar:
        for name in peers:
            try:
                model.set_experts_implementation(name)
            except ValueError as error:
                # A family whose experts are not switchable runs its own loop whatever is asked.
                if name != "eager":
                    skipped[name] = str(error)
                    continue
            runs.append(_timed(model, prompt, args.max_new_tokens, name, bar))
        ours = _timed(
            _with_fusedmoe(model, args.route, ranks if args.ep else None),
            *(prompt, args.max_new_tokens, "fusedmoe", bar),
        )
    runs.append(ours)
    return _report(args, tokenizer, runs, skipped)


def _quiet_transformers(*, bars: bool) -> None:
    """Errors only; its bars for loading and writing only where that takes a while."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


def _tokenizer(folder: Path) -> Any:
    """Of the folder, or of a GGUF file (which needs its package): local files only, no code."""
    from transformers import AutoTokenizer

    inside = {"gguf_file": folder.name} if is_gguf(folder) else {}
    try:
        return AutoTokenizer.from_pretrained(
            folder.parent if inside else folder,
            local_files_only=True,
            trust_remote_code=False,
            **inside,
        )
    except Exception as error:
        raise CheckpointError(f"{folder}: Transformers cannot load it: {error}") from error


def _load(
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


def _load_packed(
    folder: Path, dtype: torch.dtype | None, device: torch.device, quantize: str | None
) -> Any:
    """The model with quantized experts, as they are stored or as ``quantize`` rounds them."""
    import fusedmoe

    return fusedmoe.from_pretrained(folder, dtype=dtype or "auto", device=device, quantize=quantize)


def _with_fusedmoe(model: Any, route: str, ranks: Ranks | None) -> Any:
    """``model`` with its experts, or its whole MoE blocks, run by this library.

    All ``ranks`` run the same prompt, each its share of the experts.
    """
    import fusedmoe
    from fusedmoe.integrations.transformers.packed import PackedExperts

    if ranks is not None:
        return fusedmoe.accelerate(model, ep_group=ranks.group, same_tokens=True)
    if route == "accelerate":
        return fusedmoe.accelerate(model)
    if any(isinstance(module, PackedExperts) for module in model.modules()):
        return model
    fusedmoe.register()
    model.set_experts_implementation("fusedmoe")
    return model


def _timed(
    model: Any, prompt: torch.Tensor, max_new_tokens: int, name: str, bar: Progress
) -> Generation:
    """Greedy tokens after the prompt [1, T], timed after a short run that warms up."""
    _greedy(model, prompt, min(WARM_UP_TOKENS, max_new_tokens), bar)
    start = time.perf_counter()
    tokens = _greedy(model, prompt, max_new_tokens, bar)
    return Generation(name, tokens, time.perf_counter() - start)


def _greedy(model: Any, prompt: torch.Tensor, max_new_tokens: int, bar: Progress) -> list[int]:
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

    with torch.inference_mode():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            streamer=Count(),
        )
    # .tolist() waits for the device, so the time taken around this is the whole time.
    return output[0, prompt.shape[1] :].tolist()


def _first_difference(left: list[int], right: list[int]) -> int | None:
    """Where two token lists part; None where they are the same."""
    if left == right:
        return None
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _report(
    args: argparse.Namespace,
    tokenizer: Any,
    runs: list[Generation],
    skipped: dict[str, str],
) -> int:
    """Print what was generated and, for a comparison, how it compares; returns the exit code."""
    text = tokenizer.decode(runs[-1].tokens, skip_special_tokens=True)
    differs: dict[str, int | None] = {}
    if args.compare:
        differs = {r.implementation: _first_difference(runs[0].tokens, r.tokens) for r in runs}
    agree = differs.get("fusedmoe") is None
    if args.json:
        print_json(
            {
                "checkpoint": args.preset or args.checkpoint,
                "route": args.route,
                "prompt": args.prompt,
                "text": text,
                "runs": [asdict(run) | {"tokens_per_s": run.tokens_per_s} for run in runs],
                "first_difference_from_eager": differs,
                "skipped": skipped,
                "tokens_agree": agree if args.compare else None,
            }
        )
        return 0 if agree else 1
    print(printable(args.prompt + text) + "\n")
    columns = ["experts", "tokens", "tokens/s"]
    rows: list[list[Any]] = [[r.implementation, len(r.tokens), r.tokens_per_s] for r in runs]
    if args.compare:
        columns.append("against eager")
        for row, where in zip(rows, differs.values(), strict=True):
            row.append("same" if where is None else f"differs at token {where}")
    print_table(columns, rows)
    for name, why in skipped.items():
        print(f"{name} was not run: {why}")
    return 0 if agree else 1
