"""``qgm topology``: shows what :mod:`qgm_ext.topology` knows of a graph; needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from qgm_ext import topology as topologies
from qgm_ext import topology_names
from qgm_ext.cli_support import make_console, option, user_errors

__all__ = ["topology"]

_LARGEST_PRINTED_MATRIX = 12


def topology(
    name: Annotated[
        str, typer.Argument(help=f"NAME or NAME:WORKERS: {', '.join(topologies.names())}.", show_default=False)
    ],
    workers: Annotated[int | None, option(None, "Number of workers.", "16, social 32", "--workers", "-n")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the graph into this file.", show_default=False)] = None,
) -> None:
    """Show a topology: degree, spectral gap, eigenvalues, weights and period; draw it with --png."""
    console = make_console()
    with user_errors():
        name, workers = topology_names.parse(name, workers)
        made = topologies.get(name, topology_names.default_workers(name) if workers is None else workers)
        facts = made.describe()
        if png is not None:
            made.save_png(png)
    low, high = facts["degree_min"], facts["degree_max"]
    table = Table(box=box.SIMPLE_HEAD, title=f"{made.name} of {made.num_workers} workers", show_header=False)
    table.title_justify = "left"
    for label, value in (
        ("degree", low if low == high else f"{low} to {high}"),
        ("spectral gap", facts["spectral_gap"]),
        ("lambda_2", facts["lambda_2"]),
        ("lambda_n", facts["lambda_n"]),
        ("weight of a neighbour", _span(facts["weight_min"], facts["weight_max"])),
        ("weight of oneself", _span(facts["self_weight_min"], facts["self_weight_max"])),
        ("messages per step, all workers", facts["messages_per_step"]),
        ("period", "never repeats" if facts["period"] is None else facts["period"]),
        ("symmetric", "yes" if facts["symmetric"] else "no"),
    ):
        table.add_row(label, "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value))
    console.print(table)
    if made.num_workers <= _LARGEST_PRINTED_MATRIX:
        shown = made.period or 1
        for step in range(min(shown, 4)):
            console.print(_matrix_text(made, step), markup=False, highlight=False, soft_wrap=True)
    if png is not None:
        console.print(f"drawn into {png}", markup=False, highlight=False, soft_wrap=True)


def _span(low: float | None, high: float | None) -> str | None:
    if low is None or high is None:
        return None
    return f"{low:.6g}" if f"{low:.6g}" == f"{high:.6g}" else f"{low:.6g} to {high:.6g}"


def _matrix_text(made: topologies.Topology, step: int) -> str:
    head = f"mixing matrix of step {step}:" if made.is_time_varying else "mixing matrix:"
    rows = [" ".join(f"{weight:6.4f}" if weight else "     ." for weight in row) for row in made.matrix(step)]
    return "\n".join([head, *rows, ""])
