"""``qgm plan``: shows what :mod:`qgm_ext.experiments.plan` predicts."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from qgm_ext.cli_support import make_console, user_errors

__all__ = ["plan"]


def plan(
    params: Annotated[float, typer.Option(help="Parameters of the model, e.g. 1.3e9.")],
    workers: Annotated[int, typer.Option("--workers", "-n", help="Number of workers.")],
    bandwidth: Annotated[float, typer.Option(help="Of each worker's link, each way, in bit/s.")],
    latency: Annotated[float, typer.Option(help="One way between two workers, in seconds.")],
    compute: Annotated[float, typer.Option(help="Seconds of one gradient.")] = 0.0,
    algorithm: Annotated[str, typer.Option(help="Whose state takes memory.")] = "qg_dsgdm_n",
    mixing: Annotated[float, typer.Option(help="What the recommended choice must mix by in a step.")] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict step time, bytes, memory and mixing of every topology and message type, and recommend one."""
    from qgm_ext.experiments import plan as planning  # only now, for it needs torch

    with user_errors():
        if not params.is_integer() or params < 1:
            raise ValueError(f"--params must be a whole number of at least 1, got {params:g}")
        if not 0 <= mixing <= 1:
            raise ValueError(f"--mixing must be in [0, 1], got {mixing:g}")
        network = planning.Network(workers, bandwidth, latency, compute)
        made = planning.make(int(params), network, algorithm, mixing)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(made), indent=1))
        return
    console = make_console()
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{params:.6g} parameters, {workers} workers, {bandwidth:.4g} bit/s, {latency:g} s",
        title_justify="left",
    )
    for head in ("topology", "messages"):
        table.add_column(head, no_wrap=True)
    for head in ("seconds\na step", "GB sent\nmean", "GB sent\nmost", "GB of\nmemory", "mixing"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("runs with")
    for c in made.choices:
        sizes = [f"{value / 1e9:.4g}" for value in (c.bytes_mean, c.bytes_max, c.memory)]
        mixes = "-" if c.mixing is None else f"{c.mixing:.3g}"
        table.add_row(c.topology, c.message, f"{c.seconds:.4g}", *sizes, mixes, c.runs_with or "-")
    console.print(table)
    for note in made.notes:
        console.print(f"left out: {note}", markup=False, highlight=False, soft_wrap=True)
    best = made.recommended
    console.print(
        f"recommended: {best.topology} with {best.message} messages, {best.seconds:.4g} s a step: the fastest that "
        f"mixes by at least {mixing:g} in a step"
        if best.mixing is not None and best.mixing >= mixing
        else f"recommended: {best.topology} with {best.message} messages, {best.seconds:.4g} s a step: it mixes best; "
        f"nothing mixes by {mixing:g} in a step",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
