"""Small batches replayed as CUDA graphs: the same bits, whatever happens between two calls."""

import copy
import threading

import pytest
import torch

import fusedmoe
from fusedmoe.integrations.transformers.accelerate import _replacement
from fusedmoe.integrations.transformers.blocks import BlockForward
from fusedmoe.runner import replay as replay_module
from fusedmoe.runner.graph_ends import CopyEnd
from fusedmoe.runner.replay import MAX_REPLAYED_ROWS, GraphReplay

pytest.importorskip("transformers")
from hf import tiny_models

pytestmark = pytest.mark.gpu


def accelerated(name, replay_rows=MAX_REPLAYED_ROWS):
    model = tiny_models.build(tiny_models.by_name(name)).to("cuda", torch.bfloat16)
    fusedmoe.accelerate(model, replay_rows=replay_rows)
    blocks = (m for m in model.modules() if isinstance(_replacement(m), BlockForward))
    return model, next(blocks)


def captured(block):
    return list(_replacement(block).replay._captured.values())


def width(block):
    return _replacement(block).width


def first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4"])
def test_replayed_blocks_give_the_bits_of_launched_ones(name, mode):
    _, block = accelerated(name)
    _, launched = accelerated(name, replay_rows=0)
    with mode():
        for T in (1, 3, 1, 3, 1, 3, 70, 70, 70, 300, 300, 300):
            x = torch.randn(1, T, width(block), device="cuda", dtype=torch.bfloat16)
            result = block(x)
            assert torch.equal(first(result), first(launched(x)))
    returned = len(result) if isinstance(result, tuple) else 1
    assert [len(one.outputs) for one in captured(block)] == [returned] * 3
    assert not captured(launched)


