"""The run of a comparison: child processes that train, what each is to do next, and what it will take.

Everything is in the files of the runs. A comparison that was stopped or killed is started again and goes on: finished
runs are not repeated, begun ones continue from their checkpoint. What is compared is
:mod:`qgm_ext.experiments.comparison`'s business, what comes out :mod:`qgm_ext.experiments.results`'.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import qgm_ext
from qgm_ext.algorithms import check_number
from qgm_ext.experiments import compare_check, comparison, results, runfolder
from qgm_ext.experiments.comparison import Comparison
from qgm_ext.experiments.config import TrainConfig
from qgm_ext.experiments.results import Results, Run
from qgm_ext.files import told, write_atomically

__all__ = ["CompareError", "Estimate", "Outcome", "State", "compare"]

_POLL_SECONDS = 0.5
_CLOSING_SECONDS = 5.0
_CHILD = """
import json, sys
start = json.loads(sys.argv[1])
sys.path[:] = start["path"]
from multiprocessing.connection import Connection
from qgm_ext.experiments import compare_worker
compare_worker.serve(Connection(start["pipe"]), start["plugins"], start["threads"])
"""
# What tells nothing of how long a run takes.
_FREE_OF_COST = ("lr", "seed", "alpha", "warmup_from")
_DEFAULT_CHECKPOINT_SECONDS = 30.0


class CompareError(RuntimeError):
    """A run could not be done; what is done is kept. ``disk``: because a file could not be written or read."""

    def __init__(self, message: str, *, disk: bool = False) -> None:
        super().__init__(message)
        self.disk = disk


@dataclass(frozen=True)
class Estimate:
    """What a comparison will take.

    Args:
        runs: to be done; ``done``: those done before.
        seconds: about, on ``processes`` processes.
        measured: how it was found: "calibration" or "finished runs", or both.
    """

    runs: int
    done: int
    seconds: float
    processes: int
    measured: str


@dataclass(frozen=True)
class State:
    """Where a comparison stands.

    Args:
        done, runs: runs that are complete, and how many there will be.
        seconds, total_seconds: of work, what is done and all of it, as estimated; of one process.
        running: what is being trained, and which share of it is done.
    """

    done: int
    runs: int
    seconds: float
    total_seconds: float
    running: tuple[tuple[Run, float], ...]


@dataclass(frozen=True)
class Outcome:
    """What a call of :func:`compare` did.

    Args:
        results: the comparison's, finished or not.
        finished: whether all runs are done.
        seconds: of this call.
        estimate: what was foretold; None if there was nothing to do.
    """

    results: Results
    finished: bool
    seconds: float
    estimate: Estimate | None


def compare(
    plan: Comparison,
    out: str | os.PathLike[str],
    *,
    processes: int | None = None,
    threads: int = 1,
    checkpoint_seconds: float = _DEFAULT_CHECKPOINT_SECONDS,
    dry_run: bool = False,
    on_estimate: Callable[[Estimate], object] | None = None,
    on_run: Callable[[Run], object] | None = None,
    on_state: Callable[[State], object] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Outcome:
    """Do all runs of a comparison that are not done yet.

    Args:
        plan: what is compared.
        out: its folder: new, empty, or that of a comparison; runs that an earlier one has done are taken over.
        processes: child processes. (Default: as many as cores.)
        threads: CPU threads of each.
        checkpoint_seconds: seconds between checkpoints of a run.
        dry_run: measure and estimate only.
        on_estimate, on_run, on_state: told of the estimate, of each run that is done, and of progress.
        should_stop: asked twice a second; True ends the comparison after the running runs have written a checkpoint.

    Raises:
        ValueError, TypeError: if an argument does not fit, or the folder can't be used or is in use.
        OSError, ImportError: if data are missing, or what reads them.
        CompareError: if a run could not be done. Everything done until then is kept.

    What would stop a run later is found, as far as :mod:`qgm_ext.experiments.compare_check` can, before the first one.
    """
    count = _check_count("processes", available_cores() if processes is None else processes)
    _check_count("threads", threads)
    check_number("checkpoint_seconds", checkpoint_seconds, low=0.0)
    begin = time.perf_counter()
    folder = Path(out)
    if _read(plan, folder, threads).todo():
        compare_check.check(plan)
    with _taken(folder, plan):
        found = _read(plan, folder, threads)
        runner = _Runner(found, count, threads, checkpoint_seconds, on_run, on_state, should_stop or (lambda: False))
        estimate: Estimate | None = None
        try:
            if found.todo():
                estimate = runner.estimate()
                if estimate is not None and on_estimate is not None:
                    on_estimate(estimate)
                if estimate is not None and not dry_run:
                    runner.work()
            found.write_csv()
        except OSError as error:
            raise CompareError(told(error), disk=True) from error
        finally:
            runner.close()
    return Outcome(found, not found.todo(), time.perf_counter() - begin, estimate)


def _read(plan: Comparison, folder: Path, threads: int) -> Results:
    return Results(plan, folder, [results.read_run(run) for run in results.planned_runs(plan, folder, threads)])


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class _Child:
    """One child process and what it is doing."""

    def __init__(self, plugins: Sequence[str], threads: int) -> None:
        ours, theirs = socket.socketpair()
        # Not multiprocessing.Process: it would run the caller's main module once more, which need not be made for it.
        start = json.dumps({"path": sys.path, "pipe": theirs.fileno(), "plugins": list(plugins), "threads": threads})
        # Until the child ignores them by itself: what stops all processes must not end it while it is being started.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, start],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self.pipe = Connection(ours.detach())
        self.run: Run | None = None
        self.share = 0.0

    def give(self, kind: str, run: Run, checkpoint_seconds: float) -> None:
        self.run, self.share = run, 0.0
        self.pipe.send(
            {
                "kind": kind,
                "config": run.config.as_dict(),
                "folder": str(run.folder),
                "checkpoint_seconds": checkpoint_seconds,
            }
        )

    def answer(self) -> Mapping[str, Any]:
        """The next answer; that of a child that has died is a failure."""
        try:
            answer: Mapping[str, Any] = self.pipe.recv()
        except (EOFError, OSError):
            code = self.process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return {"kind": "failed", "error": f"its process {how}", "disk": False}
        return answer

    def say_stop(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send({"kind": "stop"})

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.pipe.close()
        try:
            self.process.wait(timeout=_CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()  # a checkpoint is never half written
            self.process.wait()


class _Runner:
    """The children, the runs still to do, and their costs."""

    def __init__(
        self,
        found: Results,
        processes: int,
        threads: int,
        checkpoint_seconds: float,
        on_run: Callable[[Run], object] | None,
        on_state: Callable[[State], object] | None,
        should_stop: Callable[[], bool],
    ) -> None:
        self._found = found
        self._processes = processes
        self._threads = threads
        self._checkpoint_seconds = checkpoint_seconds
        self._on_run, self._on_state, self._should_stop = on_run, on_state, should_stop
        self._children: list[_Child] = []
        self._costs: dict[str, float] = {}

    def estimate(self) -> Estimate | None:
        """Measure what has not been measured; None if it was stopped meanwhile."""
        for run in self._found.runs.values():
            if run.status == "finished":
                self._costs[_cost_class(run.config)] = run.seconds
        known = set(self._costs)
        missing: dict[str, Run] = {}
        for run in self._found.todo():
            if _cost_class(run.config) not in self._costs:
                missing.setdefault(_cost_class(run.config), run)
        self._start_children(len(missing) or 1)
        waiting = deque(missing.values())

        def measured(run: Run, answer: Mapping[str, Any]) -> None:
            cost = answer["setup"] + answer["steps"] * answer["step"] + answer["evaluations"] * answer["evaluation"]
            self._costs[_cost_class(run.config)] = cost

        if not self._loop("calibrate", waiting, measured):
            return None
        total, todo = self._total_runs(), self._found.todo()
        seconds = sum(self._cost(run) for run in self._all_ahead())
        used = min(self._processes, max(len(todo), 1))
        ways = [*(["finished runs"] if known else []), *(["calibration"] if missing else [])]
        return Estimate(total - self._done(), self._done(), seconds / used, used, " and ".join(ways))

    def work(self) -> None:
        """Do the runs; returns early if asked to stop."""
        todo = self._found.todo()
        self._start_children(len(todo))
        given = {run.folder for run in todo}
        waiting = deque(todo)

        def done(run: Run, answer: Mapping[str, Any]) -> None:
            if answer["kind"] != "done":
                return
            # Cells may share a run: that of a centralised method on several topologies.
            for other in [other for other in self._found.runs.values() if other.folder == run.folder]:
                self._found.add(results.read_run(other))
            self._found.write_csv()
            if self._on_run is not None:
                self._on_run(results.read_run(run))
            for more in self._found.todo():  # those with the step size that has just been chosen
                if more.folder not in given:
                    given.add(more.folder)
                    waiting.appendleft(more)

        self._loop("train", waiting, done)

    def close(self) -> None:
        """End the children."""
        for child in self._children:
            child.close()
        self._children = []

    def _start_children(self, runs: int) -> None:
        while len(self._children) < min(self._processes, runs):
            self._children.append(_Child(self._found.plan.plugins, self._threads))

    def _loop(self, kind: str, waiting: deque[Run], done: Callable[[Run, Mapping[str, Any]], None]) -> bool:
        """Keep the children busy until nothing is left; False if it was stopped. The first failure stops, too."""
        stopped = False
        failure: CompareError | None = None
        while True:
            if not stopped and (failure is not None or self._should_stop()):
                stopped = True
                for child in self._children:
                    if child.run is not None:
                        child.say_stop()
            if not stopped:
                for child in self._children:
                    if child.run is None and waiting:
                        child.give(kind, waiting.popleft(), self._checkpoint_seconds)
            busy = [child for child in self._children if child.run is not None]
            if not busy:
                break
            if kind == "train":
                self._tell_state(busy)
            ready = multiprocessing.connection.wait([child.pipe for child in busy], timeout=_POLL_SECONDS)
            for child in busy:
                if child.pipe not in ready or child.run is None:
                    continue
                answer = child.answer()
                if answer["kind"] == "progress":
                    child.share = answer["share"]
                    continue
                run, child.run = child.run, None
                if answer["kind"] == "failed":
                    failure = failure or CompareError(f"{run}: {answer['error']}", disk=answer["disk"])
                else:
                    try:
                        done(run, answer)
                    except OSError as error:
                        failure = failure or CompareError(told(error), disk=True)
        if kind == "train":
            self._tell_state([])
        if failure is not None:
            raise failure
        return not stopped

    def _tell_state(self, busy: Sequence[_Child]) -> None:
        if self._on_state is None:
            return
        running = tuple((child.run, child.share) for child in busy if child.run is not None)
        done = {run.folder: run for run in self._found.runs.values() if run.status != "unfinished"}
        behind = sum(map(self._cost, done.values()))
        partly = sum(self._cost(run) * share for run, share in running)
        ahead = sum(map(self._cost, self._all_ahead()))
        self._on_state(State(self._done(), self._total_runs(), behind + partly, behind + ahead, running))

    def _all_ahead(self) -> Iterator[Run]:
        """What is still to do, with runs of step sizes not chosen yet stood for by others of the same cost."""
        yield from self._found.todo()
        seeds = self._found.plan.search_seeds()
        for cell in self._found.plan.cells():
            if not self._found.searched(cell):
                yield from (run for run in self._found.of(cell, cell.method.lrs[0]) if run.seed not in seeds)

    def _cost(self, run: Run) -> float:
        return self._costs.get(_cost_class(run.config), run.seconds)

    def _done(self) -> int:
        return len({run.folder for run in self._found.runs.values() if run.status != "unfinished"})

    def _total_runs(self) -> int:
        return self._done() + len({run.folder for run in self._all_ahead()})


def _cost_class(config: TrainConfig) -> str:
    return json.dumps({key: value for key, value in config.as_dict().items() if key not in _FREE_OF_COST})


@contextlib.contextmanager
def _taken(folder: Path, plan: Comparison) -> Iterator[None]:
    """The folder locked, with the plan in it."""
    if not (folder / results.COMPARISON).is_file():
        runfolder.check_empty(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = runfolder.lock_folder(folder, "comparison")
    except OSError as error:
        raise ValueError(f"out folder {folder} can't be written to: {error.strerror or error}") from error
    try:
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        content = {
            "format": comparison.FORMAT,
            "qgm_ext": qgm_ext.__version__,
            "comparison": plan.as_dict(),
        }
        text = runfolder.json_text(content).encode()
        write_atomically(folder / results.COMPARISON, lambda file: file.write(text))
        (folder / results.RUNS).mkdir(exist_ok=True)  # after what makes the folder one that can be taken up again
        yield
    finally:
        os.close(lock)


def _check_count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
