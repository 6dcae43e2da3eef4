"""Which named routing method a rule is: what monolithic kernels are told."""

from __future__ import annotations

from fusedmoe.config import RoutingMethodType
from fusedmoe.router.spec import RoutingSpec, RoutingTensors


def get_routing_method_type(
    scoring_func: str,
    top_k: int,
    renormalize: bool,
    num_expert_group: int | None,
    has_e_score_bias: bool,
) -> RoutingMethodType:
    """The method of a rule that scores, then chooses; Unspecified where none has a name.

    No method is told apart by ``top_k``, which callers pass all the same.
    """
    if scoring_func == "sqrtsoftplus":
        return RoutingMethodType.DeepseekV4 if renormalize else RoutingMethodType.Unspecified
    if has_e_score_bias:
        if scoring_func != "sigmoid" or not renormalize:
            return RoutingMethodType.Unspecified
        grouped = (num_expert_group or 0) > 0
        return RoutingMethodType.DeepSeekV3 if grouped else RoutingMethodType.MiniMax2
    if scoring_func == "sigmoid":
        return RoutingMethodType.SigmoidRenorm if renormalize else RoutingMethodType.Sigmoid
    if scoring_func == "softmax":
        return RoutingMethodType.RenormalizeNaive if renormalize else RoutingMethodType.Default
    return RoutingMethodType.Unspecified


def routing_method_of(spec: RoutingSpec, tensors: RoutingTensors) -> RoutingMethodType:
    """The method that computes exactly ``spec`` (scale apart), Unspecified where none does.

    Stricter than ``get_routing_method_type``: a kernel that only knows the name must not drop a
    step that the name does not say.
    """
    unnamed = (
        spec.selection != "topk"
        or spec.logit_softcap
        or spec.num_zero_experts
        or spec.num_fused_shared_experts
        or tensors.per_expert_scale is not None
        or tensors.vision_bias is not None
        or spec.renormalize_floor
        or spec.renormalize_norm != 1.0
    )
    if unnamed:
        return RoutingMethodType.Unspecified
    has_bias = tensors.correction_bias is not None
    if tensors.hash_indices_table is not None and spec.score_function != "sqrtsoftplus":
        return RoutingMethodType.Unspecified
    if spec.num_expert_group > 1 and not (has_bias and spec.group_score == "top2_sum"):
        return RoutingMethodType.Unspecified
    if spec.score_after_topk:
        if has_bias or spec.num_expert_group > 1:
            return RoutingMethodType.Unspecified
        named = {
            "softmax": RoutingMethodType.Renormalize,
            "sigmoid": RoutingMethodType.Unspecified
            if spec.renormalize
            else RoutingMethodType.Llama4,
        }
        return named.get(spec.score_function, RoutingMethodType.Unspecified)
    if spec.score_function == "identity":
        plain = not (has_bias or spec.renormalize)
        return RoutingMethodType.TopK if plain else RoutingMethodType.Unspecified
    return get_routing_method_type(
        spec.score_function, spec.top_k, spec.renormalize, spec.num_expert_group, has_bias
    )
