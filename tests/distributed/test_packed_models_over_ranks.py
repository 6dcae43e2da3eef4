"""Models whose ranks read their own experts alone: the tokens are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import rank_packed
import torch
from folders import (
    Folders,
    read_tensors,
    write_folder,
    write_folders,
    write_gpt_oss,
    write_with_one_scale,
)
from writers import CASES

import fusedmoe

pytest.importorskip("transformers")

# What is written, which of the two folders is read, and the rounding asked for.
MODELS = {
    "floats": ("tiny-qwen3-moe", "gptq", "floats", None),
    "floats of all experts in one tensor": ("tiny-gpt-oss", None, "floats", None),
    "int4": ("tiny-mixtral", "gptq", "packed", None),
    "fp8 blocks": ("tiny-deepseek-v3", "deepseek", "packed", None),
    "mxfp4 of all experts in one tensor": ("tiny-gpt-oss", None, "packed", None),
    "rounded": ("tiny-olmoe", "gptq", "floats", "int8"),
}


def write(path: Path, preset: str, case: str | None) -> Folders:
    return write_gpt_oss(path) if case is None else write_folders(path, preset, CASES[case])


@pytest.mark.parametrize("name", MODELS)
def test_each_rank_reads_its_share_and_all_give_the_same_tokens(ranks, name, tmp_path):
    preset, case, which, quantize = MODELS[name]
    folder = getattr(write(tmp_path, preset, case), which)
    stored = sum(t.nbytes for n, t in read_tensors(folder).items() if ".experts." in n)
    alone = fusedmoe.from_pretrained(folder, quantize=quantize)
    for size, same_tokens in ((2, True), (4, False)):
        expected = [
            rank_packed.tokens(alone, ids) for ids in rank_packed.prompts(size, same_tokens)
        ]
        arguments = (str(folder), size, same_tokens, expected, quantize)
        read = ranks.run(rank_packed.check, *arguments)
        assert read == [stored // size] * 4


def test_ranks_share_the_one_scale_of_all_experts(ranks, tmp_path):
    folder = write_with_one_scale(tmp_path).packed
    alone = fusedmoe.from_pretrained(folder, dtype=torch.float32)
    expected = [rank_packed.tokens(alone, ids) for ids in rank_packed.prompts(4, False)]
    ranks.run(rank_packed.check, str(folder), 4, False, expected)


def test_a_gguf_file_with_fewer_experts_than_ranks(ranks, tmp_path):
    if torch.cuda.is_available():  # a GPU machine need not have what the test extra brings
        pytest.importorskip("gguf")
    from test_gguf import tiny_model, write_model

    plain = tiny_model("qwen3moe", "qwen3_moe")
    path = write_model(tmp_path / "model.gguf", plain, "qwen3moe", "Q8_0", "Q4_0")
    alone = fusedmoe.from_pretrained(path, dtype=torch.float32)
    for same_tokens in (True, False):
        expected = [rank_packed.tokens(alone, x) for x in rank_packed.prompts(4, same_tokens)]
        ranks.run(rank_packed.check, str(path), 4, same_tokens, expected)


def test_a_bad_file_on_one_rank_is_an_error_on_all(ranks, tmp_path):
    packed = write(tmp_path, "tiny-qwen3-moe", "gptq").packed
    tensors = read_tensors(packed)
    del tensors["model.layers.1.mlp.experts.2.up_proj.scales"]
    bad = write_folder(tmp_path / "bad", packed, tensors)
    ranks.run(rank_packed.check_bad_file_on_one_rank, str(packed), str(bad))


def test_ranks_that_ask_for_different_things(ranks, tmp_path):
    folder = write(tmp_path, "tiny-qwen3-moe", "gptq").floats
    ranks.run(rank_packed.check_different_arguments, str(folder))


def test_packed_experts_stay_where_they_were_read(ranks, tmp_path):
    folder = write(tmp_path, "tiny-qwen3-moe", "gptq").packed
    ranks.run(rank_packed.check_packed_stays_where_it_is, str(folder))
