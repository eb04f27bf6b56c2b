"""``qgm bench`` and ``qgm doctor``: how fast and how sound the package is on this machine."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table

from qgm_ext.cli_support import EXIT_FAILED, make_console, user_errors
from qgm_ext.experiments import bench as benchmark
from qgm_ext.experiments import doctor as medicine

__all__ = ["bench", "doctor"]


def bench(
    size: Annotated[
        list[str] | None,
        typer.Option(help="Workers x parameters; may be repeated.", metavar="NxD", show_default=False),
    ] = None,
    algorithm: Annotated[str, typer.Option(help="Which step to time.")] = "qg_dsgdm_n",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    seconds: Annotated[float, typer.Option(help="How long to measure each size.")] = 1.0,
) -> None:
    """Time the fused step on this machine against plain PyTorch and against copying the same bytes."""
    with user_errors():
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        sizes = [_parse_size(text) for text in size] if size else list(benchmark.DEFAULT_SIZES)
        timings = benchmark.measure(sizes, algorithm, seconds)
        table = Table(
            box=box.SIMPLE_HEAD,
            title=f"{algorithm}, ring, float32, threads: {threads}, torch {torch.__version__}",
            caption="minimum of repeated runs taken in turn; bytes: what a step must read and write at the least",
            title_justify="left",
            caption_justify="left",
        )
        for head in ("n", "D", "fused ms", "GB/s", "copy ms", "fused / copy", "PyTorch ms", "PyTorch / fused"):
            table.add_column(head, justify="right", no_wrap=len(head) < 3)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for t in timings:
                table.add_row(
                    str(t.workers),
                    str(t.dim),
                    f"{1e3 * t.fused:.4g}",
                    f"{t.bytes / t.fused / 1e9:.4g}",
                    f"{1e3 * t.copy:.4g}",
                    f"{t.fused / t.copy:.4g}",
                    f"{1e3 * t.reference:.4g}",
                    f"{t.reference / t.fused:.4g}",
                )
        finally:
            torch.set_num_threads(before)
    make_console().print(table)


def _parse_size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"--size must be workers x parameters, e.g. 16x100000, got {text!r}")
    return int(parts[0]), int(parts[1])


def doctor() -> None:
    """Check this installation: versions, native modules, threads, devices and a short self-check."""
    console = make_console()
    wrong = 0
    for finding in medicine.examine():
        mark = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}[finding.verdict]
        console.print(f"{mark} {finding.what}: {finding.found}", markup=False, highlight=False, soft_wrap=True)
        wrong += finding.verdict == "wrong"
    if wrong:
        typer.echo(f"qgm: {wrong} problem{'s' if wrong > 1 else ''} found", err=True)
        raise typer.Exit(EXIT_FAILED)
