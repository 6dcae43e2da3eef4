"""``fusedmoe.accelerate(model)``: every family gives what its own forward gives."""

import copy
import dataclasses
import inspect
import logging
import pickle
from importlib.util import find_spec

import pytest
import tiny_models
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import fusedmoe
from fusedmoe.experts.torch_reference import TorchExperts
from fusedmoe.integrations.transformers.accelerate import _replacement, accelerated_blocks, plan
from fusedmoe.integrations.transformers.blocks import BlockForward
from fusedmoe.integrations.transformers.families import Family
from fusedmoe.integrations.transformers.rows import FAMILIES, UNSUPPORTED

UNSUPPORTED_MODELS = {"inkling2", "muse_spark", "nllb_moe", "switch_transformers"}
NAMES = [row.name for row in tiny_models.ROWS if row.name not in UNSUPPORTED_MODELS]


def accelerated(row, **settings):
    """A tiny model whose blocks run through fusedmoe and cannot run in any other way."""
    return forbid_originals(fusedmoe.accelerate(tiny_models.build(row, **settings)))


def forbid_originals(model):
    def refuse(*args, **kwargs):
        raise AssertionError("the original forward was called")

    found = [r for m in model.modules() if (r := _replacement(m)) is not None]
    assert found
    for replacement in found:
        replacement.original = refuse
    return model


def blocks_of(model):
    return [m for m in model.modules() if isinstance(_replacement(m), BlockForward)]


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_are_those_of_eager(name):
    row = tiny_models.by_name(name)
    wanted, tokens = tiny_models.eager_results(name)
    model = accelerated(row)
    assert tiny_models.relative_error(tiny_models.logits(row, model), wanted) <= 1e-4
    if tokens is not None:
        assert torch.equal(tiny_models.greedy_tokens(row, model), tokens)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_values_stay_and_restore_gives_the_original_back(name):
    row = tiny_models.by_name(name)
    wanted, _ = tiny_models.eager_results(name)
    model = tiny_models.build(row)
    parameters = dict(model.named_parameters())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fusedmoe.accelerate(model)
    assert dict(model.named_parameters()) == parameters, "other Parameter objects"
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    fusedmoe.restore(model)
    assert not accelerated_blocks(model)
    assert all("forward" not in vars(m) and "_apply" not in vars(m) for m in model.modules())
    assert not any(m._load_state_dict_post_hooks for m in model.modules())
    assert all(p.is_contiguous() for p in model.parameters())
    assert torch.equal(tiny_models.logits(row, model), wanted)


# What the tiny models leave at its default decides the routing too.
VARIANTS = {
    "cohere2_moe": [
        {"expert_selection_fn": score, "norm_topk_prob": norm, "num_shared_experts": shared}
        | {"shared_expert_combination_strategy": combination}
        for score, norm, shared, combination in (
            ("sigmoid", True, 1, "average"),
            ("sigmoid", False, 0, "average"),
            ("softmax", True, 2, "sum"),
        )
    ],
    "deepseek_v3": [{"n_group": 2, "topk_group": 1}],
    "axk2": [{"n_group": None, "topk_group": None}],
    "lfm2_moe": [{"use_expert_bias": False}],
    "laguna": [{"moe_router_logit_softcapping": 0.7}],
    "ernie4_5_moe": [{"moe_num_shared_experts": 0, "moe_norm_min": 0.9}],
    "nemotron_h": [{"moe_latent_size": None}],
    "longcat_flash": [{"zero_expert_num": 0}],
    "phimoe": [{"router_jitter_noise": 0.3}],
    "granitemoehybrid": [{"num_experts_per_tok": tiny_models.EXPERTS}],
    "hunyuan_v1_moe": [{"moe_topk": [1, 3]}],
    "hy_v3": [{"enable_moe_fp32_combine": True}],
    "dbrx": [
        {"ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 3} | more}
        for more in (
            {"moe_normalize_expert_weights": None},
            {"moe_normalize_expert_weights": 2.0},
        )
    ],
}


# And these, wherever a config has them.
COMMON_VARIANTS = (
    {"n_group": 3, "topk_group": 2, "topk_method": "group_limited_greedy"},
    {"routed_scaling_factor": 1.7},
    {"route_scale": 1.7},
    {"router_scaling_factor": 1.7},
    {"moe_routed_scaling_factor": 1.7},
    {"moe_router_scaling_factor": 1.7},
    {"norm_topk_prob": False},
)


def common_variants():
    for name in NAMES:
        row = tiny_models.by_name(name)
        config = row.make_config()
        text = getattr(config, row.text_at) if row.text_at else config
        known = {field.name for field in dataclasses.fields(text)}
        for changes in COMMON_VARIANTS:
            if next(iter(changes)) in known:
                yield name, {key: value for key, value in changes.items() if key in known}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, changes) for name, several in VARIANTS.items() for changes in several),
        *common_variants(),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_configured_variants(name, changes):
    row = tiny_models.by_name(name)
    row = dataclasses.replace(row, config=dict(row.config) | changes)
    wanted = tiny_models.logits(row, tiny_models.build(row))
    got = tiny_models.logits(row, accelerated(row))
    assert tiny_models.relative_error(got, wanted) <= 1e-4


