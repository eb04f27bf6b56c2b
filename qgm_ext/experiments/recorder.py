"""What a run is measured by: losses, bytes and seconds as it goes, and a record for each evaluation.

It holds what a resumed run must know of what was measured before; it writes no files.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qgm_ext.distributed.communication import Communication
from qgm_ext.distributed.process_worker import ProcessWorker
from qgm_ext.experiments.inputs import Inputs, torch_threads

__all__ = ["Record", "Recorder"]

_LARGE_EVALUATION = 1 << 27  # multiply-adds of one model on the test set, from which more threads help

Record = dict[str, Any]


class Recorder:
    """Measures a run. What the fields of a record mean is said in :class:`qgm_ext.experiments.train.Result`.

    Args:
        inputs: of the run.

    Attributes:
        records: one for each evaluation.
        own_records: the same of this worker alone, in a process of its own.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs, self._sim = inputs, inputs.sim
        self.records: list[Record] = []
        self.own_records: list[Record] = []
        self._own_losses: list[Tensor] = []  # of a worker with peers, until they meet for an evaluation
        self._communication_before = Communication()  # of this worker in earlier legs of a resumed run
        self._ages_before = torch.zeros(inputs.config.staleness + 1, dtype=torch.int64)  # the same for message_ages
        self._ages_of_all = self._ages_of_others = self._ages_before
        self._bytes_sent: dict[int, int] = {}  # by each worker, as far as it was heard
        self._bytes_of_others = 0  # by workers that are no more
        self._replaced_workers = 0  # how often one has taken up the state of a neighbour
        self._spent = {"gradient": 0.0, "optimizer": 0.0, "evaluation": 0.0, "total": 0.0}
        self._start = 0.0
        self._loss_sum, self._loss_count = self._no_losses()

    def start(self) -> float:
        """Let time run; gives the seconds spent before."""
        self._start = time.perf_counter() - self._spent["total"]
        return self._spent["total"]

    def tick(self) -> float:
        """Count the time up to now; gives all seconds spent, those before a resumption too."""
        self._spent["total"] = time.perf_counter() - self._start
        return self._spent["total"]

    def count(self, losses: Tensor) -> None:
        """Take in the losses of one step: of all workers, [n], or, in a process of its own, of this one."""
        if isinstance(self._sim, ProcessWorker):
            self._own_losses.append(losses)
        else:
            self._count_losses(losses)

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
        every = self._sim.gather(torch.tensor(self._own_communication(self._sim).bytes_sent)).tolist()
        self._bytes_sent |= dict(zip(self._sim.left, every, strict=True))
        return sum(self._bytes_sent.values()) + self._bytes_of_others

    def _gather_stale_share(self) -> float:
        """Of the messages that all workers together have merged, the share of those of earlier steps."""
        assert isinstance(self._sim, ProcessWorker)  # as inputs.build has seen to
        self._ages_of_all = self._sim.gather(self._own_ages(self._sim)).sum(0) + self._ages_of_others
        return float(self._ages_of_all[1:].sum()) / max(1, int(self._ages_of_all.sum()))

    def _own_ages(self, sim: ProcessWorker) -> Tensor:
        return self._ages_before + sim.message_ages

    def _no_losses(self) -> tuple[Tensor, int]:
        return torch.zeros((), dtype=torch.float64, device=self._inputs.device), 0

    def _own_communication(self, sim: ProcessWorker) -> Communication:
        """What this worker has exchanged, earlier legs of a resumed run included."""
        return self._communication_before + sim.opt.communication

    def evaluate(self, step: int) -> Record:
        """Evaluate after so many steps, on the test set and the validation set, and make the record; a collective."""
        seconds = time.perf_counter() - self._start
        config = self._inputs.config
        # A small model is faster on one thread, and on a busy machine very much so: a second one is waited for.
        work = self._sim.num_parameters * len(self._inputs.test[1])
        evaluating = self.times()["evaluation"]
        extra: Record = {}
        with torch_threads(config.threads if work >= _LARGE_EVALUATION else 1):
            found = self._sim.evaluate(*self._inputs.test)
            if config.validation:
                held_out = self._sim.evaluate(*self._inputs.validation)
                extra = {
                    "validation_accuracy_local_mean": held_out.accuracy_local_mean,
                    "validation_accuracy_local_min": held_out.accuracy_local_min,
                    "validation_accuracy_average": held_out.accuracy_average,
                    "validation_loss_local_mean": held_out.loss_local_mean,
                }
        own_losses = self._own_losses
        bytes_sent = self._gather_bytes_and_losses()
        record = {
            "step": step,
            "epoch": step / self._inputs.batches.steps_per_epoch,
            "loss": float(self._loss_sum) / self._loss_count if self._loss_count else None,
            "accuracy_local_mean": found.accuracy_local_mean,
            "accuracy_local_min": found.accuracy_local_min,
            "accuracy_local_max": found.accuracy_local_max,
            "accuracy_average": found.accuracy_average,
            **extra,
            "consensus_distance": found.consensus_distance,
            "lr": self._inputs.schedule.at(max(step - 1, 0)),
            "bytes_sent": bytes_sent,
            "seconds": round(seconds, 3),
            "seconds_training": round(seconds - evaluating, 3),
        }
        if config.staleness:
            record["stale_share"] = self._gather_stale_share()
        self._loss_sum, self._loss_count = self._no_losses()
        self.records.append(record)
        if isinstance(self._sim, ProcessWorker):
            times, communication = self.times(), self._own_communication(self._sim)
            self.own_records.append(
                {
                    **{key: record[key] for key in ("step", "epoch", "lr", "seconds", "seconds_training")},
                    "worker": self._sim.worker,
                    "loss": float(torch.stack(own_losses).double().mean()) if own_losses else None,
                    "accuracy": found.accuracy_local[self._sim.left.index(self._sim.worker)],
                    "bytes_sent": communication.bytes_sent,
                    "wire_bytes_sent": communication.wire_bytes_sent,
                    "seconds_gradient": round(times["gradient"], 3),
                    "seconds_optimizer": round(times["optimizer"], 3),
                    "seconds_waiting": round(communication.seconds, 3),
                    "stale_messages": communication.stale_messages,
                }
            )
        return record

    def summary(self, step: int) -> Record:
        """The last record, and speed and shares of time, after so many steps."""
        spent = self.times()
        total = max(spent["total"], 1e-9)
        training = max(total - spent["evaluation"], 1e-9)
        summary = {key: value for key, value in self.records[-1].items() if not key.startswith("seconds")}
        if isinstance(self._sim, ProcessWorker):
            summary["replaced_workers"] = self._replaced_workers
            summary["lost_workers"] = sorted(self._sim.opt.lost_workers)
            if self._inputs.config.staleness:
                summary["message_ages"] = self._ages_of_all.tolist()
        return summary | {
            "best_accuracy_local_mean": max(record["accuracy_local_mean"] for record in self.records),
            "num_parameters": self._sim.num_parameters,
            "engine": self._sim.engine,
            "skipped_steps": self._sim.opt.skipped_steps,
            "worker_steps_per_second": round(self._inputs.config.workers * step / training, 1),
            "share_gradient": round(spent["gradient"] / total, 4),
            "share_optimizer": round(spent["optimizer"] / total, 4),
            "share_evaluation": round(spent["evaluation"] / total, 4),
            "seconds": round(spent["total"], 3),
        }

    def times(self) -> dict[str, float]:
        """Seconds spent so far, earlier legs of a resumed run included."""
        return self._spent | {key: self._spent[key] + value for key, value in self._sim.timings._asdict().items()}

    def state(self) -> Record:
        """What :meth:`load_state` takes, for a checkpoint of all workers in one process."""
        return {
            "metrics": self.records,
            "loss_sum": float(self._loss_sum),
            "loss_count": self._loss_count,
            "spent": self.times(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.records = state["metrics"]
        self._loss_sum = torch.tensor(state["loss_sum"], dtype=torch.float64, device=self._inputs.device)
        self._loss_count = state["loss_count"]
        self._spent = state["spent"]

    def worker_state(self, sim: ProcessWorker) -> Record:
        """The same of this worker, in a process of its own."""
        return {
            "metrics": self.records,
            "own_metrics": self.own_records,
            "losses": torch.stack(self._own_losses) if self._own_losses else None,
            "communication": dataclasses.asdict(self._own_communication(sim)),
            "message_ages": self._own_ages(sim),
            "bytes_of_others": self._bytes_of_others,
            "ages_of_others": self._ages_of_others,
            "ages_of_all": self._ages_of_all,
            "replaced_workers": self._replaced_workers,
            "spent": self.times(),
        }

    def load_worker_state(self, state: Mapping[str, Any], own: bool = True, replaced: int = 0) -> None:
        """Go on from there.

        Args:
            state: from :meth:`worker_state`.
            own: False: it is a neighbour's. Its losses since the last evaluation and its counts stand for the worker's
                own; its records don't.
            replaced: how many workers go on with a neighbour's.
        """
        self.records, self._spent = state["metrics"], state["spent"]
        self.own_records = state["own_metrics"] if own else []
        self._replaced_workers = state.get("replaced_workers", 0) + replaced  # it is not in those of older versions
        self._own_losses = [] if state["losses"] is None else list(state["losses"])
        self._communication_before = Communication(**state["communication"])
        self._bytes_of_others = state["bytes_of_others"]
        if self._inputs.config.staleness:
            self._ages_before, self._ages_of_others = state["message_ages"], state["ages_of_others"]
            self._ages_of_all = state["ages_of_all"]

    def load_state_of_others(self, state: Mapping[str, Any]) -> None:
        """Go on from another number of workers: with their records, time and bytes, none of them this worker's."""
        self.records, self._spent = state["metrics"], state["spent"]
        self._bytes_of_others = self.records[-1]["bytes_sent"]
        if self._inputs.config.staleness:
            self._ages_of_others = state["ages_of_all"]
