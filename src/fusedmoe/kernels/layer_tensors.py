"""What a layer behind its routing reads and writes: one record for all that runs it on Hopper."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation
from fusedmoe.kernels.activation import DeviceActivation, device_activation
from fusedmoe.quantization.tensor import QuantizedTensor

Weight = TypeVar("Weight", torch.Tensor, QuantizedTensor)


class LayerTensors(NamedTuple, Generic[Weight]):
    """out[t] = sum over k of topk_weights[t, k] * expert_k(x[t]), weights None: all one.

    x [T, H], w1 [e, S * I, H], w2 [e, H, I], topk_weights fp32 [T, K], topk_ids int [T, K]
    contiguous, out [T, H]; biases [e, S * I] and [e, H]; ``expert_map`` int32 [all experts]: the
    local expert of each id or -1, None where ids are local. Scratch: ``act``, rows of I, and ``y``,
    rows of H, how many and of which dtype is the launcher's to say. ``programs``: how many run at
    once, the number of multiprocessors.
    """

    x: torch.Tensor
    w1: Weight
    w2: Weight
    topk_weights: torch.Tensor | None
    topk_ids: torch.Tensor
    out: torch.Tensor
    act: torch.Tensor
    y: torch.Tensor
    programs: int
    activation: MoEActivation = MoEActivation.SILU
    activation_config: ApplyMoEActivationConfig | None = None
    w1_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    expert_map: torch.Tensor | None = None

    @property
    def epilogue(self) -> DeviceActivation:
        """The activation as kernels are told."""
        return device_activation(self.activation, self.activation_config)

    @property
    def num_experts(self) -> int:
        """Experts of all ranks."""
        return self.w2.shape[0] if self.expert_map is None else self.expert_map.shape[0]