def test_a_group_left_out_may_still_win_in_axk2():
    """Its choice score becomes 0, which beats the negative ones of the groups that are kept."""
    row = tiny_models.by_name("axk2")
    row = dataclasses.replace(row, config=dict(row.config) | {"n_group": 3, "topk_group": 1})
    models = tiny_models.build(row), accelerated(row)
    for model in models:
        for layer in model.model.layers:
            layer.mlp.gate.e_score_correction_bias.fill_(-2.0)
    wanted, got = (tiny_models.logits(row, model) for model in models)
    assert tiny_models.relative_error(got, wanted) <= 1e-4


def is_here(row):
    """Whether this release of Transformers has the row's model; those in files always are."""
    return row.module.startswith("modeling_") or find_spec(f"transformers.models.{row.module}")


def test_every_row_is_that_of_a_tiny_model():
    seen = set()
    for row in tiny_models.ROWS:
        for block in plan(tiny_models.build(row)):
            seen.add(f"{row.family}.{type(block.module).__name__}")
    not_in_transformers = {"modeling_grok1.MoeBlock"}
    no_model = {"vitpose_backbone.VitPoseBackboneMoeMLP", "doge.DogeCDMoE"}
    rows = {row.name for row in (*FAMILIES, *UNSUPPORTED) if is_here(row)}
    assert rows - not_in_transformers - no_model == seen


def test_every_experts_class_has_a_row():
    classes = {(row.module, row.experts.cls) for row in FAMILIES}
    left_alone = {row.module for row in UNSUPPORTED}
    for row in tiny_models.ROWS:
        assert (row.family, row.experts_class) in classes or row.family in left_alone


