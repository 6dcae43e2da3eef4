"""The activations between the two GEMMs: their names, their formulas, and one function to apply.

Gated activations read ``[..., 2 * I]`` and write ``[..., I]``; names that end in ``_no_mul`` keep
the width. Everything is computed in fp32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum

import torch
import torch.nn.functional as F


class MoEActivation(Enum):
    """The activation of an expert. The gate is the first half unless the name says otherwise."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU2 = "relu2"
    SWIGLUOAI = "swigluoai"  # gate and up interleaved: gate = x[0::2], up = x[1::2]
    SWIGLUOAI_UNINTERLEAVE = "swigluoai_uninterleave"
    SWIGLUSTEP = "swiglustep"
    SITU = "situ"
    SILU_NO_MUL = "silu_no_mul"
    GELU_NO_MUL = "gelu_no_mul"
    GELU_TANH_NO_MUL = "gelu_tanh_no_mul"
    RELU2_NO_MUL = "relu2_no_mul"

    @property
    def is_gated(self) -> bool:
        """Whether it reads gate and up, [..., 2 * I], and writes [..., I]."""
        return not self.value.endswith("_no_mul")

    @property
    def custom_op_name(self) -> str:
        """The activation's name among element-wise ops: ``<act>_and_mul`` or the bare act."""
        return f"{self.value}_and_mul" if self.is_gated else self.value.removesuffix("_no_mul")

    @classmethod
    def from_str(cls, s: str | MoEActivation) -> MoEActivation:
        """Parse a name; Hugging Face's spellings of the same functions are understood.

        A member is itself. ValueError for a name that is not known.
        """
        aliases: dict[object, str] = {
            "swish": "silu",
            "gelu_pytorch_tanh": "gelu_tanh",
            "gelu_new": "gelu_tanh",
            "gelu_pytorch_tanh_no_mul": "gelu_tanh_no_mul",
        }
        try:
            return cls(aliases.get(s, s))
        except ValueError:
            known = ", ".join(member.value for member in cls)
            raise ValueError(f"unknown MoE activation {s!r}; known: {known}") from None

    def without_mul(self) -> MoEActivation:
        """The variant without a gate, or this one where there is none."""
        try:
            return MoEActivation(f"{self.value}_no_mul")
        except ValueError:
            return self


@dataclass(frozen=True, kw_only=True)
class ApplyMoEActivationConfig:
    """Numbers an activation may need; ``None`` takes the activation's own default or refuses.

    ``clamp_limit`` bounds gate (above; for swiglustep silu(gate)) and up (both sides). ``alpha``
    and ``beta`` belong to the swigluoai forms: (up + beta) * gate * sigmoid(alpha * gate).
    ``situ_beta`` b and ``situ_linear_beta`` l belong to situ: b * tanh(gate / b) * sigmoid(gate) *
    up, where l, if given, makes up l * tanh(up / l).
    """

    clamp_limit: float | None = None
    alpha: float | None = None
    beta: float | None = None
    situ_beta: float | None = None
    situ_linear_beta: float | None = None

    def __post_init__(self) -> None:
        """ValueError for a number with which no output means anything."""
        if self.clamp_limit is not None and not self.clamp_limit > 0:
            raise ValueError(f"a clamp limit must be positive, got {self.clamp_limit}")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is not None and not -math.inf < value < math.inf:  # as compilers can trace
                raise ValueError(f"{field.name} must be a finite number, got {value}")
        if self.situ_beta == 0:
            raise ValueError("situ_beta is divided by, got 0")

    @classmethod
    def of_layer(
        cls,
        activation: MoEActivation,
        *,
        swiglu_limit: float | None = None,
        swiglu_alpha: float | None = None,
        swiglu_beta: float | None = None,
        activation_situ_beta: float | None = None,
        activation_situ_linear_beta: float | None = None,
    ) -> ApplyMoEActivationConfig:
        """The numbers among a layer's arguments; ValueError for one that ``activation`` lacks."""
        is_swigluoai = activation in (MoEActivation.SWIGLUOAI, MoEActivation.SWIGLUOAI_UNINTERLEAVE)
        is_situ = activation is MoEActivation.SITU
        for name, value, has in (
            ("swiglu_limit", swiglu_limit, activation.is_gated and not is_situ),
            ("swiglu_alpha", swiglu_alpha, is_swigluoai),
            ("swiglu_beta", swiglu_beta, is_swigluoai),
            ("activation_situ_beta", activation_situ_beta, is_situ),
            ("activation_situ_linear_beta", activation_situ_linear_beta, is_situ),
        ):
            if value is not None and not has:
                raise ValueError(f"the activation {activation.value} has no {name} (got {value})")
        return cls(
            clamp_limit=swiglu_limit,
            alpha=swiglu_alpha,
            beta=swiglu_beta,
            situ_beta=activation_situ_beta,
            situ_linear_beta=activation_situ_linear_beta,
        )

    def numbers(self) -> list[float]:
        """The fields in order, as a custom op takes them, with NaN for None."""
        given = (self.clamp_limit, self.alpha, self.beta, self.situ_beta, self.situ_linear_beta)
        return [math.nan if number is None else number for number in given]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> ApplyMoEActivationConfig:
        """The inverse of ``numbers``."""
        given = (None if math.isnan(number) else number for number in numbers)
        return cls(**{field.name: n for field, n in zip(fields(cls), given, strict=True)})


