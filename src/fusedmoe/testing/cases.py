"""Layers as data: sizes, features and routing, and the tensors that go with them.

T tokens, K picks, E experts, e local experts, H hidden, I intermediate, S = 2 where the activation
is gated.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.config import FusedMoEConfig, MoEOptions
from fusedmoe.testing.routing import routing_logits


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer and what enters it; ``str`` of it is a readable test id.

    ``local``: how many of the E experts are here (None: all, without a map). ``dropped``: share of
    the slots that carry id -1. ``transposed``: weights are views of [e, H, S * I] and [e, I, H].
    ``strided``: the rows of the input lie apart, those of weights and ids too. ``ids_dtype``:
    integer dtype of the ids.
    """

    name: str = ""
    T: int = 7
    K: int = 2
    E: int = 4
    H: int = 64
    I: int = 48  # noqa: E741
    activation: MoEActivation = MoEActivation.SILU
    numbers: ApplyMoEActivationConfig = field(default_factory=ApplyMoEActivationConfig)
    bias: bool = False
    local: int | None = None
    weight_on_input: bool = False
    routing: str = "uniform"
    dropped: float = 0.0
    transposed: bool = False
    strided: bool = False
    ids_dtype: torch.dtype = torch.int32

    def __str__(self) -> str:
        if self.name:
            return self.name
        words = [f"{name}{getattr(self, name)}" for name in ("T", "K", "E", "H", "I")]
        for spec in fields(self)[6:]:
            value = getattr(self, spec.name)
            if spec.name == "activation" and value is not MoEActivation.SILU:
                words.append(value.value)
            elif spec.name in ("bias", "weight_on_input", "transposed", "strided") and value:
                words.append(spec.name)
            elif spec.name in ("local", "dropped") and value:
                words.append(f"{spec.name}{value}")
            elif spec.name == "routing" and value != "uniform":
                words.append(value)
        return "-".join(words)

    @property
    def w13_shards(self) -> int:
        return 2 if self.activation.is_gated else 1

    def moe_config(
        self, device: torch.device | str, dtype: torch.dtype, options: MoEOptions | None = None
    ) -> FusedMoEConfig:
        """What selection sees of this case."""
        return FusedMoEConfig(
            num_experts=self.E,
            num_local_experts=self.E if self.local is None else self.local,
            experts_per_token=self.K,
            hidden_dim=self.H,
            intermediate_size_per_partition=self.I,
            activation=self.activation,
            activation_config=self.numbers,
            in_dtype=dtype,
            device=torch.device(device),
            has_bias=self.bias,
            apply_router_weight_on_input=self.weight_on_input,
            options=options or MoEOptions(),
        )


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case.

    hidden_states [T, H], w1 [e, S * I, H], w2 [e, H, I] of the asked dtype; router_logits fp32
    [T, E]; topk_weights fp32 and topk_ids int [T, K]; biases [e, S * I], [e, H] and
    expert_map int32 [E], or None.
    """

    hidden_states: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    router_logits: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    w1_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None
    expert_map: torch.Tensor | None


def make_inputs(
    case: Case,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    """Draw the tensors of ``case`` on the host from ``seed``: the same on every device.

    Outputs come out of order one; the router's weights are a softmax over the K picks, a sigmoid
    where K is 1, since a weight of one would not show.
    """
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=gen, dtype=torch.float32, device="cpu")
        return (drawn * std).to(device, dtype)

    def weight(e: int, out: int, width: int) -> torch.Tensor:
        data = normal(e, out, width, std=2 * width**-0.5)
        return data.transpose(1, 2).contiguous().transpose(1, 2) if case.transposed else data

    e = case.E if case.local is None else case.local
    width = case.w13_shards * case.I
    logits = routing_logits(case.routing, case.T, case.E, case.K, seed)
    picked, ids = logits.topk(case.K)
    weights = picked.softmax(-1) if case.K > 1 else picked.sigmoid()
    dropped = torch.rand(ids.shape, generator=gen, dtype=torch.float32, device="cpu") < case.dropped
    ids, weights = ids.masked_fill(dropped, -1), weights.masked_fill(dropped, 0.0)
    rows = (
        normal(case.T, case.H),
        weights.to(device),
        ids.to(device, case.ids_dtype),
    )
    x, weights, ids = (_apart(tensor) if case.strided else tensor for tensor in rows)
    expert_map = None
    if case.local is not None:
        here = torch.randperm(case.E, generator=gen, device="cpu")[: case.local]
        on_host = torch.full((case.E,), -1, dtype=torch.int32, device="cpu")
        on_host[here] = torch.arange(case.local, dtype=torch.int32, device="cpu")
        expert_map = on_host.to(device)
    return Inputs(
        hidden_states=x,
        w1=weight(e, width, case.H),
        w2=weight(e, case.H, case.I),
        router_logits=logits.to(device),
        topk_weights=weights,
        topk_ids=ids,
        w1_bias=normal(e, width) if case.bias else None,
        w2_bias=normal(e, case.H) if case.bias else None,
        expert_map=expert_map,
    )


def _apart(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` [T, n] with other ones' numbers beside each."""
    return torch.cat((rows, rows.flip(0)), 1)[:, : rows.shape[1]]


