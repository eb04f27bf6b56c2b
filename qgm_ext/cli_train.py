"""``qgm train``: words to a training run, its progress, and its result.

Nothing is computed here: see :mod:`qgm_ext.experiments.train`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from qgm_ext import data as datasets
from qgm_ext import messages, models, topology_names
from qgm_ext import topology as topologies
from qgm_ext.cli_support import (
    EXIT_FAILED,
    Stop,
    fail,
    make_console,
    option,
    process_group,
    stop_on_signal,
    user_errors,
)
from qgm_ext.data import augment as augmentation
from qgm_ext.distributed import PeerLostError, timeline
from qgm_ext.distributed.agreement import check_agreement
from qgm_ext.distributed.options import ON_PEER_LOSS
from qgm_ext.experiments import config as configs
from qgm_ext.experiments import runfolder, schedules
from qgm_ext.experiments.train import Record, Result, Training
from qgm_ext.experiments.worker_files import by_first
from qgm_ext.files import told
from qgm_ext.stacked import NonFiniteGradientError

__all__ = ["train"]

_SHOWN_WORKERS = 32
_WHAT, _HOW, _LENGTH, _MACHINE, _FILES = "What to train", "Optimizer", "Length", "Machine", "Files"
_PROCESSES = "A process for each worker (torchrun)"


def train(
    algorithm: Annotated[str | None, option(_WHAT, "One of `qgm algorithms`.", "qg_dsgdm_n")] = None,
    topology: Annotated[
        str | None, option(_WHAT, f"NAME or NAME:WORKERS: {', '.join(topologies.names())}.", "ring")
    ] = None,
    workers: Annotated[int | None, option(_WHAT, "Number of workers.", "16", "--workers", "-n")] = None,
    data: Annotated[str | None, option(_WHAT, f"{', '.join(datasets.names())}.", "digits")] = None,
    data_root: Annotated[str | None, option(_WHAT, "Folder of the data set's files.", "the usual places")] = None,
    num_train: Annotated[int | None, option(_WHAT, "Use so many training samples.", "all")] = None,
    validation: Annotated[
        float | None, option(_WHAT, "Share of the training set held out and evaluated as well.", "0")
    ] = None,
    augment: Annotated[
        str | None, option(_WHAT, f"Random changes of training images: {', '.join(augmentation.NAMES)}.", "none")
    ] = None,
    download: Annotated[
        bool, option(_WHAT, "Fetch the data set's files if they are not there.", None, "--download")
    ] = False,
    partition: Annotated[str | None, option(_WHAT, f"{', '.join(configs.PARTITIONS)}.", "dirichlet")] = None,
    alpha: Annotated[
        float | None, option(_WHAT, "Heterogeneity of the Dirichlet partition; small is heterogeneous.", "0.1")
    ] = None,
    classes_per_worker: Annotated[int | None, option(_WHAT, "Of the partition classes.", "2")] = None,
    model: Annotated[str | None, option(_WHAT, f"{', '.join(models.names())}.", "mlp")] = None,
    pretrained: Annotated[str | None, option(_WHAT, "Folder of weights to start from.", "random weights")] = None,
    batch: Annotated[int | None, option(_WHAT, "Samples per worker and step.", "16")] = None,
    seed: Annotated[int | None, option(_WHAT, "Of model, partition and batches.", "0")] = None,
    lr: Annotated[float | None, option(_HOW, "Peak step size.", "0.1, or the algorithm's own")] = None,
    base_batch: Annotated[
        int | None, option(_HOW, "Samples of a step that --lr is for; the peak grows with them.", "--lr is the peak")
    ] = None,
    momentum: Annotated[float | None, option(_HOW, "Beta, in [0, 1).", "the algorithm's")] = None,
    qg_momentum: Annotated[float | None, option(_HOW, "Mu of quasi-global momentum.", "the algorithm's")] = None,
    weight_decay: Annotated[float | None, option(_HOW, "Lambda.", "the algorithm's")] = None,
    local_step: Annotated[int | None, option(_HOW, "Steps averaged by quasi-global momentum.", "1")] = None,
    hyper: Annotated[
        list[str] | None,
        option(_HOW, "Any other hyper-parameter of the algorithm; may be repeated.", metavar="NAME=VALUE"),
    ] = None,
    schedule: Annotated[str | None, option(_HOW, f"{', '.join(schedules.names())}.", "constant")] = None,
    milestones: Annotated[
        list[float] | None, option(_HOW, "Where step falls by 10, share of the run; may be repeated.", "0.5, 0.75")
    ] = None,
    warmup_epochs: Annotated[float | None, option(_HOW, "Linear warm-up, per iteration.", "0")] = None,
    warmup_from: Annotated[float | None, option(_HOW, "Step size at its start.", "lr / 10, or --lr")] = None,
    clip: Annotated[float | None, option(_HOW, "Clip each worker's gradient to this norm.", "off")] = None,
    on_nonfinite: Annotated[
        str | None, option(_HOW, f"Infinite or NaN gradient: {', '.join(configs.ON_NONFINITE)}.", "raise")
    ] = None,
    message: Annotated[
        str | None, option(_HOW, f"Messages to neighbours: {', '.join(messages.NAMES)}.", "float32")
    ] = None,
    epochs: Annotated[int | None, option(_LENGTH, "Length in epochs.", "100")] = None,
    steps: Annotated[int | None, option(_LENGTH, "Length in steps, instead of epochs.")] = None,
    eval_every: Annotated[int | None, option(_LENGTH, "Epochs between evaluations.", "1/20 of the run")] = None,
    dtype: Annotated[str | None, option(_MACHINE, f"{', '.join(configs.DTYPES)}.", "float32")] = None,
    device: Annotated[str | None, option(_MACHINE, "cpu, cuda or cuda:i.", "cpu")] = None,
    engine: Annotated[
        str | None, option(_MACHINE, f"Gradients: {', '.join(configs.ENGINES)}.", "threads, cuda: vmap")
    ] = None,
    threads: Annotated[int | None, option(_MACHINE, "CPU threads.", "as torch has it")] = None,
    out: Annotated[Path | None, option(_FILES, "Folder for the run's files, empty or new.", "no files")] = None,
    resume: Annotated[Path | None, option(_FILES, "Continue the run in this folder.")] = None,
    tensorboard: Annotated[bool, option(_FILES, "Write TensorBoard events, too.", None, "--tensorboard")] = False,
    checkpoint_seconds: Annotated[float, option(_FILES, "Seconds between checkpoints.", "5")] = 5.0,
    overlap: Annotated[
        bool | None, option(_PROCESSES, "Send messages during backward, to the same bits.", "off", "--overlap")
    ] = None,
    bucket_mb: Annotated[
        float | None, option(_PROCESSES, "Largest message in MB; small ones leave early with --overlap.", "25")
    ] = None,
    staleness: Annotated[
        int | None, option(_PROCESSES, "Merge a slow neighbour's last message if so many steps old at most.", "0")
    ] = None,
    trace: Annotated[
        int | None, option(_FILES, "Timeline of so many steps, into OUT/trace.json; under torchrun.", "none")
    ] = None,
    on_peer_loss: Annotated[
        str, option(_PROCESSES, f"When a process dies: {', '.join(ON_PEER_LOSS)}; heal: the others go on.", "raise")
    ] = "raise",
) -> None:
    """Train n workers on one machine and show how good their models are.

    Started by torchrun (`torchrun --nproc-per-node 4 -m qgm_ext train ...`), each process is one worker, and the
    parameters are those of as many workers in one process on one thread.

    With --out the run's files are kept; --resume continues a run that was stopped, to the same result. Where torchrun
    starts the workers again (--max-restarts) they do so by themselves, and with another number of processes the run
    goes on from the average of the workers.
    """
    arguments = locals()
    fields = {field.name for field in dataclasses.fields(configs.TrainConfig)} - {"hyper"}
    given = {name: value for name, value in arguments.items() if name in fields and value is not None}
    for name in ("data_root", "pretrained"):
        if name in given:
            given[name] = os.path.abspath(given[name])
    if milestones is not None:
        given["milestones"] = tuple(milestones)
    own = {
        name: arguments[name]
        for name in ("momentum", "qg_momentum", "weight_decay", "local_step")
        if arguments[name] is not None
    }
    how: dict[str, Any] = {"checkpoint_seconds": checkpoint_seconds, "on_peer_loss": on_peer_loss}
    console = make_console()
    with contextlib.ExitStack() as stack:
        with user_errors(), _loss_errors():
            processes = stack.enter_context(process_group())  # first, so that one of them tells what is wrong for all
            if processes > 1:
                _check_alike(arguments)
            if topology is not None:
                given["topology"], number = topology_names.parse(topology, workers)
                given |= {} if number is None else {"workers": number}
            if on_peer_loss not in ON_PEER_LOSS:
                raise ValueError(f"--on-peer-loss must be one of {', '.join(ON_PEER_LOSS)}, got {on_peer_loss!r}")
            if trace is not None and (processes == 1 or trace < 1 or (out is None and resume is None)):
                raise ValueError(
                    "--trace must be at least 1, and shows in OUT how processes wait for each other: start at least "
                    f"two by torchrun with --out, got --trace {trace}, {processes} processes and --out {out}"
                )
            if trace is not None and on_peer_loss != "raise":
                raise ValueError(f"--trace needs all processes, so --on-peer-loss must be raise, got {on_peer_loss}")
            if processes > 1:
                console.quiet = int(os.environ["RANK"]) > 0  # one worker speaks for all
                if out is not None and resume is None and _is_started_again(out):
                    out, resume = None, out
                old = int(_of_run(resume, "staleness")) if trace is not None and resume is not None else staleness
                if trace is not None and old:
                    raise ValueError(
                        "--trace needs --staleness 0, for torch's profiler crashes if it ends while messages are under "
                        f"way, got --staleness {old}"
                    )
            if resume is not None:
                if out is not None:
                    raise ValueError("give --out for a new run or --resume for an old one, not both")
                if hyper:
                    own |= _parse_hyper(algorithm or _of_run(resume, "algorithm"), hyper)
                training = Training.resume(
                    resume,
                    given={**given, "hyper": own},
                    tensorboard=tensorboard,
                    **how,
                )
            else:
                if processes > 1:
                    given.setdefault("workers", processes)
                own |= _parse_hyper(algorithm or configs.TrainConfig.algorithm, hyper or [])
                config = configs.TrainConfig(**given, hyper=own)
                if download:
                    if processes > 1:
                        raise ValueError("--download is for one process; fetch the files once without torchrun")
                    datasets.load(config.data, config.data_root, download=True)
                training = Training(config, out, tensorboard=tensorboard, **how)
            stack.enter_context(training)
        folder = out or resume
        traced = None if trace is None or folder is None else timeline.trace_steps(folder / "trace.json", trace)
        # Without a folder workers in processes of their own have nothing to keep, and so no need to end together.
        alone = processes == 1
        stopping = stop_on_signal(once=alone) if alone or folder is not None else contextlib.nullcontext(Stop())
        with _run_errors(folder, alone), stopping as stop, traced or contextlib.nullcontext(lambda: None) as after_step:
            _announce(console, training)
            result = _run(console, training, stop, after_step)
        console.quiet = not training.speaks
        if not result.finished:
            # Another worker may have got the signal.
            number = stop.signals[0] if stop.signals else signal.SIGTERM
            if not console.quiet:
                _say_interrupted(training, folder, number, alone)
            raise typer.Exit(128 + number)
    _show_result(console, result)
    if folder is not None:
        console.print(f"Files are in {folder}", markup=False, highlight=False, soft_wrap=True)


def _check_alike(arguments: dict[str, Any]) -> None:
    """Refuse workers of several machines with different options, who would wait for each other in vain."""
    said = {name: value for name, value in arguments.items() if name not in ("data_root", "pretrained", "threads")}
    said |= {name: arguments[name] is not None for name in ("out", "resume")}  # each machine may have its own
    check_agreement(None, {f"--{name.replace('_', '-')}": value for name, value in said.items()}, torch.device("cpu"))


def _is_started_again(out: Path) -> bool:
    """Whether torchrun has started the workers again after one of them died, and there is a run to go on with."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return False
    return by_first(lambda: "yes" if (out / runfolder.CONFIG).is_file() else "no") == "yes"


