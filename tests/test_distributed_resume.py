"""Runs with a process for each worker survive kill -9 of any or all of them and go on to the same bits."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from process_pool import Processes, process_group
from qgm_ext.experiments.config import TrainConfig
from qgm_ext.experiments.train import Training, run

SIZE = 3
CONFIG: dict[str, Any] = {
    "workers": SIZE,
    "num_train": 300,
    "epochs": 2,
    "batch": 8,
    "threads": 1,
    "alpha": 1.0,
    "topology": "one_peer_exponential",
    "eval_every": 1,
}
PRELOAD = ["qgm_ext.cli_train", "sklearn.datasets", "matplotlib.figure"]
LIMIT = 150.0  # seconds after which workers that have not ended hang
FIGURES = ("step", "loss", "accuracy_local_mean", "accuracy_average", "consensus_distance", "lr", "bytes_sent")


def flattened(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def one_worker(
    rank: int, size: int, store: str, out: str, config: dict[str, Any], stop: int | None, seconds: float
) -> None:
    """Start the run in ``out`` or go on with it; ``stop``: the last worker shall end after so many steps."""
    with process_group(rank, size, store):
        started = (Path(out) / "config.json").exists()
        torch.distributed.barrier()
        make: Callable[..., Training] = (
            Training.resume if started else lambda o, **m: Training(TrainConfig(**config), o, **m)
        )
        with make(out, checkpoint_seconds=seconds) as training:
            notes = training.notes
            result = training.run(should_stop=lambda: rank == size - 1 and training.step == stop)
            model = flattened(result.simulator.model)
            torch.save({"model": model, "metrics": result.metrics, "notes": notes}, f"{store}-{rank}.pt")


class Workers(Processes):
    """``size`` processes that train in ``out``."""

    def __init__(
        self,
        folder: Path,
        out: Path,
        size: int = SIZE,
        stop: int | None = None,
        seconds: float = 5.0,
        config: dict[str, Any] = CONFIG,
    ) -> None:
        self.store = str(folder / f"store-{time.monotonic_ns()}")
        arguments = (size, self.store, str(out), config, stop, seconds)
        super().__init__(one_worker, size, *arguments, log=self.store, preload=PRELOAD)

    def results(self) -> list[dict[str, Any]]:
        assert not any(self.end(LIMIT)), self.logs
        return [torch.load(f"{self.store}-{rank}.pt") for rank in range(len(self.members))]


def figures(metrics: list[dict[str, Any]]) -> list[list[Any]]:
    return [[record[name] for name in FIGURES] for record in metrics]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def own_figures(out: Path, rank: int, size: int = SIZE) -> list[list[Any]]:
    names = ("step", "epoch", "worker", "loss", "accuracy", "lr", "bytes_sent", "wire_bytes_sent")
    return [[record[name] for name in names] for record in lines(out / f"worker-{rank}-of-{size}" / "metrics.jsonl")]


def kill(workers: Workers, victims: list[int]) -> None:
    for victim in victims:
        pid = workers.members[victim].pid
        if pid is not None and workers.members[victim].is_alive():
            os.kill(pid, signal.SIGKILL)


def saved_steps(out: Path) -> int:
    return len(list((out / "checkpoints").glob("step-*"))) and max(
        int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{}, {"overlap": True, "bucket_mb": 0.01, "on_nonfinite": "ignore"}], ids=["plain", "overlap"]
)
def test_killed_workers_go_on_to_the_same_bits(tmp_path: Path, more: dict[str, Any]) -> None:
    draw = random.Random(0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = Workers(tmp_path, whole, config=CONFIG | more).results()
    alone = run(TrainConfig(**CONFIG))
    steps = expected[0]["metrics"][-1]["step"]
    for attempt in range(2):
        before = saved_steps(killed) if killed.exists() else 0
        workers = Workers(tmp_path, killed, seconds=0.0, config=CONFIG | more)
        end = time.monotonic() + 60
        wanted = min(before + draw.randint(1, steps // 3), steps - 2)
        while (not killed.exists() or saved_steps(killed) < wanted) and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.03))  # anywhere in a step, or in the middle of saving
        kill(workers, [draw.randrange(SIZE)] if attempt % 2 else list(range(SIZE)))
        assert any(workers.end(LIMIT))
        assert not (killed / "summary.json").exists()
    found = Workers(tmp_path, killed).results()
    for rank in range(SIZE):
        assert torch.equal(found[rank]["model"], expected[rank]["model"])
        assert torch.equal(found[rank]["model"], flattened(alone.simulator.models[rank]))
        assert figures(found[rank]["metrics"]) == figures(alone.metrics)
        assert own_figures(killed, rank) == own_figures(whole, rank)
    assert figures(lines(killed / "metrics.jsonl")) == figures(alone.metrics)
    assert (killed / "summary.json").exists()


@pytest.mark.slow
def test_killed_workers_go_on_with_old_messages_and_count_them_on(tmp_path: Path) -> None:
    out, config = tmp_path / "run", CONFIG | {"topology": "ring", "staleness": 2, "on_nonfinite": "ignore"}
    workers = Workers(tmp_path, out, seconds=0.0, config=config)
    end = time.monotonic() + 120
    while not (out.exists() and saved_steps(out) > 4) and time.monotonic() < end:
        time.sleep(0.005)
    kill(workers, [1])
    assert any(workers.end(LIMIT))
    step = saved_steps(out)
    found = Workers(tmp_path, out).results()
    summary = json.loads((out / "summary.json").read_text())
    assert 4 <= step < summary["step"] == found[0]["metrics"][-1]["step"]
    assert sum(summary["message_ages"]) == SIZE * 2 * summary["step"]
    for rank in range(SIZE):
        own = lines(out / f"worker-{rank}-of-{SIZE}" / "metrics.jsonl")
        assert 0 <= own[1]["stale_messages"] <= own[-1]["stale_messages"]
    Workers(tmp_path, out).results()  # of a run that is over, nothing is measured again
    assert json.loads((out / "summary.json").read_text())["message_ages"] == summary["message_ages"]


def test_another_number_of_workers_goes_on_from_the_average(tmp_path: Path) -> None:
    out = tmp_path / "run"
    before = Workers(tmp_path, out, 3, stop=13, seconds=0.0).results()  # of 12 steps an epoch
    average = torch.stack([result["model"].double() for result in before]).mean(0)
    now = Workers(
        tmp_path, out, 2, stop=20, seconds=0.0
    )  # steps an epoch: 18, so that it goes on at step 20, and stops at once
    for result in now.results():
        assert len(result["notes"]) == 1
        assert "was saved by 3 workers at step 13, now there are 2: all start from the average" in result["notes"][0]
        assert result["notes"][0].endswith("the run goes on at step 20 of 36")
        assert torch.equal(result["model"], average.float())
        assert figures(result["metrics"]) == figures(before[0]["metrics"])
    assert {path.name for path in (out / "checkpoints").glob("step-*/worker-*")} == {"worker-0-of-2", "worker-1-of-2"}
    assert json.loads((out / "config.json").read_text())["config"]["workers"] == 2
    for result in Workers(tmp_path, out, 2).results():  # the same number again: nothing to say
        assert result["notes"] == []
        assert result["metrics"][-1]["step"] == 36


@pytest.mark.slow
def test_torchrun_starts_killed_workers_again_and_they_go_on(tmp_path: Path) -> None:
    options = ["--num-train", "300", "--epochs", "8", "--batch", "4", "--alpha", "1", "--threads", "1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = tmp_path / "run"
    command = [*launch, "--max-restarts", "1", "-m", "qgm_ext", "train", *options, "--out", str(out)]
    command += ["--checkpoint-seconds", "0.02"]
    with open(tmp_path / "log", "w") as log:
        torchrun = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 90
            while not (out.exists() and saved_steps(out) > 10) and time.monotonic() < end:
                time.sleep(0.005)
            owner = int((out / "worker-1-of-2" / ".lock").read_text())
            os.kill(owner, signal.SIGKILL)
            assert torchrun.wait(timeout=120) == 0, (tmp_path / "log").read_text()
        finally:
            torchrun.kill()
            torchrun.wait()
    assert "resumed at step" in (tmp_path / "log").read_text()
    expected = run(TrainConfig(workers=2, num_train=300, epochs=8, batch=4, alpha=1.0, threads=1))
    assert figures(lines(out / "metrics.jsonl")) == figures(expected.metrics)


@pytest.mark.slow
def test_sigterm_to_torchrun_ends_in_a_checkpoint_of_all_workers(tmp_path: Path) -> None:
    """As a cluster does it that takes its machines back; and the run goes on to the same bits."""
    options = ["--num-train", "300", "--epochs", "4", "--batch", "4", "--alpha", "1", "--threads", "1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = tmp_path / "run"
    train = [*launch, "-m", "qgm_ext", "train"]
    command = [*train, *options, "--out", str(out), "--checkpoint-seconds", "1000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        torchrun = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 120
            while not (out.exists() and saved_steps(out) > 0) and time.monotonic() < end:
                time.sleep(0.005)
            torchrun.send_signal(signal.SIGTERM)
            assert torchrun.wait(timeout=60) != 0
        finally:
            torchrun.kill()
            torchrun.wait()
    text = (tmp_path / "log").read_text()
    found = re.search(r"^qgm: stopped by SIGTERM at step (\d+) of (\d+), checkpoint written; (.*)$", text, re.MULTILINE)
    assert found is not None, text
    assert found[3] == f"continue with: torchrun ... -m qgm_ext train --resume {out}"
    assert text.count("stopped by SIGTERM") == 1
    step = int(found[1])
    assert step < int(found[2])
    kept = {path.name for path in (out / "checkpoints" / f"step-{step:08d}").iterdir()}
    assert kept == {"worker-0-of-2", "worker-1-of-2"}
    assert saved_steps(out) == step
    again = subprocess.run(
        [*train, "--resume", str(out)], env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert again.returncode == 0, again.stderr
    assert f"resumed at step {step} of {found[2]}" in again.stdout
    expected = run(TrainConfig(workers=2, num_train=300, epochs=4, batch=4, alpha=1.0, threads=1))
    assert figures(lines(out / "metrics.jsonl")) == figures(expected.metrics)
