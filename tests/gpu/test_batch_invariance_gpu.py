"""With batch invariance a token's bits do not depend on its neighbours: gate, router, experts."""

import pytest
import torch

from fusedmoe import FusedMoE, GateLinear, MoEOptions
from gpu_marks import needs_hopper

pytestmark = pytest.mark.gpu

SHAPES = {"fine": (64, 8, 2048, 768), "coarse": (8, 2, 1024, 3584), "odd": (60, 4, 1040, 176)}


def make_layer(shape, dtype, experts):
    E, K, H, I = SHAPES[shape]  # noqa: E741
    torch.manual_seed(0)
    with torch.device("cuda"):
        gate = GateLinear(H, E, out_dtype=torch.float32, params_dtype=dtype)
        layer = FusedMoE(
            E,
            K,
            H,
            I,
            params_dtype=dtype,
            gate=gate,
            options=MoEOptions(batch_invariant=True, experts=experts),
        )
    with torch.no_grad():
        for name in ("w13_weight", "w2_weight"):
            weight = getattr(layer.routed_experts, name)
            weight.normal_(std=weight.shape[-1] ** -0.5)
    layer.routed_experts.process_weights_after_loading()
    return layer


@pytest.mark.parametrize("experts", [None, "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_alone_and_in_every_batch(shape, dtype, experts):
    layer = make_layer(shape, dtype, experts)
    x = torch.randn(4096, SHAPES[shape][2], device="cuda").to(dtype)
    with torch.inference_mode():
        whole = layer(x)
        for tokens in (1, 2, 7, 64, 333):
            for first in (0, 1000, 4096 - tokens):
                part = layer(x[first : first + tokens])
                assert torch.equal(part, whole[first : first + tokens]), (tokens, first)
        others = torch.randn_like(x)
        others[17] = x[17]
        assert torch.equal(layer(others)[17], whole[17])


@needs_hopper
def test_the_default_may_differ_so_that_this_says_something():
    """Hopper's kernel for one token rounds less often than the one for many."""
    layer = make_layer("fine", torch.bfloat16, None)
    free = FusedMoE(64, 8, 2048, 768, params_dtype=torch.bfloat16, device="cuda")
    for name in ("w13_weight", "w2_weight"):
        getattr(free.routed_experts, name).data.copy_(getattr(layer.routed_experts, name))
    free.routed_experts.process_weights_after_loading()
    x = torch.randn(64, 2048, device="cuda").bfloat16()
    logits = torch.randn(64, 64, device="cuda")
    with torch.inference_mode():
        alone = torch.cat([free(x[i : i + 1], logits[i : i + 1]) for i in range(8)])
        assert not torch.equal(alone, free(x, logits)[:8])
