"""A training run: n workers, from a TrainConfig to a Result, resumable to the same bits.

All of them are in this process on one device, or, in a process group of torch.distributed, one is in each process.

``run(config)`` is the whole of it for a script; :class:`Training` is the same in two halves, so that a caller can show
the partition before the first step. Everything that decides the outcome is in the config; one seed drives the initial
model, the partition and the batches, each as a function of the step number, so a checkpoint holds little more than
parameters and state. What a run is made from is told by :mod:`qgm_ext.experiments.inputs`, what is measured by
``recorder``, what is kept for a resumption by ``resumption``; the files are the business of ``runfolder``, and a run
without a folder writes none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from qgm_ext import algorithms, data
from qgm_ext.distributed.options import OnPeerLoss
from qgm_ext.distributed.process_worker import ProcessWorker
from qgm_ext.experiments import config as configs
from qgm_ext.experiments import curves, events, inputs, resumption, runfolder
from qgm_ext.experiments.config import TrainConfig
from qgm_ext.experiments.recorder import Record, Recorder
from qgm_ext.experiments.runfolder import RunFolder
from qgm_ext.experiments.worker_files import WorkerFiles, by_first, has_peers
from qgm_ext.files import write_atomically
from qgm_ext.simulator import Simulator

__all__ = ["Record", "Result", "Training", "resume", "run"]


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Args:
        config: complete, with every default filled in.
        metrics: one record for each evaluation: step, epoch, loss (mean over workers and steps since the last one),
            accuracy_local_mean, accuracy_local_min, accuracy_local_max, accuracy_average (on the test set),
            consensus_distance, lr, bytes_sent (by all workers together), seconds and seconds_training (evaluations
            left out); with a validation set also validation_accuracy_local_mean, validation_accuracy_local_min,
            validation_accuracy_average and validation_loss_local_mean; with ``staleness`` also stale_share, of the
            messages merged so far the share of those of earlier steps.
        summary: the last of them, and speed and shares of time; with ``staleness`` also message_ages, how many of the
            messages that all workers merged were 0, 1, ..., k steps old.
        simulator: the trained workers; ``simulator.average_model()`` is the model to use. In a process group of several
            processes it is this process's own worker, and that call a collective.
        finished: False if it was stopped before its last step.
    """

    config: TrainConfig
    metrics: list[Record]
    summary: Record
    simulator: Simulator | ProcessWorker
    finished: bool


def run(
    config: TrainConfig,
    out: str | os.PathLike[str] | None = None,
    *,
    tensorboard: bool = False,
    checkpoint_seconds: float = 5.0,
) -> Result:
    """Train.

    Args:
        config: what to train.
        out: folder for the run's files, empty or not there yet; None: no files.
        tensorboard, checkpoint_seconds: as in :class:`Training`.

    Raises:
        TypeError, ValueError: if something does not fit, before any work.
        FileNotFoundError, ImportError: if data or a package is missing.
        NonFiniteGradientError: in the middle, with on_nonfinite="raise".

    Example:
        >>> result = run(TrainConfig(workers=4, epochs=1, num_train=200))
        >>> result.finished, [record["step"] for record in result.metrics]
        (True, [0, 3])
    """
    with Training(config, out, tensorboard=tensorboard, checkpoint_seconds=checkpoint_seconds) as training:
        return training.run()


def resume(out: str | os.PathLike[str], *, checkpoint_seconds: float = 5.0) -> Result:
    """Continue the run in a folder from its last checkpoint, to the same bits as if it had never stopped.

    Args:
        out: the folder.
        checkpoint_seconds: as in :class:`Training`.

    Raises:
        ValueError: if there is no run in it, or a file is damaged or does not belong to the others.
    """
    with Training.resume(out, checkpoint_seconds=checkpoint_seconds) as training:
        return training.run()


