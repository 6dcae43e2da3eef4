"""A case as a layer of one rank: its weights, the stages that run it, and the tokens that enter."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from fusedmoe.kernels.experts_reference import experts_reference
from fusedmoe.modular_kernel import (
    ExpertsCapabilities,
    FusedMoEExpertsMonolithic,
    FusedMoEKernel,
    FusedMoEMonolithicKernel,
)
from fusedmoe.quantization.config import biased_moe_quant_config
from fusedmoe.router.base import routing_by
from fusedmoe.router.routers import SpecRouter
from fusedmoe.router.spec import RoutingResult, RoutingSpec
from fusedmoe.selection import Selection, select
from fusedmoe.testing.cases import Case, Inputs
from fusedmoe.testing.poison import nan_poison
from fusedmoe.testing.tolerances import Tolerance, assert_close, format_name

_TOKENS = ("hidden_states", "router_logits", "topk_weights", "topk_ids")


@dataclass(frozen=True)
class CaseLayer:
    """``weights`` has the parameters, which lie where those of ``inputs`` do; ``str`` names case
    and dtype."""

    case: Case
    selection: Selection
    inputs: Inputs
    weights: torch.nn.Module
    kernel: FusedMoEKernel | FusedMoEMonolithicKernel

    @classmethod
    def of(cls, case: Case, selection: Selection, inputs: Inputs) -> CaseLayer:
        """The stages as a layer composes them, weights prepacked."""
        weights = torch.nn.Module()
        for name, tensor in (
            ("w13_weight", inputs.w1),
            ("w2_weight", inputs.w2),
            ("w13_bias", inputs.w1_bias),
            ("w2_bias", inputs.w2_bias),
        ):
            if tensor is not None:
                weights.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        config = biased_moe_quant_config(inputs.w1_bias, inputs.w2_bias)
        layer = cls(case, selection, inputs, weights, selection.make_kernel(config))
        layer.prepack()
        return layer

    def with_options(self, **options: Any) -> CaseLayer:
        """The same weights and tokens under other options, with stages of their own."""
        moe = self.selection.moe_config
        moe = replace(moe, options=replace(moe.options, **options))
        return self.of(self.case, select(moe), self.inputs)

    def with_tokens(self, **tokens: torch.Tensor) -> CaseLayer:
        """The same stages, other tokens."""
        return replace(self, inputs=replace(self.inputs, **tokens))

    def only(self, part: slice) -> CaseLayer:
        """The same stages, some of the tokens."""
        return self.with_tokens(**{name: value[part] for name, value in self.tokens.items()})

    @property
    def tokens(self) -> dict[str, torch.Tensor]:
        """What changes from batch to batch."""
        return {name: getattr(self.inputs, name) for name in _TOKENS}

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs.hidden_states.dtype

    @property
    def capabilities(self) -> ExpertsCapabilities:
        return self.selection.chosen.capabilities()

    @property
    def routes_by_itself(self) -> bool:
        return issubclass(self.selection.chosen, FusedMoEExpertsMonolithic)

    @property
    def _router(self) -> SpecRouter:
        return SpecRouter(RoutingSpec(top_k=self.case.K, num_experts=self.case.E, renormalize=True))

    def __str__(self) -> str:
        return f"{self.case} in {format_name(self.dtype)}"

    def prepack(self) -> None:
        """As after loading. Raises AssertionError where the parameters are not what they were."""
        before = {name: (tensor, tensor.clone()) for name, tensor in self._parameters.items()}
        self.kernel.experts.process_weights_after_loading(self.weights)
        for name, (tensor, values) in before.items():
            now = self._parameters.get(name)
            if now is not tensor or not _same_bits(tensor, values):
                raise AssertionError(f"{self}: {name} was replaced or written to by prepacking")

    @property
    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.weights.named_parameters())

    def run(self) -> torch.Tensor:
        """One forward through prepare, experts and finalize.

        Raises AssertionError where it writes to what it is given.
        """
        before = {
            field.name: tensor.clone()
            for field in fields(self.inputs)
            if (tensor := getattr(self.inputs, field.name)) is not None
        }
        with nan_poison(), torch.no_grad():
            output = self._forward()
        for name, old in before.items():
            if not _same_bits(getattr(self.inputs, name), old):
                raise AssertionError(f"{self}: {name} was written to")
        return output

    def _forward(self) -> torch.Tensor:
        inputs, weights, kernel = self.inputs, self._parameters, self.kernel
        rest: dict[str, Any] = {
            "activation": self.case.activation,
            "global_num_experts": self.case.E,
            "expert_map": inputs.expert_map,
            "apply_router_weight_on_input": self.case.weight_on_input,
        }
        rows = inputs.hidden_states, weights["w13_weight"], weights["w2_weight"]
        if isinstance(kernel, FusedMoEMonolithicKernel):
            return kernel.apply(*rows, inputs.router_logits, router=self._router, **rest)
        return kernel.apply(*rows, inputs.topk_weights, inputs.topk_ids, **rest)

    def check(self, output: torch.Tensor, how: str = "") -> Tolerance:
        """Raise AssertionError unless ``output`` is the definition's; ``how`` it came about."""
        name = f"{self}{how and ', '}{how}"
        if output.dtype is not self.dtype:
            raise AssertionError(f"{name}: rows enter in {self.dtype} and leave in {output.dtype}")
        return assert_close(name, output, self.expected(), self.dtype)

    def expected(self) -> torch.Tensor:
        """The definition in fp64, on the same values."""
        inputs, routing = self.inputs, self._routing()
        w1_bias, w2_bias = (
            None if bias is None else bias.double() for bias in (inputs.w1_bias, inputs.w2_bias)
        )
        return experts_reference(
            inputs.hidden_states.double(),
            inputs.w1.double(),
            inputs.w2.double(),
            routing.topk_weights.double(),
            routing.topk_ids,
            activation=self.case.activation,
            activation_config=self.case.numbers,
            w1_bias=w1_bias,
            w2_bias=w2_bias,
            expert_map=inputs.expert_map,
            apply_router_weight_on_input=self.case.weight_on_input,
            compute_dtype=torch.float64,
        )

    def _routing(self) -> RoutingResult:
        inputs = self.inputs
        if self.routes_by_itself:
            return routing_by(self._router, inputs.hidden_states, inputs.router_logits)
        return RoutingResult(inputs.topk_weights, inputs.topk_ids)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same, NaN included."""
    return torch.equal(*(t.detach().contiguous().view(torch.uint8) for t in (a, b)))
