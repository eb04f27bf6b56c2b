"""Commands of the command line, run in this process."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from qgm_ext.cli import app

# Options of a short training run.
SMALL = ("--workers", "4", "--num-train", "200", "--batch", "8", "--threads", "1")


def qgm(*arguments: str | Path | float, columns: int = 120) -> tuple[int, str]:
    """Exit code and everything that was printed."""
    result = CliRunner(env={"COLUMNS": str(columns), "NO_COLOR": "1"}).invoke(app, [str(word) for word in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def fails(*arguments: str | Path | float) -> str:
    """The one line that a user's mistake gives."""
    code, output = qgm(*arguments)
    assert code == 2, output
    lines = output.strip().splitlines()
    assert len(lines) == 1, output
    assert lines[0].startswith("qgm: ")
    return lines[0]
