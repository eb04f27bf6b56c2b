"""The project's own CUDA extension, built against the stand-in runtime: its launches end in the PTX machine.

``open_module`` compiles csrc/cuda with nvcc as setup.py does, for one virtual architecture, and links binding.cpp and
the stand-in runtime to a Python module. ``MockModule`` calls it with CPU tensors as device memory. Holds no test.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import torch
from torch import Tensor

import harness
from qgm_ext import ops
from qgm_ext.mixing import Mixing

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
FORMS = {"identity": 0, "mean": 1, "sparse": 2, "dense": 2}
#: What rules get, as many as they take. The CPU gets the same numbers and is the oracle, so no rule is special.
HYPER = [0.1, 0.9, 0.8, 1e-4, 2.0, 1.0, 0.7, 0.3, 0.2, 0.6]
STREAM = 0x5EED  # a stream handle that the launches must carry


def rule_sources() -> list[Path]:
    """One source per rule header, as setup.py writes them."""
    directory = Path(tempfile.gettempdir()) / f"qgm_ext-cuda-rules-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    sources = []
    for header in sorted((CSRC / "rules").glob("*.h")):
        if header.stem == "rule":
            continue
        source = directory / f"cuda_{header.stem}.cu"
        text = (
            f'#include "cuda/registry.h"\n#include "rules/{header.name}"\n'
            f"[[maybe_unused]] static const bool registered =\n"
            f"    qgm::cuda::register_rules(qgm::rules::{header.stem}::Rules{{}});\n"
        )
        if not source.exists() or source.read_text() != text:
            whole = source.with_suffix(f".{os.getpid()}")
            whole.write_text(text)
            whole.replace(source)  # at once: other test processes may be compiling it
        sources.append(source)
    return sources


class MockModule:
    """The module ``_cuda`` on the PTX machine."""

    def __init__(self, defines: Sequence[str] = (), only: str | None = None, **options: Any) -> None:
        sources = [*rule_sources(), CSRC / "cuda" / "relay.cu"]
        sources = [s for s in sources if only in (None, s.name, s.stem.removeprefix("cuda_"))]
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        built = harness.build(
            [*sources, CSRC / "cuda" / "reduce.cu"],
            include=[CSRC],
            defines=defines,
            # several builds in one process must not share the inline variables of the first (the table of rules)
            flags=(*harness.NVCC_FLAGS, "-Xcompiler", "-fno-gnu-unique"),
            host_sources=[CSRC / "cuda" / "binding.cpp"],
            host_flags=[
                f"-I{pybind11.get_include()}",
                f"-I{sysconfig.get_path('include')}",
                "-ffp-contract=off",
                "-fno-gnu-unique",
            ],
            name=f"_cuda{suffix}",
        )
        assert built.library is not None
        self.runtime = harness.MockRuntime(built, **options)
        self.module = _import(built.library)
        self.rules = {entry["name"]: (index, entry) for index, entry in enumerate(self.module.rules())}

    def gossip_step(
        self,
        x: Tensor,
        g: Tensor,
        state: list[Tensor],
        mixing: Mixing,
        rule: str,
        hyper: list[float],
        row_scalars: Tensor | None = None,
        block_sums: Tensor | None = None,
        device: int = 0,
    ) -> None:
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        offsets, columns, weights = (t.clone() for t in mixing.tensors(dtype=compute))
        lanes = None if block_sums is None else torch.full((*block_sums.shape, 256), float("nan"), dtype=compute)
        numbers = {"scalars": given(row_scalars), "sums": given(block_sums), "lanes": given(lanes)}
        matrix = {"offsets": offsets, "columns": columns, "weights": weights}
        fresh = [*numbers["sums"], *numbers["lanes"]]
        with self.mapped(unwritten=fresh, x=x, g=g, state=state, **matrix, **numbers):
            self.module.gossip_step(
                self.rules[rule][0],
                DTYPES[x.dtype],
                x.data_ptr(),
                g.data_ptr(),
                [s.data_ptr() for s in state],
                x.shape[0],
                x.shape[1],
                x.stride(0),
                g.stride(0),
                state[0].stride(0) if state else 0,
                FORMS[mixing.form],
                offsets.data_ptr(),
                columns.data_ptr(),
                weights.data_ptr(),
                columns.numel(),
                hyper,
                address(numbers["scalars"]),
                address(numbers["sums"]),
                address(numbers["lanes"]),
                device,
                STREAM,
            )

    def relay_step(
        self,
        x: Tensor,
        g: Tensor,
        state: list[Tensor],
        messages: Tensor,
        trees: tuple[Tensor, ...],
        counts: Tensor,
        rule: str,
        hyper: list[float],
    ) -> None:
        offsets, senders, reverse = (t.clone() for t in trees)
        named = {"x": x, "g": g, "state": state, "messages": messages, "counts": counts.clone()}
        named |= {"offsets": offsets, "senders": senders, "reverse": reverse}
        with self.mapped(**{name: value for name, value in named.items() if isinstance(value, list) or value.numel()}):
            self.module.relay_step(
                rule,
                DTYPES[x.dtype],
                x.data_ptr(),
                g.data_ptr(),
                [s.data_ptr() for s in state],
                x.shape[0],
                x.shape[1],
                x.stride(0),
                g.stride(0),
                state[0].stride(0) if state else 0,
                len(offsets),
                offsets.data_ptr(),
                senders.data_ptr(),
                reverse.data_ptr(),
                messages.data_ptr(),
                messages.stride(0),
                named["counts"].data_ptr(),
                hyper,
                0,
                STREAM,
            )

    def local_step(
        self,
        x: Tensor,
        g: Tensor,
        state: list[Tensor],
        messages: list[Tensor],
        rule: str,
        hyper: list[float],
        row_scalars: Tensor | None = None,
    ) -> None:
        scalars = given(row_scalars)
        with self.mapped(unwritten=messages, x=x, g=g, state=state, messages=messages, scalars=scalars):
            self.module.local_step(
                self.rules[rule][0],
                DTYPES[x.dtype],
                x.data_ptr(),
                g.data_ptr(),
                [s.data_ptr() for s in state],
                [m.data_ptr() for m in messages],
                x.numel(),
                hyper,
                address(scalars),
                0,
                STREAM,
            )

    def merge(
        self,
        x: Tensor,
        g: Tensor,
        state: list[Tensor],
        received: list[Tensor],
        weights: list[float],
        mean: bool,
        rule: str,
        hyper: list[float],
        row_scalars: Tensor | None = None,
        block_sums: Tensor | None = None,
    ) -> None:
        scalars, sums = given(row_scalars), given(block_sums)
        with self.mapped(unwritten=sums, x=x, g=g, state=state, received=received, scalars=scalars, sums=sums):
            self.module.merge(
                self.rules[rule][0],
                DTYPES[x.dtype],
                x.data_ptr(),
                g.data_ptr(),
                [s.data_ptr() for s in state],
                [r.data_ptr() for r in received],
                weights,
                mean,
                x.numel(),
                hyper,
                address(scalars),
                address(sums),
                0,
                STREAM,
            )

    def reduce(self, name: str, x: Tensor) -> Tensor:
        """squared_norms, consensus_distance or rows_are_finite of x [n, D]."""
        rows = () if name == "consensus_distance" else (x.shape[0],)
        out = torch.full(rows, 7, dtype=torch.bool if name == "rows_are_finite" else torch.float64)
        blocks = -(-x.shape[1] // self.module.REDUCE_BLOCK)
        scratch = torch.full(((rows or (1,))[0] * blocks,), float("nan"), dtype=torch.float64)
        with self.mapped(unwritten=[out, scratch], x=x, out=out, scratch=scratch):
            getattr(self.module, name)(
                DTYPES[x.dtype],
                x.data_ptr(),
                x.shape[0],
                x.shape[1],
                x.stride(0),
                out.data_ptr(),
                scratch.data_ptr(),
                0,
                STREAM,
            )
        return out

    def sum_blocks(self, block_sums: Tensor) -> Tensor:
        """The squared norms of rows, from what gossip_step has left of them."""
        out = torch.full(block_sums.shape[:1], float("nan"), dtype=torch.float64)
        with self.mapped(unwritten=[out], sums=block_sums, out=out):
            self.module.sum_blocks(block_sums.data_ptr(), *block_sums.shape, out.data_ptr(), 0, STREAM)
        return out

    @contextmanager
    def mapped(self, unwritten: Sequence[Tensor] = (), **named: Tensor | list[Tensor]) -> Iterator[None]:
        """Tensors and lists of tensors as device memory; ``unwritten`` ones must be written before they are read."""
        flat: dict[str, Tensor] = {}
        for name, value in named.items():
            for k, tensor in enumerate(value if isinstance(value, list) else [value]):
                flat[f"{name}[{k}]" if isinstance(value, list) else name] = tensor
        fresh = {id(tensor) for tensor in unwritten}
        with self.runtime.mapped([name for name, tensor in flat.items() if id(tensor) in fresh], **flat):
            yield


def given(*tensors: Tensor | None) -> list[Tensor]:
    """Those of the optional tensors that are there."""
    return [tensor for tensor in tensors if tensor is not None]


def address(tensors: list[Tensor]) -> int:
    """Where an optional tensor of :func:`given` lies, 0 for none."""
    return tensors[0].data_ptr() if tensors else 0


def _import(library: Path) -> ModuleType:
    """Import an extension module from its file, apart from any installed qgm_ext._cuda."""
    name = f"{library.parent.name}._cuda"  # pybind11 gives a second module of one name the first one's functions
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_file_location(name, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@functools.cache
def open_module() -> MockModule:
    """The extension as it is built for users, races looked for."""
    return MockModule()


class Problem:
    """Inputs of one step in memory with padding behind every row; equal for equal arguments.

    Args:
        offset: elements from a 64-byte boundary to the first row; stride: from row to row, at least D.
        shifted_g: elements by which g is off x, so that their rows are aligned differently.
    """

    def __init__(
        self, rule: str, n: int, d: int, dtype: torch.dtype, *, offset: int = 0, stride: int = 0, shifted_g: int = 0
    ) -> None:
        known, compute = ops.rules()[rule], ops.compute_dtype(dtype)
        generator = torch.Generator().manual_seed(n * 1009 + d)
        self.rule, self.n, self.d, self.offset, self.stride = rule, n, d, offset, max(d, stride)
        self.hyper = HYPER[: known.hyper]
        self.shifted_g = shifted_g
        scalars = 0.5 + torch.rand(n, known.row_scalars, generator=generator, dtype=torch.float64)
        self.row_scalars = scalars.to(compute) if known.row_scalars else None
        self.has_norm = known.norm_state >= 0

        def buffer(kind: torch.dtype) -> Tensor:
            return torch.randn(n * self.stride + 16, generator=generator, dtype=torch.float64).to(kind)

        # No state below zero: rules take square roots of second moments, and NaN has many bit patterns.
        self.buffers = [buffer(dtype), buffer(dtype), *[buffer(compute).abs() for _ in range(known.states)]]

    def views(self, buffers: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """x, g and the states as views of such buffers."""

        def view(buffer: Tensor, offset: int) -> Tensor:
            return buffer.as_strided((self.n, self.d), (self.stride, 1), offset)

        x, g, *state = buffers
        return view(x, self.offset), view(g, self.offset + self.shifted_g), [view(s, self.offset) for s in state]

    def block_sums(self) -> list[Tensor]:
        """Room for the sums of a rule that has a norm, in a list to go with the buffers."""
        return [ops.new_block_sums(self.views(self.buffers)[0]).fill_(float("nan"))] if self.has_norm else []

    def clones(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.buffers]


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether all bytes agree, padding included."""
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(left, right, strict=True))