def test_named_classes_exist():
    """In one row of each block, where releases of Transformers have it in several ways."""
    missing, complete = {}, set()
    for row in FAMILIES:
        if row.module.startswith("modeling_") or not is_here(row):
            continue
        module = tiny_models.TinyModel(family=row.module, model_class="", experts_class="").module
        names = {row.block, row.router.cls, row.experts.cls} - {"Linear"}
        if absent := [name for name in names if not inspect.isclass(getattr(module, name, None))]:
            missing[row.name] = absent
        else:
            complete.add(row.name)
    assert not missing.keys() - complete, missing


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx", "deepseek_v3", "granitemoeshared"])
def test_a_saved_accelerated_model_is_an_ordinary_checkpoint(name, tmp_path):
    row = tiny_models.by_name(name)
    wanted, _ = tiny_models.eager_results(name)
    accelerated(row).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(tiny_models.logits(row, model), wanted) or (
        tiny_models.relative_error(tiny_models.logits(row, model), wanted) <= 1e-5
    )


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx", "deepseek_v3"])
def test_weights_loaded_afterwards_are_used(name, assign):
    row = tiny_models.by_name(name)
    other = tiny_models.build(row, seed=3)
    wanted = tiny_models.logits(row, other)
    model = accelerated(row)
    tiny_models.logits(row, model)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert tiny_models.relative_error(tiny_models.logits(row, model), wanted) <= 1e-4


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx", "qwen2_moe"])
def test_the_model_may_be_cast_afterwards(name):
    row = tiny_models.by_name(name)
    wanted = tiny_models.logits(row, tiny_models.build(row).double())
    model = accelerated(row).double()
    got = tiny_models.logits(row, model)
    assert got.dtype == torch.float64
    # Routing weights are fp32 in every dtype.
    assert tiny_models.relative_error(got, wanted) <= 1e-5
    assert not model.to(torch.float32).load_state_dict(tiny_models.build(row).state_dict())[0]
    assert (
        tiny_models.relative_error(
            tiny_models.logits(row, model), tiny_models.eager_results(name)[0]
        )
        <= 1e-4
    )


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx"])
def test_a_copy_has_weights_of_its_own(name):
    row = tiny_models.by_name(name)
    wanted, _ = tiny_models.eager_results(name)
    model = accelerated(row)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert tiny_models.relative_error(tiny_models.logits(row, twin), wanted) <= 1e-4
    assert all(r.module in set(twin.modules()) for m in twin.modules() if (r := _replacement(m)))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx", "laguna"])
def test_a_model_survives_pickling(name):
    row = tiny_models.by_name(name)
    twin = pickle.loads(pickle.dumps(fusedmoe.accelerate(tiny_models.build(row))))
    forbid_originals(twin)
    wanted, _ = tiny_models.eager_results(name)
    assert tiny_models.relative_error(tiny_models.logits(row, twin), wanted) <= 1e-4


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_bf16_is_as_close_as_bf16_allows(name):
    row = tiny_models.by_name(name)
    wanted = tiny_models.logits(row, tiny_models.build(row).bfloat16())
    got = tiny_models.logits(row, accelerated(row).bfloat16())
    assert tiny_models.relative_error(got, wanted) <= 5e-2


RECORDED = [
    "mixtral",
    "qwen2_moe",
    "gpt_oss",
    "deepseek_v4",
    "afmoe",
    "hy_v3",
    "jamba",
    "jetmoe",
    "llama4",
    "minimax_m2",
    "gemma4",
    "ernie4_5_moe",
    "phimoe",
    "zaya",
]


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
def test_recorded_router_logits_are_those_of_the_original(name):
    row = tiny_models.by_name(name)
    inputs = tiny_models.INPUTS[row.inputs]

    def recorded(model):
        base = model.model if hasattr(model, "model") else model
        return base(**inputs(model), output_router_logits=True).router_logits

    plain, model = tiny_models.build(row), accelerated(row)
    for _ in range(2):
        wanted, got = recorded(plain), recorded(model)
        assert len(got) == len(wanted) > 0
        for ours, theirs in zip(got, wanted, strict=True):
            assert ours.shape == theirs.shape
            assert tiny_models.relative_error(ours, theirs) <= 1e-5
    results = tiny_models.logits(row, model), tiny_models.eager_results(name)[0]
    assert tiny_models.relative_error(*results) <= 1e-4


def test_a_hook_that_changes_the_routers_answer_is_obeyed():
    row = tiny_models.by_name("qwen3_moe")
    models = tiny_models.build(row), accelerated(row)

    def only_expert_zero(module, args, output):
        logits, weights, ids = output
        return logits, weights, torch.zeros_like(ids)

    for model in models:
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(only_expert_zero)
    wanted, got = (tiny_models.logits(row, model) for model in models)
    assert tiny_models.relative_error(got, wanted) <= 1e-4
    assert tiny_models.relative_error(got, tiny_models.eager_results("qwen3_moe")[0]) > 0.01


