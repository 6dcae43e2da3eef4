"""A GGUF model in several files, ``name-00001-of-00003.gguf`` and so on, read as one."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fusedmoe.checkpoint import CheckpointError
from fusedmoe.weights.gguf_file import GgufFile, GgufTensor

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


class GgufParts:
    """All parts of the model that ``path`` is a part of, or the file that is the whole of it.

    ``metadata`` is that of the first. Raises CheckpointError for a part that is missing, or that
    does not belong to the others.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        files = [GgufFile(part) for part in paths_of(self.path)]
        self.metadata = files[0].metadata
        count = self.metadata.get(_COUNT, 1)
        if count != len(files):
            raise CheckpointError(
                f"{files[0].path}: is part of {count!r}, its name says of {len(files)}"
            )
        self._files: dict[str, GgufFile] = {}
        self.tensors: dict[str, GgufTensor] = {}
        for number, file in enumerate(files):
            found = file.metadata.get(_NUMBER, 0), file.metadata.get(_COUNT, 1)
            if found != (number, count):
                raise CheckpointError(
                    f"{file.path}: expected part {number} of {count}, found {found[0]!r} of "
                    f"{found[1]!r}"
                )
            twice = sorted(file.tensors.keys() & self.tensors.keys())
            if twice:
                raise CheckpointError(
                    f"{file.path}: holds {twice[0]!r}, as {self._files[twice[0]].path.name} does"
                )
            self.tensors |= file.tensors
            self._files |= dict.fromkeys(file.tensors, file)
        total = len(self.tensors)
        expected = self.metadata.get(_TENSORS, total)
        if expected != total:
            raise CheckpointError(
                f"{self.path}: expected {expected!r} tensors in all parts, found {total}"
            )

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """As ``GgufFile.read``."""
        return self._files[name].read(name)


def paths_of(path: Path) -> list[Path]:
    """All parts of the model that ``path`` is a part of, in their order, by its name."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    paths = [path.with_name(f"{match[1]}-{n:05}-of-{match[3]}.gguf") for n in range(1, count + 1)]
    lacking = next((part for part in paths if not part.is_file()), None)
    if path not in paths or lacking is not None:
        raise CheckpointError(f"{path.parent}: lacks {(lacking or path).name}, a part of the model")
    return paths
