"""What the compiled CUDA kernels should reach on a GPU: a roofline MODEL, never a measurement.

    python benchmarks/gpu_model.py            # a Markdown report; needs nvcc 13.0, g++ and nvdisasm, no GPU

From what is compiled, not from what was intended:

- bytes, 32-byte sectors, shared-memory wavefronts and instructions: counted by the PTX machine (tests/cuda) while it
  runs the real launcher and kernel on a small problem;
- registers, shared memory and load bytes in flight: read from ptxas and the machine code of the GPU's architecture;
- blocks on a multiprocessor and the width of a tile: by the launcher itself, told the limits of that GPU.

Time is the largest of: bytes over the bandwidth that a copy reaches; wavefronts over one a clock and multiprocessor;
instructions over four a clock and multiprocessor, at 70 % of that. Where fewer load bytes are in flight than Little's
law asks for (latency times bandwidth), the bandwidth shrinks in proportion. A last, half-empty wave of tiles is
charged as if it were full. Latencies are assumptions; the copy bandwidths of H100 and H200 were measured elsewhere,
that of A100 is an assumed share of its data sheet's peak. Caches are taken to hold nothing between steps.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "cuda"), str(ROOT)]

import torch  # noqa: E402

import harness  # noqa: E402
import kernel_module  # noqa: E402
import sass  # noqa: E402
from qgm_ext import topology  # noqa: E402
from test_relay_end_to_end import RelayProblem  # noqa: E402


@dataclass(frozen=True)
class Gpu:
    """Limits of a multiprocessor, and what memory does.

    Attributes:
        copy: bytes a second, read and written, that a device-to-device copy reaches; latency: of a load, seconds.
    """

    name: str
    arch: str
    multiprocessors: int
    shared_bytes: int
    shared_bytes_per_block: int
    copy: float
    latency: float
    clock: float
    registers: int = 65536
    warps: int = 64
    blocks: int = 32

    @property
    def bytes_needed_in_flight(self) -> float:
        """Little's law: bytes that a multiprocessor must have under way to keep memory busy."""
        return self.copy * self.latency / self.multiprocessors


KIB = 1024
GPUS = [
    Gpu("A100", "sm_80", 108, 164 * KIB, 163 * KIB, 1.75e12, 560e-9, 1.41e9),
    Gpu("H100", "sm_90", 132, 228 * KIB, 227 * KIB, 3.0e12, 650e-9, 1.7e9),
    Gpu("H200", "sm_90", 132, 228 * KIB, 227 * KIB, 4.3e12, 650e-9, 1.7e9),
]
MODELS = {"ResNet-20": 272_474, "ResNet-18": 11_689_512, "ViT-B": 86_567_656, "1.3 B parameters": 1_300_000_000}
ISSUE_SHARE = 0.7  # of the peak instruction rate that real code reaches
# PTX that is nothing in machine code: registers are renamed, and on 64-bit GPUs global addresses are generic ones.
FREE = ("mov", "cvta")
RULE, RELAY_RULE = "qg_dsgdm_n", "dsgdm_n"


@dataclass(frozen=True)
class Prediction:
    """One configuration on one GPU; see the module. Times in seconds, bytes for one element of x."""

    gpu: Gpu
    lanes: int
    registers: int
    blocks: int
    warps: int
    in_flight: float
    bytes_element: float
    ideal_bytes: float
    sector_ratio: float
    conflicts: float
    share_of_copy: float
    bottleneck: str
    tile_elements: int

    def seconds(self, n: int, d: int) -> float:
        """Time of one fused step of n workers with d parameters each."""
        tiles = math.ceil(d / self.tile_elements)
        at_once = self.blocks * self.gpu.multiprocessors
        waves = math.ceil(tiles / at_once) * at_once / tiles if tiles > at_once else 1.0
        return n * d * self.bytes_element / (self.gpu.copy * self.share_of_copy) * waves


def predict(module: kernel_module.MockModule, gpu: Gpu, n: int, dtype: torch.dtype, name: str) -> Prediction:
    """Run one small step on the PTX machine as if on this GPU, and put the counts into the roofline.

    Raises:
        RuntimeError: if the launch took another path than one fused tile kernel.
    """
    code = machine_code("gossip", gpu.arch)[STORAGE[dtype]]
    start_on(module, gpu)
    problem = kernel_module.Problem(RULE, n, 10_240, dtype)
    x, g, state = problem.views(problem.buffers)
    matrix = topology.Mixing.from_matrix([[1.0]]) if n == 1 else getattr(topology, name)(n).mixing()
    module.gossip_step(x, g, state, matrix, RULE, problem.hyper)
    return roofline(module, gpu, code, problem, rows_per_thread=4, ideal_bytes=step_bytes(dtype))


