"""bf16 experts from packed weights: the same bits, a copy only where there is memory for one."""

from __future__ import annotations

import pytest
import torch

from fusedmoe import FusedMoE, MoEOptions
from fusedmoe.experts import copies, cpu_gemm
from fusedmoe.experts.copies import Memory, host_memory
from fusedmoe.experts.cpu_packed import CpuPackedExperts
from fusedmoe.selection import select
from fusedmoe.testing import Case, check_experts

BF16_CPU = cpu_gemm.has_native(torch.bfloat16)


@pytest.mark.skipif(not BF16_CPU, reason="this CPU has no bf16 instructions")
class TestPacked:
    @pytest.mark.usefixtures("one_thread")
    def test_as_an_implementation(self):
        results = check_experts(CpuPackedExperts)
        assert {result.dtype for result in results} == {torch.bfloat16}
        assert not [str(result) for result in results if result.skipped]

    @staticmethod
    def layers() -> tuple[FusedMoE, FusedMoE]:
        """The same weights, plain and packed."""
        plain, packed = (
            FusedMoE(
                4,
                2,
                64,
                96,
                has_bias=True,
                params_dtype=torch.bfloat16,
                options=MoEOptions(experts=name),
            )
            for name in ("cpu", "cpu_packed")
        )
        for parameter in plain.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        packed.load_state_dict(plain.state_dict())
        packed.routed_experts.process_weights_after_loading()
        return plain, packed

    @staticmethod
    def products(layer: FusedMoE):
        routed = layer.routed_experts
        experts = routed.quant_method.kernel(routed).experts
        return experts.products(routed.w13_weight, routed.w2_weight)

    @pytest.mark.parametrize("T", [1, 3, 50])
    def test_the_bits_are_those_of_the_plain_products(self, T):
        plain, packed = self.layers()
        x, logits = torch.randn(T, 64).bfloat16(), torch.randn(T, 4)
        assert self.products(packed) is not None
        assert torch.equal(packed(x, logits), plain(x, logits))
        assert packed.state_dict().keys() == plain.state_dict().keys()

    def test_weights_written_afterwards_are_noticed(self):
        plain, packed = self.layers()
        x, logits = torch.randn(5, 64).bfloat16(), torch.randn(5, 4)
        packed(x, logits)
        for layer in (plain, packed):
            with torch.no_grad():
                layer.routed_experts.w2_weight.mul_(2)
        assert self.products(packed) is None
        assert torch.equal(packed(x, logits), plain(x, logits))
        packed.routed_experts.process_weights_after_loading()
        assert self.products(packed) is not None
        assert torch.equal(packed(x, logits), plain(x, logits))

    @pytest.mark.parametrize("memory", [None, Memory(10**9, 10**8), Memory(10**6, 10**6 // 4)])
    def test_no_copy_is_made_where_memory_is_short_or_unknown(self, memory, monkeypatch):
        monkeypatch.setattr("fusedmoe.experts.copies.host_memory", lambda: memory)
        plain, packed = self.layers()
        assert self.products(packed) is None
        x, logits = torch.randn(5, 64).bfloat16(), torch.randn(5, 4)
        assert torch.equal(packed(x, logits), plain(x, logits))

    def test_it_says_what_the_cpu_lacks(self, monkeypatch):
        monkeypatch.setattr("fusedmoe.experts.cpu_packed.has_native", lambda dtype: False)
        moe = Case().moe_config("cpu", torch.bfloat16, MoEOptions(experts="cpu_packed"))
        with pytest.raises(ValueError, match="bf16 instructions"):
            select(moe)


class TestMemory:
    def machine(self, monkeypatch, tmp_path, meminfo: str, limit: str | None = None) -> None:
        info = tmp_path / "meminfo"
        info.write_text(meminfo)
        monkeypatch.setattr(copies, "_MEMINFO", info)
        files = (tmp_path / "max", tmp_path / "current")
        if limit is not None:
            files[0].write_text(limit + "\n")
            files[1].write_text("3000\n")
        monkeypatch.setattr(copies, "_CGROUPS", (files,))

    MEMINFO = "MemTotal:   10 kB\nMemFree:   1 kB\nMemAvailable:    5 kB\n"

    def test_of_a_machine(self, monkeypatch, tmp_path):
        self.machine(monkeypatch, tmp_path, self.MEMINFO)
        assert host_memory() == Memory(10240, 5120)

    def test_of_a_container(self, monkeypatch, tmp_path):
        self.machine(monkeypatch, tmp_path, self.MEMINFO, limit="8000")
        assert host_memory() == Memory(8000, 5000)
        self.machine(monkeypatch, tmp_path, self.MEMINFO, limit="2000")
        assert host_memory() == Memory(2000, 0)
        self.machine(monkeypatch, tmp_path, self.MEMINFO, limit="max")
        assert host_memory() == Memory(10240, 5120)

    def test_of_a_system_that_does_not_say(self, monkeypatch, tmp_path):
        self.machine(monkeypatch, tmp_path, "MemTotal: some\n")
        assert host_memory() is None
        monkeypatch.setattr(copies, "_MEMINFO", tmp_path / "nothing")
        assert host_memory() is None
