"""What ptxas made of the kernels: registers, spills, local memory, and every memory access with its width and loop.

``analyse`` compiles a .cu file to machine code for one architecture and reads ptxas' report and nvdisasm's listing into
a KernelCode for each kernel. It runs nothing. nvdisasm comes with CUDA, inside torch's ``triton`` wheel, or as
``pip install --no-deps nvidia-cuda-nvdisasm``. Holds no test and no limits: those are the gate's matter.
"""

from __future__ import annotations

import functools
import glob
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import harness

#: The architectures that the product is built for.
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

#: Opcode -> (state space, kind). Whatever is not here touches no memory that the gate is about.
_ACCESSES = {
    "LDG": ("global", "load"),
    "STG": ("global", "store"),
    "LDS": ("shared", "load"),
    "LDSM": ("shared", "load"),
    "STS": ("shared", "store"),
    "LDL": ("local", "load"),
    "STL": ("local", "store"),
    "LD": ("generic", "load"),
    "ST": ("generic", "store"),
    "LDGSTS": ("global", "copy"),
    "ATOM": ("generic", "atomic"),
    "ATOMG": ("global", "atomic"),
    "ATOMS": ("shared", "atomic"),
    "RED": ("global", "atomic"),
    "REDG": ("global", "atomic"),
}
_WIDTHS = {"256": 32, "128": 16, "64": 8, "32": 4, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}


@dataclass(frozen=True)
class SassInstruction:
    """One machine instruction.

    Attributes:
        address: within the kernel, bytes; source: ``file:line`` when compiled with -lineinfo.
        opcode: with its modifiers, such as ``LDG.E.128``; operands: the rest of the text.
        loop: index of the innermost loop that contains it, or None.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    source: str = ""
    loop: int | None = None

    @property
    def name(self) -> str:
        """Opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def space(self) -> str | None:
        """State space that it accesses, or None."""
        return _ACCESSES[self.name][0] if self.name in _ACCESSES else None

    @property
    def kind(self) -> str | None:
        """load, store, atomic, or copy (cp.async); None when it accesses no memory."""
        return _ACCESSES[self.name][1] if self.name in _ACCESSES else None

    @property
    def width(self) -> int:
        """Bytes a thread that it accesses."""
        return next((_WIDTHS[part] for part in self.opcode.split(".")[1:] if part in _WIDTHS), 4)


@dataclass(frozen=True)
class Loop:
    """Instructions from ``first`` to ``last`` (addresses), closed by a backward branch; ``depth`` 1 is outermost."""

    first: int
    last: int
    depth: int = 1


