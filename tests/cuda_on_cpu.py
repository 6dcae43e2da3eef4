"""CUDA kernels of ``fusedmoe/kernels/cuda`` compiled for the CPU, for tests without a GPU."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from pathlib import Path

from fusedmoe.kernels.cuda.program import source_of

HEADER = Path(__file__).with_suffix(".hpp")
LAUNCH = """
extern "C" int argument_bytes() { return sizeof(Arguments); }
extern "C" void launch(const Arguments* a, int blocks, int threads, int shared, int cluster) {
  gridDim.x = blocks;
  for (int first = 0; first < blocks; first += cluster)
    run_cluster(first, cluster, threads, shared, [&] { %s(*a); });
}
"""


class KernelOnCpu:
    """Stands in for ``CudaKernel``; ``files`` do without the instructions' own text."""

    def __init__(self, files, entry, defines, threads, shared, cluster=1, *, cooperative=False):
        text = HEADER.read_text() + source_of(*files) + LAUNCH % entry
        flags = [f"-D{name}={value}" for name, value in defines]
        name = hashlib.sha256("\0".join((text, *flags)).encode()).hexdigest()
        library = Path(tempfile.gettempdir()) / f"fusedmoe-{name}.so"
        if not library.exists():
            command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-fno-strict-aliasing"]
            subprocess.run(
                [*command, *flags, "-xc++", "-", "-o", str(library)],
                input=text,
                text=True,
                check=True,
                capture_output=True,
            )
        self._library = ctypes.CDLL(str(library))
        self._sizes, self._cluster = (threads, shared), None if cooperative else cluster

    def launch(self, blocks, parameters, device):
        assert ctypes.sizeof(parameters) == self._library.argument_bytes()
        together = self._cluster or blocks
        self._library.launch(ctypes.byref(parameters), blocks, *self._sizes, together)
