"""Builds real CUDA sources without a GPU and runs them: nvcc, the stand-in runtime, the PTX machine.

``build`` compiles .cu files once: host objects with their launchers, and the PTX of the same compilation. Linked with
``mock_runtime`` in place of libcudart they form a shared library whose launches end in Python. ``MockRuntime`` loads it
and runs each launch on the PTX machine, with host arrays as device memory, at their own addresses::

    runtime = MockRuntime(build([csrc / "kernels.cu"], include=[csrc]))
    with runtime.mapped(x=x, g=g):                       # numpy arrays or torch CPU tensors
        runtime.library.launch_step(x.ctypes.data, ...)  # faults of the kernel are raised here
    assert runtime.forbidden_calls() == []               # nothing allocated or synchronised

Results of compilation are cached by content under the temporary directory, for all test processes. Holds no test.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from ptx import GlobalMemory, LaunchResult, Machine, Module, parse
from ptx.machine import static_shared_bytes
from ptx.memory import Allocation
from ptx.types import Array

MOCK_SOURCES = Path(__file__).parent / "mock_runtime"
EMULATION_HEADERS = Path(__file__).parent / "emulation"
#: nvcc releases whose private launch symbols the stand-in runtime has; see mock_runtime.cpp.
SUPPORTED_NVCC = ("13.0",)
#: Flags of the product build that change the arithmetic, plus line information for messages.
NVCC_FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-lineinfo")

# Numbers of cudaDeviceAttr for MockRuntime.set_attributes.
DEVICE_ATTRIBUTES = {
    "multiprocessors": 16,
    "shared_bytes_per_block": 8,
    "shared_bytes_opt_in": 97,
    "shared_bytes_per_multiprocessor": 81,
    "threads_per_multiprocessor": 39,
    "blocks_per_multiprocessor": 106,
    "l2_bytes": 38,
    "compute_capability_major": 75,
    "compute_capability_minor": 76,
}


# ------------------------------------------------------------------------------------------------ compilation
def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of the PATH, or of /usr/local/cuda."""
    candidates = [os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc"), shutil.which("nvcc") or ""]
    for candidate in [*candidates, "/usr/local/cuda/bin/nvcc"]:
        if candidate and os.access(candidate, os.X_OK):
            return Path(candidate)
    return None


@functools.cache
def nvcc_release() -> str | None:
    """Release of nvcc, such as ``13.0``; None without nvcc."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match[1] if match else "unknown"


def nvcc_skip_reason() -> str:
    """Why nothing can be compiled with nvcc here; empty when it can."""
    return "" if find_nvcc() else "nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda/bin)"


def mock_skip_reason() -> str:
    """Why the real launchers cannot be run here; empty when they can."""
    if reason := nvcc_skip_reason():
        return reason
    if shutil.which("g++") is None:
        return "g++ was not found, which links the stand-in runtime"
    if nvcc_release() not in SUPPORTED_NVCC:
        return (
            f"the stand-in runtime knows the private launch symbols of nvcc {', '.join(SUPPORTED_NVCC)}, "
            f"found nvcc {nvcc_release()}"
        )
    return ""


@dataclass(frozen=True)
class Build:
    """A compiled set of sources: the library (None for PTX alone) and the PTX of each .cu file."""

    directory: Path
    library: Path | None
    ptx: tuple[Path, ...]

    def modules(self) -> list[Module]:
        return [parse(path.read_text()) for path in self.ptx]


def compile_ptx(
    source: Path,
    *,
    arch: str = "compute_80",
    include: Sequence[Path] = (),
    defines: Sequence[str] = (),
    flags: Sequence[str] = NVCC_FLAGS,
) -> Path:
    """PTX of one .cu file, for a virtual architecture."""
    options = [f"-arch={arch}", *flags, *[f"-I{d}" for d in include], *[f"-D{d}" for d in defines]]

    def make(directory: Path) -> None:
        _nvcc([*options, "-ptx", str(source), "-o", str(directory / f"{source.stem}.ptx")])

    return _cached("ptx", [source], include, options, make) / f"{source.stem}.ptx"


def compile_cubin(
    source: Path,
    arch: str,
    *,
    include: Sequence[Path] = (),
    defines: Sequence[str] = (),
    flags: Sequence[str] = NVCC_FLAGS,
) -> Path:
    """Machine code of one .cu file for one architecture, such as ``sm_90``.

    Returns: directory with ``<stem>.cubin`` and what ptxas reported, ``ptxas.txt``.
    """
    options = [f"-arch={arch}", "-Xptxas", "-v", *flags, *[f"-I{d}" for d in include], *[f"-D{d}" for d in defines]]

    def make(directory: Path) -> None:
        report = _nvcc([*options, "-cubin", str(source), "-o", str(directory / f"{source.stem}.cubin")])
        (directory / "ptxas.txt").write_text(report)

    return _cached("cubin", [source], include, options, make)


def build(
    sources: Sequence[Path],
    *,
    arch: str = "compute_80",
    include: Sequence[Path] = (),
    defines: Sequence[str] = (),
    flags: Sequence[str] = NVCC_FLAGS,
    host_sources: Sequence[Path] = (),
    host_flags: Sequence[str] = (),
    name: str = "libkernels.so",
) -> Build:
    """Compile .cu files, host files and the stand-in runtime into one shared library.

    Args:
        sources: .cu files; host_sources: .cpp files, such as a Python binding.
        arch: virtual architecture whose PTX the machine runs.
        include, defines: for both compilers; flags: for .cu files; host_flags: for the g++ behind nvcc, without commas.
        name: file name of the library; a Python module needs ``<module>.so``.

    Raises:
        RuntimeError: a compiler failed, or the sources call a runtime function that the stand-in lacks.
    """
    common = [*[f"-I{d}" for d in include], *[f"-D{d}" for d in defines]]
    nvcc_options = [f"-arch={arch}", "-cudart", "none", "-Xcompiler", "-fPIC", *flags, *common]
    # nvcc hands .cpp files to g++ and knows where the headers of its runtime are
    host_options = ["-std=c++17", "-O2", "-Xcompiler", ",".join(["-fPIC", *host_flags]), *common]
    mock = sorted(MOCK_SOURCES.glob("*.cpp"))

    def make(directory: Path) -> None:
        def cuda(source: Path) -> None:
            # --keep leaves the PTX of this very compilation: internal names in both halves agree
            keep = directory / source.stem
            keep.mkdir()
            _nvcc([*nvcc_options, "-c", str(source), "--keep", "--keep-dir", str(keep), "-o", f"{keep}.o"])
            (keep / f"{source.stem}.ptx").rename(directory / f"{source.stem}.ptx")
            shutil.rmtree(keep)

        def host(source: Path) -> None:
            _nvcc([*host_options, "-c", str(source), "-o", str(directory / f"host_{source.stem}.o")])

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            jobs = [pool.submit(cuda, s) for s in sources] + [pool.submit(host, s) for s in [*host_sources, *mock]]
            for job in jobs:
                job.result()
        objects = sorted(str(o) for o in directory.glob("*.o"))
        # -Bsymbolic: a real libcudart in the process, such as torch's, must not take the place of the stand-in
        _run(["g++", "-shared", "-Wl,-Bsymbolic", *objects, "-o", str(directory / name)])
        _check_symbols(directory / name)

    inputs = [*sources, *host_sources, *MOCK_SOURCES.iterdir()]
    directory = _cached("library", inputs, include, [name, *nvcc_options, *host_options], make)
    return Build(directory, directory / name, tuple(directory / f"{s.stem}.ptx" for s in sources))


def emulation_skip_reason() -> str:
    """Why kernels cannot be compiled for the host here; empty when they can."""
    return "" if shutil.which("g++") else "g++ was not found"


def build_emulation(
    source: Path, sanitizer_flags: Sequence[str], *, include: Sequence[Path] = (), defines: Sequence[str] = ()
) -> Path:
    """Compile a C++ program that runs kernels as fibers (emulation/), under sanitizers."""
    directories = [EMULATION_HEADERS, *include]
    options = ["-std=c++20", "-g", "-O1", "-ffp-contract=off", "-DQGM_EMULATE_CUDA", *sanitizer_flags]
    options += [*[f"-I{d}" for d in directories], *[f"-D{d}" for d in defines]]

    def make(directory: Path) -> None:
        _run(["g++", *options, str(source), "-o", str(directory / source.stem)])

    return _cached("emulation", [source], directories, options, make) / source.stem


def run_emulation(program: Path, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a program of build_emulation; a finding of a sanitizer is a non-zero return code and text in stderr."""
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
    }
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=timeout, env=environment)