def predict_relay(module: kernel_module.MockModule, gpu: Gpu, n: int, dtype: torch.dtype, name: str) -> Prediction:
    """The same for a relayed step; its messages count as bytes of x, which has fewer rows.

    Raises:
        RuntimeError: if the launch took another path than one vectorised kernel.
    """
    code = machine_code("relay", gpu.arch)[STORAGE[dtype]]
    start_on(module, gpu)
    trees = getattr(topology, name)(n).trees()
    problem = RelayProblem(RELAY_RULE, n, 2_560, dtype, trees)
    problem.run(module.relay_step, problem.buffers)
    messages = 2 * trees.num_edges / n * max(4, dtype.itemsize)
    return roofline(module, gpu, code, problem, rows_per_thread=1, ideal_bytes=step_bytes(dtype) + messages)


def step_bytes(dtype: torch.dtype) -> float:
    """Bytes of one element: x, g and one state read, x and the state written."""
    return 3 * dtype.itemsize + 2 * max(4, dtype.itemsize)


def start_on(module: kernel_module.MockModule, gpu: Gpu) -> None:
    module.runtime.reset(
        multiprocessors=gpu.multiprocessors,
        shared_bytes_opt_in=gpu.shared_bytes_per_block,
        shared_bytes_per_multiprocessor=gpu.shared_bytes,
    )


