"""What ``qgm doctor`` finds out: versions, native modules, threads, devices, and a self-check of about a second.

The self-check is no replacement for the tests; it finds a build that does not fit this machine.
"""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import qgm_ext
from qgm_ext import algorithms, ops, reference, topology

__all__ = ["Finding", "examine"]

_REQUIRED = ("numpy", "networkx")
_OPTIONAL = ("typer", "rich", "scikit-learn", "matplotlib", "tensorboard")
_CHECKED = ("dsgd", "dsgdm_n", "qg_dsgdm_n")  # no state, a trace, an average


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found, and whether that is "ok", a "note" or "wrong"."""

    what: str
    found: str
    verdict: Literal["ok", "note", "wrong"] = "ok"


def examine() -> Iterator[Finding]:
    """Look at this installation, one finding after the other; a problem is a finding, not an exception."""
    yield Finding("qgm_ext", f"{qgm_ext.__version__} in {Path(qgm_ext.__file__).parent}")
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})")
    for package in (*_REQUIRED, *_OPTIONAL):
        yield _package(package)
    yield Finding("threads", f"{torch.get_num_threads()} of torch, {_cores()} cores for this process")
    yield from _native_cpu()
    yield from _native_cuda()
    if ops.has_native("cpu"):
        yield _self_check("self-check", torch.device("cpu"))
    if ops.has_native("cuda") and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _self_check(f"self-check cuda:{index}", torch.device("cuda", index))


def _package(name: str) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        if name in _REQUIRED:
            return Finding(name, f"missing: pip install {name}", "wrong")
        return Finding(name, "missing: pip install 'qgm_ext[train]'", "note")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _native_cpu() -> Iterator[Finding]:
    try:
        module = importlib.import_module("qgm_ext._cpu")
    except ImportError as error:
        yield Finding("native CPU core", f"can't be imported ({error}): `pip install .` in the source folder", "wrong")
        return
    info = module.build_info()
    yield Finding("native CPU core", ", ".join(f"{key} {value}" for key, value in info.items() if key != "simd_best"))
    level, best = module.simd_level(), info["simd_best"]
    yield Finding("SIMD level", level if level == best else f"{level}, though this processor has {best}")


def _native_cuda() -> Iterator[Finding]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        size = device.total_memory / 2**30
        yield Finding(f"cuda:{index}", f"{device.name}, sm_{device.major}{device.minor}, {size:.1f} GiB")
    if count == 0:
        yield Finding("CUDA devices", "none", "ok")
    try:
        module = importlib.import_module("qgm_ext._cuda")
    except ModuleNotFoundError:
        how = "not built; `QGM_CUDA=1 pip install .` builds it where nvcc is"
        yield Finding("native CUDA core", how, "note" if count else "ok")
    except ImportError as error:
        yield Finding("native CUDA core", f"can't be imported: {error}", "wrong")
    else:
        info = module.build_info() if hasattr(module, "build_info") else {}
        yield Finding("native CUDA core", ", ".join(f"{key} {value}" for key, value in info.items()) or "built")


def _self_check(what: str, device: torch.device) -> Finding:
    """Fused against split step bit by bit in three dtypes, and against the reference in float64, on random data."""
    try:
        count = 0
        for name in _CHECKED:
            algorithm = algorithms.get(name, lr=0.1, weight_decay=1e-2)
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                fault = _fault(algorithm, dtype, device)
                if fault:
                    return Finding(what, f"{name}, {dtype}: {fault}; rebuild with `pip install .`", "wrong")
                count += 1
    except (RuntimeError, ValueError, TypeError, ImportError) as error:
        return Finding(what, f"failed: {error}", "wrong")
    return Finding(what, f"{count} cases: fused and split steps equal bit by bit, and equal to the reference")


def _fault(algorithm: algorithms.Algorithm, dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with three steps of this algorithm, or None. n = 7 on a ring, D = 1001: full and torn tiles."""
    n, dim = 7, 1001
    graph = topology.ring(n)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, dim, generator=generator, dtype=torch.float64).to(device, dtype)
    compute = ops.compute_dtype(dtype)
    state = [torch.zeros(n, dim, dtype=compute, device=device) for _ in algorithm.state_names]
    x_split, state_split = x.clone(), [vector.clone() for vector in state]
    w = torch.from_numpy(graph.matrix()).to(device)
    expected = x.double().clone()
    expected_state = reference.initial_state(algorithm, expected)
    for step in range(3):
        g = torch.randn(n, dim, generator=generator, dtype=torch.float64).to(device, dtype)
        hyper, mixing = algorithm.hyper(step, algorithm.lr), graph.mixing(step)
        ops.gossip_step_(x, g, state, mixing.tensors(device, compute), mixing.form, algorithm.rule, hyper)
        _split_step(x_split, g, state_split, graph, step, algorithm.rule, hyper)
        if not all(torch.equal(a, b) for a, b in zip([x, *state], [x_split, *state_split], strict=True)):
            return f"the fused step {step} differs from the split one"
        expected, expected_state = reference.step(algorithm, expected, g.double(), expected_state, w, step)
    if dtype == torch.float64 and not torch.allclose(x, expected, rtol=1e-10, atol=1e-12):
        return f"the result differs from the reference by {float((x - expected).abs().max()):g}"
    return None


def _split_step(
    x: Tensor, g: Tensor, state: list[Tensor], graph: topology.Topology, step: int, rule: str, hyper: list[float]
) -> None:
    """The step as n processes would do it: local_step_, then merge_, one worker after the other."""
    n, count = len(x), ops.rules("cuda" if x.is_cuda else "cpu")[rule].messages
    sent = [[x.new_empty(x.shape[1], dtype=ops.compute_dtype(x.dtype)) for _ in range(count)] for _ in range(n)]
    mixing = graph.mixing(step)
    for i in range(n):
        ops.local_step_(x[i], g[i], [vector[i] for vector in state], sent[i], rule, hyper)
    for i in range(n):
        columns, weights = mixing.row(i)
        received = [sent[j][k] for k in range(count) for j in columns]
        mean = mixing.form == "mean"
        ops.merge_(x[i], g[i], [vector[i] for vector in state], received, weights.tolist(), mean, rule, hyper)