@dataclass
class KernelCode:
    """Machine code of one kernel for one architecture.

    Attributes:
        name: mangled; signature: demangled.
        registers: of a thread; stack_bytes, spill_store_bytes, spill_load_bytes: local memory of a thread.
        shared_bytes: static shared memory of a block.
    """

    name: str
    signature: str
    arch: str
    registers: int = 0
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    shared_bytes: int = 0
    instructions: list[SassInstruction] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)

    @property
    def uses_local_memory(self) -> bool:
        """Spills, or arrays that did not fit in registers."""
        return bool(self.stack_bytes or self.spill_store_bytes or self.spill_load_bytes or self.widths("local"))

    def accesses(self, space: str, kind: str | None = None, *, loops_only: bool = False) -> list[SassInstruction]:
        """Instructions that access a state space, in order."""
        return [
            i
            for i in self.instructions
            if i.space == space and kind in (None, i.kind) and (i.loop is not None or not loops_only)
        ]

    def widths(self, space: str, kind: str | None = None, *, loops_only: bool = False) -> Counter[int]:
        """How many accesses there are of each width in bytes."""
        return Counter(i.width for i in self.accesses(space, kind, loops_only=loops_only))

    def opcodes(self) -> Counter[str]:
        """How many instructions of each opcode (without modifiers) there are."""
        return Counter(i.name for i in self.instructions)

    def load_bytes_in_flight(self) -> int:
        """Most bytes of global loads that one thread has issued before it needs the first of them.

        Counted along straight code: a use of a loaded register waits for that load and those before it, and a branch
        target ends the count. A lower bound of what the hardware overlaps.
        """
        targets = {loop.first for loop in self.loops} | self._targets
        pending: list[tuple[set[int], int]] = []
        most = 0
        for instruction in self.instructions:
            if instruction.address in targets:
                pending.clear()
            used = {int(r) for r in re.findall(r"\bR(\d+)\b", instruction.operands)}
            is_load = instruction.space == "global" and instruction.kind == "load"
            if is_load and (match := re.match(r"\s*R(\d+)", instruction.operands)):
                first = int(match[1])
                used.discard(first)
            for k in reversed(range(len(pending))):
                if pending[k][0] & used:
                    del pending[: k + 1]
                    break
            if is_load and match:
                loaded = set(range(first, first + max(1, instruction.width // 4)))
                pending.append((loaded, instruction.width))
                most = max(most, sum(width for _, width in pending))
            elif instruction.name in ("BRA", "EXIT", "RET", "CALL") and not instruction.predicate:
                pending.clear()
        return most

    _targets: set[int] = field(default_factory=set, repr=False)


# ------------------------------------------------------------------------------------------------ tools
@functools.cache
def find_nvdisasm() -> Path | None:
    """nvdisasm of the PATH, of CUDA_HOME, of an installed wheel."""
    spec = importlib.util.find_spec("triton")
    places = [shutil.which("nvdisasm") or "", os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvdisasm")]
    if spec is not None and spec.origin:
        places.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"))
    nvidia = importlib.util.find_spec("nvidia")
    for root in (nvidia.submodule_search_locations or []) if nvidia else []:
        places += glob.glob(f"{root}/*/bin/nvdisasm")
    return next((Path(p) for p in places if p and os.access(p, os.X_OK)), None)


@functools.cache
def supported_architectures() -> tuple[str, ...]:
    """Those of ARCHITECTURES that the nvcc at hand compiles for."""
    nvcc = harness.find_nvcc()
    if nvcc is None:
        return ()
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return tuple(a for a in ARCHITECTURES if a in known)


def sass_skip_reason() -> str:
    """Why machine code cannot be examined here; empty when it can."""
    if reason := harness.nvcc_skip_reason():
        return reason
    if find_nvdisasm() is None:
        return "nvdisasm was not found (CUDA, the triton wheel, or pip install --no-deps nvidia-cuda-nvdisasm)"
    return ""


# ------------------------------------------------------------------------------------------------ analysis
def analyse(
    source: Path,
    arch: str,
    *,
    include: Sequence[Path] = (),
    defines: Sequence[str] = (),
    flags: Sequence[str] = harness.NVCC_FLAGS,
) -> dict[str, KernelCode]:
    """Compile a .cu file for one architecture and read its machine code.

    Args:
        arch: such as ``sm_90``.

    Returns: a KernelCode for each kernel, by mangled name.
    """
    directory = harness.compile_cubin(source, arch, include=include, defines=defines, flags=flags)
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        raise RuntimeError(sass_skip_reason())
    listing = directory / f"{source.stem}.sass"
    if not listing.exists():
        cubin = directory / f"{source.stem}.cubin"
        text = subprocess.run([nvdisasm, "-c", "-g", cubin], capture_output=True, text=True, check=True).stdout
        whole = listing.with_suffix(f".{os.getpid()}")
        whole.write_text(text)
        whole.replace(listing)  # at once: other test processes may be reading
    kernels = parse_report((directory / "ptxas.txt").read_text(), arch)
    for name, (instructions, loops, targets) in parse_listing(listing.read_text()).items():
        if name in kernels:
            kernels[name].instructions, kernels[name].loops, kernels[name]._targets = instructions, loops, targets
    return kernels


def parse_report(text: str, arch: str) -> dict[str, KernelCode]:
    """Read what ``ptxas -v`` says of each kernel."""
    kernels: dict[str, KernelCode] = {}
    current = KernelCode("", "", arch)
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '([^']+)'", line):
            current = kernels.setdefault(match[1], KernelCode(match[1], match[1], arch))
        elif match := re.search(r"Function properties for (\S+)", line):
            current = kernels.get(match[1], KernelCode("", "", arch))
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current.stack_bytes, current.spill_store_bytes, current.spill_load_bytes = (int(v) for v in match.groups())
        elif match := re.search(r"Used (\d+) registers", line):
            current.registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current.shared_bytes = int(shared[1]) if shared else 0
    for kernel, signature in zip(kernels.values(), _demangle(list(kernels)), strict=True):
        kernel.signature = signature
    return kernels


_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*?)\s*;")


def parse_listing(text: str) -> dict[str, tuple[list[SassInstruction], list[Loop], set[int]]]:
    """Read nvdisasm's listing: instructions, loops and branch targets of each kernel."""
    raw: dict[str, list[SassInstruction]] = {}
    labels: dict[str, int] = {}  # unique in a listing
    waiting: list[str] = []  # labels before the next instruction
    current: list[SassInstruction] = []
    source = ""
    for line in text.splitlines():
        if match := re.match(r"\.text\.(\S+):", line):
            current = raw.setdefault(match[1], [])
            source = ""
        elif match := re.match(r"(\.L_\w+|\$[\w$]+):", line):
            waiting.append(match[1])
        elif match := re.search(r'//## File "([^"]*)", line (\d+)', line):
            if "inlined at" not in line:
                source = f"{match[1].rsplit('/', 1)[-1]}:{match[2]}"
        elif match := _INSTRUCTION.match(line):
            address = int(match[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
            current.append(SassInstruction(address, match[2] or "", match[3], match[4], source))
    return {name: _with_loops(instructions, labels) for name, instructions in raw.items()}


def _with_loops(
    instructions: list[SassInstruction], labels: dict[str, int]
) -> tuple[list[SassInstruction], list[Loop], set[int]]:
    """Find loops by their backward branches, and the innermost loop of each instruction."""
    ends: dict[int, int] = {}  # first address -> last
    targets = set()
    for i in instructions:
        match = re.search(r"`\(([^)]+)\)", i.operands)
        if i.name != "BRA" or match is None or match[1] not in labels:
            continue
        target = labels[match[1]]
        targets.add(target)
        # a branch to itself is the padding after the last instruction
        if target < i.address:
            ends[target] = max(ends.get(target, 0), i.address)
    spans = sorted(ends.items())
    loops = [Loop(a, b, sum(c <= a and b <= d for c, d in spans)) for a, b in spans]

    def innermost(address: int) -> int | None:
        around = [k for k, loop in enumerate(loops) if loop.first <= address <= loop.last]
        return max(around, key=lambda k: loops[k].depth, default=None)

    placed = [
        SassInstruction(i.address, i.predicate, i.opcode, i.operands, i.source, innermost(i.address))
        for i in instructions
    ]
    return placed, loops, targets


def _demangle(names: list[str]) -> list[str]:
    """C++ signatures, or the names themselves without c++filt."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
