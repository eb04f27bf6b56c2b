"""A training run with one process for each worker ends with the bits of the run in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from process_pool import ProcessPool
from qgm_ext.experiments.config import TrainConfig
from qgm_ext.experiments.train import resume, run

FIGURES = (
    "step",
    "loss",
    "accuracy_local_mean",
    "accuracy_local_min",
    "accuracy_average",
    "consensus_distance",
    "lr",
    "bytes_sent",
)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(4) as made:
        yield made


def flattened(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def figures(metrics: list[dict[str, Any]]) -> list[list[Any]]:
    return [[record[name] for name in FIGURES] for record in metrics]


def train(rank: int, cases: list[dict[str, Any]]) -> list[tuple[Tensor, list[list[Any]], Tensor | None]]:
    found = []
    for case in cases:
        result = run(TrainConfig(**case))
        average = result.simulator.average_model()
        shown = None if average is None else flattened(average)
        found.append((flattened(result.simulator.model), figures(result.metrics), shown))
    return found


def cases(n: int) -> list[dict[str, Any]]:
    common = {"workers": n, "num_train": 300, "steps": 6, "batch": 4, "threads": 1, "alpha": 1.0}
    return [
        {**common, "schedule": "cosine", "warmup_epochs": 0.1, "clip": 1.0},
        {**common, "algorithm": "gradient_tracking_m", "topology": "one_peer_exponential", "dtype": "float64"},
        {**common, "algorithm": "relaysgd", "topology": "chain", "validation": 0.1},
        {**common, "algorithm": "sgp", "topology": "random_directed", "dtype": "bfloat16", "lr": 0.01},
        {**common, "algorithm": "csgdm", "model": "cnn"},
        {**common, "algorithm": "choco_sgd", "hyper": {"compressor": "qsgd"}},
        {**common, "message": "int8", "topology": "complete"},
        {**common, "algorithm": "damsgrad", "message": "bfloat16", "lr": 0.01},
    ]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_processes_train_as_the_simulator(pool: ProcessPool, n: int) -> None:
    wanted = cases(n)
    results = pool.run(train, n, wanted, limit=200.0)
    for k, case in enumerate(wanted):
        expected = run(TrainConfig(**case))
        for rank in range(n):
            parameters, metrics, average = results[rank][k]
            assert torch.equal(parameters, flattened(expected.simulator.models[rank])), f"{case}, rank {rank}"
            assert metrics == figures(expected.metrics), f"{case}, rank {rank}"
            assert (average is None) == (rank > 0)
        assert torch.equal(results[0][k][2], flattened(expected.simulator.average_model()))


def refusals(rank: int) -> list[str]:
    found = []
    for wrong in ({"workers": 3}, {"workers": 2, "engine": "vmap"}):
        try:
            run(TrainConfig(num_train=300, steps=1, batch=4, alpha=1.0, **wrong))
        except ValueError as error:
            found.append(str(error))
    return found


def test_what_a_process_of_its_own_cannot_do_is_refused(pool: ProcessPool) -> None:
    for messages in pool.run(refusals, 2):
        assert messages[0].startswith("workers must be the number of processes, 2, got 3")
        assert messages[1].startswith("engine must be 'loop' or 'threads'")


def test_torchrun_trains_as_one_process(tmp_path: Path) -> None:
    """The command line: one process speaks, and the files are those of a run in one process."""
    options = ["--num-train", "300", "--steps", "3", "--batch", "4", "--alpha", "1", "--threads", "1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "qgm_ext", "train", *options, "--out", str(tmp_path / "run"), "--trace", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Result on the test set") == 1
    expected = run(TrainConfig(workers=2, num_train=300, steps=3, batch=4, alpha=1.0, threads=1))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert figures([json.loads(line) for line in lines]) == figures(expected.metrics)
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name[0] != ".") == [
        "checkpoints",
        "config.json",
        "learning_curves.png",
        "metrics.jsonl",
        "partition.npz",
        "summary.json",
        "trace.json",
        "worker-0-of-2",
        "worker-1-of-2",
    ]
    for rank in range(2):
        own = [json.loads(line) for line in (tmp_path / "run" / f"worker-{rank}-of-2" / "metrics.jsonl").open()]
        assert [record["worker"] for record in own] == [rank, rank]
        assert 2 * own[-1]["bytes_sent"] == json.loads(lines[-1])["bytes_sent"] > 0
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    for name in ("backward", "qgm_ext: send bucket 0", "qgm_ext::merge_"):
        assert sorted(event["pid"] for event in events if event["name"] == name) == [0, 1], name
    with pytest.raises(ValueError, match="has a process for each worker; resume it with torchrun"):
        resume(tmp_path / "run")