def _of_run(out: Path, field: str) -> str:
    return by_first(lambda: str(getattr(configs.loads(out / runfolder.CONFIG)[0], field)))


def _parse_hyper(algorithm: str, texts: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--hyper must be NAME=VALUE, got {text!r}")
        found[name.strip().replace("-", "_")] = configs.parse_hyper(algorithm, name.strip().replace("-", "_"), value)
    return found


def _announce(console: Console, training: Training) -> None:
    config = training.config
    for note in () if console.quiet else training.notes:
        typer.echo(f"qgm: {note}", err=True)
    hyper = ", ".join(f"{key} {value}" for key, value in {"lr": config.lr, **config.hyper}.items())
    lines = [
        f"{config.algorithm} ({hyper}), {config.schedule} schedule",
        f"{config.workers} workers, {config.topology}; {config.model} on {config.data}; {training.num_steps} steps of "
        f"{config.batch} samples a worker; {config.dtype} on {config.device}, seed {config.seed}",
        "",
        training.partition.describe(training.dataset.train_y.numpy(), training.dataset.num_classes, _SHOWN_WORKERS),
        "",
    ]
    if training.step:
        lines.append(f"resumed at step {training.step} of {training.num_steps}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _run(console: Console, training: Training, stop: Callable[[], bool], after_step: Callable[[], object]) -> Result:
    """Run it under a progress bar, or, where there is no terminal, with a line for each evaluation."""
    if not console.is_terminal:
        return training.run(
            on_step=lambda _: after_step(),
            on_evaluation=lambda record: console.print(
                _progress_text(record, training), markup=False, highlight=False, soft_wrap=True
            ),
            should_stop=stop,
        )
    columns = (
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=training.num_steps, completed=training.step)

        def on_step(step: int) -> None:
            progress.update(task, completed=step)
            after_step()

        return training.run(
            on_step=on_step,
            on_evaluation=lambda record: progress.update(task, description=_accuracy_text(record)),
            should_stop=stop,
        )


def _accuracy_text(record: Record) -> str:
    return f"accuracy {record['accuracy_local_mean']:.1%}, averaged {record['accuracy_average']:.1%}"


def _progress_text(record: Record, training: Training) -> str:
    loss = "" if record["loss"] is None else f", loss {record['loss']:.4f}"
    return f"step {record['step']}/{training.num_steps}, epoch {record['epoch']:g}{loss}, {_accuracy_text(record)}"


def _say_interrupted(training: Training, folder: Path | None, number: int, alone: bool) -> None:
    name = signal.Signals(number).name
    if folder is None:
        typer.echo(f"qgm: stopped by {name} at step {training.step}; without --out nothing was kept", err=True)
    else:
        typer.echo(
            f"qgm: stopped by {name} at step {training.step} of {training.num_steps}, checkpoint written; "
            f"continue with: {_resuming(folder, alone)}",
            err=True,
        )


def _resuming(folder: Path, alone: bool) -> str:
    """The command that goes on with a run."""
    return f"{'qgm' if alone else 'torchrun ... -m qgm_ext'} train --resume {shlex.quote(str(folder))}"


def _show_result(console: Console, result: Result) -> None:
    summary = result.summary
    table = Table(box=box.SIMPLE_HEAD, title="Result on the test set", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, key, pattern in (
        ("accuracy of the local models: mean", "accuracy_local_mean", "{:.2%}"),
        ("  worst worker", "accuracy_local_min", "{:.2%}"),
        ("  best worker", "accuracy_local_max", "{:.2%}"),
        ("accuracy of the averaged model", "accuracy_average", "{:.2%}"),
        ("consensus distance", "consensus_distance", "{:.4g}"),
        ("worker-steps per second", "worker_steps_per_second", "{:,.0f}"),
        ("share of time: gradient", "share_gradient", "{:.1%}"),
        ("  optimizer", "share_optimizer", "{:.1%}"),
        ("  evaluation", "share_evaluation", "{:.1%}"),
        ("bytes sent by all workers", "bytes_sent", "{:,}"),
        ("seconds", "seconds", "{:.1f}"),
    ):
        table.add_row(label, pattern.format(summary[key]))
    if "message_ages" in summary:
        table.add_row("messages of earlier steps merged", f"{summary['stale_share']:.1%}")
        for age, count in enumerate(summary["message_ages"]):
            table.add_row(f"  {age} step{'' if age == 1 else 's'} old", f"{count:,}")
    console.print(table)


@contextlib.contextmanager
def _loss_errors(hint: str = "") -> Iterator[None]:
    """A lost worker as one line of one of the others, who have each seen the loss in a way of their own."""
    try:
        yield
    except PeerLostError as error:
        fail(f"{error}{hint}", EXIT_FAILED, about=f"rank {error.peer} is lost")


@contextlib.contextmanager
def _run_errors(folder: Path | None, alone: bool) -> Iterator[None]:
    """What can go wrong in the middle of a run, as one line; all else is our mistake, and shows its traceback."""
    hint = "" if folder is None else f"; when that is put right, continue with: {_resuming(folder, alone)}"
    try:
        with _loss_errors(hint):
            yield
    except NonFiniteGradientError as error:
        fail(f"{error}; a smaller --lr or --clip may help", EXIT_FAILED)
    except OSError as error:
        fail(f"{told(error)}{hint}", EXIT_FAILED)
    except KeyboardInterrupt:
        fail("stopped at once, without a checkpoint", 128 + signal.SIGINT)
