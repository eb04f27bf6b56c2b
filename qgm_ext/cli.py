"""The command line: ``qgm train | compare | report | topology | plan | algorithms | bench | doctor``.

It reads words, calls :mod:`qgm_ext.experiments` and shows what comes back; nothing is computed here. A user's mistake
is one line on stderr and exit code 2; what goes wrong later, in the middle of a run, is exit code 1; ctrl-C is 130.

Each command has a module, ``cli_*``, which is imported when the command is called: torch takes seconds, and the list of
commands needs none of it.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

try:
    import rich  # noqa: F401 (the commands need it)
    import typer
    from typer.core import TyperGroup
except ModuleNotFoundError as error:
    print(f"qgm needs the package {error.name}: pip install 'qgm_ext[train]'", file=sys.stderr)
    raise SystemExit(2) from None

import qgm_ext
from qgm_ext.cli_support import parser_errors

__all__ = ["app", "main"]

# Where each command is, and what the list of commands says of it: the first line of its docstring.
_COMMANDS = {
    "train": ("cli_train:train", "Train n workers on one machine and show how good their models are."),
    "compare": (
        "cli_compare:compare",
        "Compare algorithms on topologies, alphas and models, over seeds and a grid of step sizes.",
    ),
    "report": (
        "cli_compare:report",
        "Write the report of a comparison: one HTML page that needs no network, and its pictures as PNG files.",
    ),
    "topology": (
        "cli_topology:topology",
        "Show a topology: degree, spectral gap, eigenvalues, weights and period; draw it with --png.",
    ),
    "plan": (
        "cli_plan:plan",
        "Predict step time, bytes, memory and mixing of every topology and message type, and recommend one.",
    ),
    "algorithms": (
        "cli_algorithms:list_algorithms",
        "List the algorithms: what a worker sends and keeps, the topology it needs, hyper-parameters, and the source.",
    ),
    "bench": (
        "cli_machine:bench",
        "Time the fused step on this machine against plain PyTorch and against copying the same bytes.",
    ),
    "doctor": (
        "cli_machine:doctor",
        "Check this installation: versions, native modules, threads, devices and a short self-check.",
    ),
}
_SETTINGS: dict[str, Any] = {
    "rich_markup_mode": "rich",
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


class _Commands(TyperGroup):
    """The commands by name: in the list of commands as ``_COMMANDS`` has them, for a call as their modules do."""

    def make_context(self, *arguments: Any, **more: Any) -> Any:
        with parser_errors():
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: Any) -> Any:
        with parser_errors():
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name in _COMMANDS else command, rest


def _load(name: str) -> Any:
    module, function = _COMMANDS[name][0].split(":")
    alone = typer.Typer(**_SETTINGS)
    alone.command(name)(getattr(importlib.import_module(f"qgm_ext.{module}"), function))
    return typer.main.get_command(alone)


app = typer.Typer(
    name="qgm",
    cls=_Commands,
    help="Decentralized deep learning with quasi-global momentum.",
    no_args_is_help=True,
    **_SETTINGS,
)
for _name, (_, _help) in _COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)


def main() -> None:
    """Run the command line; the entry point of ``qgm``."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qgm_ext {qgm_ext.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    pass