_NUMBERS = {
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: ApplyMoEActivationConfig(
        clamp_limit=7.0, alpha=1.702, beta=1.0
    ),
    MoEActivation.SITU: ApplyMoEActivationConfig(situ_beta=2.0, situ_linear_beta=3.0),
}

ACTIVATION_CASES: tuple[Case, ...] = tuple(
    Case(
        name=f"activation-{activation.value}",
        activation=activation,
        numbers=_NUMBERS.get(activation, ApplyMoEActivationConfig()),
    )
    for activation in MoEActivation
    if activation is not MoEActivation.RELU2
)

STANDARD_CASES: tuple[Case, ...] = (
    Case(name="plain"),
    Case(name="one-token", T=1),
    Case(name="no-token", T=0),
    Case(name="odd-shapes", T=13, K=3, E=5, H=40, I=24),
    Case(name="many-tokens", T=131, K=2, E=3, H=64, I=80),
    Case(name="many-experts", T=33, K=8, E=64, H=32, I=16),
    Case(name="top-1", K=1),
    Case(name="all-experts", K=4, E=4),
    Case(name="one-expert-exists", K=1, E=1),
    Case(name="empty-experts", T=3, K=1, E=16),
    Case(name="all-to-one", T=37, K=1, E=8, routing="one_expert"),
    Case(name="power-law", T=64, K=2, E=16, routing="power_law_1.2"),
    Case(name="dropped-slots", T=19, K=4, E=8, dropped=0.4),
    Case(name="all-dropped", T=5, dropped=1.1),
    Case(name="expert-map", T=29, K=2, E=8, local=3),
    Case(name="expert-map-one-local", T=9, K=2, E=8, local=1),
    Case(name="expert-map-dropped", T=29, K=3, E=8, local=5, dropped=0.3),
    Case(name="bias", bias=True),
    Case(name="bias-map", T=29, E=8, local=3, bias=True),
    Case(name="non-gated", activation=MoEActivation.RELU2_NO_MUL),
    Case(name="non-gated-bias", activation=MoEActivation.SILU_NO_MUL, bias=True),
    Case(name="weight-on-input", K=1, weight_on_input=True),
    Case(name="clamped", numbers=ApplyMoEActivationConfig(clamp_limit=0.5)),
    Case(name="transposed-weights", T=40, transposed=True),
    Case(name="strided-input", strided=True),
    Case(name="int64-ids", ids_dtype=torch.int64),
)
"""What an implementation should run before anything else; ``ACTIVATION_CASES`` come on top."""