def test_who_listens_to_the_experts_is_called():
    row = tiny_models.by_name("mixtral")
    model = fusedmoe.accelerate(tiny_models.build(row))
    heard = []
    handle = model.model.layers[0].mlp.experts.register_forward_hook(lambda *a: heard.append(1))
    tiny_models.logits(row, model)
    assert heard == [1]
    handle.remove()
    forbid_originals(model)
    tiny_models.logits(row, model)


def test_who_listens_to_all_modules_hears_each_block_once():
    row = tiny_models.by_name("qwen3_moe")
    model = fusedmoe.accelerate(tiny_models.build(row))
    heard = []
    listen = torch.nn.modules.module.register_module_forward_hook
    handle = listen(lambda module, *_: heard.append(module))
    tiny_models.logits(row, model)
    handle.remove()
    blocks = [model.get_submodule(path) for path in accelerated_blocks(model)]
    assert [module for module in heard if module in blocks] == blocks
    assert not any(isinstance(module, BlockForward) for module in heard)


def test_a_replaced_part_is_obeyed():
    row = tiny_models.by_name("qwen2_moe")
    model = fusedmoe.accelerate(tiny_models.build(row))
    for layer in model.model.layers:
        gate = nn.Linear(32, 1, bias=False)
        nn.init.zeros_(gate.weight)
        layer.mlp.shared_expert_gate = gate
    wanted = tiny_models.logits(row, fusedmoe.restore(copy.deepcopy(model)))
    assert torch.equal(tiny_models.logits(row, model), wanted)


def test_training_runs_the_original_and_has_gradients():
    row = tiny_models.by_name("qwen3_moe")
    ids = tiny_models.token_ids()
    gradients = []
    for wrap in (lambda model: model, fusedmoe.accelerate):
        model = wrap(tiny_models.build(row)).train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    assert all(
        torch.equal(grad, gradients[1][key]) if grad is not None else gradients[1][key] is None
        for key, grad in gradients[0].items()
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_eval_mode_refuses_to_pretend_that_it_has_gradients(compiled):
    row = tiny_models.by_name("mixtral")
    model = accelerated(row)
    with torch.no_grad():
        wanted = model(input_ids=tiny_models.token_ids()).logits
    if compiled:
        torch._dynamo.reset()
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = model(input_ids=tiny_models.token_ids()).logits
    torch.testing.assert_close(logits, wanted)
    loss = logits.sum()
    with pytest.raises(RuntimeError, match="no backward"):
        loss.backward()


def test_a_noisy_block_in_training_mode_keeps_its_noise():
    row = tiny_models.by_name("mixtral")
    row = dataclasses.replace(row, config={"router_jitter_noise": 0.5})
    model = fusedmoe.accelerate(tiny_models.build(row)).train()
    first, second = (tiny_models.logits(row, model) for _ in range(2))
    assert tiny_models.relative_error(first, second) > 1e-3


def test_autocast_runs_the_original():
    row = tiny_models.by_name("mixtral")
    plain = tiny_models.build(row)
    model = fusedmoe.accelerate(tiny_models.build(row))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tiny_models.logits(row, model), tiny_models.logits(row, plain))


def test_again_changes_nothing():
    model = accelerated(tiny_models.by_name("mixtral"))
    before = [_replacement(m) for m in model.modules()]
    fusedmoe.accelerate(model)
    assert [_replacement(m) for m in model.modules()] == before
    assert fusedmoe.restore(fusedmoe.restore(model)) is model


def test_nothing_of_ours_is_a_submodule():
    model = accelerated(tiny_models.by_name("deepseek_v3"))
    assert not any(type(m).__module__.startswith("fusedmoe.") for m in model.modules())


def left_alone(caplog, model):
    with caplog.at_level(logging.WARNING, logger="fusedmoe"):
        fusedmoe.accelerate(model)
    return caplog.text


