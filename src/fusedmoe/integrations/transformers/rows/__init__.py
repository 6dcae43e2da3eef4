"""The rows: every Mixture-of-Experts block of Transformers 5.17, and of what its files ported.

Read off the modelling files: hard-coded score functions and ignored config fields are as there.
"""

from __future__ import annotations

from fusedmoe.integrations.transformers.families import Family, Unsupported, family
from fusedmoe.integrations.transformers.rows.logits_first import LOGITS_FIRST
from fusedmoe.integrations.transformers.rows.sigmoid import SIGMOID
from fusedmoe.integrations.transformers.rows.softmax import SOFTMAX

# Their routers do more than a rule can say; they keep them, and their experts run through us.
OWN_ROUTER = (
    # The router carries a state from layer to layer.
    family("zaya", "Zaya", {}, router="Router", whole=False),
    # The chosen and the shared experts are normalised together.
    family("inkling", "Inkling", {}, block="MoE", router="TopkRouter", whole=False),
)

FAMILIES: tuple[Family, ...] = SOFTMAX + LOGITS_FIRST + SIGMOID + OWN_ROUTER

UNSUPPORTED: tuple[Unsupported, ...] = (
    Unsupported(
        module="muse_spark",
        block="MuseSparkMoE",
        reason="what an expert gives is normalised before its weight",
    ),
    Unsupported(
        module="inkling2",
        block="Inkling2SparseMoeBlock",
        reason="its experts cap gate and up softly before they meet",
    ),
    Unsupported(
        module="jetmoe",
        block="JetMoeMoA",
        reason="its experts are attention heads, not feed-forward layers",
    ),
    Unsupported(
        module="doge",
        block="DogeCDMoE",
        reason="its experts are single vectors found by product keys: a gather, not two GEMMs",
    ),
    Unsupported(
        module="switch_transformers",
        block="SwitchTransformersSparseMLP",
        reason="tokens beyond an expert's capacity are dropped, in the order of the sequence",
    ),
    Unsupported(
        module="nllb_moe",
        block="NllbMoeSparseMLP",
        reason="tokens beyond an expert's capacity are dropped, in the order of the batch",
    ),
    Unsupported(
        module="vitpose_backbone",
        block="VitPoseBackboneMoeMLP",
        reason="its experts are single linear layers chosen by the data set, not by a router",
    ),
)

BY_BLOCK: dict[tuple[str, str], tuple[Family, ...]] = {
    key: tuple(row for row in FAMILIES if (row.home, row.block) == key)
    for key in dict.fromkeys((row.home, row.block) for row in FAMILIES)
}
UNSUPPORTED_BLOCKS = {(row.home, row.block): row.reason for row in UNSUPPORTED}
