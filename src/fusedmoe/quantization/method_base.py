"""FusedMoEMethodBase: the weights of one format, and the kernel that runs them.

A format says which parameters it has (``param_specs``), how its kernels compute
(``get_fused_moe_quant_config``) and under which keys selection looks for them; creating the
parameters, choosing the kernel and calling it are the same for every format.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

from fusedmoe.config import FusedMoEConfig, FusedMoEParallelConfig, ParallelGroups
from fusedmoe.modular_kernel import FusedMoEKernel, FusedMoEMonolithicKernel
from fusedmoe.quantization.built_kernel import BuiltKernel
from fusedmoe.quantization.config import FusedMoEQuantConfig
from fusedmoe.quantization.keys import QuantKey
from fusedmoe.selection import Selection, select
from fusedmoe.weights.param_spec import ParamSpec

if TYPE_CHECKING:
    from fusedmoe.quantization.dialects.base import LayerSchemes
    from fusedmoe.weights.routed_experts import RoutedExperts

SharedExpertsCallback = Callable[[torch.Tensor], object]


class QuantizationConfig(Protocol):
    """What a checkpoint says about its formats: one method per layer, by the layer's name."""

    def get_quant_method(
        self, moe_config: FusedMoEConfig, prefix: str
    ) -> FusedMoEMethodBase | None:
        """The method of the MoE layer called ``prefix``; None leaves it unquantized."""


