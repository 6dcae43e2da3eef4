"""One layer by loops over tokens and picks in fp64: what the whole layer is compared with.

Shares nothing with the library but the activation formula (which has its own tests).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation, activation_reference


@dataclass
class Experts:
    """Checkpoint tensors of E experts: gate/up [I, H] (gate None without one), down [H, I]."""

    gate: list[torch.Tensor] | None
    up: list[torch.Tensor]
    down: list[torch.Tensor]
    gate_bias: list[torch.Tensor] | None = None
    up_bias: list[torch.Tensor] | None = None
    down_bias: list[torch.Tensor] | None = None

    @classmethod
    def random(
        cls,
        E: int,
        H: int,
        I: int,  # noqa: E741
        *,
        gated: bool = True,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Experts:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> list[torch.Tensor]:
            return [
                (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)
                for _ in range(E)
            ]

        return cls(
            gate=draw(I, H) if gated else None,
            up=draw(I, H),
            down=draw(H, I),
            gate_bias=draw(I) if bias and gated else None,
            up_bias=draw(I) if bias else None,
            down_bias=draw(H) if bias else None,
        )

    def named(self) -> list[tuple[str, torch.Tensor]]:
        """Under the usual per-expert names."""
        parts = {
            "gate_proj.weight": self.gate,
            "up_proj.weight": self.up,
            "down_proj.weight": self.down,
            "gate_proj.bias": self.gate_bias,
            "up_proj.bias": self.up_bias,
            "down_proj.bias": self.down_bias,
        }
        return [
            (f"experts.{e}.{name}", tensor)
            for name, tensors in parts.items()
            if tensors is not None
            for e, tensor in enumerate(tensors)
        ]

    def run(
        self,
        e: int,
        x: torch.Tensor,
        activation: MoEActivation = MoEActivation.SILU,
        config: ApplyMoEActivationConfig | None = None,
    ) -> torch.Tensor:
        """Expert ``e`` of one row x [H], fp64."""
        up = self.up[e].double() @ x
        if self.up_bias is not None:
            up = up + self.up_bias[e].double()
        if self.gate is None:
            hidden = up
        else:
            gate = self.gate[e].double() @ x
            if self.gate_bias is not None:
                gate = gate + self.gate_bias[e].double()
            pairs = torch.stack((gate, up), dim=1)
            interleaved = activation is MoEActivation.SWIGLUOAI
            hidden = pairs.flatten() if interleaved else pairs.T.flatten()
        out = self.down[e].double() @ activation_reference(activation, hidden, config)
        return out if self.down_bias is None else out + self.down_bias[e].double()


def scores_of(logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    logits = logits.double()
    if scoring_func == "softmax":
        return logits.softmax(-1)
    if scoring_func == "sigmoid":
        return logits.sigmoid()
    return torch.nn.functional.softplus(logits).sqrt()


@dataclass
class Rule:
    """Softmax (or another score), plus a bias for the choice, top-k, renormalize, scale."""

    top_k: int
    scoring_func: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    bias: torch.Tensor | None = None
    groups: int = 0
    topk_group: int = 0
    table: torch.Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def pick(self, logits: torch.Tensor, input_id: int | None) -> list[tuple[int, float]]:
        """(expert, weight) for one row of logits."""
        scores = scores_of(logits, self.scoring_func)
        choice = scores if self.bias is None else scores + self.bias.double()
        if self.groups:
            grouped = choice.view(self.groups, -1)
            best = (
                grouped.max(-1).values if self.bias is None else grouped.topk(2, -1).values.sum(-1)
            )
            kept = best.topk(self.topk_group).indices
            mask = torch.full_like(grouped, float("-inf"))
            mask[kept] = 0.0
            choice = (grouped + mask).flatten()
        if self.table is not None:
            assert input_id is not None
            ids = self.table[input_id].tolist()
        else:
            ids = choice.topk(self.top_k).indices.tolist()
        weights = scores[ids]
        if self.renormalize:
            weights = weights / weights.sum()
        return list(zip(ids, (weights * self.scale).tolist(), strict=True))


def routed_oracle(
    x: torch.Tensor,
    logits: torch.Tensor,
    experts: Experts,
    rule: Rule,
    *,
    activation: MoEActivation = MoEActivation.SILU,
    activation_config: ApplyMoEActivationConfig | None = None,
    weight_on_input: bool = False,
    input_ids: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, H] in fp64: sum over picks of weight * expert(x); picks past the experts are zero
    experts and give weight * x."""
    out = torch.zeros(x.shape[0], experts.down[0].shape[0], dtype=torch.float64)
    for t, row in enumerate(x.double()):
        if is_padding is not None and bool(is_padding[t]):
            continue
        token = None if input_ids is None else int(input_ids[t])
        for expert, weight in rule.pick(logits[t], token):
            if expert >= len(experts.up):
                out[t] += weight * row
            elif weight_on_input:
                out[t] += experts.run(expert, row * weight, activation, activation_config)
            else:
                out[t] += weight * experts.run(expert, row, activation, activation_config)
    return out
