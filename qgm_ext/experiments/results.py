"""Results of a comparison: its runs as the disk has them, the chosen step sizes, the statistics, and the tidy CSV file.

Step sizes are chosen on validation accuracy alone; nothing here looks at the test set before that. Holds no training
(:mod:`qgm_ext.experiments.compare`) and no pictures (:mod:`qgm_ext.experiments.report`).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from qgm_ext.experiments import comparison, comparison_files, runfolder
from qgm_ext.experiments.comparison import Cell, Comparison, Published, run_name
from qgm_ext.experiments.config import TrainConfig
from qgm_ext.files import write_atomically

__all__ = [
    "COMPARISON",
    "CSV",
    "RUNS",
    "Paired",
    "Results",
    "Run",
    "Score",
    "load",
    "paired_test",
    "read_run",
    "resume_command",
]

COMPARISON = "comparison.json"
CSV = "results.csv"
RUNS = "runs"
# Which accuracy counts, by the comparison's metric: the one that chooses, and the one that the table shows.
VALIDATION = {"mean": "validation_accuracy_local_mean", "worst": "validation_accuracy_local_min"}
TEST = {"mean": "accuracy_local_mean", "worst": "accuracy_local_min"}

Status = Literal["finished", "diverged", "unfinished"]
Record = Mapping[str, Any]

_COLUMNS = (
    "model",
    "topology",
    "workers",
    "alpha",
    "method",
    "algorithm",
    "hyper",
    "runs_on",
    "lr",
    "seed",
    "status",
    "chosen",
    "step",
    "epoch",
    "validation_accuracy_local_mean",
    "validation_accuracy_local_min",
    "accuracy_local_mean",
    "accuracy_local_min",
    "accuracy_local_max",
    "accuracy_average",
    "consensus_distance",
    "loss",
    "bytes_sent",
    "seconds",
    "folder",
)


@dataclass(frozen=True)
class Run:
    """One training run of a comparison, as far as it has come.

    Args:
        cell, lr, seed: its place in the comparison.
        config: what is trained.
        folder: where its files are.
        status: "finished" with a result, "diverged" or "unfinished".
        metrics: its records; see :class:`qgm_ext.experiments.train.Result`.
        seconds: how long it took.
        reason: why it diverged.
    """

    cell: Cell
    lr: float
    seed: int
    config: TrainConfig
    folder: Path
    status: Status = "unfinished"
    metrics: tuple[Record, ...] = ()
    seconds: float = 0.0
    reason: str = ""

    def record(self, plan: Comparison) -> Record | None:
        """The record that counts: the last, or that with the best validation accuracy; None for a run without."""
        if self.status != "finished":
            return None
        validation = VALIDATION[plan.metric]
        if plan.choose == "best" and validation in self.metrics[-1]:
            return max(self.metrics, key=lambda record: float(record[validation]))
        return self.metrics[-1]

    def __str__(self) -> str:
        return f"{self.cell}, lr {self.lr:g}, seed {self.seed}"


class Paired(NamedTuple):
    """A paired comparison of two methods over the same seeds.

    ``difference`` is the mean of the pairwise differences, in the unit of what was compared; ``low`` and ``high`` its
    95 % confidence interval and ``p`` the two-sided p value, both of Student's t distribution; ``n`` the pairs. With
    fewer than two pairs, or none that differ in their difference, low, high and p are NaN.
    """

    difference: float
    low: float
    high: float
    p: float
    n: int


def paired_test(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """Paired t test. With the three seeds that are usual, its power is small: only large effects come out clear.

    Example:
        >>> test = paired_test([0.83, 0.82, 0.84], [0.80, 0.81, 0.80])
        >>> round(test.difference, 4), round(test.p, 3), test.n
        (0.0267, 0.094, 3)
    """
    from scipy import stats

    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    n = len(difference)
    mean = float(difference.mean()) if n else math.nan
    spread = float(difference.std(ddof=1)) if n > 1 else 0.0
    if spread <= 1e-12 * max(1.0, abs(mean)):
        return Paired(mean, math.nan, math.nan, math.nan, n)
    error = spread / math.sqrt(n)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return Paired(mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, n - 1)), n)


@dataclass(frozen=True)
class Score:
    """What a cell of the table says. Accuracies are those of the local models on the test set, in [0, 1]: their mean or
    that of the worst of them, as the comparison's metric has it.

    Args:
        cell: which.
        lr: the chosen step size; None: not chosen yet, or everything diverged.
        at_edge: it is the smallest or the largest of its grid, so that a wider grid might find a better one.
        values: accuracy of each finished seed.
        diverged: seeds that diverged with the chosen step size, or, without one, step sizes times seeds that did.
        complete: whether all runs of the cell are done.
        mean, std: over the seeds; std with n - 1, NaN for one seed.
        against: the paired test against the baseline; None for the baseline itself or where there are no pairs.
        published: figures from papers that belong here.
    """

    cell: Cell
    lr: float | None
    at_edge: bool
    values: Mapping[int, float]
    diverged: int
    complete: bool
    against: Paired | None
    published: tuple[Published, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.values.values()))) if self.values else math.nan

    @property
    def std(self) -> float:
        return float(np.std(list(self.values.values()), ddof=1)) if len(self.values) > 1 else math.nan


class Results:
    """The runs of a comparison and what follows from them.

    Args:
        plan: the comparison.
        folder: where it lies.
        runs: all that the plan knows of, also those not done.
    """

    def __init__(self, plan: Comparison, folder: Path, runs: Sequence[Run]) -> None:
        self.plan = plan
        self.folder = folder
        self.runs = {(_key(run.cell), run.lr, run.seed): run for run in runs}

    def add(self, run: Run) -> None:
        """Take in a run as it is now."""
        self.runs[_key(run.cell), run.lr, run.seed] = run

    def of(self, cell: Cell, lr: float | None = None) -> list[Run]:
        """The runs of a cell, or those with one step size."""
        key = _key(cell)
        return [run for (k, step, _), run in self.runs.items() if k == key and lr in (None, step)]

    def searched(self, cell: Cell) -> bool:
        """Whether all runs that choose the step size are done."""
        seeds = self.plan.search_seeds()
        return all(run.status != "unfinished" for run in self.of(cell) if run.seed in seeds)

    def chosen_lr(self, cell: Cell) -> float | None:
        """The step size with the best validation accuracy, the mean over the search seeds.

        One that diverged with any of them is out. None before the search is done, or if all are out.
        """
        if not self.searched(cell):
            return None
        if len(cell.method.lrs) == 1:
            (lr,) = cell.method.lrs
            return lr if any(run.status == "finished" for run in self.of(cell)) else None
        best: tuple[float, float] | None = None
        for lr in cell.method.lrs:
            runs = [run for run in self.of(cell, lr) if run.seed in self.plan.search_seeds()]
            records = [run.record(self.plan) for run in runs]
            if all(record is not None for record in records):
                mean = float(
                    np.mean([float(record[VALIDATION[self.plan.metric]]) for record in records if record is not None])
                )
                if best is None or mean > best[0]:
                    best = mean, lr
        return None if best is None else best[1]

    def wanted(self, cell: Cell) -> list[Run]:
        """The runs that the cell needs, as far as can be said now: those of the search, then those of the chosen lr."""
        seeds = self.plan.search_seeds()
        search = [run for run in self.of(cell) if run.seed in seeds]
        lr = self.chosen_lr(cell)
        return search + ([] if lr is None else [run for run in self.of(cell, lr) if run.seed not in seeds])

    def todo(self) -> list[Run]:
        """The runs that are wanted and not done, as far as can be said now."""
        runs: dict[Path, Run] = {}
        for cell in self.plan.cells():
            for run in self.wanted(cell):
                if run.status == "unfinished":
                    runs.setdefault(run.folder, run)
        return list(runs.values())

    def num_wanted(self) -> int:
        """How many runs there will be in all."""
        search = len(self.plan.search_seeds())
        return sum(len(cell.method.lrs) * search + len(self.plan.seeds) - search for cell in self.plan.cells())

    def done(self) -> list[Run]:
        """Those that are done, cell by cell. Runs of an earlier grid of step sizes are not among them."""
        return [run for cell in self.plan.cells() for run in self.wanted(cell) if run.status != "unfinished"]

    def final(self, cell: Cell) -> list[Run]:
        """The runs that the table is made of: those with the chosen step size."""
        lr = self.chosen_lr(cell)
        return [] if lr is None else self.of(cell, lr)

    def values(self, cell: Cell) -> dict[int, float]:
        """Test accuracy by seed, with the chosen step size."""
        records = {run.seed: run.record(self.plan) for run in self.final(cell)}
        return {seed: float(record[TEST[self.plan.metric]]) for seed, record in records.items() if record is not None}

    def score(self, cell: Cell) -> Score:
        """What the table says of a cell."""
        lr = self.chosen_lr(cell)
        grid = cell.method.lrs
        ours = self.values(cell)
        runs = self.final(cell) if lr is not None else self.of(cell)
        against = None
        if cell.method.label != self.plan.baseline:
            theirs = self.values(self._baseline(cell))
            pairs = sorted(ours.keys() & theirs.keys())
            if pairs:
                against = paired_test([ours[seed] for seed in pairs], [theirs[seed] for seed in pairs])
        return Score(
            cell,
            lr,
            at_edge=len(grid) > 1 and lr in (grid[0], grid[-1]),
            values=ours,
            diverged=sum(run.status == "diverged" for run in runs),
            complete=self.searched(cell) and all(run.status != "unfinished" for run in self.wanted(cell)),
            against=against,
            published=self.published(cell),
        )

    def published(self, cell: Cell) -> tuple[Published, ...]:
        """The figures from papers that belong beside a cell."""
        model, place, alpha = cell.place
        return tuple(
            figure
            for figure in self.plan.published
            if figure.method == cell.method.label
            and figure.topology == place
            and figure.alpha in (None, alpha)
            and figure.model in (None, model)
        )

    def scores(self) -> list[Score]:
        """All of them, in the order of :meth:`Comparison.cells`."""
        return [self.score(cell) for cell in self.plan.cells()]

    def _baseline(self, cell: Cell) -> Cell:
        (method,) = (method for method in self.plan.methods if method.label == self.plan.baseline)
        return Cell(cell.model, cell.topology, cell.workers, cell.alpha, method)

    def csv(self) -> str:
        """The tidy file: one line for each run that is done."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        for cell in self.plan.cells():
            lr = self.chosen_lr(cell)
            for run in self.of(cell):
                if run.status != "unfinished":
                    writer.writerow(_row(run, run.lr == lr, self.plan, self.folder))
        return text.getvalue()

    def write_csv(self) -> None:
        """Write results.csv into the folder, atomically."""
        content = self.csv().encode()
        write_atomically(self.folder / CSV, lambda file: file.write(content))