def test_what_is_left_alone_is_named_with_its_reason(caplog):
    row = tiny_models.by_name("switch_transformers")
    model = tiny_models.build(row)
    text = left_alone(caplog, model)
    assert "encoder.block.0.layer.1.mlp is left as it is: tokens beyond an expert's" in text
    assert torch.equal(
        tiny_models.logits(row, model), tiny_models.eager_results("switch_transformers")[0]
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "gate", nn.Linear(32, 6)), "its router is torch.nn.modules.linear"),
        (lambda m: setattr(m, "experts", nn.Identity()), "its experts is torch.nn.modules.linear"),
        (lambda m: setattr(m, "forward", lambda x: x), "its forward was replaced by something"),
        (lambda m: setattr(m.gate, "forward", lambda x: x), "the forward of its router was"),
        (lambda m: m.experts.to("meta"), "no storage yet"),
        (lambda m: setattr(m.gate, "top_k", 99), "top_k 99 does not lie in"),
        (
            lambda m: setattr(m.experts, "down_proj", nn.Parameter(torch.ones(6, 32, 7))),
            "w13 is",
        ),
        (
            lambda m: setattr(
                m.experts, "down_proj", nn.Parameter(m.experts.down_proj.to(torch.float8_e4m3fn))
            ),
            "stored as torch.float8_e4m3fn",
        ),
        (
            lambda m: setattr(m, "_hf_hook", type("Hook", (), {"offload": True})()),
            "its weights are offloaded",
        ),
        (
            lambda m: setattr(m.experts, "act_fn", nn.Softplus()),
            "the activation of MixtralExperts is none of ours",
        ),
    ],
)
def test_a_block_that_deviates_is_left_alone(caplog, change, reason):
    model = tiny_models.build(tiny_models.by_name("mixtral"))
    block = model.model.layers[0].mlp
    with torch.no_grad():
        change(block)
    assert reason in left_alone(caplog, model)
    assert _replacement(block) is None
    assert len(blocks_of(model)) == 1, "the other block is as it should be"


def test_a_subclass_with_a_forward_of_its_own_is_left_alone(caplog):
    model = tiny_models.build(tiny_models.by_name("mixtral"))
    first, second = (layer.mlp for layer in model.model.layers)

    class Louder(type(first)):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    class Renamed(type(first)):
        pass

    first.__class__, second.__class__ = Louder, Renamed
    assert "Louder overrides the forward of MixtralSparseMoeBlock" in left_alone(caplog, model)
    assert blocks_of(model) == [second]


def test_llama4_with_two_experts_per_token_is_left_alone(caplog):
    row = tiny_models.by_name("llama4")
    row = dataclasses.replace(row, config=dict(row.config) | {"num_experts_per_tok": 2})
    model = tiny_models.build(row)
    wanted = tiny_models.logits(row, model)
    assert "router.top_k is 2, not 1" in left_alone(caplog, model)
    assert torch.equal(tiny_models.logits(row, model), wanted)


class Prepacked(TorchExperts):
    """Computes with what it packed last."""

    def process_weights_after_loading(self, layer):
        self.packed = layer.w13_weight.clone(), layer.w2_weight.clone()

    def apply(self, output, hidden_states, w1, w2, *rest):
        super().apply(output, hidden_states, *self.packed, *rest)


@pytest.mark.parametrize("name", ["mixtral", "gemma4"])
def test_experts_that_prepack_do_so_again_after_loading(name):
    row = tiny_models.by_name(name)
    other = tiny_models.build(row, seed=3)
    model = fusedmoe.accelerate(
        tiny_models.build(row), options=fusedmoe.MoEOptions(experts=Prepacked)
    )
    tiny_models.logits(row, model)
    model.load_state_dict(other.state_dict())
    wanted = tiny_models.logits(row, other)
    assert tiny_models.relative_error(tiny_models.logits(row, model), wanted) <= 1e-4


def test_options_reach_the_experts():
    model = tiny_models.build(tiny_models.by_name("mixtral"))
    fusedmoe.accelerate(model, options=fusedmoe.MoEOptions(experts="torch"))
    for runner in accelerated_blocks(model).values():
        assert (
            runner.routed_experts.quant_method.select(runner.routed_experts).chosen.name == "torch"
        )


