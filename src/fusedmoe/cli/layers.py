"""The MoE layers of a checkpoint: how many experts, stored how, in how many bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusedmoe.checkpoint import CONFIG_NAME, Checkpoint, CheckpointError
from fusedmoe.cli.facts import ModelFacts, role_of
from fusedmoe.weights.checkpoint_experts import CheckpointExperts
from fusedmoe.weights.families import EXPERT_PARTS

ABSURD_FACTOR = 4


@dataclass
class LayerFacts:
    """One MoE layer of the files. Bytes are as stored, scales and biases included.

    ``format`` is a weight format's name where ``dialect`` is one that can be loaded; else what the
    tensors look like. ``problem`` says why they could not be.
    """

    layer: str
    experts: int = 0
    format: str = ""
    dialect: str | None = None
    activation: str | None = None
    problem: str | None = None
    expert_bytes: int = 0
    shared_bytes: int = 0
    router_bytes: int = 0
    leaves: dict[str, set[str]] = field(default_factory=dict, repr=False)

    def bytes_per_token(self, top_k: int | None) -> int | None:
        """Bytes that one token alone reads: top_k experts, the shared ones and the router."""
        if top_k is None or not self.experts:
            return None
        routed = self.expert_bytes * min(top_k, self.experts) // self.experts
        return routed + self.shared_bytes + self.router_bytes


def moe_layers(checkpoint: Checkpoint, facts: ModelFacts) -> list[LayerFacts]:
    """The MoE layers in the order of their numbers; those of a second stack carry its prefix."""
    found: dict[tuple[str, int], LayerFacts] = {}
    expert_ids: dict[tuple[str, int], set[int]] = {}
    for entry in checkpoint.tensors.values():
        role = role_of(entry.name, facts.family)
        if role is None:
            continue
        key = (role.prefix, role.layer)
        layer = found.setdefault(key, LayerFacts(f"{role.prefix}layers.{role.layer}"))
        if role.part in EXPERT_PARTS:
            layer.expert_bytes += entry.nbytes
            layer.leaves.setdefault(role.leaf, set()).add(entry.dtype)
            if role.expert is not None:
                expert_ids.setdefault(key, set()).add(role.expert)
            elif len(entry.shape) >= 3:
                layer.experts = max(layer.experts, entry.shape[0])
        elif role.part in ("shared", "shared_gate", "latent"):
            layer.shared_bytes += entry.nbytes
        else:
            layer.router_bytes += entry.nbytes
    for key, layer in found.items():
        ids = expert_ids.get(key)
        layer.experts = len(ids) if ids else layer.experts or facts.sizes.num_experts or 0
        layer.format = storage_format(layer.leaves, facts.quant_method)
    _name_dialects(checkpoint, facts, found)
    return [found[key] for key in sorted(found) if found[key].leaves]


def _name_dialects(
    checkpoint: Checkpoint, facts: ModelFacts, found: dict[tuple[str, int], LayerFacts]
) -> None:
    """Format, dialect and activation of each layer, as loading would understand it."""
    if facts.family is None:
        return
    try:
        experts = CheckpointExperts.read(checkpoint, facts.family)
    except CheckpointError as error:
        for layer in found.values():
            layer.problem = str(error)
        return
    for key, stored in experts.model_layers.items():
        layer = found[key]
        try:
            schemes = experts.schemes(stored)
            experts.check(stored, schemes)
        except CheckpointError as error:
            layer.problem = str(error)
            continue
        if schemes is not None:
            described = schemes.describe()
            layer.format, layer.dialect = described["format"], described["dialect"]
            layer.activation = described["activation"]


def storage_format(leaves: dict[str, set[str]], quant_method: str | None) -> str:
    """A short name for how experts are stored, from the names and dtypes of their tensors."""
    dtypes = set().union(*leaves.values())
    if "blocks" in leaves:
        return "mxfp4"
    if "weight_scale_2" in leaves or "weight_global_scale" in leaves:
        return "nvfp4"
    if "qweight" in leaves:
        return f"{quant_method or 'packed'} int32"
    if "weight_packed" in leaves:
        return "pack-quantized int32"
    weights = leaves.get("weight", set()) or leaves.get("", set()) or dtypes
    name = "+".join(sorted(weights)).lower()
    if "weight_scale_inv" in leaves:
        return f"{name}, block scales"
    if "weight_scale" in leaves or "scale" in leaves:
        return f"{name}, scales"
    return name


def check_counts(checkpoint: Checkpoint, facts: ModelFacts) -> None:
    """CheckpointError where config.json promises far more layers or experts than the files have.

    Building a model of absurd sizes takes as long as its sizes say, so this comes first. Loading
    finds what is merely missing; some families count two layers where the files number one.
    """
    where = checkpoint.folder / CONFIG_NAME
    promised, found = facts.sizes.num_layers, facts.layers_in_files
    if promised is not None and promised > ABSURD_FACTOR * found:
        raise CheckpointError(f"{where}: promises {promised} layers, the files have {found}")
    promised = facts.sizes.num_experts
    for layer in moe_layers(checkpoint, facts):
        if promised is not None and promised > ABSURD_FACTOR * layer.experts:
            raise CheckpointError(
                f"{where}: promises {promised} experts, {layer.layer} has {layer.experts}"
            )
