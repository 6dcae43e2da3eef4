"""The activation between the two GEMMs as one launch, for where a GEMM does not do it itself.

Triton bodies, which the GEMMs share: ``kernels/triton/activation.py``. The definition is
``fusedmoe.activation.activation_reference``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from fusedmoe.activation import (
    ApplyMoEActivationConfig,
    MoEActivation,
    activation_reference,
    swigluoai_numbers,
)
from fusedmoe.kernels.ids import check_expert_map, local_ids


class DeviceActivation(NamedTuple):
    """An activation as a kernel takes it: a formula's name and three numbers.

    ``limit`` None: no clamp. ``alpha`` and ``beta`` are those of the swigluoai forms; for situ they
    are situ_beta and situ_linear_beta (0: up stays linear).
    """

    formula: str
    gated: bool
    interleaved: bool = False
    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0

    @property
    def numbers(self) -> tuple[float | None, float, float]:
        return self.limit, self.alpha, self.beta

    @property
    def shards(self) -> int:
        """Shards of the weights whose products it takes: gate and up, or one."""
        return 2 if self.gated else 1


NO_ACTIVATION = DeviceActivation(formula="", gated=False)


@lru_cache(maxsize=1024)
def device_activation(
    activation: MoEActivation | None, config: ApplyMoEActivationConfig | None = None
) -> DeviceActivation:
    """Resolve defaults; raises ValueError where the activation lacks a number it needs."""
    if activation is None:
        return NO_ACTIVATION
    act = _resolved(activation, config or ApplyMoEActivationConfig())
    # An integer would be another type to a compiled kernel.
    limit = None if act.limit is None else float(act.limit)
    return act._replace(limit=limit, alpha=float(act.alpha), beta=float(act.beta))


def _resolved(activation: MoEActivation, config: ApplyMoEActivationConfig) -> DeviceActivation:
    if activation is MoEActivation.RELU2:
        raise ValueError("relu2 has no gated form; use relu2_no_mul")
    if not activation.is_gated:
        return DeviceActivation(activation.value.removesuffix("_no_mul"), gated=False)
    if activation in (MoEActivation.SWIGLUOAI, MoEActivation.SWIGLUOAI_UNINTERLEAVE):
        interleaved = activation is MoEActivation.SWIGLUOAI
        return DeviceActivation(
            "swigluoai", True, interleaved, *swigluoai_numbers(activation, config)
        )
    if activation is MoEActivation.SWIGLUSTEP:
        limit = 7.0 if config.clamp_limit is None else config.clamp_limit
        return DeviceActivation("swiglustep", True, limit=limit)
    if activation is MoEActivation.SITU:
        if config.situ_beta is None:
            raise ValueError("situ needs situ_beta")
        linear = config.situ_linear_beta or 0.0
        return DeviceActivation("situ", True, alpha=config.situ_beta, beta=linear)
    return DeviceActivation(activation.value, True, limit=config.clamp_limit)


def moe_activation(
    activation: MoEActivation,
    output: torch.Tensor,
    input: torch.Tensor,
    config: ApplyMoEActivationConfig | None = None,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    valid_token_counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """input [..., S * I] -> output [..., I]; computed in fp32, rounded once.

    Rows that carry nothing are neither read nor written: slots without a local expert where
    ``topk_ids`` [T, K] is given (as many slots as rows), rows past ``valid_token_counts`` (int32,
    [1] for 2-D input, [E] for [E, T, S * I]). Raises ValueError where the masks do not fit.
    """
    check_masks(input, topk_ids, expert_map, valid_token_counts)
    if input.is_cuda and input.dtype != torch.float64:
        from fusedmoe.kernels.triton.activation import activate

        resolved = device_activation(activation, config)
        activate(resolved, output, input, topk_ids, expert_map, valid_token_counts)
        return output
    return moe_activation_reference(
        activation, output, input, config, topk_ids, expert_map, valid_token_counts
    )


def moe_activation_reference(
    activation: MoEActivation,
    output: torch.Tensor,
    input: torch.Tensor,
    config: ApplyMoEActivationConfig | None = None,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    valid_token_counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain torch."""
    result = activation_reference(activation, input, config).to(output.dtype)
    live = torch.ones(input.shape[:-1], dtype=torch.bool, device=input.device)
    if topk_ids is not None:
        no_limit = torch.iinfo(torch.int32).max
        live &= (local_ids(topk_ids, no_limit, expert_map) >= 0).view(live.shape)
    if valid_token_counts is not None:
        position = torch.arange(input.shape[-2], device=input.device)
        live &= (position < valid_token_counts[:, None]).view(live.shape)
    return output.copy_(torch.where(live[..., None], result, output))


def check_masks(
    input: torch.Tensor,
    topk_ids: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    valid_token_counts: torch.Tensor | None,
) -> None:
    """Raise ValueError, with the numbers, where a mask does not belong to ``input``'s rows."""
    rows = input.shape[:-1]
    if topk_ids is not None and topk_ids.numel() != rows.numel():
        raise ValueError(
            f"topk_ids {tuple(topk_ids.shape)} do not name the {rows.numel()} rows of input "
            f"{tuple(input.shape)}"
        )
    check_expert_map(expert_map, topk_ids)
    if valid_token_counts is not None:
        wanted = {2: (1,), 3: (input.shape[0],)}.get(input.dim())
        if valid_token_counts.shape != wanted:
            raise ValueError(
                f"valid_token_counts is {tuple(valid_token_counts.shape)}, but input "
                f"{tuple(input.shape)} asks for {wanted}"
            )
