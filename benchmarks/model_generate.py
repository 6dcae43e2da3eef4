"""Generate with a random-weight Mixture-of-Experts model of real size, on one GPU.

Compares expert implementations inside the same model: tokens/s of greedy generation, and, teacher
forced on the baseline's tokens, how often the argmax differs and by how much the baseline's two
best logits were apart there (in bf16 ulps of the best one). ``layer_share`` is the part of a
decoding step that passes in the MoE blocks.

    python benchmarks/model_generate.py --out benchmarks/results/h200/model_qwen3_30b.json
    python benchmarks/model_generate.py --caches static --implementations fusedmoe:accelerate \
        --out benchmarks/results/h200/model_qwen3_30b_static.json

With a static cache `generate` compiles the model's step, which takes a minute for each batch size
and implementation (``warm_up_s``), and makes a new cache each time. Everybody's caches come to lie
where those before them lay, so that nobody's step is recorded again. The calls before ours are
replayed are warm-up, too; ``later_ms`` has each run after it. The file is
written after every batch size; ``--append`` keeps the rows that it holds. Batch sizes measured side
by side, on a GPU each, are put together by

    python benchmarks/model_generate.py --join one.json other.json --out both.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from h200_ceilings import ceilings_of
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import fusedmoe
from fusedmoe.bench.report import make_header
from fusedmoe.integrations.transformers.static_caches import keep_static_caches

# The published sizes of Qwen3-30B-A3B.
QWEN3_30B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 40960,
}
TINY = QWEN3_30B | {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
BASELINE = "grouped_mm"
WARM_UPS = {"dynamic": 2, "static": 4}


def build_model(
    sizes: dict[str, Any], layers: int, device: str, router_gain: float
) -> Qwen3MoeForCausalLM:
    """Weights normal with std 0.02, norms 1, and three things as in a trained model.

    Embeddings have std 1, the projections back into the residual stream are smaller by
    sqrt(2 * layers), and routers are ``router_gain`` times sharper. Otherwise a layer's rounding
    decides ties in the next one, and any two implementations drift several bf16 ulps apart,
    whatever their experts do.
    """
    config = Qwen3MoeConfig(**sizes | {"num_hidden_layers": layers})
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=device).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02 * gain_of(name, layers, router_gain))
        rotary = type(model.model.rotary_emb)(config=config).to(device)
        model.model.rotary_emb = rotary
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def gain_of(name: str, layers: int, router_gain: float) -> float:
    """How many times 0.02 a parameter's standard deviation is."""
    if name.endswith("mlp.gate.weight"):
        return router_gain
    if name.endswith("embed_tokens.weight"):
        return 50.0
    into_residual = ("o_proj.weight", "down_proj.weight", "down_proj")
    return (2 * layers) ** -0.5 if name.endswith(into_residual) else 1.0


def use(model: Any, implementation: str) -> None:
    """Switch ``model`` to an experts implementation, or to accelerated whole blocks."""
    # What was compiled for another implementation keeps memory, and must not be found again.
    model.__dict__.pop("_compiled_call", None)
    torch.compiler.reset()
    fusedmoe.restore(model)
    if implementation == "fusedmoe:accelerate":
        model.set_experts_implementation("fusedmoe")
        fusedmoe.accelerate(model)
    else:
        model.set_experts_implementation(implementation)
    # As accelerate does: nobody's step is recorded again for a cache at new addresses.
    keep_static_caches(model)


@torch.inference_mode()
def generate(model: Any, prompt: torch.Tensor, new_tokens: int, cache: str | None) -> torch.Tensor:
    extra = {} if cache is None else {"cache_implementation": cache}
    return model.generate(
        prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **extra
    )


def tokens_per_second(
    model: Any, prompt: torch.Tensor, new_tokens: int, cache: str, repeats: int
) -> tuple[float, list[float], float, torch.Tensor]:
    """Median over ``repeats`` runs, the seconds of each and of the warm-up before, and the tokens.

    The rate counts generated tokens of all rows.
    """

    def timed() -> tuple[float, torch.Tensor]:
        wait = torch.cuda.synchronize if prompt.is_cuda else (lambda: None)
        wait()
        start = time.perf_counter()
        tokens = generate(model, prompt, new_tokens, None if cache == "dynamic" else cache)
        wait()
        return time.perf_counter() - start, tokens

    warm_up = sum(timed()[0] for _ in range(WARM_UPS[cache]))
    runs = [timed() for _ in range(repeats)]
    taken = [seconds for seconds, _ in runs]
    rate = prompt.shape[0] * new_tokens / statistics.median(taken)
    return rate, taken, warm_up, runs[-1][1]


@torch.inference_mode()
def layer_share(model: Any, prompt: torch.Tensor, steps: int = 16) -> float:
    """Share of the decoding steps' time, on the GPU's clock, that passes in the MoE blocks."""
    spans: dict[str, list[list[torch.cuda.Event]]] = {"blocks": [], "steps": []}

    def watch(module: Any, name: str) -> list[Any]:
        def mark() -> torch.cuda.Event:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        return [
            module.register_forward_pre_hook(lambda *_: spans[name].append([mark()])),
            module.register_forward_hook(lambda *_: spans[name][-1].append(mark())),
        ]

    handles = [h for layer in model.model.layers for h in watch(layer.mlp, "blocks")]
    handles += watch(model, "steps")
    generate(model, prompt, steps + 1, None)
    torch.cuda.synchronize()
    for handle in handles:
        handle.remove()
    # The first step reads the prompt.
    whole = sum(start.elapsed_time(end) for start, end in spans["steps"][1:])
    first = len(model.model.layers)
    return sum(start.elapsed_time(end) for start, end in spans["blocks"][first:]) / whole