def resume_command(folder: Path) -> str:
    """What to type to go on with the comparison in a folder, quoted for the shell.

    Example:
        >>> resume_command(Path("my runs"))
        "qgm compare --resume 'my runs'"
    """
    return f"qgm compare --resume {shlex.quote(str(folder))}"


def load(folder: Path) -> Results:
    """The results in a comparison's folder, finished or not.

    Raises:
        ValueError: if there is no comparison in it, or a file is damaged.
    """
    return Results(plan := load_plan(folder), folder, [read_run(run) for run in planned_runs(plan, folder)])


def load_csv(folder: Path) -> Results:
    """The results as results.csv and comparison.json tell them, without the folders of the runs.

    Raises: as :func:`load`.
    """
    plan, path = load_plan(folder), folder / CSV
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = {row["folder"]: row for row in csv.DictReader(file)}
        runs = []
        for run in planned_runs(plan, folder):
            row = rows.get(str(run.folder.relative_to(folder)))
            runs.append(run if row is None else _run_of(run, row))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    return Results(plan, folder, runs)


def load_plan(folder: Path) -> Comparison:
    """The comparison that a folder holds.

    Raises: as :func:`load`.
    """
    path = folder / COMPARISON
    if not path.is_file():
        raise ValueError(f"there is no comparison in {folder}: it holds no {COMPARISON}; qgm compare --out makes one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no comparison")
        if content.get("format") != comparison.FORMAT:
            raise ValueError(f"it is of version {content.get('format')!r}, this qgm_ext reads {comparison.FORMAT!r}")
        if not isinstance(content.get("comparison"), dict):
            raise ValueError("it holds no comparison")
        return comparison_files.from_dict(content["comparison"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def planned_runs(plan: Comparison, folder: Path, threads: int = 1) -> Iterator[Run]:
    """Every run that a comparison may need: all cells, step sizes and seeds."""
    for cell in plan.cells():
        for lr in cell.method.lrs:
            for seed in plan.seeds:
                config = plan.config(cell, lr, seed, threads)
                yield Run(cell, lr, seed, config, folder / RUNS / run_name(config))


def read_run(run: Run) -> Run:
    """A run as the disk has it now.

    Raises:
        ValueError: if one of its files is damaged.
    """
    diverged, summary = run.folder / runfolder.DIVERGED, run.folder / runfolder.SUMMARY
    path = diverged if diverged.exists() else summary
    if not path.exists():
        return run
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        lines = (run.folder / runfolder.METRICS).read_text(encoding="utf-8").splitlines()
        metrics = tuple(_checked_record(json.loads(line)) for line in lines)
        status: Status = "diverged" if path == diverged else "finished"
        reason = str(told["reason"]) if status == "diverged" else ""
        if status == "finished" and not metrics:
            raise ValueError("it has no metrics")
        if status == "finished" and metrics[-1].get("step") != told["step"]:
            raise ValueError(f"{runfolder.METRICS} ends at step {metrics[-1].get('step')}, the run at {told['step']}")
        return Run(run.cell, run.lr, run.seed, run.config, run.folder, status, metrics, float(told["seconds"]), reason)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"the files of the run in {run.folder} are damaged ({error}); remove it, to do it again"
        ) from error


def _checked_record(record: Any) -> Record:
    """A record that has what tables and pictures are made of."""
    for key in ("step", "epoch", "bytes_sent", "consensus_distance", "seconds_training", *TEST.values()):
        if not isinstance(record, dict) or not isinstance(record.get(key, ""), (int, float, type(None))):
            raise ValueError(f"a line of {runfolder.METRICS} has no number {key}")
    return dict(record)


def _run_of(run: Run, row: Mapping[str, str]) -> Run:
    """A run from its line of the CSV file: with the record that counts as the only one."""
    status: Status = "finished" if row["status"] == "finished" else "diverged"
    keys = (*VALIDATION.values(), *TEST.values(), "bytes_sent")  # a file of an older qgm_ext lacks some
    record = {key: float(row[key]) for key in keys if row.get(key)}
    return dataclasses.replace(
        run, status=status, metrics=(record,) if status == "finished" else (), seconds=float(row["seconds"])
    )


def _row(run: Run, chosen: bool, plan: Comparison, folder: Path) -> dict[str, Any]:
    record = run.record(plan) or {}
    measured = {name: record.get(name) for name in _COLUMNS if name in record}
    return measured | {
        "model": run.cell.model,
        "topology": run.cell.topology,
        "workers": run.cell.workers,
        "alpha": run.cell.alpha,
        "method": run.cell.method.label,
        "algorithm": run.config.algorithm,
        "hyper": json.dumps(dict(run.config.hyper), sort_keys=True),
        "runs_on": run.config.topology,
        "lr": run.lr,
        "seed": run.seed,
        "status": run.status,
        "chosen": int(chosen),
        "seconds": run.seconds,
        "folder": run.folder.relative_to(folder),
    }


def _key(cell: Cell) -> tuple[Any, ...]:
    return (*cell.place, cell.method.label)