def activation_without_mul(activation: str) -> str:
    """The name of the non-gated variant of ``activation`` (``"silu"`` -> ``"silu_no_mul"``)."""
    return MoEActivation.from_str(activation).without_mul().value


def activation_reference(
    activation: MoEActivation, x: torch.Tensor, config: ApplyMoEActivationConfig | None = None
) -> torch.Tensor:
    """The definition. x [..., S * I] (S = 2 where gated) -> [..., I] in fp32 (fp64 stays fp64)."""
    config = config or ApplyMoEActivationConfig()
    x = x if x.dtype == torch.float64 else x.float()
    if not activation.is_gated:
        return _plain(activation.value.removesuffix("_no_mul"), x)
    if activation is MoEActivation.RELU2:
        raise ValueError("relu2 has no gated form; use relu2_no_mul")
    gate, up = (
        (x[..., 0::2], x[..., 1::2]) if activation is MoEActivation.SWIGLUOAI else x.chunk(2, -1)
    )
    limit = config.clamp_limit
    if activation in (MoEActivation.SWIGLUOAI, MoEActivation.SWIGLUOAI_UNINTERLEAVE):
        limit, alpha, beta = swigluoai_numbers(activation, config)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + beta) * gate * torch.sigmoid(alpha * gate)
    if activation is MoEActivation.SWIGLUSTEP:
        limit = 7.0 if limit is None else limit
        return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
    if activation is MoEActivation.SITU:
        if config.situ_beta is None:
            raise ValueError("situ needs situ_beta")
        if config.situ_linear_beta:
            up = config.situ_linear_beta * torch.tanh(up / config.situ_linear_beta)
        return config.situ_beta * torch.tanh(gate / config.situ_beta) * torch.sigmoid(gate) * up
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return _plain(activation.value, gate) * up


def _plain(name: str, x: torch.Tensor) -> torch.Tensor:
    if name == "silu":
        return F.silu(x)
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return F.relu(x).square()


def swigluoai_numbers(
    activation: MoEActivation, config: ApplyMoEActivationConfig
) -> tuple[float, float, float]:
    """(limit, alpha, beta): fixed for gpt-oss's interleaved form unless given, else required."""
    interleaved = activation is MoEActivation.SWIGLUOAI
    if config.clamp_limit is None and not interleaved:
        raise ValueError("swigluoai_uninterleave needs clamp_limit")
    limit = 7.0 if config.clamp_limit is None else config.clamp_limit
    alpha = (1.702 if interleaved else 1.0) if config.alpha is None else config.alpha
    beta = (1.0 if interleaved else 0.0) if config.beta is None else config.beta
    return limit, alpha, beta


def apply_moe_activation(
    activation: MoEActivation,
    output: torch.Tensor,
    input: torch.Tensor,
    *,
    activation_config: ApplyMoEActivationConfig | None = None,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    valid_token_counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply ``activation`` to ``input`` [..., S * I], writing ``output`` [..., I] in place.

    Rows that carry nothing are neither read nor written: with ``topk_ids`` [T, K], slots whose id
    is -1 or maps to -1 in ``expert_map``; with ``valid_token_counts`` (int32, [1] for 2-D input,
    [E] for [E, T, S * I]), rows past the count.
    """
    if input.dim() < 1:
        raise ValueError("input must be [..., S * I], got a scalar")
    width = input.shape[-1] // 2 if activation.is_gated else input.shape[-1]
    if output.shape != (*input.shape[:-1], width) or (activation.is_gated and input.shape[-1] % 2):
        raise ValueError(
            f"{activation.value} of input {tuple(input.shape)} writes "
            f"{(*input.shape[:-1], width)}, but output is {tuple(output.shape)}"
        )
    from fusedmoe.kernels.activation import moe_activation

    return moe_activation(
        activation, output, input, activation_config, topk_ids, expert_map, valid_token_counts
    )