class Training:
    """A run that is ready to start: everything checked, loaded and built. A context manager.

    Args:
        config: what to train.
        out: folder for the run's files, empty or not there yet; None: no files.
        tensorboard: write events to ``out``/tensorboard as well.
        checkpoint_seconds: seconds between checkpoints; 0: one after every step. Has no influence on the outcome.
        on_peer_loss: "heal": where each worker has a process of its own the others go on when one dies
            (:class:`qgm_ext.distributed.RuntimeOptions`); records are of those that are left then. Rank 0 keeps the
            files of the run; if it dies, those of each worker go on.

    In a process group every process gives the same arguments; ``out`` is one folder, or one on each machine, and rank 0
    keeps the files of the run, each worker some of its own (:mod:`qgm_ext.experiments.worker_files`).

    Attributes:
        config: complete, with every default filled in.
        dataset, partition: the data and their split.
        validation_indices: positions in the training set of the samples held out for validation, ascending.
        num_steps: length of the run.
        step: steps done so far.
        notes: what a user should know of a resumed run.

    Raises: as :func:`run`.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: str | os.PathLike[str] | None = None,
        *,
        tensorboard: bool = False,
        checkpoint_seconds: float = 5.0,
        on_peer_loss: OnPeerLoss = "raise",
    ) -> None:
        algorithms.check_number("checkpoint_seconds", checkpoint_seconds, low=0.0)
        if tensorboard and out is None:
            raise ValueError("tensorboard needs an out folder, where its events are written")
        with contextlib.ExitStack() as stack:
            taken: list[RunFolder] = []

            def take() -> str:
                if out is not None:
                    taken.append(stack.enter_context(RunFolder.create(out, beside_workers=has_peers())))
                return ""

            by_first(take)
            folder = taken[0] if taken else None
            self._build(config, folder, None, tensorboard, checkpoint_seconds, on_peer_loss)
            if out is not None:
                by_first(self._write_start)
                self._take_own_files(stack, Path(out))
                if self._own is not None:  # a run whose first machine is another one now
                    self._go_on(resumption.restore_worker(self._own, Path(out), self._inputs, self._recorder))
            self._stack = stack.pop_all()

    @classmethod
    def resume(
        cls,
        out: str | os.PathLike[str],
        *,
        given: dict[str, Any] | None = None,
        tensorboard: bool = False,
        checkpoint_seconds: float = 5.0,
        on_peer_loss: OnPeerLoss = "raise",
    ) -> Training:
        """Take up the run in a folder.

        Args:
            out: the folder.
            given: fields of the config that must be as in the run, e.g. because a user repeated them.
            tensorboard: as in the class; a run that was started with it keeps it.
            checkpoint_seconds, on_peer_loss: as in the class.

        Raises:
            ValueError: if there is no run in the folder, a file is damaged, or ``given`` contradicts the run.

        In a process group of another size than before, all workers start from the average of the saved models, at the
        epoch (of a run of so many steps: at the step) where it was; ``notes`` says so. As it does where a worker whose
        checkpoints are lost takes up those of a neighbour (:func:`qgm_ext.distributed.checkpoint.load`).
        """
        algorithms.check_number("checkpoint_seconds", checkpoint_seconds, low=0.0)
        self = cls.__new__(cls)
        with contextlib.ExitStack() as stack:
            taken: list[RunFolder] = []

            def take() -> str:
                folder = stack.enter_context(RunFolder.open(out))
                resumption.check_kind(folder)
                taken.append(folder)
                return folder.file(runfolder.CONFIG).read_text(encoding="utf-8")

            text = by_first(take)
            folder, path = taken[0] if taken else None, Path(out)
            stored_config, about = configs.parse(text, path / runfolder.CONFIG)
            config = stored_config
            if has_peers() and config.workers != dist.get_world_size():
                config = dataclasses.replace(config, workers=dist.get_world_size())
            differing = config.contradictions(given or {})
            if differing:
                raise ValueError(f"can't resume {path} with other options: {'; '.join(differing)}")
            stored, partition = path / runfolder.PARTITION, None
            if config == stored_config and stored.exists():
                partition = data.Partition.load(stored)
            tensorboard = tensorboard or bool(about.get("tensorboard"))
            self._build(config, folder, partition, tensorboard, checkpoint_seconds, on_peer_loss)
            self.notes = resumption.check_about(path, about, self._inputs, same_workers=config == stored_config)
            if config != stored_config:
                by_first(self._write_start)
            elif partition is None and folder is not None:
                # Killed before it was written; what has been drawn again is the same, as checked.
                self.partition.save(stored)
            self._take_own_files(stack, path)
            if self._own is not None:
                self._go_on(resumption.restore_worker(self._own, path, self._inputs, self._recorder))
            elif folder is not None:
                self._go_on(resumption.restore(folder, self._inputs, self._recorder))
            self._stack = stack.pop_all()
        return self

    def _build(
        self,
        config: TrainConfig,
        folder: RunFolder | None,
        partition: data.Partition | None,
        with_tensorboard: bool,
        checkpoint_seconds: float,
        on_peer_loss: OnPeerLoss,
    ) -> None:
        """All that both a new and a resumed run begin with; what fails here has left nothing behind."""
        self._folder = folder
        self._tensorboard = with_tensorboard
        self._checkpoint_seconds = checkpoint_seconds
        if folder is not None:
            curves.require_matplotlib()  # at the start rather than at the end of a long run
        if with_tensorboard:
            events.require_tensorboard()
        self._inputs = inputs.build(config, partition, on_peer_loss)
        self._recorder = Recorder(self._inputs)
        self.config = config
        self.dataset, self.partition = self._inputs.dataset, self._inputs.partition
        self.validation_indices = self._inputs.validation_indices
        self.num_steps = self._inputs.num_steps
        self.step = 0
        self.notes: list[str] = []
        self._rng: dict[str, Tensor] | None = None
        self._own: WorkerFiles | None = None

    def _go_on(self, point: resumption.Point | None) -> None:
        if point is not None:
            self.step, self._rng = point.step, point.rng
            self.notes += [point.note] if point.note else []

    def _write_start(self) -> str:
        """Write what makes the folder a run that can be resumed; the config first, for all else follows from it."""
        if self._folder is not None:
            self._folder.file(runfolder.PARTITION).unlink(missing_ok=True)
            self._folder.write_text(
                runfolder.CONFIG, configs.dumps(self.config, resumption.about(self._inputs, self._tensorboard))
            )
            self.partition.save(self._folder.file(runfolder.PARTITION))
        return ""

    def _take_own_files(self, stack: contextlib.ExitStack, out: Path) -> None:
        sim = self._inputs.sim
        if isinstance(sim, ProcessWorker):
            files = WorkerFiles(out, sim, self._tensorboard, self._checkpoint_seconds)
            self._own = stack.enter_context(files)

    @property
    def speaks(self) -> bool:
        """Whether this is the process that tells of the run: that of the lowest worker that is left."""
        sim = self._inputs.sim
        return not isinstance(sim, ProcessWorker) or sim.worker == sim.left[0]

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which the smallest worker sees its samples once."""
        return self._inputs.batches.steps_per_epoch

    def run(
        self,
        *,
        on_step: Callable[[int], object] | None = None,
        on_evaluation: Callable[[Record], object] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Result:
        """Train to the end, or until ``should_stop``.

        Args:
            on_step: called after each step with the number of steps done.
            on_evaluation: called with each new record.
            should_stop: asked before each step; True ends the run after a checkpoint, to be resumed. In a process
                group with ``out`` it ends the run of all workers, within about half a second.

        Raises:
            NonFiniteGradientError: with on_nonfinite="raise"; the last checkpoint stays.
            OSError: if a file can't be written.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(inputs.torch_threads(self.config.threads))
            stack.enter_context(self._seeded())
            recorder = self._recorder
            writer: events.EventWriter | None = None
            if self._folder is not None:
                self._folder.start_metrics(recorder.records)
                if self._tensorboard:
                    writer = events.EventWriter(self._folder.file("tensorboard"), recorder.records)
                    stack.callback(writer.close)
            if self._own is not None:
                self._own.start(self.step, recorder.own_records)

            def evaluate() -> None:
                record = recorder.evaluate(self.step)
                if self._folder is not None:
                    self._folder.append_metrics(record)
                if writer is not None:
                    writer.write(record)
                if self._own is not None:
                    self._own.append(recorder.own_records[-1])
                if on_evaluation is not None:
                    on_evaluation(record)

            saved = recorder.start()
            every = self.config.eval_every * self.steps_per_epoch
            if not recorder.records:
                evaluate()
            stopping = stopped = due = False
            while self.step < self.num_steps and not stopped:
                stopping = stopping or (should_stop is not None and should_stop())
                stopped = stopping
                if self._own is not None:
                    stopped, due = self._own.agree(self.step, stopping)
                if not stopped:
                    self._step()
                    if on_step is not None:
                        on_step(self.step)
                    if self.step % every == 0 or self.step == self.num_steps:
                        evaluate()
                now = recorder.tick()
                if self._own is None:
                    due = now - saved >= self._checkpoint_seconds
                if stopped or self.step == self.num_steps or due:
                    self._save_checkpoint()
                    saved = now
            if isinstance(self._inputs.sim, ProcessWorker):
                self._inputs.sim.drain()
            finished = self.step == self.num_steps
            result = Result(self.config, recorder.records, recorder.summary(self.step), self._inputs.sim, finished)
            if self._folder is not None and finished:
                self._write_outcome(self._folder, result)
            return result

    def evaluate(self) -> Record:
        """Measure the models as they are now, in memory only; :meth:`run` does so by itself, and writes it down."""
        return self._recorder.evaluate(self.step)

    def close(self) -> None:
        """Give up the folder."""
        self._stack.close()

    def __enter__(self) -> Training:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _step(self) -> None:
        sim, lr = self._inputs.sim, self._inputs.schedule.at(self.step)
        if isinstance(sim, ProcessWorker):
            x, y = self._inputs.batches.at(self.step, sim.worker)
            losses = sim.step(functional.cross_entropy, x, y, lr)
        else:
            losses = sim.step(functional.cross_entropy, self._inputs.batches.at(self.step), lr=lr)
        self._recorder.count(losses)
        self.step += 1

    def _write_outcome(self, folder: RunFolder, result: Result) -> None:
        title = (
            f"{self.config.algorithm} on {self.config.data}, {self.config.topology} of {self.config.workers}, "
            f"{inputs.describe_partition(self.config)}, {self.config.model}, lr {self.config.lr:g}, "
            f"seed {self.config.seed}"
        )
        chance = 1 / self.dataset.num_classes
        write_atomically(
            folder.file(runfolder.CURVES),
            lambda file: curves.save_learning_curves(file, result.metrics, title, chance),
        )
        described = {key: getattr(self.config, key) for key in ("algorithm", "topology", "workers", "data", "seed")}
        folder.write_json(runfolder.SUMMARY, described | result.summary)

    def _save_checkpoint(self) -> None:
        if self._own is not None:
            resumption.save_worker(self._own, self._inputs, self._recorder, self.step)
        elif self._folder is not None:
            resumption.save(self._folder, self._inputs, self._recorder, self.step)

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        """Models that draw numbers as they train (dropout) draw the same ones again; the caller's are not touched."""
        devices = [self._inputs.device] if self._inputs.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.backends.cudnn.flags(deterministic=True, benchmark=False):
            if self._rng is None:
                torch.manual_seed(self.config.seed)
            else:
                torch.set_rng_state(self._rng["cpu"])
                if devices:
                    torch.cuda.set_rng_state(self._rng["cuda"], self._inputs.device)
            yield
