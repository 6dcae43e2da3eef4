"""Every way a checkpoint stores experts ends in the same parameters, on every rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusedmoe import FusedMoE, MoEOptions, OnlineQuantization, ParallelGroups, RoutedExperts

E, H, I = 4, 6, 10  # noqa: E741
GATE = torch.randn(E, I, H, generator=torch.Generator().manual_seed(0))
UP = torch.randn(E, I, H, generator=torch.Generator().manual_seed(1))
DOWN = torch.randn(E, H, I, generator=torch.Generator().manual_seed(2))
GATE_BIAS, UP_BIAS, DOWN_BIAS = torch.randn(E, I), torch.randn(E, I), torch.randn(E, H)


def experts(**arguments):
    arguments = {"params_dtype": torch.float32, "options": MoEOptions(experts="torch")} | arguments
    return FusedMoE(E, 2, H, I, **arguments).routed_experts


def per_expert(gate="gate_proj", down="down_proj", up="up_proj"):
    for e in range(E):
        yield f"experts.{e}.{gate}.weight", GATE[e]
        yield f"experts.{e}.{down}.weight", DOWN[e]
        yield f"experts.{e}.{up}.weight", UP[e]


STACKED = torch.cat((GATE, UP), dim=1)
INTERLEAVED = torch.stack((GATE, UP), dim=2).flatten(1, 2)
LAYOUTS = {
    "one tensor per expert": (list(per_expert()), {}),
    "in any order": (list(per_expert())[::-1], {}),
    "mixtral's names": (list(per_expert("w1", "w2", "w3")), {"ckpt_names": ("w1", "w2", "w3")}),
    "grok's names": (
        list(per_expert("linear", "linear_1", "linear_v")),
        {"ckpt_names": ("linear", "linear_1", "linear_v")},
    ),
    "gate and up joined in each expert": (
        [(f"experts.{e}.gate_up_proj.weight", STACKED[e]) for e in range(E)]
        + [(f"experts.{e}.down_proj.weight", DOWN[e]) for e in range(E)],
        {},
    ),
    "3-D": ([("experts.gate_up_proj", STACKED), ("experts.down_proj", DOWN)], {}),
    "3-D, gate and up apart": (
        [("gate_proj.weight", GATE), ("up_proj.weight", UP), ("down_proj.weight", DOWN)],
        {},
    ),
    "3-D under one name (Granite)": (
        [("input_linear.weight", STACKED), ("output_linear.weight", DOWN)],
        {"ckpt_names": ("input_linear", "output_linear", None)},
    ),
    "3-D, input dimension first": (
        [("experts.gate_up_proj", STACKED.mT), ("experts.down_proj", DOWN.mT)],
        {"is_fused_checkpoint_transposed": True},
    ),
    "3-D, transposed and interleaved": (
        [("experts.gate_up_proj", INTERLEAVED.mT), ("experts.down_proj", DOWN.mT)],
        {"is_fused_checkpoint_transposed": True, "is_fused_checkpoint_interleaved": True},
    ),
    "stacked rows (DBRX)": (
        [
            ("experts.mlp.w1", GATE.flatten(0, 1)),
            ("experts.mlp.v1", UP.flatten(0, 1)),
            ("experts.mlp.w2", DOWN.mT.flatten(0, 1)),
        ],
        {"ckpt_names": ("mlp.w1", "mlp.w2", "mlp.v1")},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_checkpoint_layout_fills_the_same_parameters(layout):
    weights, arguments = LAYOUTS[layout]
    loaded = experts(**arguments)
    assert loaded.load_weights(weights) == {"w13_weight", "w2_weight"}
    loaded.check_loaded()
    torch.testing.assert_close(loaded.w13_weight.data, STACKED)
    torch.testing.assert_close(loaded.w2_weight.data, DOWN)


@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_block_4x3", "int8_channel"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_checkpoint_layout_is_rounded_to_the_same_numbers(layout, name):
    """Gate and up have scales of their own, however they lie in files."""
    weights, arguments = LAYOUTS[layout]
    rounded = {"quant_config": OnlineQuantization.of(name), "options": MoEOptions()}
    loaded, plain = experts(**rounded, **arguments), experts(**rounded)
    loaded.load_weights(weights)
    loaded.check_loaded()
    plain.load_weights(per_expert())
    for name, tensor in plain.state_dict().items():
        found = loaded.state_dict()[name]
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_mapping_is_as_good_as_pairs():
    loaded = experts()
    loaded.load_weights(dict(per_expert()))
    torch.testing.assert_close(loaded.w13_weight.data, STACKED)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ep", [False, True])
def test_every_checkpoint_layout_is_cut_for_every_rank(layout, ep):
    weights, arguments = LAYOUTS[layout]
    groups = ParallelGroups(enable_expert_parallel=ep)
    for rank in range(3):
        loaded = experts(tp_size=3, tp_rank=rank, parallel=groups, **arguments)
        loaded.load_weights(weights)
        loaded.check_loaded()
        if ep:
            rows = slice(0, 2) if rank == 0 else slice(rank + 1, rank + 2)
            torch.testing.assert_close(loaded.w13_weight.data, STACKED[rows])
            torch.testing.assert_close(loaded.w2_weight.data, DOWN[rows])
            continue
        owned = slice(rank * 4, min(rank * 4 + 4, I))
        width = owned.stop - owned.start
        w13, w2 = loaded.w13_weight.data, loaded.w2_weight.data
        torch.testing.assert_close(w13[:, :width], GATE[:, owned])
        torch.testing.assert_close(w13[:, 4 : 4 + width], UP[:, owned])
        torch.testing.assert_close(w2[:, :, :width], DOWN[:, :, owned])
        assert not w13[:, width:4].any()
        assert not w13[:, 4 + width :].any()
        assert not w2[:, :, width:].any()


@pytest.mark.parametrize("interleaved_checkpoint", [False, True])
def test_gpt_oss_keeps_gate_and_up_interleaved_with_their_biases(interleaved_checkpoint):
    weights, bias = (
        (INTERLEAVED, torch.stack((GATE_BIAS, UP_BIAS), 2).flatten(1))
        if interleaved_checkpoint
        else (STACKED, torch.cat((GATE_BIAS, UP_BIAS), 1))
    )
    loaded = experts(
        activation="swigluoai",
        has_bias=True,
        is_fused_checkpoint_transposed=True,
        is_fused_checkpoint_interleaved=interleaved_checkpoint,
    )
    loaded.load_weights(
        [
            ("experts.gate_up_proj", weights.mT),
            ("experts.gate_up_proj_bias", bias),
            ("experts.down_proj", DOWN.mT),
            ("experts.down_proj_bias", DOWN_BIAS),
        ]
    )
    loaded.check_loaded()
    torch.testing.assert_close(loaded.w13_weight.data, INTERLEAVED)
    torch.testing.assert_close(loaded.w13_bias[:, 0::2], GATE_BIAS)
    torch.testing.assert_close(loaded.w13_bias[:, 1::2], UP_BIAS)
    torch.testing.assert_close(loaded.w2_bias.data, DOWN_BIAS)


def test_interleaving_is_assumed_where_the_activation_reads_it():
    loaded = experts(activation="swigluoai")
    loaded.load_weights([("gate_up_proj", INTERLEAVED), ("down_proj", DOWN)])
    torch.testing.assert_close(loaded.w13_weight.data, INTERLEAVED)


def test_without_a_gate_there_is_one_projection_up():
    loaded = experts(activation="relu2_no_mul", ckpt_names=("up_proj", "down_proj", None))
    loaded.load_weights([("experts.up_proj", UP), ("experts.down_proj", DOWN)])
    loaded.check_loaded()
    torch.testing.assert_close(loaded.w13_weight.data, UP)


@pytest.mark.parametrize("fused", [False, True])
def test_redundant_copies_are_filled_too(fused):
    loaded = experts(enable_eplb=True, num_redundant_experts=3)
    loaded.load_weights(LAYOUTS["3-D" if fused else "one tensor per expert"][0])
    loaded.check_loaded()
    torch.testing.assert_close(loaded.w13_weight.data, torch.cat((STACKED, STACKED[:3])))
    torch.testing.assert_close(loaded.w2_weight.data, torch.cat((DOWN, DOWN[:3])))


def test_the_mapping_of_the_api_reference_loads_through_the_weight_loader():
    """An engine's own loop: look the name up, call the parameter's weight_loader."""
    model = nn.Module()
    model.experts = FusedMoE(
        E,
        2,
        H,
        I,
        params_dtype=torch.float32,
        enable_eplb=True,
        num_redundant_experts=2,
        options=MoEOptions(experts="torch"),
    )
    parameters = dict(model.named_parameters())
    mapping = model.experts.routed_experts.make_expert_params_mapping(
        model, "gate_proj", "down_proj", "up_proj", E, 2
    )
    for name, tensor in per_expert():
        for param_name, weight_name, expert_id, shard_id in mapping:
            if weight_name in name:
                parameter = parameters[name.replace(weight_name, param_name)]
                done = parameter.weight_loader(
                    parameter, tensor, name, shard_id, expert_id, return_success=True
                )
                assert done
    loaded = model.experts.routed_experts
    loaded.check_loaded()
    torch.testing.assert_close(loaded.w13_weight.data, torch.cat((STACKED, STACKED[:2])))


def test_weight_loader_tells_whether_the_expert_is_here():
    loaded = experts(tp_size=2, tp_rank=1, parallel=ParallelGroups(enable_expert_parallel=True))
    load = loaded.weight_loader
    assert load(loaded.w2_weight, DOWN[0], "down", "w2", 0, return_success=True) is False
    assert load(loaded.w2_weight, DOWN[2], "down", "w2", 2, return_success=True) is True
    assert load(loaded.w2_weight, DOWN[3], "down", "w2", 3) is None
    torch.testing.assert_close(loaded.w2_weight.data, DOWN[2:])
    with pytest.raises(ValueError, match="4 does not lie"):
        load(loaded.w2_weight, DOWN[0], "down", "w2", 4)
    with pytest.raises(ValueError, match="down: the given parameter"):
        load(nn.Parameter(), DOWN[0], "down", "w2", 2)
    with pytest.raises(ValueError, match="w2_weight has shards w2, not w1"):
        load(loaded.w2_weight, DOWN[2], "down", "w1", 2)


def test_weight_loaders_survive_moving_and_materialising():
    loaded = experts(device="meta")
    loaded.to_empty(device="cpu")
    assert loaded.w2_weight.weight_loader == loaded.weight_loader
    loaded.double()
    assert loaded.w13_weight.weight_loader == loaded.weight_loader


def test_what_is_missing_is_an_error_with_names():
    loaded = experts()
    loaded.load_weights(list(per_expert())[:-2])
    report = loaded.load_report()
    assert len(report.loaded) == 10
    assert report.missing == {("w13_weight", "w3", 3), ("w2_weight", "w2", 3)}
    with pytest.raises(ValueError, match=r"misses 2 of 12 .* w13_weight w3 of expert 3, w2_weight"):
        loaded.check_loaded()
    with pytest.raises(ValueError, match=r"misses 12 of 12 .* and 8 more"):
        experts().check_loaded()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("experts.0.gate.weight", GATE[0], "experts.0.gate.weight names no tensor"),
        ("experts.4.gate_proj.weight", GATE[0], "expert 4 of a layer that has 4"),
        ("experts.0.gate_proj.bias", GATE_BIAS[0], "no parameter w13_bias"),
        ("experts.0.gate_proj.weight_scale", GATE[0], "no parameter w13_weight_scale"),
        ("experts.0.gate_proj.weight", GATE[0].T, r"expected shape \(10, 6\).*found \(6, 10\)"),
        ("experts.0.gate_proj.weight", GATE[0, :, 0], r"found \(10,\)"),
        ("experts.0.gate_proj.weight", GATE[0].int(), "torch.int32"),
        ("experts.0.gate_up_proj.weight", STACKED[0, :-1], r"\(20, 6\), found \(19, 6\)"),
        ("experts.gate_up_proj", STACKED[:3], r"\(4, 20, 6\), found \(3, 20, 6\)"),
        ("experts.gate_up_proj", STACKED.mT, r"found \(4, 6, 20\); it is stored the other way"),
        ("experts.gate_up_proj", STACKED[0], r"\(80, 6\), found \(20, 6\)"),
        ("experts.down_proj", DOWN.flatten(0, 1), r"\(40, 6\), found \(24, 10\)"),
        ("experts.down_proj", DOWN[None], r"found \(1, 4, 6, 10\)"),
    ],
)
def test_wrong_tensors_are_refused_by_name_and_nothing_is_marked_loaded(name, tensor, message):
    loaded = experts()
    with pytest.raises(ValueError, match=message):
        loaded.load_weights([(name, tensor)])
    assert not loaded.load_report().loaded


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("path", ["model.layers.1.mlp", "model.layers.10.mlp", "layers.2.mlp"])
def test_experts_of_other_layers_are_refused(path, stacked):
    """Whoever gives every layer the whole checkpoint is told, before one overwrites another."""
    runner = FusedMoE(E, 2, H, I, torch.float32, prefix="model.layers.0.mlp")
    runner.load_weights((f"model.layers.0.mlp.{name}", tensor) for name, tensor in per_expert())
    foreign = (f"{path}.experts.1.down_proj.weight", torch.zeros(H, I))
    if stacked:
        foreign = (f"{path}.experts.down_proj", torch.zeros(E, H, I))
    for load in (runner.load_weights, runner.routed_experts.load_weights):
        with pytest.raises(ValueError, match=f"^{path}.* another layer than model.layers.0.mlp"):
            load([foreign])
    assert torch.equal(runner.routed_experts.w2_weight, DOWN)


def test_a_layer_without_a_prefix_takes_one_layer_at_a_time():
    def of_layer(i):
        return [(f"layers.{i}.mlp.{name}", tensor * i) for name, tensor in per_expert()]

    layer = experts()
    with pytest.raises(ValueError, match=r"^layers\.1\.mlp.* another layer than layers\.0\.mlp"):
        layer.load_weights([*of_layer(0), *of_layer(1)])
    for i in (1, 2):
        layer.load_weights(of_layer(i))
        assert torch.equal(layer.w2_weight, DOWN * i)


@pytest.mark.parametrize(
    ("prefix", "path"),
    [
        ("model.layers.3.mlp", ""),
        ("model.layers.3.mlp", "mlp."),
        ("model.layers.3.mlp", "layers.3.mlp."),  # without the model's own name
        ("model.layers.3.mlp", "language_model.model.layers.3.mlp."),
        ("model.layers.3", "model.layers.3.moe.2."),
        ("mlp", "model.layers.3.mlp."),
        ("", "model.layers.3.mlp."),
    ],
)
def test_a_name_may_lack_the_prefix_or_go_on_before_it(prefix, path):
    layer = experts(prefix=prefix)
    layer.load_weights((f"{path}{name}", tensor) for name, tensor in per_expert())
    assert torch.equal(layer.w2_weight, DOWN)


def test_existing_parameters_are_used_without_a_copy_whatever_their_strides():
    """As when a model's own [E, 2I, H] parameters are aliased, or transposed views of them."""
    gate_up, down = nn.Parameter(STACKED.mT.contiguous()), nn.Parameter(DOWN.clone())
    loaded = experts(routed_experts_args={"w13_weight": gate_up.mT, "w2_weight": down})
    assert loaded.w2_weight is down
    assert loaded.w13_weight.data_ptr() == gate_up.data_ptr()
    assert "w13_weight" not in loaded.state_dict()
    loaded.load_weights([("gate_up_proj", STACKED + 1), ("down_proj", DOWN + 1)])
    torch.testing.assert_close(gate_up.data, STACKED.mT + 1)
    torch.testing.assert_close(down.data, DOWN + 1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w13_weight": STACKED}, "w2_weight"),
        ({"w13_weight": STACKED, "w2_weight": DOWN.mT}, r"w2_weight must be \(4, 6, 10\)"),
        ({"w13_weight": STACKED, "w2_weight": DOWN, "w2_bias": DOWN_BIAS}, "w2_bias"),
    ],
)
def test_existing_tensors_that_do_not_fit_are_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        experts(routed_experts_args=tensors)


