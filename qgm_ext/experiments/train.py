"""A training run: n workers, from a TrainConfig to a Result, resumable to the same bits.

All of them are in this process on one device, or, in a process group of torch.distributed, one is in each process.

``run(config)`` is the whole of it for a script; :class:`Training` is the same in two halves, so that a caller can show
the partition before the first step. Everything that decides the outcome is in the config; one seed drives the initial
model, the partition and the batches, each as a function of the step number, so a checkpoint holds little more than
parameters and state. The files are :mod:`qgm_ext.experiments.runfolder`'s business, and a run without a folder writes
none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

import qgm_ext
from qgm_ext import algorithms, data, ops, topology
from qgm_ext.data import augment
from qgm_ext.data.datasets import subset
from qgm_ext.distributed import checkpoint as checkpoints
from qgm_ext.distributed.communication import Communication
from qgm_ext.distributed.process_worker import ProcessWorker
from qgm_ext.experiments import config as configs
from qgm_ext.experiments import curves, events, inputs, runfolder
from qgm_ext.experiments.config import TrainConfig
from qgm_ext.experiments.runfolder import RunFolder
from qgm_ext.experiments.schedules import Schedule
from qgm_ext.experiments.worker_files import WorkerFiles, by_first, has_peers
from qgm_ext.simulator import Simulator

__all__ = ["Record", "Result", "Training", "resume", "run"]

_LARGE_EVALUATION = 1 << 27  # multiply-adds of one model on the test set, from which more threads help
_CHECKPOINT_FORMAT = "qgm_ext.checkpoint/1"

Record = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Args:
        config: complete, with every default filled in.
        metrics: one record for each evaluation: step, epoch, loss (mean over workers and steps since the last one),
            accuracy_local_mean, accuracy_local_min, accuracy_local_max, accuracy_average (on the test set),
            consensus_distance, lr, bytes_sent (by all workers together), seconds and seconds_training (evaluations
            left out); with a validation set also validation_accuracy_local_mean,
            validation_accuracy_average and validation_loss_local_mean.
        summary: the last of them, and speed and shares of time.
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
    ) -> None:
        algorithms.check_number("checkpoint_seconds", checkpoint_seconds, low=0.0)
        if tensorboard and out is None:
            raise ValueError("tensorboard needs an out folder, where its events are written")
        with contextlib.ExitStack() as stack:
            taken: list[RunFolder] = []

            def take() -> str:
                if out is not None:
                    taken.append(stack.enter_context(RunFolder.create(out)))
                return ""

            by_first(take)
            folder = taken[0] if taken else None
            self._build(config, folder, None, tensorboard, checkpoint_seconds)
            if out is not None:
                by_first(self._write_start)
                self._take_own_files(stack, Path(out))
            self._stack = stack.pop_all()

    @classmethod
    def resume(
        cls,
        out: str | os.PathLike[str],
        *,
        given: dict[str, Any] | None = None,
        tensorboard: bool = False,
        checkpoint_seconds: float = 5.0,
    ) -> Training:
        """Take up the run in a folder.

        Args:
            out: the folder.
            given: fields of the config that must be as in the run, e.g. because a user repeated them.
            tensorboard: as in the class; a run that was started with it keeps it.
            checkpoint_seconds: as in the class.

        Raises:
            ValueError: if there is no run in the folder, a file is damaged, or ``given`` contradicts the run.

        In a process group of another size than before, all workers start from the average of the saved models, at the
        epoch (of a run of so many steps: at the step) where it was; ``notes`` says so.
        """
        algorithms.check_number("checkpoint_seconds", checkpoint_seconds, low=0.0)
        self = cls.__new__(cls)
        with contextlib.ExitStack() as stack:
            taken: list[RunFolder] = []

            def take() -> str:
                folder = stack.enter_context(RunFolder.open(out))
                _check_kind(folder)
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
            self._build(config, folder, partition, tensorboard or bool(about.get("tensorboard")), checkpoint_seconds)
            self._check_about(path, about, same_workers=config == stored_config)
            if config != stored_config:
                by_first(self._write_start)
            elif partition is None and folder is not None:
                # Killed before it was written; what has been drawn again is the same, as checked.
                self.partition.save(stored)
            self._take_own_files(stack, path)
            if self._own is not None:
                self._restore_worker(self._own, path)
            elif folder is not None:
                checkpoint = folder.load_checkpoint()
                if checkpoint is not None:
                    self._restore(folder, checkpoint)
            self._stack = stack.pop_all()
        return self

    def _build(
        self,
        config: TrainConfig,
        folder: RunFolder | None,
        partition: data.Partition | None,
        with_tensorboard: bool,
        checkpoint_seconds: float,
    ) -> None:
        """Load the data and build model, batches and simulator; what fails here has left nothing behind."""
        self._folder = folder
        self._tensorboard = with_tensorboard
        self._checkpoint_seconds = checkpoint_seconds
        if folder is not None:
            curves.require_matplotlib()  # at the start rather than at the end of a long run
        if with_tensorboard:
            events.require_tensorboard()
        self._device = _device(config.device)
        self.dataset = inputs.load_data(config)
        kept, self.validation_indices = data.hold_out(len(self.dataset.train_y), config.validation, config.seed)
        self.partition = inputs.make_partition(config, self.dataset, kept) if partition is None else partition
        dtype = config.torch_dtype()
        train_x, test_x = (inputs.placed(x, self._device, dtype) for x in (self.dataset.train_x, self.dataset.test_x))
        train_y = self.dataset.train_y.to(self._device)
        self._test = test_x, self.dataset.test_y.to(self._device)
        held_out = torch.from_numpy(self.validation_indices).to(self._device)
        self._validation = subset(train_x, held_out), train_y[held_out]
        changes = augment.make(config.augment, self.dataset)
        self._batches = data.WorkerBatches(train_x, train_y, self.partition, config.batch, config.seed, changes)
        per_epoch = self._batches.steps_per_epoch
        self.num_steps = config.num_steps(per_epoch)
        warmup = round(config.warmup_epochs * per_epoch)
        if warmup > self.num_steps:
            raise ValueError(f"warmup_epochs must fit into the {self.num_steps} steps of the run, got {warmup} steps")
        self._schedule = Schedule(
            name=config.schedule,
            lr=config.peak_lr,
            num_steps=self.num_steps,
            warmup_steps=warmup,
            warmup_from=config.warmup_from,
            milestones=config.milestones,
        )
        with torch.random.fork_rng(devices=[]), _threads(config.threads):
            torch.manual_seed(config.seed)
            model = inputs.make_model(config, self.dataset)
            graph = topology.get(config.topology, config.workers)
            options: dict[str, Any] = {
                "clip_grad_norm": config.clip,
                "on_nonfinite": config.on_nonfinite,
                "message": config.message,
                "lr": config.lr,
                **config.hyper,
            }
            if has_peers():
                _check_process(config)
                model = model.to(self._device, dtype)
                self._sim: Simulator | ProcessWorker = ProcessWorker(model, graph, config.algorithm, **options)
            else:
                options |= {"engine": config.engine, "device": self._device, "dtype": dtype}
                self._sim = Simulator(model, graph, config.algorithm, **options)
        self._own_losses: list[Tensor] = []  # of a worker with peers, until they meet for an evaluation
        self.config = config
        self.step = 0
        self._metrics: list[Record] = []
        self._loss_sum, self._loss_count = torch.zeros((), dtype=torch.float64, device=self._device), 0
        self._spent = {"gradient": 0.0, "optimizer": 0.0, "evaluation": 0.0, "total": 0.0}
        self._rng: dict[str, Tensor] | None = None
        self.notes: list[str] = []
        self._own: WorkerFiles | None = None
        self._own_metrics: list[Record] = []
        self._communication_before = Communication()  # of this worker in earlier legs of a resumed run
        self._bytes_of_others = 0  # by workers that are no more

    def _write_start(self) -> str:
        """Write what makes the folder a run that can be resumed; the config first, for all else follows from it."""
        if self._folder is not None:
            self._folder.file(runfolder.PARTITION).unlink(missing_ok=True)
            self._folder.write_text(runfolder.CONFIG, configs.dumps(self.config, self._about()))
            self.partition.save(self._folder.file(runfolder.PARTITION))
        return ""

    def _take_own_files(self, stack: contextlib.ExitStack, out: Path) -> None:
        if isinstance(self._sim, ProcessWorker):
            files = WorkerFiles(out, self._sim, self._tensorboard, self._checkpoint_seconds)
            self._own = stack.enter_context(files)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which the smallest worker sees its samples once."""
        return self._batches.steps_per_epoch

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
            should_stop: asked before each step; True ends the run after a checkpoint, to be resumed.

        Raises:
            NonFiniteGradientError: with on_nonfinite="raise"; the last checkpoint stays.
            OSError: if a file can't be written.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(_threads(self.config.threads))
            stack.enter_context(self._seeded())
            writer: events.EventWriter | None = None
            if self._folder is not None:
                self._folder.start_metrics(self._metrics)
                if self._tensorboard:
                    writer = events.EventWriter(self._folder.file("tensorboard"), self._metrics)
                    stack.callback(writer.close)
            if self._own is not None:
                self._own.start(self.step, self._own_metrics)

            def evaluate() -> None:
                record = self._evaluate(before + time.perf_counter() - start)
                if self._folder is not None:
                    self._folder.append_metrics(record)
                if writer is not None:
                    writer.write(record)
                if self._own is not None:
                    self._own.append(self._own_metrics[-1])
                if on_evaluation is not None:
                    on_evaluation(record)

            before, start = self._spent["total"], time.perf_counter()
            saved = start
            every = self.config.eval_every * self._batches.steps_per_epoch
            if not self._metrics:
                evaluate()
            stopped = False
            while self.step < self.num_steps and not stopped:
                if should_stop is not None and should_stop():
                    stopped = True
                else:
                    self._step()
                    if on_step is not None:
                        on_step(self.step)
                    if self.step % every == 0 or self.step == self.num_steps:
                        evaluate()
                now = time.perf_counter()
                self._spent["total"] = before + now - start
                due = now - saved >= self._checkpoint_seconds if self._own is None else self._own.due(self.step)
                if stopped or self.step == self.num_steps or due:
                    self._save_checkpoint()
                    saved = now
            result = self._result()
            if self._folder is not None and result.finished:
                self._write_outcome(self._folder, result)
            return result

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
        lr = self._schedule.at(self.step)
        if isinstance(self._sim, ProcessWorker):
            x, y = self._batches.at(self.step, self._sim.worker)
            self._own_losses.append(self._sim.step(functional.cross_entropy, x, y, lr))
        else:
            self._count_losses(self._sim.step(functional.cross_entropy, self._batches.at(self.step), lr=lr))
        self.step += 1

    def _count_losses(self, losses: Tensor) -> None:
        """Add the losses of all workers in one step, [n]."""
        self._loss_sum = self._loss_sum + losses.double().mean()
        self._loss_count += 1

    def _gather_bytes_and_losses(self) -> int:
        """What all workers together have sent; takes in the losses that workers in processes of their own have kept."""
        if not isinstance(self._sim, ProcessWorker):
            return self._sim.opt.bytes_sent
        if self._own_losses:
            for losses in self._sim.gather(torch.stack(self._own_losses)).unbind(1):
                self._count_losses(losses)
            self._own_losses = []
        mine = torch.tensor(self._own_communication(self._sim).bytes_sent)
        return int(self._sim.gather(mine).sum()) + self._bytes_of_others

    def _own_communication(self, sim: ProcessWorker) -> Communication:
        """What this worker has exchanged, earlier legs of a resumed run included."""
        return self._communication_before + sim.opt.communication

    def _evaluate(self, seconds: float) -> Record:
        # A small model is faster on one thread, and on a busy machine very much so: a second one is waited for.
        work = self._sim.num_parameters * len(self._test[1])
        evaluating = self._times()["evaluation"]
        extra: Record = {}
        with _threads(self.config.threads if work >= _LARGE_EVALUATION else 1):
            found = self._sim.evaluate(*self._test)
            if self.config.validation:
                held_out = self._sim.evaluate(*self._validation)
                extra = {
                    "validation_accuracy_local_mean": held_out.accuracy_local_mean,
                    "validation_accuracy_average": held_out.accuracy_average,
                    "validation_loss_local_mean": held_out.loss_local_mean,
                }
        own_losses = self._own_losses
        bytes_sent = self._gather_bytes_and_losses()
        record = {
            "step": self.step,
            "epoch": self.step / self._batches.steps_per_epoch,
            "loss": float(self._loss_sum) / self._loss_count if self._loss_count else None,
            "accuracy_local_mean": found.accuracy_local_mean,
            "accuracy_local_min": found.accuracy_local_min,
            "accuracy_local_max": found.accuracy_local_max,
            "accuracy_average": found.accuracy_average,
            **extra,
            "consensus_distance": found.consensus_distance,
            "lr": self._schedule.at(max(self.step - 1, 0)),
            "bytes_sent": bytes_sent,
            "seconds": round(seconds, 3),
            "seconds_training": round(seconds - evaluating, 3),
        }
        self._loss_sum, self._loss_count = torch.zeros((), dtype=torch.float64, device=self._device), 0
        self._metrics.append(record)
        if isinstance(self._sim, ProcessWorker):
            times, communication = self._times(), self._own_communication(self._sim)
            self._own_metrics.append(
                {
                    **{key: record[key] for key in ("step", "epoch", "lr", "seconds", "seconds_training")},
                    "worker": self._sim.worker,
                    "loss": float(torch.stack(own_losses).double().mean()) if own_losses else None,
                    "accuracy": found.accuracy_local[self._sim.worker],
                    "bytes_sent": communication.bytes_sent,
                    "wire_bytes_sent": communication.wire_bytes_sent,
                    "seconds_gradient": round(times["gradient"], 3),
                    "seconds_optimizer": round(times["optimizer"], 3),
                    "seconds_waiting": round(communication.seconds, 3),
                }
            )
        return record

    def _result(self) -> Result:
        spent = self._times()
        total = max(spent["total"], 1e-9)
        training = max(total - spent["evaluation"], 1e-9)
        summary = {key: value for key, value in self._metrics[-1].items() if not key.startswith("seconds")}
        summary |= {
            "best_accuracy_local_mean": max(record["accuracy_local_mean"] for record in self._metrics),
            "num_parameters": self._sim.num_parameters,
            "engine": self._sim.engine,
            "skipped_steps": self._sim.opt.skipped_steps,
            "worker_steps_per_second": round(self.config.workers * self.step / training, 1),
            "share_gradient": round(spent["gradient"] / total, 4),
            "share_optimizer": round(spent["optimizer"] / total, 4),
            "share_evaluation": round(spent["evaluation"] / total, 4),
            "seconds": round(spent["total"], 3),
        }
        return Result(self.config, self._metrics, summary, self._sim, self.step == self.num_steps)

    def _write_outcome(self, folder: RunFolder, result: Result) -> None:
        title = (
            f"{self.config.algorithm} on {self.config.data}, {self.config.topology} of {self.config.workers}, "
            f"{inputs.describe_partition(self.config)}, {self.config.model}, lr {self.config.lr:g}, "
            f"seed {self.config.seed}"
        )
        chance = 1 / self.dataset.num_classes
        runfolder.write_atomically(
            folder.file(runfolder.CURVES),
            lambda file: curves.save_learning_curves(file, self._metrics, title, chance),
        )
        described = {key: getattr(self.config, key) for key in ("algorithm", "topology", "workers", "data", "seed")}
        folder.write_json(runfolder.SUMMARY, described | result.summary)

    def _times(self) -> dict[str, float]:
        """Seconds spent so far, earlier legs of a resumed run included."""
        return self._spent | {key: self._spent[key] + value for key, value in self._sim.timings._asdict().items()}

    def _save_checkpoint(self) -> None:
        if isinstance(self._sim, ProcessWorker):
            self._save_worker(self._sim)
        if self._folder is None or isinstance(self._sim, ProcessWorker):
            return
        rng = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self._device)
        self._folder.save_checkpoint(
            {
                "format": _CHECKPOINT_FORMAT,
                "config_digest": _config_digest(self.config),
                "step": self.step,
                "simulator": self._sim.state_dict(),
                "metrics": self._metrics,
                "loss_sum": float(self._loss_sum),
                "loss_count": self._loss_count,
                "spent": self._times(),
                "rng": rng,
            }
        )

    def _restore(self, folder: RunFolder, checkpoint: dict[str, Any]) -> None:
        path = folder.file(runfolder.CHECKPOINT)
        if checkpoint.get("format") != _CHECKPOINT_FORMAT:
            raise ValueError(
                f"{path} is of version {checkpoint.get('format')!r}, this qgm_ext reads {_CHECKPOINT_FORMAT!r}; "
                "resume with the qgm_ext that wrote it"
            )
        if checkpoint.get("config_digest") != _config_digest(self.config):
            raise ValueError(f"{path} belongs to another run than {runfolder.CONFIG} beside it")
        try:
            assert isinstance(self._sim, Simulator)  # as _check_kind has seen to
            self._sim.load_state_dict(checkpoint["simulator"])
            self.step = checkpoint["step"]
            self._metrics = checkpoint["metrics"]
            self._loss_sum = torch.tensor(checkpoint["loss_sum"], dtype=torch.float64, device=self._device)
            self._loss_count = checkpoint["loss_count"]
            self._spent = checkpoint["spent"]
            self._rng = checkpoint["rng"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def _save_worker(self, sim: ProcessWorker) -> None:
        if self._own is None:
            return
        self._own.save(
            self.step,
            {
                "format": _CHECKPOINT_FORMAT,
                "config_digest": _config_digest(self.config),
                "epoch": self.step / self._batches.steps_per_epoch,
                "metrics": self._metrics,
                "own_metrics": self._own_metrics,
                "losses": torch.stack(self._own_losses) if self._own_losses else None,
                "communication": dataclasses.asdict(self._own_communication(sim)),
                "bytes_of_others": self._bytes_of_others,
                "skipped_steps": sim.opt.skipped_steps,
                "spent": self._times(),
            },
        )

    def _restore_worker(self, own: WorkerFiles, out: Path) -> None:
        """Take up this worker's part, or, where there were more or fewer workers, the average of all."""
        found = own.load()
        if found is None:
            return
        loaded, rng = found
        extra = loaded.extra
        if extra.get("format") != _CHECKPOINT_FORMAT:
            raise ValueError(
                f"{out} has checkpoints of version {extra.get('format')!r}, this qgm_ext reads {_CHECKPOINT_FORMAT!r}; "
                "resume with the qgm_ext that wrote it"
            )
        self._metrics, self._spent = extra["metrics"], extra["spent"]
        if not loaded.resumed:
            self.step = loaded.step if self.config.steps else round(extra["epoch"] * self.steps_per_epoch)
            self._bytes_of_others = self._metrics[-1]["bytes_sent"]
            self.notes.append(f"{loaded.note}; the run goes on at step {self.step} of {self.num_steps}")
            # Of other numbers of workers nothing must be left, or it might be taken for newer than what comes.
            self._save_checkpoint()
            dist.barrier()
            checkpoints.discard_others(own.checkpoints, self.config.workers)
            return
        if extra["config_digest"] != _config_digest(self.config):
            raise ValueError(f"{own.checkpoints} belongs to another run than {runfolder.CONFIG} beside it")
        self.step = loaded.step
        self._own_metrics = extra["own_metrics"]
        self._own_losses = [] if extra["losses"] is None else list(extra["losses"])
        self._communication_before = Communication(**extra["communication"])
        self._bytes_of_others = extra["bytes_of_others"]
        self._sim.opt.skipped_steps = extra["skipped_steps"]
        self._rng = {"cpu": rng}

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        """Models that draw numbers as they train (dropout) draw the same ones again; the caller's are not touched."""
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.backends.cudnn.flags(deterministic=True, benchmark=False):
            if self._rng is None:
                torch.manual_seed(self.config.seed)
            else:
                torch.set_rng_state(self._rng["cpu"])
                if devices:
                    torch.cuda.set_rng_state(self._rng["cuda"], self._device)
            yield

    def _about(self) -> dict[str, Any]:
        """What config.json says besides the config: versions, and what the data and the partition were."""
        return {
            "qgm_ext": qgm_ext.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "tensorboard": self._tensorboard,
            "process_per_worker": isinstance(self._sim, ProcessWorker),
            "num_steps": self.num_steps,
            "data_digest": self.dataset.digest(),
            "partition_digest": self.partition.digest(),
        }

    def _check_about(self, out: Path, about: dict[str, Any], same_workers: bool) -> None:
        mine = self._about()
        if same_workers and about.get("partition_digest") != mine["partition_digest"]:
            raise ValueError(f"{out / runfolder.PARTITION} is not the partition that the run was started with")
        if about.get("data_digest") != mine["data_digest"]:
            raise ValueError(f"the data set {self.dataset.name} is not the one that the run in {out} was started with")
        self.notes = [
            f"the run was started with {package} {about.get(package)}, this is {mine[package]}: "
            "the last bits of the result may differ from an uninterrupted run's"
            for package in ("qgm_ext", "torch")
            if about.get(package) != mine[package]
        ]


def _check_kind(folder: RunFolder) -> None:
    """Refuse to go on with a process for each worker where there was one for all, and the other way round."""
    _, about = configs.loads(folder.file(runfolder.CONFIG))
    if about.get("process_per_worker", False) == has_peers():
        return
    if has_peers():
        raise ValueError(f"the run in {folder.path} has all workers in one process; resume it without torchrun")
    raise ValueError(
        f"the run in {folder.path} has a process for each worker; resume it with torchrun and at least two processes"
    )


def _check_process(config: TrainConfig) -> None:
    """Refuse what a worker in a process of its own can't do."""
    if config.workers != dist.get_world_size():
        raise ValueError(
            f"workers must be the number of processes, {dist.get_world_size()}, got {config.workers}: one process is "
            "one worker"
        )
    if config.device != "cpu":
        raise ValueError(f"device must be 'cpu' where each worker has a process of its own, got {config.device!r}")
    if config.engine not in ("loop", "threads"):
        raise ValueError(
            f"engine must be 'loop' or 'threads' where each worker has a process of its own, got {config.engine!r}"
        )


def _config_digest(config: TrainConfig) -> str:
    return hashlib.sha256(configs.dumps(config, {}).encode()).hexdigest()


def _device(name: str) -> torch.device:
    """The device, if kernels for it are built and it is there."""
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {name!r} needs a CUDA device and a torch with CUDA, but torch finds none")
        if not ops.has_native("cuda"):
            raise ValueError(f"device {name!r} needs qgm_ext._cuda: QGM_CUDA=1 pip install . where nvcc is")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device must be below cuda:{torch.cuda.device_count()}, got {name!r}")
    return device


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads in torch and in our kernels, for the moment."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
