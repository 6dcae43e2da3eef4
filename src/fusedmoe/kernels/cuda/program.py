"""CUDA C++ compiled at run time by NVRTC and launched on torch's current stream.

NVRTC and the driver are reached through ``cuda.bindings``, which torch's CUDA wheels bring. A
compiled program is kept in this process and, by the hash of its source, options and compiler, in
the user's cache folder. A kernel takes one structure by value as its only parameter.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from fusedmoe.kernels.capture import loads_code


@lru_cache
def missing_nvrtc() -> str | None:
    """Why nothing can be compiled here, None where it can."""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        return f"needs cuda-bindings ({error})"
    try:
        code, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:
        return f"needs NVRTC ({error})"
    if code or not hasattr(driver, "cuLaunchKernelEx"):
        return f"needs NVRTC and a driver that launches dependent kernels, got {code}"
    if (major, minor) < (12, 3):
        return f"needs NVRTC 12.3, got {major}.{minor}"
    return None


class CudaKernel:
    """One entry point of a compiled program, on every device it is launched on.

    ``threads`` per block, ``shared`` bytes of dynamic shared memory, ``cluster`` blocks in each
    cluster, at most 8. Launches may begin while the launch before them ends (programmatic dependent
    launch): the code waits for it.
    """

    def __init__(
        self,
        source: str,
        entry: str,
        defines: tuple[tuple[str, str], ...],
        threads: int,
        shared: int,
        cluster: int = 1,
        *,
        cooperative: bool = False,
    ) -> None:
        self._entry, self._threads, self._shared = entry, threads, shared
        self._cluster, self._cooperative = cluster, cooperative
        self._source, self._defines = source, defines
        self._functions: dict[int, Any] = {}

    def launch(self, blocks: int, parameters: ctypes.Structure, device: int) -> None:
        """On torch's current stream of ``device``, which has to be the current device."""
        function = self._functions.get(device)
        if function is None:
            with loads_code():
                function = self._functions[device] = self._load(device)
        address = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        stream = torch._C._cuda_getCurrentRawStream(device)
        shape = blocks, self._threads, self._shared, self._cluster
        config = _config(*shape, self._cooperative, stream)
        driver, call = _driver(), (config, function, ctypes.addressof(address), 0)
        answer = driver.cuLaunchKernelEx(*call)
        if answer[0] == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            _enter_context(device)
            answer = driver.cuLaunchKernelEx(*call)
        checked(answer)

    def _load(self, device: int) -> Any:
        if device != torch.cuda.current_device():
            raise RuntimeError(f"device {device} is not current, {torch.cuda.current_device()} is")
        _enter_context(device)
        driver = _driver()
        image = compiled(self._source, self._defines, torch.cuda.get_device_capability(device))
        library = checked(driver.cuLibraryLoadData(image, [], [], 0, [], [], 0))
        kernel = checked(driver.cuLibraryGetKernel(library, self._entry.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        handle = checked(driver.cuDeviceGet(device))
        checked(driver.cuKernelSetAttribute(attribute, self._shared, kernel, handle))
        return checked(driver.cuKernelGetFunction(kernel))


@lru_cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _enter_context(device: int) -> None:
    """What the runtime does on a thread's first use of a GPU, and the driver does not."""
    driver = _driver()
    handle = checked(driver.cuDeviceGet(device))
    checked(driver.cuCtxSetCurrent(checked(driver.cuDevicePrimaryCtxRetain(handle))))


@lru_cache(maxsize=256)
def _config(
    blocks: int, threads: int, shared: int, cluster: int, cooperative: bool, stream: int
) -> Any:
    driver = _driver()
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    attributes = [attribute]
    if cluster > 1:
        shape = driver.CUlaunchAttribute()
        shape.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = shape.value.clusterDim
        size.x, size.y, size.z = cluster, 1, 1
        attributes.append(shape)
    if cooperative:
        together = driver.CUlaunchAttribute()
        together.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        together.value.cooperative = 1
        attributes.append(together)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared, stream
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


def checked(answer: tuple[Any, ...]) -> Any:
    """The result of a call; RuntimeError with the error's name where it failed."""
    code, *results = answer
    if code:
        raise RuntimeError(f"CUDA driver: {code}")
    return results[0] if results else None


def source_of(*names: str) -> str:
    """The text of files of this folder, one after the other."""
    return "".join((files(__package__) / name).read_text() for name in names)


def compiled(
    source: str, defines: tuple[tuple[str, str], ...], capability: tuple[int, int]
) -> bytes:
    """The machine code of ``source``; RuntimeError with the compiler's log where it has errors."""
    from cuda.bindings import nvrtc

    version = nvrtc.nvrtcVersion()[1:]
    options = [
        f"--gpu-architecture=sm_{capability[0]}{capability[1]}a",
        "--std=c++17",
        *(f"-D{name}={value}" for name, value in defines),
    ]
    digest = hashlib.sha256("\0".join((source, *options, str(version))).encode()).hexdigest()
    place = _cache_folder() / f"{digest}.cubin"
    if place.exists():
        return place.read_bytes()
    image = _compile(source, [option.encode() for option in options])
    # Written under another name first: a reader sees a whole file or none.
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as part:
            part.write(image)
        os.replace(part.name, place)
    except OSError:
        pass
    return image


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fusedmoe"


def _compile(source: str, options: list[bytes]) -> bytes:
    from cuda.bindings import nvrtc

    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"program.cu", 0, [], []))
    try:
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if code:
            log = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC: {code}\n{log.decode()}")
        image = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program)))
        checked(nvrtc.nvrtcGetCUBIN(program, image))
        return bytes(image)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
