"""What a run is made from, by its config: data, their split over workers, batches, step sizes, model and simulator.

Nothing here knows of steps done, measurements or files; those are :mod:`qgm_ext.experiments.train`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from qgm_ext import data, models, ops, topology
from qgm_ext.data import augment
from qgm_ext.data.datasets import subset
from qgm_ext.distributed.options import OnPeerLoss, RuntimeOptions
from qgm_ext.distributed.process_worker import ProcessWorker
from qgm_ext.experiments.config import FOR_PROCESSES, TrainConfig
from qgm_ext.experiments.schedules import Schedule
from qgm_ext.experiments.worker_files import has_peers
from qgm_ext.simulator import Simulator

__all__ = [
    "Inputs",
    "build",
    "check",
    "check_device",
    "describe_partition",
    "load_data",
    "make_model",
    "make_partition",
    "placed",
    "torch_threads",
]


@dataclass(frozen=True)
class Inputs:
    """All that a run trains with.

    Args:
        config: complete.
        device: where it runs.
        dataset, partition: the data and their split.
        validation_indices: positions in the training set of the samples held out for validation, ascending.
        test, validation: samples and labels to evaluate on, on the device.
        batches: those of every worker and step.
        schedule: the step sizes.
        num_steps: length of the run.
        sim: the workers, or, in a process group, the one of this process.
    """

    config: TrainConfig
    device: torch.device
    dataset: data.Dataset
    partition: data.Partition
    validation_indices: npt.NDArray[np.int64]
    test: tuple[Tensor | data.ImageFiles, Tensor]
    validation: tuple[Tensor | data.ImageFiles, Tensor]
    batches: data.WorkerBatches
    schedule: Schedule
    num_steps: int
    sim: Simulator | ProcessWorker


def build(config: TrainConfig, partition: data.Partition | None = None, on_peer_loss: OnPeerLoss = "raise") -> Inputs:
    """Load the data and build the rest; what fails here has left nothing behind.

    Args:
        config: what to build.
        partition: of the data, if it has been drawn before.
        on_peer_loss: as in :class:`qgm_ext.experiments.train.Training`.

    Raises: as :func:`qgm_ext.experiments.train.run`.
    """
    _check_process(config, on_peer_loss)
    device = check_device(config.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    dataset = load_data(config)
    kept, validation_indices = _hold_out(config, dataset)
    if partition is None:
        partition = make_partition(config, dataset, kept)
    dtype = config.torch_dtype()
    train_x, test_x = (placed(x, device, dtype) for x in (dataset.train_x, dataset.test_x))
    train_y = dataset.train_y.to(device)
    held_out = torch.from_numpy(validation_indices).to(device)
    changes = augment.make(config.augment, dataset)
    batches = data.WorkerBatches(train_x, train_y, partition, config.batch, config.seed, changes)
    schedule = _make_schedule(config, batches.steps_per_epoch)
    return Inputs(
        config=config,
        device=device,
        dataset=dataset,
        partition=partition,
        validation_indices=validation_indices,
        test=(test_x, dataset.test_y.to(device)),
        validation=(subset(train_x, held_out), train_y[held_out]),
        batches=batches,
        schedule=schedule,
        num_steps=schedule.num_steps,
        sim=_make_simulator(config, dataset, device, on_peer_loss),
    )


def check(config: TrainConfig, dataset: data.Dataset) -> None:
    """Find what :func:`build` would find wrong with the split over workers, the batches and the length of a run.

    Needs neither the device nor a model.

    Args:
        config: of the run.
        dataset: its data, from :func:`load_data`.

    Raises: TypeError, ValueError as :func:`build`.
    """
    kept, _ = _hold_out(config, dataset)
    partition = make_partition(config, dataset, kept)
    changes = augment.make(config.augment, dataset)
    batches = data.WorkerBatches(dataset.train_x, dataset.train_y, partition, config.batch, config.seed, changes)
    _make_schedule(config, batches.steps_per_epoch)


def _hold_out(config: TrainConfig, dataset: data.Dataset) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    try:
        return data.hold_out(len(dataset.train_y), config.validation, config.seed)
    except ValueError as error:
        raise ValueError(f"validation must leave samples on both sides: {error}") from error


def _make_schedule(config: TrainConfig, steps_per_epoch: int) -> Schedule:
    num_steps = config.num_steps(steps_per_epoch)
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if warmup > num_steps:
        raise ValueError(f"warmup_epochs must fit into the {num_steps} steps of the run, got {warmup} steps")
    return Schedule(
        name=config.schedule,
        lr=config.peak_lr,
        num_steps=num_steps,
        warmup_steps=warmup,
        warmup_from=config.warmup_from,
        milestones=config.milestones,
    )


def _make_simulator(
    config: TrainConfig, dataset: data.Dataset, device: torch.device, on_peer_loss: OnPeerLoss
) -> Simulator | ProcessWorker:
    dtype = config.torch_dtype()
    with torch.random.fork_rng(devices=[]), torch_threads(config.threads):
        torch.manual_seed(config.seed)
        model = make_model(config, dataset)
        graph = topology.get(config.topology, config.workers)
        options: dict[str, Any] = {
            "clip_grad_norm": config.clip,
            "on_nonfinite": config.on_nonfinite,
            "message": config.message,
            "lr": config.lr,
            **config.hyper,
        }
        if has_peers():
            options |= {name: getattr(config, name) for name in FOR_PROCESSES}
            options["on_peer_loss"] = on_peer_loss
            return ProcessWorker(model.to(device, dtype), graph, config.algorithm, **options)
        options |= {"engine": config.engine, "device": device, "dtype": dtype}
        return Simulator(model, graph, config.algorithm, **options)


def load_data(config: TrainConfig) -> data.Dataset:
    """The data set of a run; its texts are split into the tokens of the pretrained model, if there is one.

    Raises: as :func:`qgm_ext.data.load`.
    """
    tokenizer = None
    if config.pretrained is not None and models.takes_texts(config.model):
        tokenizer = data.PretrainedTokenizer(config.pretrained)
    return data.load(config.data, config.data_root, num_train=config.num_train, seed=config.seed, tokenizer=tokenizer)


def make_model(config: TrainConfig, dataset: data.Dataset) -> nn.Module:
    """The model of a run, for the data."""
    if models.takes_texts(config.model) != (dataset.vocabulary is not None):
        kinds = [name for name in models.names() if models.takes_texts(name) == (dataset.vocabulary is not None)]
        raise ValueError(f"{config.model} is no model for {dataset.name}; there are {', '.join(kinds)}")
    options: dict[str, Any] = {} if dataset.vocabulary is None else {"vocabulary": dataset.vocabulary}
    if config.pretrained is not None:
        if not models.takes(config.model, "pretrained"):
            able = [name for name in models.names() if models.takes(name, "pretrained")]
            raise ValueError(f"pretrained is for {', '.join(able)}; {config.model} starts from random weights")
        options["pretrained"] = config.pretrained
    return models.get(config.model, dataset.input_shape, dataset.num_classes, **options)


def placed(samples: Tensor | data.ImageFiles, device: torch.device, dtype: torch.dtype) -> Tensor | data.ImageFiles:
    """Samples on a device; images in the dtype of the parameters, tokens stay numbers."""
    if isinstance(samples, Tensor) and not samples.is_floating_point():
        return samples.to(device)
    return samples.to(device, dtype)


def make_partition(config: TrainConfig, dataset: data.Dataset, kept: npt.NDArray[np.int64]) -> data.Partition:
    """The split of the samples ``kept``, in positions of the whole training set."""
    labels = dataset.train_y.numpy()[kept]
    if config.partition == "dirichlet":
        split = data.dirichlet_partition(labels, config.workers, config.alpha, config.seed)
    elif config.partition == "iid":
        split = data.iid_partition(labels, config.workers, config.seed)
    elif config.partition == "classes":
        split = data.classes_partition(labels, config.workers, config.classes_per_worker, config.seed)
    else:
        split = data.sorted_partition(labels, config.workers)
    return split.within(kept)


def describe_partition(config: TrainConfig) -> str:
    if config.partition == "classes":
        return f"{config.classes_per_worker} classes per worker"
    return f"alpha {config.alpha:g}" if config.partition == "dirichlet" else config.partition


def _check_process(config: TrainConfig, on_peer_loss: OnPeerLoss) -> None:
    """Refuse what a worker in a process of its own can't do, or it alone can."""
    if not has_peers():
        for name, value in {
            **{name: getattr(config, name) for name in FOR_PROCESSES},
            "on_peer_loss": on_peer_loss,
        }.items():
            if value != getattr(RuntimeOptions, name):
                raise ValueError(f"{name}={value!r} is for workers in processes of their own, which torchrun starts")
        return
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


def check_device(name: str) -> torch.device:
    """The device, if kernels for it are built and it is there; does nothing on it yet.

    Raises: ValueError if not.
    """
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {name!r} needs a CUDA device and a torch with CUDA, but torch finds none")
        if not ops.has_native("cuda"):
            raise ValueError(f"device {name!r} needs qgm_ext._cuda: QGM_CUDA=1 pip install . where nvcc is")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ValueError(f"device must be below cuda:{torch.cuda.device_count()}, got {name!r}")
    return device


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads in torch and in our kernels, for the moment."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
