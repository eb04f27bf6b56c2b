"""The child processes of a comparison: each trains one run after the other, as its parent says.

Job and answers are plain dictionaries over a pipe. A child ends by itself, after a checkpoint, when the pipe breaks, so
that killing the parent leaves nothing behind. What a run needs and leaves is :mod:`qgm_ext.experiments.train`'s.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from qgm_ext.experiments import runfolder
from qgm_ext.experiments.config import TrainConfig, loads
from qgm_ext.experiments.plugins import load_plugins
from qgm_ext.experiments.train import Record, Training
from qgm_ext.files import told, write_atomically
from qgm_ext.stacked import NonFiniteGradientError

__all__ = ["calibrate", "serve", "train"]

_SECONDS_BETWEEN_REPORTS = 0.25
_CALIBRATION_STEPS = 4  # the first of them warms up and is not counted
_CALIBRATION_SECONDS = 10.0

Answer = dict[str, Any]


class _Parent:
    """The pipe to the parent: it is told of progress, and asked whether to stop."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._reported = 0.0
        self.stop = False

    def should_stop(self) -> bool:
        try:
            if not self.stop and self._pipe.poll():
                self._pipe.recv()  # the only thing said during a run is: stop
                self.stop = True
        except (EOFError, OSError):
            self.stop = True  # the parent is gone
        return self.stop

    def report(self, step: int, num_steps: int) -> None:
        now = time.monotonic()
        if now - self._reported >= _SECONDS_BETWEEN_REPORTS and not self.stop:
            self._reported = now
            self.tell({"kind": "progress", "share": step / num_steps})

    def tell(self, answer: Answer) -> None:
        try:
            self._pipe.send(answer)
        except OSError:
            self.stop = True

    def next_job(self) -> Mapping[str, Any] | None:
        try:
            job: Mapping[str, Any] | None = self._pipe.recv()
        except (EOFError, OSError):
            return None
        return job


def serve(pipe: Connection, plugins: Sequence[str], threads: int) -> None:
    """The whole life of a child process.

    Args:
        pipe: jobs come in, {"kind": "train" | "calibrate", "config": ..., "folder": ..., "checkpoint_seconds": ...};
            None ends the child. Answers go out.
        plugins: as in :class:`Comparison`.
        threads: CPU threads.
    """
    # Ctrl-C, timeout and a scheduler reach all processes; the parent says what to do, and its end is noticed.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(threads)
    parent = _Parent(pipe)
    try:
        load_plugins(plugins)
    except ValueError as error:
        parent.tell({"kind": "failed", "error": str(error), "disk": False})
        return
    while not parent.stop:
        job = parent.next_job()
        if job is None or "config" not in job:
            return
        config = TrainConfig(**job["config"])
        try:
            if job["kind"] == "calibrate":
                answer = calibrate(config)
            else:
                answer = train(config, Path(job["folder"]), parent, job["checkpoint_seconds"])
        except (OSError, ValueError, TypeError, ImportError, RuntimeError, MemoryError) as error:
            disk = isinstance(error, OSError) or isinstance(error.__cause__, OSError)  # of a folder: a ValueError
            answer = {
                "kind": "failed",
                "error": told(error) if disk else f"{type(error).__name__}: {error}",
                "disk": disk,
            }
        parent.tell(answer)


def train(config: TrainConfig, folder: Path, parent: _Parent, checkpoint_seconds: float) -> Answer:
    """Start or continue the run in ``folder``; a run that diverges is told of in a file of its own, and is complete."""
    if (folder / runfolder.CONFIG).exists():
        stored, _ = loads(folder / runfolder.CONFIG)
        differing = stored.contradictions({k: v for k, v in config.as_dict().items() if k != "threads"})
        if differing:
            raise ValueError(f"{folder} holds another run than its name says: {'; '.join(differing)}")
        training = Training.resume(folder, checkpoint_seconds=checkpoint_seconds)
    else:
        training = Training(config, folder, checkpoint_seconds=checkpoint_seconds)
    with training:
        begin = time.perf_counter()
        try:
            result = training.run(
                on_step=lambda step: parent.report(step, training.num_steps), should_stop=parent.should_stop
            )
        except NonFiniteGradientError as error:
            _record_divergence(folder, training.step, str(error), time.perf_counter() - begin)
            return {"kind": "done"}
        if result.finished and not _is_finite(result.metrics[-1]):
            _record_divergence(folder, training.step, "the parameters are not finite", result.summary["seconds"])
        return {"kind": "done" if result.finished else "stopped"}


def calibrate(config: TrainConfig) -> Answer:
    """Measure what a run costs: seconds to set up, for a step and for an evaluation, and how many of both it has."""
    begin = time.perf_counter()
    with Training(config) as training:
        setup = time.perf_counter() - begin
        times: list[float] = []
        first: list[float] = []  # the evaluation before the first step, of equal workers, takes less than later ones
        run_begin = time.perf_counter()

        def enough() -> bool:
            slow = time.perf_counter() - run_begin > _CALIBRATION_SECONDS
            return len(times) >= _CALIBRATION_STEPS or (slow and bool(times))

        with contextlib.suppress(NonFiniteGradientError):  # a diverging run is as fast as any other, and shorter
            training.run(
                on_step=lambda _: times.append(time.perf_counter()),
                on_evaluation=lambda _: first.append(time.perf_counter() - run_begin),
                should_stop=enough,
            )
        steps = [after - before for before, after in itertools.pairwise(times)]
        # times is empty if the gradients of the first step were not finite
        step = min(steps) if steps else (times[0] - run_begin - first[0] if times else 0.0)
        evaluation_begin = time.perf_counter()
        training.evaluate()
        return {
            "kind": "measured",
            "setup": setup + first[0],
            "step": step,
            "evaluation": time.perf_counter() - evaluation_begin,
            "steps": training.num_steps,
            "evaluations": -(-training.num_steps // (config.eval_every * training.steps_per_epoch)),
        }


def _record_divergence(folder: Path, step: int, reason: str, seconds: float) -> None:
    text = runfolder.json_text({"step": step, "reason": reason, "seconds": round(seconds, 3)})
    write_atomically(folder / runfolder.DIVERGED, lambda file: file.write(text.encode()))


def _is_finite(record: Record) -> bool:
    return all(math.isfinite(record[key]) for key in ("consensus_distance", "loss") if record[key] is not None)