def test_batch_invariance_reaches_the_routers():
    model = tiny_models.build(tiny_models.by_name("mixtral"))
    fusedmoe.accelerate(model, options=fusedmoe.MoEOptions(batch_invariant=True))
    for runner in accelerated_blocks(model).values():
        x = torch.randn(40, runner.moe_config.hidden_dim)
        whole = runner.router.logits(x)
        assert torch.equal(runner.router.logits(x[:1]), whole[:1])
        assert runner.router.batch_invariant


class OnlyOnTheMoon(TorchExperts):
    @classmethod
    def capabilities(cls):
        return dataclasses.replace(super().capabilities(), devices=frozenset({"moon"}))


def test_options_that_name_nothing_are_an_error():
    model = tiny_models.build(tiny_models.by_name("mixtral"))
    with pytest.raises(ValueError, match="no implementation is called 'tritn'"):
        fusedmoe.accelerate(model, options=fusedmoe.MoEOptions(experts="tritn"))
    assert not accelerated_blocks(model)


@pytest.mark.parametrize("name", ["mixtral", "dbrx"])
def test_options_that_nothing_satisfies_leave_the_model_as_it_was(name, caplog):
    row = tiny_models.by_name(name)
    model = tiny_models.build(row)
    with caplog.at_level(logging.WARNING, logger="fusedmoe"):
        fusedmoe.accelerate(model, options=fusedmoe.MoEOptions(experts=OnlyOnTheMoon))
    assert "runs on moon, not cpu" in caplog.text
    assert not accelerated_blocks(model)
    assert all(p.is_contiguous() for p in model.parameters())
    assert not any("_apply" in vars(m) for m in model.modules())
    assert torch.equal(tiny_models.logits(row, model), tiny_models.eager_results(name)[0])


def test_no_tokens_and_one_token():
    model = accelerated(tiny_models.by_name("qwen2_moe"))
    block = blocks_of(model)[0]
    with torch.no_grad():
        assert block(torch.randn(1, 0, 32)).shape == (1, 0, 32)
        assert block(torch.randn(1, 1, 32)).shape == (1, 1, 32)
        x = torch.randn(3, 4, 64)[..., ::2]
        torch.testing.assert_close(block(x), block(x.contiguous()))


def test_a_nan_row_harms_no_other():
    row = tiny_models.by_name("mixtral")
    block = blocks_of(accelerated(row))[0]
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        wanted = block(x)
        x[0, 2] = float("nan")
        got = block(x)
    keep = [0, 1, 3, 4]
    torch.testing.assert_close(got[0, keep], wanted[0, keep])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_compiled_model_has_no_graph_break(name):
    row = tiny_models.by_name(name)
    wanted, _ = tiny_models.eager_results(name)
    compiled = torch.compile(accelerated(row), fullgraph=True, backend="aot_eager")
    assert tiny_models.relative_error(tiny_models.logits(row, compiled), wanted) <= 1e-4


@torch.no_grad()
def test_a_compiled_model_still_records_its_router_logits():
    row = tiny_models.by_name("mixtral")
    inputs = {"input_ids": tiny_models.token_ids(), "output_router_logits": True}
    wanted = tiny_models.build(row)(**inputs).router_logits
    model = accelerated(row)
    model(**inputs)
    got = torch.compile(model, backend="eager")(**inputs).router_logits
    for ours, theirs in zip(got, wanted, strict=True):
        assert tiny_models.relative_error(ours, theirs) <= 1e-5


def test_an_unknown_model_is_untouched_and_that_is_said(caplog):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert "nothing in this Sequential runs through fusedmoe" in left_alone(caplog, model)
    assert not accelerated_blocks(model)


def test_rows_are_data():
    for row in FAMILIES:
        assert isinstance(row, Family)
        hash(row.name)
        with pytest.raises(dataclasses.FrozenInstanceError):
            row.block = "other"