def roofline(
    module: kernel_module.MockModule,
    gpu: Gpu,
    code: sass.KernelCode,
    problem: kernel_module.Problem,
    *,
    rows_per_thread: int,
    ideal_bytes: float,
) -> Prediction:
    """Put the counts of the one launch that there was into the roofline."""
    launches = module.runtime.launches
    if len(launches) != 1 or launches[0].result is None:
        raise RuntimeError(f"expected one launch, got {[launch.kernel for launch in launches]}")
    (launch,), n, dtype = launches, problem.n, problem.buffers[0].dtype
    result, elements = launch.result, problem.n * problem.d

    threads = math.prod(launch.block)
    warps_of_block = math.ceil(threads / 32)
    by_registers = gpu.registers // (math.ceil(code.registers * 32 / 256) * 256 * warps_of_block)
    by_shared = gpu.shared_bytes // (launch.shared_bytes + KIB)
    blocks = min(by_registers, by_shared, gpu.warps // warps_of_block, gpu.blocks)
    rows = rows_per_thread if n == 1 else n  # a worker alone is stepped in pieces
    busy_rows = min(1.0, rows / (launch.block[1] * rows_per_thread))  # slots without a worker load nothing
    in_flight = blocks * threads * code.load_bytes_in_flight() * busy_rows

    own = [name for name in result.loaded_bytes if name in ("x", "g", "messages") or name.startswith("state")]
    payload = sum(result.loaded_bytes[k] + result.stored_bytes.get(k, 0) for k in own)
    sectors = result.total("sectors", "global") / result.total("ideal_sectors", "global")
    wavefronts = result.total("wavefronts", "shared")
    instructions = sum(count for opcode, count in result.warp_instructions.items() if opcode.split(".")[0] not in FREE)
    little = min(1.0, in_flight / gpu.bytes_needed_in_flight)
    times = {
        "memory bandwidth": payload * sectors / gpu.copy,
        "load bytes in flight": payload * sectors / (gpu.copy * little) if little < 1.0 else 0.0,
        "shared memory": wavefronts / (gpu.clock * gpu.multiprocessors),
        "instruction issue": instructions / (4 * ISSUE_SHARE * gpu.clock * gpu.multiprocessors),
    }
    bottleneck = max(times, key=lambda k: times[k])
    return Prediction(
        gpu=gpu,
        lanes=launch.block[0],
        registers=code.registers,
        blocks=blocks,
        warps=blocks * warps_of_block,
        in_flight=in_flight,
        bytes_element=payload / elements,
        ideal_bytes=ideal_bytes,
        sector_ratio=sectors,
        conflicts=wavefronts / max(1, result.total("ideal_wavefronts", "shared")),
        share_of_copy=times["memory bandwidth"] / times[bottleneck],
        bottleneck=bottleneck,
        tile_elements=launch.block[0] * (16 // max(4, dtype.itemsize)) * launch.block[2],
    )


#: Storage types as they stand in a signature.
STORAGE = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Which source holds a kernel, and its signature up to the storage type and, for the relay, the width.
KERNELS = {
    "gossip": ("cuda_qg_dsgdm.cu", r"gossip_tile<.*QuasiGlobal<\w+, true>, (?:qgm::)?(\w+)>\("),
    "relay": ("relay.cu", r"relay_tile<.*Momentum<\w+, true>, (?:qgm::)?(\w+), [24]>\("),
}


@functools.cache
def machine_code(kernel: str, arch: str) -> dict[str, sass.KernelCode]:
    """Machine code of one of KERNELS for the rule of the model, by storage type."""
    file, signature = KERNELS[kernel]
    sources = [*kernel_module.rule_sources(), kernel_module.CSRC / "cuda" / "relay.cu"]
    source = next(path for path in sources if path.name == file)
    codes = sass.analyse(source, arch, include=[kernel_module.CSRC]).values()
    return {match[1]: code for code in codes if (match := re.search(signature, code.signature))}


def row(p: Prediction, dtype: torch.dtype, n: int, name: str) -> str:
    """A prediction as a line of the table."""
    return (
        f"| {p.gpu.name} | {str(dtype)[6:]} | {n} | {name} | {p.lanes * 16} B | {p.registers} | "
        f"{p.blocks} x {p.warps // p.blocks} | {p.in_flight / KIB:.0f} / "
        f"{p.gpu.bytes_needed_in_flight / KIB:.1f} KiB | {p.bytes_element:.2f} ({p.ideal_bytes:g}) | "
        f"{p.sector_ratio:.3f} | {'none' if p.conflicts <= 1.0 else f'{p.conflicts:.2f}x'} | "
        f"{p.share_of_copy:.0%} | {p.bottleneck} |"
    )


def report() -> str:
    """The whole report in Markdown."""
    module = kernel_module.MockModule(statistics=True, races=False, only="qg_dsgdm")
    header = [
        "| GPU | dtype | n | topology | tile row | registers | blocks x warps | in flight / need | B/element (ideal) | "
        "sectors / ideal | bank conflicts | share | bottleneck |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines = [
        "# Roofline model of the CUDA backend: predicted, not measured",
        "",
        f"Rule `{RULE}`. No GPU ran anything here. 'Share' is the predicted share of the bandwidth of a "
        "device-to-device copy; 'in flight' the load bytes a multiprocessor can have under way, against the need by "
        "Little's law.",
        "",
        *header,
    ]
    cases = [(1, "ring"), (2, "ring"), (4, "ring"), (8, "ring"), (16, "ring"), (16, "complete"), (32, "star")]
    cases += [(64, "torus"), (64, "exponential"), (64, "complete")]
    chosen: dict[tuple[str, torch.dtype], Prediction] = {}
    for gpu in GPUS:
        for dtype in (torch.float32, torch.bfloat16):
            for n, name in cases:
                p = predict(module, gpu, n, dtype, name)
                if (n, name) == (16, "ring"):
                    chosen[gpu.name, dtype] = p
                lines.append(row(p, dtype, n, name))
    relay = kernel_module.MockModule(statistics=True, races=False, only="relay.cu")
    lines += ["", f"RelaySGD, rule `{RELAY_RULE}`; a message of each directed edge is read and written as well:", ""]
    lines += header
    for gpu in GPUS:
        for dtype in (torch.float32, torch.bfloat16):
            for n, name in ((16, "chain"), (16, "double_binary_trees"), (16, "star"), (64, "chain")):
                lines.append(row(predict_relay(relay, gpu, n, dtype, name), dtype, n, name))
    lines += ["", "Predicted time of one fused step of 16 workers on a ring, milliseconds (model, not measured):", ""]
    lines += ["| model | parameters | dtype | " + " | ".join(g.name for g in GPUS) + " |"]
    lines += ["|---|---|---|" + "---|" * len(GPUS)]
    for model, size in MODELS.items():
        for dtype in (torch.float32, torch.bfloat16):
            times = [f"{1e3 * chosen[g.name, dtype].seconds(16, size):.3g}" for g in GPUS]
            lines.append(f"| {model} | {size:,} | {str(dtype)[6:]} | " + " | ".join(times) + " |")
    lines += [
        "",
        "16 workers of 1.3 B parameters need 250 GB in float32: more than one GPU has; the time is the traffic's.",
    ]
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "").parse_args()
    if reason := harness.mock_skip_reason() or sass.sass_skip_reason():
        sys.exit(f"gpu_model: {reason}")
    print(report())


if __name__ == "__main__":
    main()