def test_rows_for_moving_experts_between_ranks_are_views():
    loaded = experts(has_bias=True)
    rows = loaded.get_expert_weights()
    assert [tuple(r.shape) for r in rows] == [(E, 2 * I * H), (E, H * I), (E, 2 * I), (E, H)]
    rows[1][2].fill_(5.0)
    assert (loaded.w2_weight[2] == 5.0).all()
    view = experts(
        routed_experts_args={"w13_weight": STACKED, "w2_weight": DOWN.mT.contiguous().mT}
    )
    with pytest.raises(ValueError, match="w2_weight with strides"):
        view.get_expert_weights()


def test_a_subclass_may_keep_its_weights_elsewhere():
    """Properties that return a fresh view at each read, and no Parameters of its own."""

    class Borrowed(RoutedExperts):
        def __init__(self, *arguments, owner, **keywords):
            self.owner = (owner,)
            super().__init__(*arguments, **keywords)

        def create_parameters(self, params_dtype, device, tensors):
            assert not tensors

        @property
        def w13_weight(self):
            return self.owner[0].gate_up.mT

        @property
        def w2_weight(self):
            return self.owner[0].down.mT

    owner = nn.Module()
    owner.gate_up = nn.Parameter(STACKED.mT.contiguous())
    owner.down = nn.Parameter(DOWN.mT.contiguous())
    layer = FusedMoE(
        E, 2, H, I, torch.float32, routed_experts_cls=Borrowed, routed_experts_args={"owner": owner}
    )
    plain = FusedMoE(E, 2, H, I, torch.float32)
    plain.load_weights(LAYOUTS["3-D"][0])
    x, logits = torch.randn(3, H), torch.randn(3, E)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, logits), plain(x, logits))
        owner.down.mul_(2.0)
        layer.routed_experts.process_weights_after_loading()
        torch.testing.assert_close(layer(x, logits), 2 * plain(x, logits))
    assert not list(layer.state_dict())
    layer.load_weights(LAYOUTS["3-D"][0])
    torch.testing.assert_close(owner.down.data, DOWN.mT)
