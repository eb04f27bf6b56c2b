"""A training run that was stopped or killed goes on to the same bits; what contradicts it or is damaged is named."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from qgm_ext import algorithms, data, models
from qgm_ext.experiments import Training, resume, run, runfolder
from qgm_ext.models import registry
from train_runs import assert_same_outcome, small, train_until, without_times

# Stop -----------------------------------------------------------------------------------------------------------------


def test_a_run_with_validation_set_resumes_to_the_same_bits(tmp_path):
    config = small(validation=0.2)
    train_until(config, tmp_path / "run", 5)
    assert_same_outcome(resume(tmp_path / "run"), run(config))
    assert (tmp_path / "run" / "learning_curves.png").stat().st_size > 0


@pytest.mark.parametrize("name", algorithms.names())
def test_every_algorithm_runs_and_resumes_to_the_same_bits(name, tmp_path):
    config = small(algorithm=name, topology="chain", steps=7)  # a chain is what every family accepts
    train_until(config, tmp_path / "run", 3)
    assert_same_outcome(resume(tmp_path / "run"), run(config))


@pytest.mark.parametrize("engine", ["loop", "vmap", "auto"])
def test_every_engine_resumes_to_the_same_bits(engine, tmp_path):
    config = small(engine=engine)
    stopped = train_until(config, tmp_path / "run", 5)
    chosen = stopped.simulator.engine
    resumed = resume(tmp_path / "run")
    assert resumed.simulator.engine == chosen != "auto"
    assert_same_outcome(resumed, run(small(engine=chosen)))


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_stopped_run_resumes_to_the_same_bits_wherever_it_was_stopped(model, tmp_path):
    config = small(model=model, schedule="cosine", warmup_epochs=1)
    whole = run(config)
    for steps in ([0], [1, 2], [6], [5, 7, 11], [12]):
        out = tmp_path / "-".join(map(str, steps))
        for step in steps:
            stopped = train_until(config, out, step)
            assert stopped.finished == (step == 12)
        assert_same_outcome(resume(out), whole)


def test_models_that_draw_random_numbers_resume_to_the_same_bits(tmp_path, monkeypatch):
    def with_dropout(input_shape, num_classes):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, num_classes))

    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    models.register("dropout", with_dropout, draws=True)
    config = small(model="dropout")
    assert config.engine == "loop"
    train_until(config, tmp_path / "run", 5)
    torch.rand(7)
    assert_same_outcome(resume(tmp_path / "run"), run(config))


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(tmp_path):
    first = run(small(), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "summary.json").unlink()
    assert_same_outcome(resume(tmp_path), first)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert without_times(json.loads((tmp_path / "summary.json").read_text())).items() >= (
        without_times(first.summary).items()
    )


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full_after_a_while(handle):
        calls.append(handle)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch, Training(small(), tmp_path, checkpoint_seconds=0) as training:
        patch.setattr(os, "fsync", full_after_a_while)
        with pytest.raises(OSError, match="No space"):
            training.run()
        assert 1 < training.step < 12
    assert not list(tmp_path.glob(".*.tmp"))
    assert 1 <= torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] <= training.step
    assert_same_outcome(resume(tmp_path), run(small()))


def test_resume_names_what_contradicts_the_run(tmp_path):
    train_until(small(), tmp_path, 3)
    given = {"seed": 1, "lr": 0.1, "topology": "ring", "hyper": {"momentum": 0.5, "qg_momentum": 0.9}}
    with pytest.raises(ValueError, match=r"with other options: seed is 0 in the run, 1 was given; momentum is 0.9 in"):
        Training.resume(tmp_path, given=given)


def test_resume_notices_files_that_do_not_belong_together(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        train_until(small(seed=seed), tmp_path / name, 3)
    for file, message in (
        (runfolder.CHECKPOINT, r"checkpoint\.pt belongs to another run"),
        (runfolder.PARTITION, r"partition\.npz is not the partition"),
    ):
        shutil.copytree(tmp_path / "a", tmp_path / file)
        shutil.copy(tmp_path / "b" / file, tmp_path / file / file)
        with pytest.raises(ValueError, match=message):
            Training.resume(tmp_path / file)


def test_resume_notices_other_data(tmp_path, monkeypatch):
    train_until(small(), tmp_path, 3)
    load = data.load

    def other(*arguments, **options):
        dataset = load(*arguments, **options)
        dataset.train_x[0, 0, 0, 0] += 1
        return dataset

    monkeypatch.setattr(data, "load", other)
    with pytest.raises(ValueError, match="data set digits is not the one"):
        Training.resume(tmp_path)


@pytest.mark.parametrize("file", [runfolder.CHECKPOINT, runfolder.PARTITION, runfolder.CONFIG])
def test_resume_names_a_damaged_file(tmp_path, file):
    train_until(small(), tmp_path, 3)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=file):
        Training.resume(tmp_path)
    (tmp_path / file).write_bytes(content)
    Training.resume(tmp_path).close()  # and the failed attempt has given up the folder


def test_resume_names_a_checkpoint_of_another_version(tmp_path):
    train_until(small(), tmp_path, 3)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save({**checkpoint, "format": "qgm_ext.checkpoint/9"}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of version 'qgm_ext.checkpoint/9'"):
        Training.resume(tmp_path)


def test_resume_says_when_torch_is_another(tmp_path):
    train_until(small(), tmp_path, 3)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    with Training.resume(tmp_path) as training:
        assert len(training.notes) == 1
        assert "torch 1.0" in training.notes[0]


# kill -9 --------------------------------------------------------------------------------------------------------------
# A real process each time, forked from a server that has done the imports, or each would take seconds to start.


def _command_line(arguments, kill=None):
    """In the child: run qgm, and die by SIGKILL before or after a file is put in its place for the nth time."""
    from qgm_ext.cli import main

    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    if kill is not None:
        file, nth, when = kill
        replace, count = os.replace, 0

        def replace_or_die(source, target):
            nonlocal count
            count += Path(target).name == file
            dies = Path(target).name == file and count == nth
            if dies and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace_or_die
    sys.argv = ["qgm", *arguments]
    main()


@pytest.fixture(scope="module")
def start_qgm():
    """Starts ``qgm train`` with these arguments in a process of its own, and returns the process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qgm_ext.cli_train", "sklearn.datasets", "matplotlib.figure"])

    def start(*arguments, kill=None):
        process = context.Process(target=_command_line, args=(["train", *map(str, arguments)], kill))
        process.start()
        return process

    return start


