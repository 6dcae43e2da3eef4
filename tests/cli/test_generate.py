"""The main job: a checkpoint folder generates text, with the tokens of Transformers' own loop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedmoe.presets import PRESETS

TINY = [name for name, preset in PRESETS.items() if not preset.large]


@pytest.mark.parametrize("route", ["experts", "accelerate"])
@pytest.mark.parametrize("preset", TINY)
def test_presets_generate_the_same_tokens_as_eager(cli, preset: str, route: str) -> None:
    code, out, err = cli(
        "generate", "--preset", preset, "--route", route, "--compare", "--json", "--device", "cpu"
    )
    assert code == 0, err
    record = json.loads(out)
    assert record["tokens_agree"] is True
    assert record["skipped"] == {}
    assert [run["implementation"] for run in record["runs"]] == ["eager", "grouped_mm", "fusedmoe"]
    assert all(len(run["tokens"]) == 32 for run in record["runs"])
    assert len(set(record["runs"][0]["tokens"])) > 4, "a stuck model compares nothing"
    assert all(run["tokens_per_s"] > 0 for run in record["runs"])


@pytest.mark.gpu
@pytest.mark.parametrize("route", ["experts", "accelerate"])
@pytest.mark.parametrize("preset", TINY)
def test_presets_on_a_gpu(cli, preset: str, route: str) -> None:
    common = ("generate", "--preset", preset, "--route", route, "--device", "cuda", "--json")
    code, out, err = cli(*common, "--compare")
    assert code == 0, err
    assert json.loads(out)["tokens_agree"] is True
    code, out, err = cli(*common, "--dtype", "bf16")
    assert code == 0, err
    assert len(json.loads(out)["runs"][0]["tokens"]) == 32


def test_text_and_table_without_json(cli, mixtral: Path) -> None:
    code, out, err = cli(
        "generate", mixtral, "--prompt", "Grüße, 世界", "--max-new-tokens", "5", "--compare"
    )
    assert code == 0, err  # with a bar on stderr where the machine is slow
    assert out.startswith("Grüße, 世界")
    rows = [line.split() for line in out.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["eager", "grouped_mm", "fusedmoe"]
    assert all(row[1] == "5" and row[-1] == "same" for row in rows)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_dtypes(cli, mixtral: Path, dtype: str) -> None:
    code, out, err = cli("generate", mixtral, "--dtype", dtype, "--max-new-tokens", "4", "--json")
    assert code == 0, err
    assert len(json.loads(out)["runs"][0]["tokens"]) == 4


def test_a_model_of_text_and_images_generates_text(cli, tmp_path: Path) -> None:
    """The class that config.json names is loaded, which need not be one of language alone."""
    import transformers

    from fusedmoe.presets import VOCABULARY, make_tokenizer

    text = {
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "head_dim": 8},
        **{"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        **{"initializer_range": 0.2, "eos_token_id": None},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = {
        **{"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2},
        **{"out_hidden_size": 32, "patch_size": 4, "deepstack_visual_indexes": []},
    }
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    transformers.Qwen3VLMoeForConditionalGeneration(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    words = "--compare", "--device", "cpu", "--max-new-tokens", "4", "--json"
    code, out, err = cli("generate", tmp_path, *words)
    assert code == 0, err
    assert json.loads(out)["tokens_agree"] is True


def test_control_characters_never_reach_the_terminal(cli, mixtral: Path) -> None:
    _, out, _ = cli("generate", mixtral, "--prompt", "\x1b[2Jred\x07", "--max-new-tokens", "2")
    assert "\x1b" not in out
    assert out.startswith("\\x1b[2Jred\\x07")


def test_a_wrong_kernel_is_noticed(cli, mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison compares: noise in the experts makes it fail with exit code 1."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    import fusedmoe

    fusedmoe.register()

    def noise(self, hidden_states, top_k_index, top_k_weights):
        return torch.randn_like(hidden_states)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "fusedmoe", noise)
    monkeypatch.setattr(fusedmoe, "register", lambda: None)
    code, out, _ = cli("generate", mixtral, "--compare", "--json")
    record = json.loads(out)
    assert code == 1
    assert record["tokens_agree"] is False
    assert record["first_difference_from_eager"]["eager"] is None
    assert record["first_difference_from_eager"]["fusedmoe"] < 32


def test_a_preset_is_kept_where_asked_and_is_the_same_every_time(cli, tmp_path: Path) -> None:
    for name in ("one", "two"):
        code, _, err = cli(
            *("generate", "--preset", "tiny-olmoe", "--max-new-tokens", "1", "--seed", "3"),
            *("--write-to", tmp_path / name),
        )
        assert code == 0, err
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    assert len([name for name in one if name.endswith(".safetensors")]) > 1


def test_a_preset_does_not_move_the_random_state(tmp_path: Path) -> None:
    from fusedmoe.presets import write_preset

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    write_preset("tiny-olmoe", tmp_path / "olmoe")
    assert torch.equal(torch.rand(3), expected)


def test_presets_have_the_published_tensor_names(mixtral: Path) -> None:
    from fusedmoe.checkpoint import read_checkpoint

    names = read_checkpoint(mixtral).tensors
    assert "model.layers.1.block_sparse_moe.experts.7.w2.weight" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fusedmoe.cli", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("fusedmoe ")


def test_help_and_version_import_no_torch() -> None:
    code = (
        "import sys\nfrom fusedmoe.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    assert 'torch' not in sys.modules"
    )
    for words in (["--version"], ["--help"], [], ["nothing"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert "AssertionError" not in done.stderr
        assert done.returncode == (0 if words and words[0].startswith("--") else 2)
    help_of_verb = [sys.executable, "-m", "fusedmoe.cli", "explain", "--help"]
    assert "--top-k" in subprocess.run(help_of_verb, capture_output=True, text=True).stdout
