"""Layers of known models, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """One rank's layer: E experts of gate, up [I, H] and down [H, I], k of them per token."""

    name: str
    E: int
    k: int
    H: int
    I: int  # noqa: E741

    def __post_init__(self) -> None:
        if min(self.E, self.k, self.H, self.I) < 1 or self.k > self.E:
            raise ValueError(f"{self.name}: E{self.E} k{self.k} H{self.H} I{self.I} is no layer")

    @property
    def weight_elements(self) -> int:
        """Of all experts."""
        return 3 * self.E * self.H * self.I

    def flops(self, tokens: int) -> int:
        """Multiplications and additions of the two GEMMs for ``tokens`` rows."""
        return 2 * 3 * tokens * self.k * self.H * self.I


# ``-ep8``: one rank's share of the experts under expert parallelism over 8, every pick being local.
SHAPES: dict[str, LayerShape] = {
    shape.name: shape
    for shape in (
        LayerShape("qwen3-30b", 128, 8, 2048, 768),
        LayerShape("qwen3.6-35b", 256, 8, 2048, 512),
        LayerShape("qwen3-235b", 128, 8, 4096, 1536),
        LayerShape("qwen3-235b-ep8", 16, 8, 4096, 1536),
        LayerShape("olmoe", 64, 8, 2048, 1024),
        LayerShape("mixtral", 8, 2, 4096, 14336),
        LayerShape("mixtral-quarter", 8, 2, 1024, 3584),
        LayerShape("gpt-oss-20b", 32, 4, 2880, 2880),
        LayerShape("gpt-oss-120b", 128, 4, 2880, 2880),
        LayerShape("llama4-scout", 16, 1, 5120, 8192),
        LayerShape("deepseek-v3", 256, 8, 7168, 2048),
        LayerShape("deepseek-v3-ep8", 32, 8, 7168, 2048),
    )
}
