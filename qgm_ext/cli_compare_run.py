"""What ``qgm compare`` does: words to a comparison, its progress, and its table.

Nothing is computed here: see :mod:`qgm_ext.experiments.comparison`, ``compare`` and ``results``.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from qgm_ext import data
from qgm_ext.cli_support import EXIT_FAILED, fail, make_console, stop_on_signal, user_errors
from qgm_ext.experiments import compare as running
from qgm_ext.experiments import comparison_files, tables
from qgm_ext.experiments import results as outcomes
from qgm_ext.experiments.comparison import Comparison
from qgm_ext.experiments.results import Results, Run

__all__ = ["compare", "duration", "show"]


def compare(
    file: Path | None,
    preset: str | None,
    resume: Path | None,
    out: Path | None,
    given: dict[str, Any],
    *,
    download: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Run a comparison with progress on the terminal, and show its table; errors are one line.

    Args:
        file, preset, resume: where the comparison is; at most one of them.
        out: its folder; None: a usual name.
        given: keys of the file that options replace.
        download: fetch missing data.
        dry_run: only show published figures and an estimate.
        **options: of :func:`qgm_ext.experiments.compare.compare`.
    """
    console = make_console()
    with user_errors():
        plan, folder = _plan(file, preset, resume, out, given)
        if dry_run and plan.published:  # before the data, which need not be there to read them
            runs = [*outcomes.planned_runs(plan, folder)]
            show(console, Results(plan, folder, runs if resume is None else list(map(outcomes.read_run, runs))))
        if download:
            _fetch_data(plan)
        _announce(console, plan)
    again = outcomes.resume_command(folder)
    with user_errors(), stop_on_signal() as stop:
        begin = time.perf_counter()
        try:
            outcome = _run(
                console,
                plan,
                folder,
                stop,
                dry_run=dry_run,
                **options,
            )
        except running.CompareError as error:
            hint = "when that is put right, continue" if error.disk else "continue"
            fail(f"{error}; what is done is kept; {hint} with: {again}", EXIT_FAILED)
        except KeyboardInterrupt:
            fail(f"stopped at once; continue with: {again}", 128 + signal.SIGINT)
    if stop.signals:
        name = signal.Signals(stop.signals[0]).name
        fail(
            f"stopped by {name}, what is done is kept; continue with: {again}",
            128 + stop.signals[0],
        )
    if dry_run:
        return
    show(console, outcome.results)
    lines = [f"{time.perf_counter() - begin:.0f} s; runs and {outcomes.CSV} are in {folder}"]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _plan(
    file: Path | None, preset: str | None, resume: Path | None, out: Path | None, given: dict[str, Any]
) -> tuple[Comparison, Path]:
    sources = [source for source in (file, preset, resume) if source is not None]
    if len(sources) > 1:
        raise ValueError("give a file, --preset or --resume, only one of them")
    if resume is not None:
        if given or out is not None:
            raise ValueError("--resume goes on with a comparison as it is; to change it give the file or preset again")
        return outcomes.load_plan(resume), resume
    if file is not None:
        return comparison_files.read(file, **given), out or Path(f"compare-{file.stem}")
    if preset is not None:
        return comparison_files.preset(preset, **given), out or Path(f"compare-{preset}")
    if "algorithms" not in given:
        raise ValueError("say what to compare: a TOML file, --preset NAME or --algorithm NAME (more than once)")
    return comparison_files.from_dict(given), out or Path("compare-run")


def _fetch_data(plan: Comparison) -> None:
    for chosen in {
        (train.get("data", "digits"), train.get("data_root"))
        for train in ({**plan.train, **method.train} for method in plan.methods)
    }:
        data.load(*chosen, download=True)


def _announce(console: Console, plan: Comparison) -> None:
    lines = [plan.title or "Comparison"]
    lines += [f"note: {note}" for note in plan.notes()]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _run(console: Console, plan: Comparison, folder: Path, stop: Callable[[], bool], **options: Any) -> running.Outcome:
    """Under a progress bar, or, where there is no terminal, with a line for each run."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def tell_estimate(estimate: running.Estimate) -> None:
        say(
            f"{estimate.runs} runs to do, {estimate.done} done before; about {duration(estimate.seconds)} on "
            f"{estimate.processes} process{'es' if estimate.processes > 1 else ''} (from {estimate.measured})"
        )

    if not console.is_terminal:
        counts = {"done": 0, "runs": 0}

        def tell_state(state: running.State) -> None:
            counts.update(done=state.done, runs=state.runs)

        def tell_run(run: Run) -> None:
            say(f"[{counts['done'] + 1}/{counts['runs']}] {run}: {_outcome_text(run)}")

        return running.compare(
            plan,
            folder,
            on_estimate=tell_estimate,
            on_run=tell_run,
            on_state=tell_state,
            should_stop=stop,
            **options,
        )
    columns = (
        TextColumn("{task.fields[runs]}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("measuring", total=None, runs="")

        def update(state: running.State) -> None:
            shown = "; ".join(f"{run.cell.method.label} lr {run.lr:g} {share:.0%}" for run, share in state.running)
            progress.update(
                task,
                completed=state.seconds,
                total=max(state.total_seconds, 1e-9),
                description=shown,
                runs=f"run {state.done}/{state.runs}",
            )

        return running.compare(plan, folder, on_estimate=tell_estimate, on_state=update, should_stop=stop, **options)


def _outcome_text(run: Run) -> str:
    if run.status == "diverged":
        return "diverged"
    record = run.metrics[-1]
    validation = record.get(outcomes.VALIDATION["mean"])
    return "done" if validation is None else f"validation accuracy {validation:.2%}"


def duration(seconds: float) -> str:
    """A time for people.

    Example:
        >>> duration(42), duration(600), duration(9000)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _shown(entry: tables.Entry) -> str:
    """A cell of the table: the figure, below it what else there is to say, and what a paper has."""
    details = [
        *([entry.detail] if entry.detail else []),
        *(["published: " + entry.published] if entry.published else []),
    ]
    figure = f"[bold]{escape(entry.text)}[/bold]" if entry.best else escape(entry.text)
    return "\n".join([figure, *(f"[dim]{escape(detail)}[/dim]" for detail in details)])


def show(console: Console, results: Results) -> None:
    """Print the tables, one for each model and topology."""
    for made in tables.make(results):
        table = Table(box=box.SIMPLE_HEAD, title=escape(made.title), title_justify="left")
        table.add_column("method", no_wrap=True)
        for head in made.heads:
            table.add_column(escape(head), justify="right")
        for row in made.rows:
            table.add_row(escape(row.label), *map(_shown, row.cells))
        console.print(table)
    console.print("\n".join(tables.legend(results)), markup=False, highlight=False, soft_wrap=True)
