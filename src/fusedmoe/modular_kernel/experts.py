"""The contract of the experts: two grouped GEMMs with an activation between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation, apply_moe_activation
from fusedmoe.config import FusedMoEConfig
from fusedmoe.modular_kernel.capabilities import ExpertsCapabilities
from fusedmoe.modular_kernel.records import (
    ExpertsWork,
    ExpertTokensMetadata,
    FusedMoEActivationFormat,
    ProblemSize,
    WorkspaceShapes,
)
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.keys import QuantKey
from fusedmoe.topk_weight_and_reduce import (
    TopKWeightAndReduce,
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNoOP,
)


def merged_activation_config(
    base: ApplyMoEActivationConfig, quant: FusedMoEQuantConfig
) -> ApplyMoEActivationConfig:
    """The numbers of ``base`` where ``quant`` does not bring its own."""
    limit, alpha, beta = quant.gemm1_clamp_limit, quant.gemm1_alpha, quant.gemm1_beta
    return ApplyMoEActivationConfig(
        clamp_limit=base.clamp_limit if limit is None else limit,
        alpha=base.alpha if alpha is None else alpha,
        beta=base.beta if beta is None else beta,
        situ_beta=base.situ_beta,
        situ_linear_beta=base.situ_linear_beta,
    )


class FusedMoEExperts(ABC):
    """The two grouped GEMMs of one layer on one device.

    ``max_num_tokens`` and ``num_dispatchers`` are given exactly in the batched format. ``derived``
    names attributes that are made of the weights: a copy begins again with the class's values.
    ``takes_late_rows``: ``apply`` knows rows that are still on their way (``LateRows``).
    """

    name: ClassVar[str] = ""
    derived: ClassVar[tuple[str, ...]] = ()
    takes_late_rows: ClassVar[bool] = False

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig,
        max_num_tokens: int | None = None,
        num_dispatchers: int | None = None,
    ) -> None:
        batched = self.activation_format() is FusedMoEActivationFormat.BatchedExperts
        if batched != (max_num_tokens is not None and num_dispatchers is not None):
            raise ValueError(
                f"{type(self).__name__} has format {self.activation_format().name}: max_num_tokens "
                f"({max_num_tokens}) and num_dispatchers ({num_dispatchers}) belong to the batched "
                "format alone, and both to it"
            )
        self.is_batched = batched
        self.moe_config = moe_config
        self.quant_config = quant_config
        self.max_num_tokens = max_num_tokens
        self.num_dispatchers = num_dispatchers

    @classmethod
    @abstractmethod
    def capabilities(cls) -> ExpertsCapabilities:
        """What these experts can run; selection compares it with what a layer needs."""

    @classmethod
    def activation_format(cls) -> FusedMoEActivationFormat:
        return cls.capabilities().activation_format

    @classmethod
    def is_supported_config(
        cls,
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        """Whether this implementation runs that layer, and if not, why."""
        reason = cls.capabilities().unmet_by(
            moe_config, weight_key, activation_key, activation_format
        ) or cls.unmet_requirement(moe_config, weight_key, activation_key)
        return reason is None, reason

    @classmethod
    def unmet_requirement(
        cls, moe: FusedMoEConfig, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> str | None:
        """What a layer that the capabilities allow still lacks, in words; None: nothing."""
        return None

    @property
    def expects_unquantized_inputs(self) -> bool:
        """True defers the quantization of the input from prepare to the experts."""
        return False

    @property
    def activation_config(self) -> ApplyMoEActivationConfig:
        """The activation's numbers; those of the quantization win over the layer's."""
        return merged_activation_config(self.moe_config.activation_config, self.quant_config)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self.derived}

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:  # noqa: B027
        """Prepack once, explicitly; the parameters of ``layer`` keep their meaning."""


class FusedMoEExpertsModular(FusedMoEExperts):
    """Experts that receive ids and weights.

    An implementation defines ``run`` and ``shapes``; or, with the same arguments one by one,
    ``apply`` and ``workspace_shapes``, which are what is called.
    """

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> WorkspaceShapes:
        """``shapes`` for M rows of K = H elements and w1 of N = S * I rows."""
        size = ProblemSize(local_num_experts, M, N, K, topk)
        return self.shapes(size, global_num_experts, activation)

    def shapes(
        self, size: ProblemSize, num_experts: int, activation: MoEActivation
    ) -> WorkspaceShapes:
        """Scratch for ``size``; a pure function, so that it may be asked before tensors exist.

        ``num_experts``: those of all ranks.
        """
        raise NotImplementedError(f"{type(self).__name__} says nothing of its workspaces")

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduce:
        """What is left to do to the output that ``apply`` wrote.

        Nothing to standard rows: they are weighted and summed; all of it to batched ones, by
        whatever moved them. An implementation that leaves something else says so here.
        """
        return TopKWeightAndReduceDelegate() if self.is_batched else TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor | None,
        workspace2: torch.Tensor | None,
        expert_tokens_meta: ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write ``output`` (shape from ``workspace_shapes``); the arguments are ``ExpertsWork``'s.

        Biases come in ``quant_config``. With ``apply_router_weight_on_input`` the input is weighted
        already and weights are not used.
        """
        rows = output, hidden_states, w1, w2, topk_weights, topk_ids, activation
        beside = global_num_experts, expert_map, a1q_scale, a2_scale, workspace13, workspace2
        self.run(ExpertsWork(*rows, *beside, expert_tokens_meta, apply_router_weight_on_input))

    def run(self, work: ExpertsWork) -> None:
        """Write ``work.output``, as ``apply``."""
        raise NotImplementedError(f"{type(self).__name__} defines neither run nor apply")

    def workspace_dtype(self, act_dtype: torch.dtype) -> torch.dtype:
        """The dtype of workspaces and output, where rows enter and leave in ``act_dtype``."""
        return act_dtype

    def moe_problem_size(
        self, a1: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor
    ) -> ProblemSize:
        """Sizes read off the tensors; implementations with packed weights override this."""
        rows = a1.shape[0] if a1.dim() == 2 else a1.shape[1]
        return ProblemSize(w1.shape[0], rows, w1.shape[1], a1.shape[-1], topk_ids.shape[1])

    @staticmethod
    def adjust_N_for_activation(N: int, activation: MoEActivation) -> int:
        """The width after the activation: N // 2 where gated, N where not."""
        return N // 2 if activation.is_gated else N

    def activation(
        self, activation: MoEActivation, output: torch.Tensor, input: torch.Tensor, **masks: Any
    ) -> None:
        """``apply_moe_activation`` with this layer's numbers."""
        apply_moe_activation(
            activation, output, input, activation_config=self.activation_config, **masks
        )


class FusedMoEExpertsMonolithic(FusedMoEExperts):
    """Experts that receive router logits and route by themselves."""

    @abstractmethod
    def apply(
        self,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        router_logits: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        *,
        router: Any,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, H] from logits [T, E]; ``router`` is the layer's ``FusedMoERouter``."""