@torch.no_grad()
def test_outputs_outlive_later_calls_and_modes_may_change():
    _, block = accelerated("mixtral")
    x = torch.randn(1, 2, width(block), device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        wanted = [first(block(x * scale)).clone() for scale in (1, 2, 3)]
    kept = [first(block(x * scale)) for scale in (1, 2, 3)]
    for one, other in zip(kept, wanted, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_weights_may_change_in_place_and_move():
    model, block = accelerated("mixtral")
    x = torch.randn(1, 2, width(block), device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        before = first(block(x))
    state = {name: value * 0.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    halved = first(block(x))
    assert not torch.equal(halved, before)
    assert torch.equal(halved, first(_replacement(block).original(x))) or torch.allclose(
        halved.float(), first(_replacement(block).original(x)).float(), rtol=5e-2, atol=5e-2
    )
    model.to("cpu").to("cuda")
    assert torch.equal(first(block(x)), halved)


@torch.no_grad()
def test_a_listener_inside_hears_every_call():
    _, block = accelerated("qwen2_moe")
    x = torch.randn(1, 2, width(block), device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        block(x)
    heard = []
    shared = block.shared_expert
    handle = shared.register_forward_hook(lambda *_: heard.append(1))
    for _ in range(3):
        block(x)
    handle.remove()
    block(x)
    assert len(heard) == 3


@torch.no_grad()
def test_inside_a_capture_and_after_a_copy():
    _, block = accelerated("mixtral")
    x = torch.randn(1, 2, width(block), device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        wanted = first(block(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = first(block(x))
    graph.replay()
    assert torch.equal(out, wanted)
    twin = copy.deepcopy(block)
    assert torch.equal(first(twin(x)), wanted)
    assert not captured(twin)


def twice_and_sum(x, y):
    return x * 2, x + y


@torch.no_grad()
def test_inputs_and_outputs_lie_elsewhere_in_each_call():
    """Those of launches that are still to run stay what they were."""
    replay = GraphReplay(twice_and_sum, lambda: True)
    calls = []
    for step in range(16):
        if step == 4:
            torch.cuda._sleep(100_000_000)
        x = torch.randn(2, 3, 5, device="cuda")
        y = torch.randn(2, 10, 3, device="cuda").mT[..., ::2]
        calls.append((x, y, *replay((x, y), ())))
    (one,) = replay._captured.values()
    assert one.moved is not None
    for x, y, twice, total in calls:
        assert torch.equal(twice, x * 2)
        assert torch.equal(total, x + y)


@torch.no_grad()
def test_a_block_replayed_in_a_loop_over_its_own_output():
    """Inputs come back to addresses of former outputs, as in a model."""
    _, block = accelerated("mixtral")
    _, launched = accelerated("mixtral", replay_rows=0)
    x = y = torch.randn(1, 2, width(block), device="cuda", dtype=torch.bfloat16)
    for _ in range(12):
        x, y = (torch.tanh(z + first(run(z))) for z, run in ((x, block), (y, launched)))
        assert torch.equal(x, y)
    assert all(one.moved is not None for one in captured(block))


@torch.no_grad()
def test_in_a_thread_that_has_not_used_the_device():
    replay = GraphReplay(twice_and_sum, lambda: True)
    x = torch.randn(2, 5, device="cuda")
    for _ in range(3):
        wanted = replay((x, x), ())
    y, results = x.clone(), []

    def call():
        with torch.no_grad():
            results.extend(replay((y, y), ()))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(results, wanted, strict=True))
    assert not replay._given_up


@torch.no_grad()
def test_random_numbers_are_drawn_anew():
    replay = GraphReplay(lambda x: (x + torch.rand_like(x),), lambda: True)
    x = torch.zeros(2, 64, device="cuda")
    drawn = torch.stack([replay((x,), ())[0] for _ in range(8)])
    assert len(replay._captured) == 1
    assert drawn.flatten().unique().numel() > 0.9 * drawn.numel()


@torch.no_grad()
def test_a_subclass_of_tensors_is_not_replayed():
    class Other(torch.Tensor):
        pass

    replay = GraphReplay(lambda x: (x * 2,), lambda: True)
    x = torch.ones(2, 3, device="cuda").as_subclass(Other)
    assert all(type(replay((x,), ())[0]) is Other for _ in range(4))
    assert not replay._captured


@torch.no_grad()
def test_without_nodes_that_can_be_moved_operations_copy(monkeypatch):
    monkeypatch.setattr(replay_module, "movable", lambda *_: None)
    replay = GraphReplay(twice_and_sum, lambda: True)
    calls = []
    for _ in range(5):
        x, y = torch.randn(2, 3, 5, device="cuda").unbind()
        calls.append((x, y, *replay((x, y), ())))
    assert [one.moved for one in replay._captured.values()] == [None]
    for x, y, twice, total in calls:
        assert torch.equal(twice, x * 2)
        assert torch.equal(total, x + y)


@torch.no_grad()
def test_what_the_driver_refuses_to_move_is_launched_for_good(monkeypatch):
    replay = GraphReplay(lambda x: (x * 2,), lambda: True)
    for _ in range(3):
        replay((torch.ones(2, 3, device="cuda"),), ())
    monkeypatch.setattr(CopyEnd, "send_to", lambda *_: False)
    for value in range(3):
        x = torch.full((2, 3), float(value), device="cuda")
        assert torch.equal(replay((x,), ())[0], x * 2)
    assert replay._given_up


@torch.no_grad()
def test_prompts_of_many_lengths_leave_room_for_decode_steps():
    replay = GraphReplay(lambda x: (x * 2,), lambda: True, max_rows=32, max_graphs=8)
    for width in range(1, 100):  # each of them once
        replay((torch.ones(32, width, device="cuda"),), ())
    assert not replay._captured
    for rows in (32, 31, 30, 16, 17, 18, 1, 2, 3, 4):
        for _ in range(3):
            x = torch.randn(rows, 5, device="cuda")
            assert torch.equal(replay((x,), ())[0], x * 2)
    held = [one.inputs[0].shape[0] for one in replay._captured.values()]
    assert held == [32, 31, 16, 17, 18, 1, 2, 3]


@torch.no_grad()
def test_what_cannot_be_captured_is_launched_for_good():
    replay = GraphReplay(lambda x: (x * float(x.sum()),), lambda: False)
    x = torch.ones(2, 3, device="cuda")
    for _ in range(4):
        assert torch.equal(replay((x,), [])[0], x * 6)
    assert not any(replay._captured.values())


@torch.no_grad()
def test_a_failed_capture_leaves_nothing_behind():
    replay = GraphReplay(lambda x: (x * float(x.sum()),), lambda: True)
    x = torch.ones(2, 3, device="cuda")
    for _ in range(4):
        assert torch.equal(replay((x,), [])[0], x * 6)
    assert not any(replay._captured.values())
    assert torch.randn(4, device="cuda").isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = torch.randn(4, device="cuda")
    graph.replay()
    assert drawn.isfinite().all()


@torch.no_grad()
def test_a_failed_capture_does_not_spoil_the_next_one():
    """Both use the same memory pool."""
    failing = GraphReplay(lambda x: (x * float(x.sum()),), lambda: True)
    replay = GraphReplay(lambda x: (x * 2 + 1,), lambda: True)
    x = torch.ones(2, 3, device="cuda")
    for _ in range(3):
        failing((x,), [])
    for step in range(4):
        assert torch.equal(replay((x * step,), [])[0], x * step * 2 + 1)
    assert any(replay._captured.values())


@torch.no_grad()
def test_models_come_and_go():
    x = torch.ones(2, 3, device="cuda")
    for factor in range(3):
        replay = GraphReplay(lambda x, factor=factor: (x * factor,), lambda: True)
        for _ in range(4):
            assert torch.equal(replay((x,), [])[0], x * factor)
        assert any(replay._captured.values())
        del replay
        if factor == 1:
            torch.cuda.empty_cache()


@torch.no_grad()
def test_the_torch_experts_are_never_captured():
    model = tiny_models.build(tiny_models.by_name("mixtral")).to("cuda", torch.bfloat16)
    fusedmoe.accelerate(model, options=fusedmoe.MoEOptions(experts="torch"))
    block = next(m for m in model.modules() if isinstance(_replacement(m), BlockForward))
    x = torch.randn(1, 2, width(block), device="cuda", dtype=torch.bfloat16)
    results = [first(block(x)) for _ in range(4)]
    assert all(torch.equal(one, results[0]) for one in results)
    assert not captured(block)


def test_gradients_switch_it_off():
    replay = GraphReplay(lambda x: (x * 2,), lambda: True)
    x = torch.ones(2, 3, device="cuda", requires_grad=True)
    for _ in range(3):
        replay((x,), [])[0].sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 6.0))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
@torch.inference_mode()
def test_the_experts_function_replays_too(name):
    fusedmoe.register()
    model = tiny_models.build(tiny_models.by_name(name), experts_implementation="fusedmoe")
    model.to("cuda", torch.bfloat16)
    experts = next(m for m in model.modules() if hasattr(m, "down_proj") and hasattr(m, "has_gate"))
    eager = copy.deepcopy(experts)
    H, E = experts.down_proj.shape[-1 if experts.is_transposed else 1], experts.down_proj.shape[0]
    for step in range(4):
        x = torch.randn(3, H, device="cuda", dtype=torch.bfloat16)
        ids = torch.rand(3, E, device="cuda").topk(2).indices
        weights = torch.rand(3, 2, device="cuda")
        eager.__dict__.pop("_fusedmoe_replay", None)
        assert torch.equal(experts(x, ids, weights), eager(x, ids, weights)), step
    assert any(experts.__dict__["_fusedmoe_replay"]._captured.values())
