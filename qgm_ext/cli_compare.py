"""``qgm compare`` and ``qgm report``: their words; what is done with them is in :mod:`qgm_ext.cli_compare_run`.

It is imported when a command has its words, so that help and misspelled options don't wait for torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from qgm_ext import presets
from qgm_ext.cli_support import make_console, option, user_errors

__all__ = ["compare", "report"]

_WHAT, _HOW, _MACHINE, _FILES = "What to compare", "How", "Machine", "Files"
_TRAIN_WORDS = ("data", "data_root", "num_train", "pretrained", "validation", "epochs", "steps", "batch", "device")


def compare(
    file: Annotated[Path | None, typer.Argument(help="TOML file; or say all in options.", show_default=False)] = None,
    preset: Annotated[str | None, option(_WHAT, f"Instead of a file: {', '.join(presets.names())}.")] = None,
    algorithm: Annotated[list[str] | None, option(_WHAT, "Method; may be repeated, as all of these.")] = None,
    topology: Annotated[list[str] | None, option(_WHAT, "NAME or NAME:WORKERS.", "ring:16")] = None,
    alpha: Annotated[list[float] | None, option(_WHAT, "Heterogeneity.", "0.1")] = None,
    model: Annotated[list[str] | None, option(_WHAT, "Model.", "mlp")] = None,
    seeds: Annotated[int | None, option(_WHAT, "Number of seeds.", "3")] = None,
    lr: Annotated[list[float] | None, option(_HOW, "Step sizes to choose from.", "4 around the usual")] = None,
    baseline: Annotated[str | None, option(_HOW, "Method to test against.", "the first decentralised")] = None,
    lr_seeds: Annotated[str | None, option(_HOW, "Seeds that choose the step size: all or first.", "all")] = None,
    choose: Annotated[str | None, option(_HOW, "Accuracy that counts: last, or best on validation.", "last")] = None,
    metric: Annotated[str | None, option(_HOW, "Accuracy of the workers' mean, or of the worst.", "mean")] = None,
    data: Annotated[str | None, option(_WHAT, "Data set.", "digits")] = None,
    data_root: Annotated[str | None, option(_WHAT, "Folder of its files.", "the usual places")] = None,
    download: Annotated[
        bool, option(_WHAT, "Fetch the data set's files if they are not there.", None, "--download")
    ] = False,
    num_train: Annotated[int | None, option(_WHAT, "Use so many training samples.", "all")] = None,
    validation: Annotated[float | None, option(_HOW, "Share of them to choose step sizes on.", "0.1")] = None,
    epochs: Annotated[int | None, option(_HOW, "Length in epochs.", "100")] = None,
    steps: Annotated[int | None, option(_HOW, "Length in steps, instead of epochs.")] = None,
    batch: Annotated[int | None, option(_HOW, "Samples per worker and step.", "16")] = None,
    pretrained: Annotated[str | None, option(_WHAT, "Folder of weights to start from.", "random weights")] = None,
    device: Annotated[str | None, option(_MACHINE, "cpu, cuda or cuda:i.", "cpu")] = None,
    processes: Annotated[int | None, option(_MACHINE, "Runs side by side.", "as many as cores")] = None,
    threads: Annotated[int, option(_MACHINE, "CPU threads of each.", "1")] = 1,
    out: Annotated[Path | None, option(_FILES, "Folder; an earlier comparison in it goes on.", "compare-NAME")] = None,
    resume: Annotated[Path | None, option(_FILES, "Go on with the comparison in this folder, as it is.")] = None,
    dry_run: Annotated[bool, option(_FILES, "Show published figures, check, estimate.", None, "--dry-run")] = False,
    checkpoint_seconds: Annotated[float, option(_FILES, "Seconds between checkpoints of a run.", "30")] = 30.0,
) -> None:
    """Compare algorithms on topologies, alphas and models, over seeds and a grid of step sizes.

    The step size is chosen on a validation set; test accuracy is of the chosen one. Stopped at any moment, the same
    command goes on. Options replace what a file or preset says.
    """
    words: dict[str, Any] = {
        "algorithms": algorithm,
        "topologies": topology,
        "alphas": alpha,
        "models": model,
        "seeds": seeds,
        "lrs": lr,
        "baseline": baseline,
        "lr_seeds": lr_seeds,
        "choose": choose,
        "metric": metric,
    }
    arguments = locals()
    train = {name: arguments[name] for name in _TRAIN_WORDS if arguments[name] is not None}
    for name in ("data_root", "pretrained"):
        if name in train:
            train[name] = os.path.abspath(train[name])
    given = {name: value for name, value in words.items() if value is not None}
    if train:
        given["train"] = train
    from qgm_ext import cli_compare_run  # only now, for it needs torch

    cli_compare_run.compare(
        file,
        preset,
        resume,
        out,
        given,
        download=download,
        dry_run=dry_run,
        processes=processes,
        threads=threads,
        checkpoint_seconds=checkpoint_seconds,
    )


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a comparison, finished or not.", show_default=False)],
    out: Annotated[Path | None, option(None, "Folder of the page and its PNGs.", "report, in that folder")] = None,
) -> None:
    """Write the report of a comparison: one HTML page that needs no network, and its pictures as PNG files."""
    from qgm_ext.experiments import report as reports  # only now, for it needs torch

    with user_errors():
        page = reports.write(folder, out)
    make_console().print(f"The report is {page}", markup=False, highlight=False, soft_wrap=True)
