"""GGUF files as models of Transformers.

header.py         the keys of a file, checked as they are read
architecture.py   what an architecture is, as data; the names that most of them share
rows/             the architectures
steps.py          what is done to tensors that converters store in another order
source.py         a file as the source of a model
"""

from fusedmoe.integrations.transformers.gguf.source import GgufSource, gguf_of

__all__ = ["GgufSource", "gguf_of"]