LIMIT = 120.0  # seconds, after which it is a hang, also on a busy machine
ARGUMENTS = ("--workers", 4, "--num-train", 200, "--batch", 8, "--threads", 1, "--eval-every", 1)


def files_of(out):
    """What must be equal in two runs: every file's content without times."""
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "names": sorted(entry.name for entry in out.iterdir()),
        "config": (out / "config.json").read_text(),
        "partition": data.Partition.load(out / "partition.npz").digest(),
        "metrics": [without_times(line) for line in lines],
        "summary": without_times(json.loads((out / "summary.json").read_text())),
        "curves": (out / "learning_curves.png").read_bytes(),
    }, checkpoint["simulator"]


def assert_same_files(a, b):
    (left, state), (right, other) = files_of(a), files_of(b)
    assert left == right
    assert state["optimizer"]["num_steps"] == other["optimizer"]["num_steps"]
    for tensors, others in (
        (state["parameters"], other["parameters"]),
        (state["optimizer"]["state"], other["optimizer"]["state"]),
    ):
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[name]), name


KILLS = [
    *(("config.json", 1, when) for when in ("before", "after")),
    *(("partition.npz", 1, when) for when in ("before", "after")),
    *(("metrics.jsonl", 1, when) for when in ("before", "after")),
    *(("checkpoint.pt", nth, when) for nth in (1, 3) for when in ("before", "after")),
    *(("learning_curves.png", 1, when) for when in ("before", "after")),
    *(("summary.json", 1, when) for when in ("before", "after")),
]


def test_kill_around_every_file_leaves_a_run_that_goes_on_to_the_same_bits(start_qgm, tmp_path):
    arguments = (*ARGUMENTS, "--steps", 20, "--checkpoint-seconds", 0)
    whole = start_qgm(*arguments, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    for kill in KILLS:
        started = (out / "config.json").exists()
        options = ("--resume", out, "--checkpoint-seconds", 0) if started else (*arguments, "--out", out)
        process = start_qgm(*options, kill=kill)
        process.join(LIMIT)
        assert process.exitcode == -signal.SIGKILL, kill
    last = start_qgm("--resume", out)
    for process in (whole, last):
        process.join(LIMIT)
        assert process.exitcode == 0
    assert_same_files(out, tmp_path / "whole")


def test_kill_at_random_moments_leaves_a_run_that_goes_on_to_the_same_bits(start_qgm, tmp_path):
    moments = random.Random(0)
    arguments = (*ARGUMENTS, "--steps", 600, "--checkpoint-seconds", 0.02)
    whole = start_qgm(*arguments, "--out", tmp_path / "whole")
    whole.join(LIMIT)
    assert whole.exitcode == 0
    out, kills = tmp_path / "killed", 0
    for _ in range(6):
        started = (out / "config.json").exists()
        options = ("--resume", out, "--checkpoint-seconds", 0.02) if started else (*arguments, "--out", out)
        process = start_qgm(*options)
        limit = time.monotonic() + LIMIT
        while process.is_alive() and not (out / "config.json").exists() and time.monotonic() < limit:
            time.sleep(0.01)
        process.join(moments.uniform(0.0, 0.6))
        kills += process.is_alive()
        process.kill()
        process.join(LIMIT)
    assert kills >= 1  # more on all but very fast machines
    last = start_qgm("--resume", out)
    last.join(LIMIT)
    assert last.exitcode == 0
    assert_same_files(out, tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_a_checkpoint(start_qgm, tmp_path, number, code):
    out = tmp_path / "run"
    process = start_qgm(*ARGUMENTS, "--steps", 100_000, "--out", out)
    _wait_for(out / "metrics.jsonl")
    os.kill(process.pid, number)
    process.join(LIMIT)
    assert process.exitcode == code
    assert 0 <= torch.load(out / "checkpoint.pt", weights_only=True)["step"] < 100_000
    with Training.resume(out) as training:
        step = training.step
        assert training.run(should_stop=lambda: training.step >= step + 2).metrics


def _wait_for(path, seconds=LIMIT):
    end = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        if time.monotonic() > end:
            raise TimeoutError(path)
        time.sleep(0.01)
