"""Layers of known models, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusedmoe.activation import MoEActivation

SWIGLUOAI_LIMIT = 7.0


@dataclass(frozen=True)
class LayerShape:
    """One rank's layer: E experts of gate, up [I, H] and down [H, I], k picks per token; no gate
    where the activation has none.

    ``all_experts``: how many the ranks of an expert-parallel group hold together, this one being
    the first (None: E, every expert is here). ``activation`` by name; ``bias`` on both GEMMs.
    """

    name: str
    E: int
    k: int
    H: int
    I: int  # noqa: E741
    all_experts: int | None = None
    activation: str = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        smallest = min(self.E, self.k, self.H, self.I)
        if smallest < 1 or self.k > self.num_experts or self.num_experts % self.E:
            raise ValueError(
                f"{self.name}: E{self.E} k{self.k} H{self.H} I{self.I} is no layer"
                + (f" of {self.all_experts} experts" if self.all_experts else "")
            )

    @property
    def num_experts(self) -> int:
        """Experts of all ranks: what the router chooses from."""
        return self.all_experts or self.E

    @property
    def ranks(self) -> int:
        return self.num_experts // self.E

    @property
    def columns(self) -> dict[str, Any]:
        """What a row of a report says of it."""
        sizes = {"k": self.k, "H": self.H, "I": self.I}
        return {"shape": self.name, "E": self.E, "num_experts": self.num_experts} | sizes

    @property
    def shards(self) -> int:
        """Shards of the first product's weights: gate and up, or up alone."""
        return 2 if MoEActivation.from_str(self.activation).is_gated else 1

    @property
    def weight_elements(self) -> int:
        """Numbers in all experts that are stored here, biases included."""
        biases = self.shards * self.I + self.H if self.bias else 0
        return self.E * ((self.shards + 1) * self.H * self.I + biases)

    @property
    def pair_flops(self) -> int:
        """Multiplications and additions of the two GEMMs for one row of one expert."""
        return 2 * (self.shards + 1) * self.H * self.I

    def flops(self, tokens: int) -> float:
        """FLOPs of ``tokens`` rows on this rank, if picks spread evenly over the ranks."""
        return self.pair_flops * tokens * self.k / self.ranks


# ``-ep8``: one rank's share of the experts under expert parallelism over 8, every pick being local;
# ``-rank``: the same share, with the picks of all the group's tokens, most of which go elsewhere.
SHAPES: dict[str, LayerShape] = {
    shape.name: shape
    for shape in (
        LayerShape("qwen3-30b", 128, 8, 2048, 768),
        LayerShape("qwen3.6-35b", 256, 8, 2048, 512),
        LayerShape("qwen3-235b", 128, 8, 4096, 1536),
        LayerShape("qwen3-235b-ep8", 16, 8, 4096, 1536),
        LayerShape("qwen3-235b-rank", 16, 8, 4096, 1536, all_experts=128),
        LayerShape("olmoe", 64, 8, 2048, 1024),
        LayerShape("mixtral", 8, 2, 4096, 14336),
        LayerShape("mixtral-quarter", 8, 2, 1024, 3584),
        LayerShape("gpt-oss-20b", 32, 4, 2880, 2880, activation="swigluoai", bias=True),
        LayerShape("gpt-oss-120b", 128, 4, 2880, 2880, activation="swigluoai", bias=True),
        LayerShape("llama4-scout", 16, 1, 5120, 8192),
        LayerShape("deepseek-v3", 256, 8, 7168, 2048),
        LayerShape("deepseek-v3-ep8", 32, 8, 7168, 2048),
    )
}


def named_shapes(names: Sequence[str]) -> list[LayerShape]:
    """The shapes of these names in ``SHAPES``; ValueError for a name that is not there."""
    for name in names:
        if name not in SHAPES:
            raise ValueError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")
    return [SHAPES[name] for name in names]