@torch.inference_mode()
def teacher_forced(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False).logits


def disagreement(baseline: torch.Tensor, ours: torch.Tensor) -> dict[str, Any]:
    """Positions whose argmax differs, with the baseline's top-2 gap there in bf16 ulps."""
    best = baseline.float().topk(2, dim=-1).values
    exponent = torch.frexp(best[..., 0].abs()).exponent  # value in [2^(e-1), 2^e)
    gap = (best[..., 0] - best[..., 1]) / torch.exp2(exponent.float() - 8)
    differs = baseline.argmax(-1) != ours.argmax(-1)
    gaps = gap[differs].tolist()
    return {
        "positions": differs.numel(),
        "argmax_differs": int(differs.sum()),
        "gap_ulps_max": max(gaps, default=0.0),
        "gaps_ulps": sorted(round(g, 2) for g in gaps),
        "logits_relative_error": float(
            (ours.float() - baseline.float()).norm() / baseline.float().norm()
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy of the same family")
    parser.add_argument("--append", action="store_true", help="keep the other rows of --out")
    parser.add_argument("--layers", type=int, default=QWEN3_30B["num_hidden_layers"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--caches", nargs="+", default=["dynamic"], choices=["dynamic", "static"])
    parser.add_argument("--router-gain", type=float, default=4.0)
    parser.add_argument("--implementations", nargs="+", default=["fusedmoe", "fusedmoe:accelerate"])
    parser.add_argument("--join", nargs="+", type=Path, help="measure nothing: reports of one run")
    args = parser.parse_args()
    if args.join:
        Path(args.out).write_text(json.dumps(joined(args.join), indent=1) + "\n")
        return
    fusedmoe.register()
    device = torch.device(args.device)
    header = make_header(device, ceilings_of(device))
    torch.cuda.empty_cache()
    sizes = TINY if args.tiny else QWEN3_30B
    model = build_model(sizes, args.layers, args.device, args.router_gain)
    bytes_of_model = sum(p.numel() * p.element_size() for p in model.parameters())
    report = header | {
        "model": f"{'tiny' if args.tiny else 'Qwen3-30B-A3B'} sizes, {args.layers} layers, "
        "random bf16 weights",
        "model_gigabytes": round(bytes_of_model / 1e9, 2),
        "router_gain": args.router_gain,
        "rows": kept_rows(args),
    }
    for batch in args.batches:
        torch.manual_seed(batch)
        prompt = torch.randint(0, model.config.vocab_size, (batch, args.prompt_tokens))
        prompt = prompt.to(args.device)
        for cache in args.caches:
            report["rows"] += measure(model, prompt, cache, args)
            if args.out:
                Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def joined(paths: Sequence[Path]) -> dict[str, Any]:
    """One report of several of the same device and model; each row says the commit it is of."""
    reports = [json.loads(path.read_text()) for path in paths]
    for name in ("device", "versions", "model"):
        if len({json.dumps(report[name]) for report in reports}) > 1:
            raise ValueError(f"reports of several: {[report[name] for report in reports]}")
    commands = "; ".join(report["command"] for report in reports)
    rows = [row | {"commit": report["commit"]} for report in reports for row in report["rows"]]
    return reports[0] | {"command": commands, "rows": rows}


def kept_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """With ``--append``, what the file holds already and this run does not measure again."""
    if not (args.append and args.out and Path(args.out).exists()):
        return []
    rows = json.loads(Path(args.out).read_text())["rows"]
    return [r for r in rows if r["batch"] not in args.batches or r["cache"] not in args.caches]


def measure(
    model: Any, prompt: torch.Tensor, cache: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row for the baseline and one for each implementation at this batch and cache."""
    rows: list[dict[str, Any]] = []
    reference: torch.Tensor | None = None
    logits = torch.empty(0)
    for implementation in [BASELINE, *args.implementations]:
        use(model, implementation)
        rate, taken, warm_up, tokens = tokens_per_second(
            model, prompt, args.new_tokens, cache, args.repeats
        )
        row = {
            "impl": implementation.replace(BASELINE, "transformers_grouped_mm"),
            "batch": prompt.shape[0],
            "prompt_tokens": prompt.shape[1],
            "new_tokens": args.new_tokens,
            "cache": cache,
            "tokens_per_s": round(rate, 2),
            "step_ms": round(1e3 * prompt.shape[0] / rate, 3),
            "warm_up_s": round(warm_up, 1),
            "later_ms": [round(1e3 * seconds, 1) for seconds in taken],
        }
        if cache == "dynamic" and prompt.is_cuda:
            row["layer_share"] = round(layer_share(model, prompt), 3)
        print(row, file=sys.stderr, flush=True)
        if reference is None:
            reference = tokens
            logits = teacher_forced(model, reference[:4])
        else:
            row |= {
                "speedup": round(rate / rows[0]["tokens_per_s"], 3),
                "tokens_identical": int((tokens == reference).all(-1).sum()),
                "teacher_forced": disagreement(logits, teacher_forced(model, reference[:4])),
            }
        if not math.isfinite(rate):
            raise RuntimeError(f"{implementation} generated nothing")
        rows.append(row)
    use(model, BASELINE)
    return rows


if __name__ == "__main__":
    main()