def _nvcc(arguments: list[str]) -> str:
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError(nvcc_skip_reason())
    return _run([str(nvcc), *arguments])


def _run(command: list[str]) -> str:
    """Run a compiler; its messages become the exception."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\nfailed:\n{done.stderr[-4000:]}{done.stdout[-1000:]}")
    return done.stdout + done.stderr


def _check_symbols(library: Path) -> None:
    """Every CUDA runtime function that the library calls must be one of the stand-in's."""
    undefined = _run(["nm", "-D", "--undefined-only", str(library)])
    missing = re.findall(r"\bU (_*cuda\w+|cu[A-Z]\w+)", undefined)
    if missing:
        raise RuntimeError(f"the stand-in runtime has no {', '.join(missing)}; add them to {MOCK_SOURCES.name}/")


def _cached(
    kind: str, sources: Sequence[Path], include: Sequence[Path], options: Sequence[str], make: Callable[[Path], None]
) -> Path:
    """Directory with what ``make`` produced from these inputs; made only when not there yet."""
    digest = hashlib.sha256()
    for text in (kind, nvcc_release() or "", *options):
        digest.update(text.encode() + b"\0")
    headers = [h for d in include for pattern in ("*.h", "*.cuh", "*.hpp", "*.inl") for h in Path(d).rglob(pattern)]
    for path in sorted({*(Path(s) for s in sources), *headers}):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    root = Path(tempfile.gettempdir()) / f"qgm_ext-cuda-proof-{os.getuid()}"
    final = root / f"{kind}-{digest.hexdigest()[:24]}"
    if final.is_dir():
        return final
    root.mkdir(mode=0o700, exist_ok=True)
    # Test processes that run side by side build a thing once: the others wait for the first.
    with FileLock(f"{final}.lock"):
        if not final.is_dir():
            scratch = Path(tempfile.mkdtemp(dir=root))
            try:
                make(scratch)
                scratch.rename(final)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return final


