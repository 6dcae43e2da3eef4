"""The contract between prepare, experts and finalize, and the kernel that composes one of each.

    hidden_states -> prepare (quantize, dispatch) -> experts (GEMM1, activation, GEMM2) -> finalize

A prepare/finalize knows how tokens move between ranks, an experts implementation how two grouped
GEMMs run on one device; neither knows the other, only the records below.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, NamedTuple

import torch

from fusedmoe.activation import ApplyMoEActivationConfig, MoEActivation, apply_moe_activation
from fusedmoe.config import FusedMoEConfig, ParallelGroups
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.keys import QuantKey
from fusedmoe.topk_weight_and_reduce import TopKWeightAndReduce, TopKWeightAndReduceNoOP


class FusedMoEActivationFormat(Enum):
    """How the rows entering the experts are laid out."""

    Standard = ("standard",)  # [T, H], with topk_ids [T, K] beside it
    BatchedExperts = ("batched_experts",)  # [e, max_tokens, H], with a row count per expert


@dataclass(frozen=True)
class ExpertTokensMetadata:
    """How many rows each local expert has: int32 [e], on the device and (if known) on the host."""

    expert_num_tokens: torch.Tensor | None
    expert_num_tokens_cpu: torch.Tensor | None = None

    @classmethod
    def make_from_list(cls, counts: Sequence[int], device: torch.device) -> ExpertTokensMetadata:
        host = torch.tensor(list(counts), dtype=torch.int32)
        return cls(host.to(device), host)


class PrepareResult(NamedTuple):
    """What the experts receive. ``topk_ids``/``topk_weights`` None: those of the caller."""

    hidden_states: torch.Tensor
    scale: torch.Tensor | None = None
    expert_tokens_meta: ExpertTokensMetadata | None = None
    topk_ids: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None


class MonolithicPrepareResult(NamedTuple):
    """As ``PrepareResult``, for experts that route by themselves."""

    hidden_states: torch.Tensor
    scale: torch.Tensor | None
    router_logits: torch.Tensor


class WorkspaceShapes(NamedTuple):
    """Shapes of the two scratch tensors and of the experts' output; (0,) where none is needed."""

    workspace13: tuple[int, ...]
    workspace2: tuple[int, ...]
    output: tuple[int, ...]


class ProblemSize(NamedTuple):
    """E local experts, M rows (tokens, or tokens per expert when batched), N = S * I, K = H."""

    E: int
    M: int
    N: int
    K: int
    topk: int


Receiver = Callable[[], Any]
Hook = Callable[[], None]


