"""The architectures whose GGUF files load as whole models: one row each, or one for each kind."""

from __future__ import annotations

from collections.abc import Mapping

from fusedmoe.integrations.transformers.gguf.architecture import Architecture
from fusedmoe.integrations.transformers.gguf.header import Header
from fusedmoe.integrations.transformers.gguf.rows.gemma import GEMMA
from fusedmoe.integrations.transformers.gguf.rows.linear import LINEAR
from fusedmoe.integrations.transformers.gguf.rows.llama import LLAMA
from fusedmoe.integrations.transformers.gguf.rows.mamba import MAMBA
from fusedmoe.integrations.transformers.gguf.rows.sigmoid import SIGMOID
from fusedmoe.integrations.transformers.gguf.rows.softmax import SOFTMAX

ARCHITECTURES: Mapping[str, tuple[Architecture, ...]] = {
    **LLAMA,
    **SOFTMAX,
    **SIGMOID,
    **LINEAR,
    **MAMBA,
    **GEMMA,
}


def architecture_of(header: Header) -> Architecture | None:
    """The row of a file; None where there is none."""
    rows = ARCHITECTURES.get(header.architecture, ())
    return next((row for row in rows if row.when(header)), None)
