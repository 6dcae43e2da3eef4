"""Layers for the tests of the experts: sizes and features as data, tensors, the right answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.config import FusedMoEConfig, MoEOptions
from fusedmoe.kernels.experts_reference import experts_reference
from fusedmoe.modular_kernel import FusedMoEKernel
from fusedmoe.quantization.config import biased_moe_quant_config
from fusedmoe.testing.tolerances import relative_error


@dataclass(frozen=True)
class Layer:
    """One layer's sizes and features; tensors are drawn from ``seed``."""

    T: int = 7
    K: int = 2
    E: int = 4
    H: int = 40
    I: int = 24  # noqa: E741
    local: int | None = None
    activation: MoEActivation = MoEActivation.SILU
    numbers: ApplyMoEActivationConfig = field(default_factory=ApplyMoEActivationConfig)
    bias: bool = False
    weight_on_input: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    options: MoEOptions = field(default_factory=MoEOptions)
    seed: int = 0

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """hidden_states, w1, w2, topk_weights, topk_ids, w1_bias, w2_bias, expert_map."""
        gen = torch.Generator().manual_seed(self.seed)
        e, S = self.local or self.E, 2 if self.activation.is_gated else 1

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=gen) * scale).to(self.device, self.dtype)

        scores = torch.rand(self.T, self.E, generator=gen)
        weights, ids = scores.topk(self.K, dim=1)
        expert_map = None
        if self.local is not None:
            expert_map = torch.full((self.E,), -1, dtype=torch.int32)
            chosen = torch.randperm(self.E, generator=gen)[: self.local]
            expert_map[chosen] = torch.arange(self.local, dtype=torch.int32)
        return {
            "hidden_states": normal(self.T, self.H),
            "w1": normal(e, S * self.I, self.H, scale=self.H**-0.5),
            "w2": normal(e, self.H, self.I, scale=self.I**-0.5),
            "topk_weights": weights.to(self.device),
            "topk_ids": ids.to(self.device, torch.int32),
            "w1_bias": normal(e, S * self.I) if self.bias else None,
            "w2_bias": normal(e, self.H) if self.bias else None,
            "expert_map": None if expert_map is None else expert_map.to(self.device),
        }

    def config(self, **changes: object) -> FusedMoEConfig:
        return FusedMoEConfig(
            num_experts=self.E,
            num_local_experts=self.local or self.E,
            experts_per_token=self.K,
            hidden_dim=self.H,
            intermediate_size_per_partition=self.I,
            activation=self.activation,
            activation_config=self.numbers,
            in_dtype=self.dtype,
            device=torch.device(self.device),
            has_bias=self.bias,
            apply_router_weight_on_input=self.weight_on_input,
            options=self.options,
            **changes,
        )

    def expected(self, tensors: dict[str, torch.Tensor | None]) -> torch.Tensor:
        """The definition in fp64."""
        return experts_reference(
            **{
                n: t.double() if t is not None and t.is_floating_point() else t
                for n, t in tensors.items()
            },
            activation=self.activation,
            activation_config=self.numbers,
            apply_router_weight_on_input=self.weight_on_input,
            compute_dtype=torch.float64,
        )

    def run(self, experts_class: type, prepare_finalize: object, tensors: dict) -> torch.Tensor:
        """The experts between a prepare and a finalize, scratch memory poisoned."""
        batched = experts_class.activation_format().name == "BatchedExperts"
        experts = experts_class(
            self.config(),
            biased_moe_quant_config(tensors["w1_bias"], tensors["w2_bias"]),
            max_num_tokens=prepare_finalize.max_num_tokens_per_rank() if batched else None,
            num_dispatchers=prepare_finalize.num_dispatchers() if batched else None,
        )
        return FusedMoEKernel(prepare_finalize, experts).apply(
            tensors["hidden_states"],
            tensors["w1"],
            tensors["w2"],
            tensors["topk_weights"],
            tensors["topk_ids"],
            activation=self.activation,
            global_num_experts=self.E,
            expert_map=tensors["expert_map"],
            apply_router_weight_on_input=self.weight_on_input,
        )


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative Frobenius norm of what they differ by; NaN must be in the same places."""
    assert torch.equal(out.isnan(), expected.isnan())
    return relative_error(out.nan_to_num(), expected.nan_to_num()).frobenius


def assert_right(out: torch.Tensor, layer: Layer, tensors: dict) -> None:
    """As near to the definition as experts without rounded weights come."""
    tolerance = 5e-3 if layer.dtype == torch.float16 else 2e-5
    torch.testing.assert_close(
        out.double(), layer.expected(tensors), rtol=tolerance, atol=tolerance
    )


def use_triton_bodies(monkeypatch: Any) -> None:
    """On CPU tensors too, every launcher takes its Triton body (under the interpreter)."""
    from fusedmoe.kernels import align, grouped_gemm, mul_sum
    from fusedmoe.kernels.activation import device_activation
    from fusedmoe.kernels.triton import align as align_triton
    from fusedmoe.kernels.triton import grouped_gemm as gemm_triton
    from fusedmoe.kernels.triton import mul_sum as mul_sum_triton

    def gemm(a, b, c, blocks, tiles, *, top_k, bias, activation, activation_config):
        act = device_activation(activation, activation_config)
        gemm_triton.launch(a, b, c, blocks, tiles, top_k, bias, act)
        return c

    def total(inputs, weights, outputs, ids, expert_map, valid, *, num_local_experts):
        mul_sum_triton.mul_sum(inputs, weights, outputs, ids, expert_map, valid, num_local_experts)
        return outputs

    monkeypatch.setattr(align, "align_reference", align_triton.align)
    monkeypatch.setattr(grouped_gemm, "grouped_gemm_reference", gemm)
    monkeypatch.setattr(mul_sum, "moe_fused_mul_sum_reference", total)
