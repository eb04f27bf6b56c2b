"""What a run leaves behind to be resumed from, and whether what is found in a folder belongs to the run.

The states of the workers, of the :class:`~qgm_ext.experiments.recorder.Recorder` and of torch's random numbers, and the
step, go into OUT/checkpoint.pt, or, where each worker has a process of its own, into its part of OUT/checkpoints;
versions and digests of data and partition into OUT/config.json.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import qgm_ext
from qgm_ext.distributed import checkpoint as checkpoints
from qgm_ext.distributed.peer_loss import meeting
from qgm_ext.distributed.process_worker import ProcessWorker
from qgm_ext.experiments import config as configs
from qgm_ext.experiments import runfolder
from qgm_ext.experiments.config import TrainConfig
from qgm_ext.experiments.inputs import Inputs
from qgm_ext.experiments.recorder import Recorder
from qgm_ext.experiments.runfolder import RunFolder
from qgm_ext.experiments.worker_files import WorkerFiles, has_peers
from qgm_ext.simulator import Simulator

__all__ = ["Point", "about", "check_about", "check_kind", "restore", "restore_worker", "save", "save_worker"]

_FORMAT = "qgm_ext.checkpoint/1"


class Point(NamedTuple):
    """Where a resumed run goes on.

    Args:
        step: steps done.
        rng: states of torch's random numbers; None: as at the start of a run.
        note: what a user should know of it.
    """

    step: int
    rng: dict[str, Tensor] | None
    note: str = ""


def save(folder: RunFolder, inputs: Inputs, recorder: Recorder, step: int) -> None:
    """Write the checkpoint of a run that has all workers in this process.

    Raises:
        OSError: if it can't be written.
    """
    assert isinstance(inputs.sim, Simulator)
    rng = {"cpu": torch.get_rng_state()}
    if inputs.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(inputs.device)
    folder.save_checkpoint(
        {
            "format": _FORMAT,
            "config_digest": _digest(inputs.config),
            "step": step,
            "simulator": inputs.sim.state_dict(),
            **recorder.state(),
            "rng": rng,
        }
    )


def restore(folder: RunFolder, inputs: Inputs, recorder: Recorder) -> Point | None:
    """Put workers and recorder to where :func:`save` found them; None if there is no checkpoint.

    Raises:
        ValueError: if it is damaged, of another version or of another run; names it.
    """
    checkpoint = folder.load_checkpoint()
    if checkpoint is None:
        return None
    path = folder.file(runfolder.CHECKPOINT)
    _check_format(checkpoint.get("format"), f"{path} is")
    if checkpoint.get("config_digest") != _digest(inputs.config):
        raise ValueError(f"{path} belongs to another run than {runfolder.CONFIG} beside it")
    try:
        assert isinstance(inputs.sim, Simulator)  # as check_kind has seen to
        inputs.sim.load_state_dict(checkpoint["simulator"])
        recorder.load_state(checkpoint)
        return Point(checkpoint["step"], checkpoint["rng"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def save_worker(own: WorkerFiles, inputs: Inputs, recorder: Recorder, step: int) -> None:
    """Write this worker's part of a checkpoint.

    Raises:
        OSError: if it can't be written.
    """
    assert isinstance(inputs.sim, ProcessWorker)
    own.save(
        step,
        {
            "format": _FORMAT,
            "config_digest": _digest(inputs.config),
            "epoch": step / inputs.batches.steps_per_epoch,
            **recorder.worker_state(inputs.sim),
            "skipped_steps": inputs.sim.opt.skipped_steps,
        },
    )


def restore_worker(own: WorkerFiles, out: Path, inputs: Inputs, recorder: Recorder) -> Point | None:
    """Take up this worker's part or what replaces it, or, where there were more or fewer workers, the average of all;
    a collective.

    Raises:
        ValueError: if it is of another version or of another run.
    """
    found = own.load()
    if found is None:
        return None
    loaded, rng = found
    extra, config = loaded.extra, inputs.config
    _check_format(extra.get("format"), f"{out} has checkpoints")
    if not loaded.resumed:
        recorder.load_state_of_others(extra)
        step = loaded.step if config.steps else round(extra["epoch"] * inputs.batches.steps_per_epoch)
        # Of other numbers of workers nothing must be left, or it might be taken for newer than what comes.
        save_worker(own, inputs, recorder, step)
        with meeting(None):
            dist.barrier()
        checkpoints.discard_others(own.checkpoints, config.workers)
        return Point(step, None, f"{loaded.note}; the run goes on at step {step} of {inputs.num_steps}")
    if extra["config_digest"] != _digest(config):
        raise ValueError(f"{own.checkpoints} belongs to another run than {runfolder.CONFIG} beside it")
    inputs.sim.opt.skipped_steps = extra["skipped_steps"]
    own_part = dist.get_rank() not in loaded.taken
    recorder.load_worker_state(extra, own_part, len(loaded.taken))
    note = f"{loaded.note}; the run goes on at step {loaded.step} of {inputs.num_steps}" if loaded.note else ""
    return Point(loaded.step, {"cpu": rng} if own_part else None, note)


def about(inputs: Inputs, tensorboard: bool) -> dict[str, Any]:
    """What config.json says besides the config: versions, and what the data and the partition were."""
    return {
        "qgm_ext": qgm_ext.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "tensorboard": tensorboard,
        "process_per_worker": isinstance(inputs.sim, ProcessWorker),
        "num_steps": inputs.num_steps,
        "data_digest": inputs.dataset.digest(),
        "partition_digest": inputs.partition.digest(),
    }


def check_about(out: Path, found: dict[str, Any], inputs: Inputs, *, same_workers: bool) -> list[str]:
    """Compare what config.json says with what is here; gives what a user should know of the difference.

    Raises:
        ValueError: if data or, with the same workers, the partition are not those that the run was started with.
    """
    mine = about(inputs, tensorboard=False)
    if same_workers and found.get("partition_digest") != mine["partition_digest"]:
        raise ValueError(f"{out / runfolder.PARTITION} is not the partition that the run was started with")
    if found.get("data_digest") != mine["data_digest"]:
        raise ValueError(f"the data set {inputs.dataset.name} is not the one that the run in {out} was started with")
    return [
        f"the run was started with {package} {found.get(package)}, this is {mine[package]}: "
        "the last bits of the result may differ from an uninterrupted run's"
        for package in ("qgm_ext", "torch")
        if found.get(package) != mine[package]
    ]


def check_kind(folder: RunFolder) -> None:
    """Refuse to go on with a process for each worker where there was one for all, and the other way round."""
    _, about = configs.loads(folder.file(runfolder.CONFIG))
    if about.get("process_per_worker", False) == has_peers():
        return
    if has_peers():
        raise ValueError(f"the run in {folder.path} has all workers in one process; resume it without torchrun")
    raise ValueError(
        f"the run in {folder.path} has a process for each worker; resume it with torchrun and at least two processes"
    )


def _check_format(found: Any, where: str) -> None:
    if found != _FORMAT:
        raise ValueError(
            f"{where} of version {found!r}, this qgm_ext reads {_FORMAT!r}; resume with the qgm_ext that wrote it"
        )


def _digest(config: TrainConfig) -> str:
    return hashlib.sha256(configs.dumps(config, {}).encode()).hexdigest()
