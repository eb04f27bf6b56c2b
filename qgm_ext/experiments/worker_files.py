"""Files of a training run whose workers have processes of their own, and how these agree on them.

Rank 0 keeps the run's files as a run in one process does (:mod:`qgm_ext.experiments.runfolder`). Besides, every worker
keeps OUT/worker-3-of-8/metrics.jsonl, what it alone has seen, its TensorBoard events beside it if they are wanted, and
its part of OUT/checkpoints (:mod:`qgm_ext.distributed.checkpoint`). On several machines OUT may be one shared folder or
a folder on each. What goes into the records and checkpoints is said by :mod:`qgm_ext.experiments.train`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qgm_ext.distributed import checkpoint
from qgm_ext.distributed.agreement import gather_json
from qgm_ext.distributed.process_worker import ProcessWorker
from qgm_ext.experiments import events
from qgm_ext.experiments.runfolder import CHECKPOINTS, RunFolder

__all__ = ["WorkerFiles", "by_first", "has_peers"]

_TOGETHER = 0.5  # seconds between the moments at which workers agree on what to do


def has_peers() -> bool:
    """Whether this process is one worker of several: torchrun started it, and it has joined their group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def by_first(action: Callable[[], str]) -> str:
    """Let rank 0 alone do something and give all workers the text it returns; a collective, if there are several.

    Raises:
        ValueError: on all workers, if ``action`` raises it or an OSError.
    """
    if not has_peers():
        return action()
    said = None
    if dist.get_rank() == 0:
        try:
            said = {"text": action()}
        except (ValueError, OSError) as error:
            said = {"error": str(error)}
    found = gather_json(None, said, torch.device("cpu"))[0]
    if "error" in found:
        raise ValueError(found["error"])
    return str(found["text"])


class WorkerFiles:
    """The files of this worker; a context manager.

    Args:
        out: the run's folder.
        sim: the worker.
        tensorboard: write events as well.
        checkpoint_seconds: about so many seconds lie between checkpoints; 0: one after every step.

    Attributes:
        checkpoints: the folder of those of all workers.

    Raises:
        ValueError: if they can't be written or are in use.
    """

    def __init__(self, out: Path, sim: ProcessWorker, tensorboard: bool, checkpoint_seconds: float) -> None:
        self._sim = sim
        self.checkpoints = out / CHECKPOINTS
        self._seconds = checkpoint_seconds
        self._writer: events.EventWriter | None = None
        self._since, self._since_step, self._next, self._saved = time.perf_counter(), 0, 0, -math.inf
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(RunFolder.of_worker(out / f"worker-{sim.worker}-of-{sim.num_workers}"))
            self._tensorboard = self._folder.file("tensorboard") if tensorboard else None
            self._stack = stack.pop_all()

    def load(self) -> tuple[checkpoint.Loaded, torch.Tensor] | None:
        """Take up the last step that all workers have saved, if there is one; a collective, also in a new run.

        Returns:
            What was loaded, and the state of torch's random numbers, which are left as they are; None before the first.

        Raises:
            ValueError: as :func:`qgm_ext.distributed.checkpoint.load`.
        """
        with torch.random.fork_rng(devices=[]):
            loaded = checkpoint.load(self.checkpoints, self._sim.model, self._sim.opt)
            return None if loaded is None else (loaded, torch.get_rng_state())

    def save(self, step: int, extra: Mapping[str, Any]) -> None:
        """Save this worker.

        Raises:
            OSError: if it can't be written.
        """
        self._folder.flush_metrics()
        checkpoint.save(self.checkpoints, self._sim.model, self._sim.opt, step, extra=extra)
        self._saved = time.perf_counter()

    def agree(self, step: int, stopping: bool) -> tuple[bool, bool]:
        """What all workers do now, before step number ``step``; a collective about twice a second.

        They must save and stop at the same steps, and signals reach them at different ones. So they count steps to the
        next moment at which they tell each other; between two checkpoints nobody gets ahead of another.

        Args:
            step: how many have been taken.
            stopping: whether this worker shall stop.

        Returns:
            Whether all stop, because one shall, and whether all save after the next step.
        """
        if step < self._next:
            return False, False
        now, taken = time.perf_counter(), step - self._since_step
        each = (now - self._since) / taken if taken else math.inf
        ahead = max(1, int(min(self._seconds, _TOGETHER) / max(each, 1e-9)))
        said = torch.tensor([int(stopping), int(now - self._saved >= self._seconds), -ahead])
        stops, due, behind = self._sim.maximum(said).tolist()
        self._since, self._since_step, self._next = now, step, step - behind
        return bool(stops), bool(due)

    def start(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Make metrics and events hold exactly these records; the first checkpoint comes after one step."""
        self._folder.start_metrics(records)
        if self._tensorboard is not None:
            self._writer = events.EventWriter(self._tensorboard, records)
            self._stack.callback(self._writer.close)
        self._since, self._since_step, self._next = time.perf_counter(), step, step

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one more record."""
        self._folder.append_metrics(record)
        if self._writer is not None:
            self._writer.write(record)

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def __enter__(self) -> WorkerFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