# ------------------------------------------------------------------------------------------------ running
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
    ctypes.c_void_p,
)


@dataclass
class Launch:
    """One launch that the library made."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stream: int
    result: LaunchResult | None = None


@dataclass
class MockRuntime:
    """A loaded library whose launches run on the PTX machine.

    Args:
        built: from ``build``.
        races, statistics: of the machine; see ptx.Machine.
        registers: registers a thread of kernels, by PTX name, for occupancy; without it they set no limit.
        choose_blocks: maps a grid to the blocks to run (None: all), to sample grids too large to run.

    Attributes:
        library: the ctypes library.
        memory: what kernels may touch.
        launches: every launch so far.
    """

    built: Build
    races: bool = True
    statistics: bool = False
    registers: dict[str, int] = field(default_factory=dict)
    choose_blocks: Callable[[tuple[int, int, int]], Sequence[int] | None] = field(default=lambda grid: None)

    def __post_init__(self) -> None:
        if self.built.library is None:
            raise ValueError("the build has no library; use build, not compile_ptx")
        self.library = ctypes.CDLL(str(self.built.library))
        self.memory = GlobalMemory()
        self.launches: list[Launch] = []
        self._fault: BaseException | None = None
        self._machines: dict[str, Machine] = {}
        self.library.mock_count.restype = ctypes.c_uint64
        self.library.mock_forbidden_calls.restype = ctypes.c_char_p
        for module in self.built.modules():
            machine = Machine(module, self.memory, races=self.races, statistics=self.statistics)
            for name, kernel in module.kernels.items():
                self._machines.setdefault(name, machine)
                self.library.mock_set_function(
                    name.encode(),
                    ctypes.c_size_t(static_shared_bytes(module, kernel)),
                    self.registers.get(name, 0),
                    kernel.max_threads or 0,
                )
        self._callback = _LAUNCH(self._launch)  # kept alive as long as the library may call it
        self.library.mock_set_launch(self._callback)
        self.library.mock_reset()

    def reset(self, **attributes: int) -> None:
        """Forget launches, errors, counts and shared-memory opt-ins; then set attributes as set_attributes does."""
        self.library.mock_reset()
        self.launches.clear()
        self._fault = None
        self.set_attributes(**attributes)

    def set_attributes(self, **attributes: int) -> None:
        """Set properties of the device, by the names in DEVICE_ATTRIBUTES."""
        for name, value in attributes.items():
            if name not in DEVICE_ATTRIBUTES:
                raise ValueError(f"device attribute must be one of {', '.join(DEVICE_ATTRIBUTES)}, got {name}")
            self.library.mock_set_attribute(DEVICE_ATTRIBUTES[name], value)

    def set_driver(self, present: bool) -> None:
        """Pretend that the machine has a driver, or none."""
        self.library.mock_set_driver(int(present))

    @contextlib.contextmanager
    def mapped(self, unwritten: Sequence[str] = (), **arrays: Any) -> Iterator[None]:
        """Make arrays device memory while inside; a kernel's fault is raised at the end.

        Args:
            unwritten: names of workspaces and outputs, which kernels must write before they read them.
            arrays: numpy arrays or torch CPU tensors, by the name that messages use.
        """
        allocations: list[Allocation] = []
        try:
            for name, array in arrays.items():
                written = name not in unwritten
                if isinstance(array, np.ndarray):
                    allocations.append(self.memory.attach(name, array, written=written))
                else:
                    size = tensor_bytes(array)
                    allocations.append(self.memory.attach_raw(name, array.data_ptr(), size, written=written))
            yield
        finally:
            for allocation in allocations:
                self.memory.remove(allocation)
            self.raise_fault()

    def raise_fault(self) -> None:
        """Raise what stopped the last launch, if anything did. The runtime then works again, as after a restart."""
        fault, self._fault = self._fault, None
        if fault is not None:
            self.library.mock_reset()
            raise fault

    def count(self, kind: str) -> int:
        """How many calls of a kind the library made: launch, synchronise, allocate or copy."""
        return int(self.library.mock_count(kind.encode()))

    def forbidden_calls(self) -> list[str]:
        """Calls that allocated or synchronised, which no CUDA graph can capture."""
        return str(self.library.mock_forbidden_calls().decode()).split()

    def _launch(self, name: bytes, grid: Any, block: Any, arguments: Any, shared_bytes: int, stream: int | None) -> int:
        try:
            kernel = name.decode()
            launch = Launch(kernel, tuple(grid[:3]), tuple(block[:3]), shared_bytes, stream or 0)
            self.launches.append(launch)
            machine = self._machines[kernel]
            params = machine.module.kernels[kernel].params
            values = [ctypes.string_at(arguments[k], p.size) for k, p in enumerate(params)]
            blocks = self.choose_blocks(launch.grid)
            launch.result = machine.launch(kernel, launch.grid, launch.block, values, shared_bytes, blocks)
        except BaseException as fault:  # an exception cannot cross the C frames: raised again by raise_fault
            self._fault = fault
            return 1
        return 0


def tensor_bytes(tensor: Any) -> int:
    """Bytes from the first to the last element of a strided torch tensor."""
    if tensor.numel() == 0:
        return 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((reach + 1) * tensor.element_size())


def aligned(array: Array, alignment: int = 16, offset: int = 0) -> Array:
    """A flat copy of an array whose address is ``offset`` bytes beyond a multiple of ``alignment``."""
    size = array.nbytes
    raw = np.empty(size + 2 * alignment, np.uint8)
    first = (-raw.ctypes.data) % alignment + offset
    result: Array = raw[first : first + size].view(array.dtype)
    result[:] = array.reshape(-1)
    return result