class FusedMoEMethodBase(ABC):
    """Holds one layer's weights in one format, and has their kernel chosen.

    ``moe_config`` is final once the layer is built. ``checkpoint_schemes`` say how tensors of a
    checkpoint become the parameters; None: they are the parameters.
    """

    weight_key: QuantKey | None = None
    activation_key: QuantKey | None = None
    checkpoint_schemes: LayerSchemes | None = None

    def __init__(self, moe_config: FusedMoEConfig, groups: ParallelGroups | None = None) -> None:
        self.moe_config = moe_config
        self.groups = groups
        self._built: BuiltKernel | None = None
        self._finished = False

    @abstractmethod
    def param_specs(self) -> tuple[ParamSpec, ...]:
        """The parameters of the format, ``w13_weight`` and ``w2_weight`` among them."""

    @abstractmethod
    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        """How the kernels compute, holding the layer's own scales and biases."""

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters of ``param_specs`` on ``layer``, uninitialised.

        ``num_experts`` are the local ones and the sizes the stored ones. ``device`` among the
        extra attributes is where; the rest become attributes of every parameter.
        """
        device = extra_weight_attrs.pop("device", None)
        sizes = replace(
            layer.sizes,
            hidden_stored=hidden_size,
            intermediate_stored=intermediate_size_per_partition,
        )
        for spec in self.param_specs():
            shape = (num_experts, *spec.expert_shape(sizes))
            data = torch.empty(shape, dtype=spec.dtype or params_dtype, device=device)
            parameter = torch.nn.Parameter(data, requires_grad=False)
            for name, value in extra_weight_attrs.items():
                setattr(parameter, name, value)
            layer.register_parameter(spec.name, parameter)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Let the kernel prepack the weights as they are now.

        To be called again whenever weights were written by hand; loading calls it itself.
        """
        self.weights_changed()
        if layer.w13_weight.device.type != "meta":
            self.kernel(layer)

    def before_writing(self, layer: RoutedExperts, name: str, row: int | None) -> None:  # noqa: B027
        """One expert of parameter ``name`` is about to be written, or all (None): what an experts
        implementation keeps in another order, together with other parameters, is put back."""

    def weights_changed(self) -> None:
        """Forget what was made of the weights; the next use of the kernel makes it again."""
        self._finished = False
        self.weights_moved()

    def weights_moved(self) -> None:
        """Forget what was prepacked: the same values lie elsewhere."""
        if self._built is not None:
            self._built.prepacked = False

    def rows_change_to(self, dtype: torch.dtype) -> None:
        """Rows enter and leave in ``dtype`` from now on: the layer was cast."""
        self.moe_config = replace(self.moe_config, in_dtype=dtype)
        self.forget_kernel()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with the same process groups; a kernel that communicates is chosen anew."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        shared = {"groups"} if self.groups is None else {"groups", "_built"}
        for name, value in vars(self).items():
            setattr(twin, name, value if name in shared else copy.deepcopy(value, memo))
        if self.groups is not None:
            twin.forget_kernel()
        return twin

    @contextmanager
    def kernel_kept(self) -> Iterator[None]:
        """A kernel that is built inside, for tensors that stand in for the layer's own, is dropped
        at the end, together with these tensors."""
        built = self._built
        try:
            yield
        finally:
            self._built = built or self._built

    def forget_kernel(self) -> None:
        """Let go of the kernel and of what it prepacked; the next use chooses one anew."""
        self._built = None

    def choose_kernel(self, layer: RoutedExperts) -> None:
        """Choose the kernel for where the weights are, unless it is known ("meta": not yet).

        Raises ValueError with all reasons where none can run this layer.
        """
        weight, tensors = layer.w13_weight, self._quant_tensors(layer)
        if (self._built and self._built.fits(weight, tensors)) or weight.device.type == "meta":
            return
        kernel = self.select(layer).make_kernel(self.get_fused_moe_quant_config(layer))
        self._built = BuiltKernel(kernel, weight.device, weight.dtype, tensors)

    def kernel(self, layer: RoutedExperts) -> FusedMoEKernel | FusedMoEMonolithicKernel:
        """The kernel for the weights as they are now, chosen on first use and after moves.

        Raises ValueError for weights of which loading failed.
        """
        layer.check_usable()
        self.choose_kernel(layer)
        if self._built is None:
            raise ValueError("the weights are on 'meta': move them with to_empty(device=...) first")
        if not self._finished:
            self.finish_weights(layer)
            self._finished = True
        if not self._built.prepacked:
            self._built.kernel.experts.process_weights_after_loading(layer)
            self._built.prepacked = True
        return self._built.kernel

    def finish_weights(self, layer: RoutedExperts) -> None:  # noqa: B027
        """Check the weights, and derive what the quant config holds, before they are prepacked."""

    def _quant_tensors(self, layer: RoutedExperts) -> tuple[torch.Tensor | None, ...]:
        weights = ("w13_weight", "w2_weight")
        return tuple(
            getattr(layer, spec.name) for spec in self.param_specs() if spec.name not in weights
        )

    def select(self, layer: RoutedExperts) -> Selection:
        """What runs this layer where its weights are, and why."""
        weight = layer.w13_weight
        moe = replace(self.moe_config, device=weight.device, in_dtype=self.input_dtype(layer))
        return select(moe, self.weight_key, self.activation_key, self.groups)

    def input_dtype(self, layer: RoutedExperts) -> torch.dtype:
        """The dtype of the rows that enter and leave."""
        return self.moe_config.in_dtype

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: SharedExpertsCallback | None = None,
        shared_experts_input: torch.Tensor | None = None,
        *,
        tokens_per_rank: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Routed output [T, H] from x [T, H], weights fp32 [T, K] and global ids [T, K].

        ``shared_experts(shared_experts_input)``, if given, is called while the combine is in
        flight; it keeps its own result.
        """
        kernel = self.kernel(layer)
        if not isinstance(kernel, FusedMoEKernel):
            raise ValueError(f"{kernel.experts.name} routes by itself: use apply_monolithic")

        def run_shared() -> None:
            assert shared_experts is not None
            shared_experts(x if shared_experts_input is None else shared_experts_input)

        return kernel.apply(
            x,
            layer.w13_weight,
            layer.w2_weight,
            topk_weights,
            topk_ids,
            activation=self.moe_config.activation,
            global_num_experts=self.moe_config.num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=self.moe_config.apply_router_weight_on_input,
            while_combining=None if shared_experts is None else run_shared,
            tokens_per_rank=tokens_per_rank,
        )

    def apply_monolithic(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        *,
        tokens_per_rank: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """As ``apply``, from router logits [T, E]: the kernel calls the layer's router itself."""
        kernel = self.kernel(layer)
        if not isinstance(kernel, FusedMoEMonolithicKernel):
            raise ValueError(f"{kernel.experts.name} takes ids and weights: use apply")
        if layer.router is None:
            raise ValueError(f"{kernel.experts.name} routes by itself, but the layer has no router")
        return kernel.apply(
            x,
            layer.w13_weight,
            layer.w2_weight,
            router_logits,
            activation=self.moe_config.activation,
            global_num_experts=self.moe_config.num_experts,
            router=layer.router,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=self.moe_config.apply_router_weight_on_input,
            input_ids=input_ids,
            tokens_per_rank=tokens_per_rank,
        )

    def maybe_roundup_sizes(
        self,
        hidden_size: int,
        intermediate_size_per_partition: int,
        act_dtype: torch.dtype,
        moe_parallel_config: FusedMoEParallelConfig,
    ) -> tuple[int, int]:
        """(hidden, intermediate) as this format stores them, at least as large as given."""
        return hidden_size, intermediate_size_per_partition

    def uses_weight_scale_2_pattern(self) -> bool:
        """Whether per-tensor scales are called ``weight_scale_2`` beside group scales."""
        return False

    @property
    def has_unpadded_output(self) -> bool:
        """Whether ``apply`` returns rows of the checkpoint's hidden size, not the stored one."""
        return False

    @property
    def skip_forward_padding(self) -> bool:
        """Whether ``apply`` takes rows of the checkpoint's hidden size and pads by itself."""
        return False

    @property
    def supports_eplb(self) -> bool:
        """Whether rows of the parameters can be moved between ranks one expert at a time."""
        return False

    def combine_is_async(self, layer: RoutedExperts) -> bool:
        """Whether other work can run while the results of other ranks are on their way."""
        return self.kernel(layer).prepare_finalize.supports_async()

    @property
    def topk_indices_dtype(self) -> torch.dtype | None:
        """The integer dtype the chosen kernel wants ids in; None for any."""
        return self._chosen().prepare_finalize.topk_indices_dtype()

    @property
    def is_monolithic(self) -> bool:
        """Whether the chosen kernel routes by itself."""
        return isinstance(self._chosen(), FusedMoEMonolithicKernel)

    def _chosen(self) -> FusedMoEKernel | FusedMoEMonolithicKernel:
        if self._built is None:
            raise ValueError("no kernel is chosen yet: call kernel(layer) first")
        return self._built.kernel
