"""``qgm algorithms``: shows what :mod:`qgm_ext.algorithms` holds."""

from __future__ import annotations

import dataclasses

from rich import box
from rich.table import Table

from qgm_ext import algorithms
from qgm_ext.cli_support import make_console

__all__ = ["list_algorithms"]


def list_algorithms() -> None:
    """List the algorithms: what a worker sends and keeps, the topology it needs, hyper-parameters, and the source."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("algorithm", no_wrap=True)
    table.add_column("messages\na step", justify="right")
    for head in ("state vectors", "topology", "hyper-parameters", "source"):
        table.add_column(head, overflow="fold")
    for name in algorithms.names():
        cls = algorithms.get_class(name)
        hyper = [
            field.name if field.default is dataclasses.MISSING else f"{field.name}={field.default}"
            for field in dataclasses.fields(cls)
        ]
        table.add_row(name, str(cls.messages), _state_text(cls), cls.needs, "\n".join(hyper), cls.source)
    make_console().print(table)


def _state_text(cls: type[algorithms.Algorithm]) -> str:
    needed = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
    state = cls(**dict.fromkeys(needed, 0.1)).state_names
    return "\n".join(state) or "-"