class FusedMoEPrepareAndFinalize(ABC):
    """What both kinds of prepare/finalize say about themselves.

    ``row_format`` is the format of the rows it delivers, ``name`` what options and ``explain``
    call it.
    """

    name: ClassVar[str] = ""
    row_format: ClassVar[FusedMoEActivationFormat] = FusedMoEActivationFormat.Standard

    @classmethod
    def unmet_requirement(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> str | None:
        """Why it cannot move the tokens of such a layer over ``groups``; None where it can."""
        return None

    @classmethod
    def make(cls, moe: FusedMoEConfig, groups: ParallelGroups | None) -> FusedMoEPrepareAndFinalize:
        """Build it for one layer."""
        return cls()

    @property
    def activation_format(self) -> FusedMoEActivationFormat:
        return self.row_format

    @abstractmethod
    def topk_indices_dtype(self) -> torch.dtype | None:
        """The integer dtype ids must arrive in, or None for any."""

    @abstractmethod
    def max_num_tokens_per_rank(self) -> int | None:
        """Rows per expert and rank that a batched format holds; None in Standard format."""

    @abstractmethod
    def num_dispatchers(self) -> int:
        """How many ranks send tokens to this one."""

    @abstractmethod
    def output_is_reduced(self) -> bool:
        """Whether finalize's output needs no further sum over ranks."""

    def supports_async(self) -> bool:
        """Whether the ``*_async`` forms return before the wire is done."""
        return False


class FusedMoEPrepareAndFinalizeModular(FusedMoEPrepareAndFinalize):
    """Moves tokens whose experts are already chosen."""

    @abstractmethod
    def prepare(
        self,
        a1: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> PrepareResult:
        """Weight the input if asked (K must be 1), quantize unless deferred, dispatch.

        a1 [T, H], topk_weights fp32 [T, K], topk_ids int [T, K] (-1: nothing),
        expert_map int32 [num_experts] global -> local id or -1. ``a1`` itself is not written.
        """

    @abstractmethod
    def finalize(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: TopKWeightAndReduce,
    ) -> None:
        """Weight, sum over K and combine into ``output`` [T, H], in place."""

    def prepare_async(
        self,
        a1: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> Receiver | tuple[Hook, Receiver]:
        """Start ``prepare``; the receiver (after the hook, if there is one) returns its result."""
        result = self.prepare(
            a1,
            topk_weights,
            topk_ids,
            num_experts,
            expert_map,
            apply_router_weight_on_input,
            quant_config,
            defer_input_quant,
        )
        return lambda: result

    def finalize_async(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: TopKWeightAndReduce,
    ) -> Receiver | tuple[Hook, Receiver]:
        """Start ``finalize``; ``output`` is valid once the receiver has returned."""
        self.finalize(
            output,
            fused_expert_output,
            topk_weights,
            topk_ids,
            apply_router_weight_on_input,
            weight_and_reduce_impl,
        )
        return lambda: None


class FusedMoEPrepareAndFinalizeMonolithic(FusedMoEPrepareAndFinalize):
    """Moves tokens together with their router logits; the experts route."""

    @abstractmethod
    def prepare(
        self,
        a1: torch.Tensor,
        router_logits: torch.Tensor,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> MonolithicPrepareResult: ...

    @abstractmethod
    def finalize(self, fused_expert_output: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class ExpertsCapabilities:
    """What an experts implementation can do, as data that selection reads and explains.

    ``weight_formats`` lists (weight, activation) pairs of ``QuantKey``; (None, None) is
    unquantized. ``requires`` names modules that must be importable. ``min_capability`` is a CUDA
    compute capability such as (9, 0).
    """

    activation_format: FusedMoEActivationFormat = FusedMoEActivationFormat.Standard
    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    dtypes: frozenset[torch.dtype] = frozenset({torch.float32, torch.float16, torch.bfloat16})
    activations: frozenset[MoEActivation] = frozenset(MoEActivation) - {MoEActivation.RELU2}
    weight_formats: frozenset[tuple[QuantKey | None, QuantKey | None]] = frozenset({(None, None)})
    min_capability: tuple[int, int] | None = None
    requires: tuple[str, ...] = ()
    bias: bool = True
    expert_map: bool = True
    apply_router_weight_on_input: bool = True
    batch_invariant: bool = True
    hash_routing: bool = True


class FusedMoEExperts(ABC):
    """The two grouped GEMMs of one layer on one device.

    ``max_num_tokens`` and ``num_dispatchers`` are given exactly in the batched format.
    """

    name: ClassVar[str] = ""

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
        self.moe_config = moe_config
        self.quant_config = quant_config
        self.max_num_tokens = max_num_tokens
        self.num_dispatchers = num_dispatchers

    @classmethod
    @abstractmethod
    def capabilities(cls) -> ExpertsCapabilities: ...

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
        from fusedmoe.selection import unmet_requirement

        reason = unmet_requirement(
            cls.capabilities(), moe_config, weight_key, activation_key, activation_format
        )
        return reason is None, reason

    @property
    def expects_unquantized_inputs(self) -> bool:
        """True defers the quantization of the input from prepare to the experts."""
        return False

    @property
    def activation_config(self) -> ApplyMoEActivationConfig:
        """The activation's numbers; those of the quantization win over the layer's."""
        base, quant = self.moe_config.activation_config, self.quant_config
        return ApplyMoEActivationConfig(
            clamp_limit=base.clamp_limit
            if quant.gemm1_clamp_limit is None
            else quant.gemm1_clamp_limit,
            alpha=base.alpha if quant.gemm1_alpha is None else quant.gemm1_alpha,
            beta=base.beta if quant.gemm1_beta is None else quant.gemm1_beta,
            situ_beta=base.situ_beta,
            situ_linear_beta=base.situ_linear_beta,
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:  # noqa: B027
        """Prepack once, explicitly; the parameters of ``layer`` keep their meaning."""


class FusedMoEExpertsModular(FusedMoEExperts):
    """Experts that receive ids and weights."""

    @abstractmethod
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
        """Scratch for M rows; a pure function, so that it may be asked before tensors exist."""

    @abstractmethod
    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduce:
        """What is left to do to the output that ``apply`` wrote."""

    @abstractmethod
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
        """Write ``output`` (shape from ``workspace_shapes``).

        w1 [e, S * I, H], w2 [e, H, I]; biases come in ``quant_config``. With
        ``apply_router_weight_on_input`` the input is weighted already and weights are not used.
        """

    def workspace_dtype(self, act_dtype: torch.dtype) -> torch.dtype:
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


def _call(pending: Receiver | tuple[Hook, Receiver]) -> Any:
    """Finish an async form: its hook, if it has one, then its receiver."""
    if isinstance(pending, tuple):
        hook, receiver = pending
        hook()
        return receiver()
    return pending()


class FusedMoEKernel:
    """One prepare/finalize and one experts implementation, composed.

    Raises ValueError where their activation formats differ.
    """

    def __init__(
        self,
        prepare_finalize: FusedMoEPrepareAndFinalizeModular,
        experts: FusedMoEExpertsModular,
    ) -> None:
        if prepare_finalize.activation_format is not experts.activation_format():
            raise ValueError(
                f"{type(prepare_finalize).__name__} gives {prepare_finalize.activation_format.name}"
                f" rows, {type(experts).__name__} takes {experts.activation_format().name} rows"
            )
        self.prepare_finalize = prepare_finalize
        self.experts = experts

    @property
    def output_is_reduced(self) -> bool:
        return self.prepare_finalize.output_is_reduced()

    def apply(
        self,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        while_combining: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """The routed output [T, H]. ``while_combining`` runs while the combine is in flight."""
        output = torch.empty_like(hidden_states)
        prepared: PrepareResult = _call(
            self.prepare_finalize.prepare_async(
                hidden_states,
                topk_weights,
                topk_ids,
                global_num_experts,
                expert_map,
                apply_router_weight_on_input,
                self.experts.quant_config,
                self.experts.expects_unquantized_inputs,
            )
        )
        ids = topk_ids if prepared.topk_ids is None else prepared.topk_ids
        weights = topk_weights if prepared.topk_weights is None else prepared.topk_weights
        routed = self._run_experts(
            prepared,
            w1,
            w2,
            weights,
            ids,
            activation,
            global_num_experts,
            expert_map,
            apply_router_weight_on_input,
            output,
        )
        pending = self.prepare_finalize.finalize_async(
            output,
            routed,
            weights,
            ids,
            apply_router_weight_on_input,
            self.experts.finalize_weight_and_reduce_impl(),
        )
        if while_combining is not None:
            while_combining()
        _call(pending)
        return output

    def _run_experts(
        self,
        prepared: PrepareResult,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        final_output: torch.Tensor,
    ) -> torch.Tensor:
        experts, x = self.experts, prepared.hidden_states
        size = experts.moe_problem_size(x, w1, w2, topk_ids)
        dtype = experts.workspace_dtype(final_output.dtype)

        def shapes(rows: int) -> WorkspaceShapes:
            return experts.workspace_shapes(
                rows,
                size.N,
                size.K,
                size.topk,
                global_num_experts,
                size.E,
                prepared.expert_tokens_meta,
                activation,
            )

        whole = shapes(size.M)
        reduced = isinstance(experts.finalize_weight_and_reduce_impl(), TopKWeightAndReduceNoOP)
        in_place = reduced and whole.output == final_output.shape and dtype == final_output.dtype
        output = final_output if in_place else x.new_empty(whole.output, dtype=dtype)
        if size.M == 0:
            return output
        chunk = self._rows_per_chunk(size.M, shapes, dtype)
        needed = shapes(chunk)
        workspace13 = x.new_empty(needed.workspace13, dtype=dtype)
        workspace2 = x.new_empty(needed.workspace2, dtype=dtype)
        for start in range(0, size.M, chunk):
            rows = slice(start, min(start + chunk, size.M))
            part = slice(None) if chunk >= size.M else rows
            experts.apply(
                output[part],
                x[part],
                w1,
                w2,
                topk_weights[part],
                topk_ids[part],
                activation,
                global_num_experts,
                expert_map,
                _rows_of_scale(prepared.scale, part, size.M),
                None,
                workspace13,
                workspace2,
                prepared.expert_tokens_meta,
                apply_router_weight_on_input,
            )
        return output

    def _rows_per_chunk(
        self, rows: int, shapes: Callable[[int], WorkspaceShapes], dtype: torch.dtype
    ) -> int:
        """How many tokens one pass may hold so that its workspaces keep to the limit (>= 1).

        The batched format has its rows bounded by construction and is never cut.
        """
        limit = self.experts.moe_config.options.max_workspace_bytes
        batched = self.experts.activation_format() is FusedMoEActivationFormat.BatchedExperts
        if limit is None or batched or workspace_bytes(shapes(rows), dtype) <= limit:
            return rows
        low, high = 1, rows
        while low < high:
            middle = (low + high + 1) // 2
            fits = workspace_bytes(shapes(middle), dtype) <= limit
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


class FusedMoEMonolithicKernel:
    """As ``FusedMoEKernel``, for experts that route by themselves."""

    def __init__(
        self,
        prepare_finalize: FusedMoEPrepareAndFinalizeMonolithic,
        experts: FusedMoEExpertsMonolithic,
    ) -> None:
        self.prepare_finalize = prepare_finalize
        self.experts = experts

    @property
    def output_is_reduced(self) -> bool:
        return self.prepare_finalize.output_is_reduced()

    def apply(
        self,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        router_logits: torch.Tensor,
        *,
        activation: MoEActivation,
        global_num_experts: int,
        router: Any,
        expert_map: torch.Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x, scale, logits = self.prepare_finalize.prepare(
            hidden_states,
            router_logits,
            self.experts.quant_config,
            self.experts.expects_unquantized_inputs,
        )
        routed = self.experts.apply(
            x,
            w1,
            w2,
            logits,
            activation,
            global_num_experts,
            expert_map,
            scale,
            apply_router_weight_on_input,
            router=router,
            input_ids=input_ids,
        )
        return self.prepare_finalize.finalize(routed)


def workspace_bytes(shapes: WorkspaceShapes, dtype: torch.dtype) -> int:
    """Bytes of the two scratch tensors together (the output is the caller's)."""
    elements = math.prod(shapes.workspace13) + math.prod(shapes.workspace2)
    return elements * dtype.itemsize


def _rows_of_scale(scale: torch.Tensor | None, part: slice, rows: int) -> torch.Tensor | None:
    """Per-row scales are cut with their rows; a scale for the whole tensor is not."""
    if scale is None or scale.dim() == 0 or scale.shape[0] != rows or scale.numel() == 1:
        return scale
    return scale[part]
