"""A training run with one process for each worker ends with the bits of the run in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from process_pool import ProcessPool
from qgm_ext.experiments.config import TrainConfig
from qgm_ext.experiments.train import Result, Training, resume, run

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
        {**common, "algorithm": "comp_ngc", "clip": 1.0},
        {**common, "algorithm": "ccl", "topology": "chain", "hyper": {"gamma": 0.5}, "dtype": "bfloat16"},
        {**common, "algorithm": "damsgrad", "message": "bfloat16", "lr": 0.01},
    ]


def check_trained_alike(results: list[Any], k: int, case: dict[str, Any], expected: Result) -> None:
    """Case k has left every process with the parameters and metrics of its worker in one process."""
    for rank, found in enumerate(results):
        parameters, metrics, _ = found[k]
        assert torch.equal(parameters, flattened(expected.simulator.models[rank])), f"{case}, rank {rank}"
        assert metrics == figures(expected.metrics), f"{case}, rank {rank}"


@pytest.mark.parametrize("n", [2, 3, 4])
def test_processes_train_as_the_simulator(pool: ProcessPool, n: int) -> None:
    wanted = cases(n)
    results = pool.run(train, n, wanted, limit=200.0)
    for k, case in enumerate(wanted):
        expected = run(TrainConfig(**case))
        check_trained_alike(results, k, case, expected)
        for rank in range(n):
            assert (results[rank][k][2] is None) == (rank > 0)
        assert torch.equal(results[0][k][2], flattened(expected.simulator.average_model()))


def test_overlap_trains_to_the_same_bits(pool: ProcessPool) -> None:
    n = 3
    common = {"workers": n, "num_train": 300, "steps": 6, "batch": 4, "threads": 1, "alpha": 1.0}
    common |= {"on_nonfinite": "ignore", "schedule": "cosine", "warmup_epochs": 0.1}
    plain = [
        common,
        {**common, "algorithm": "d2", "topology": "one_peer_exponential", "dtype": "float64"},
        {**common, "algorithm": "sgp", "topology": "random_directed", "model": "cnn"},
        {**common, "message": "int8"},
    ]
    wanted = [case | {"overlap": True, "bucket_mb": 0.01} for case in plain]  # buckets of 2500 numbers
    results = pool.run(train, n, wanted, limit=200.0)
    for k, case in enumerate(plain):
        check_trained_alike(results, k, case, run(TrainConfig(**case)))


def train_beside_a_slow_one(rank: int, n: int) -> dict[str, Any]:
    config = TrainConfig(
        workers=n, num_train=300, steps=20, batch=4, threads=1, alpha=1.0, on_nonfinite="ignore", staleness=2
    )
    with Training(config) as training:
        result = training.run(on_step=lambda _: time.sleep(0.02 if rank == n - 1 else 0.0))
        opt = result.simulator.opt
        assert not opt._runtime._engine._channels, "messages are under way still"
        return {"own": opt.message_ages, "stale": opt.communication.stale_messages, **result.summary}


def test_runs_with_old_messages_say_how_often_they_merged_some(pool: ProcessPool) -> None:
    n = 3
    results = pool.run(train_beside_a_slow_one, n, n)
    ages = [sum(counts) for counts in zip(*(c for found in results for c in found["own"].values()), strict=True)]
    assert sum(ages) == n * 2 * 20
    assert sum(ages[1:]) == sum(found["stale"] for found in results) > 0
    for found in results:
        assert found["message_ages"] == ages
        assert found["stale_share"] == sum(ages[1:]) / sum(ages)


def refusals(rank: int) -> list[str]:
    found = []
    overlap, old = {"workers": 2, "overlap": True}, {"workers": 2, "staleness": 2, "on_nonfinite": "ignore"}
    for wrong in (
        {"workers": 3},
        {"workers": 2, "engine": "vmap"},
        overlap,
        {**overlap, "on_nonfinite": "ignore", "clip": 1.0},
        {**overlap, "on_nonfinite": "ignore", "algorithm": "csgdm"},
        {**overlap, "on_nonfinite": "ignore", "algorithm": "relaysgd", "topology": "chain"},
        {**overlap, "on_nonfinite": "ignore", "algorithm": "qg_dadam"},
        {**old, "algorithm": "d2"},
        {**old, "algorithm": "csgdm"},
    ):
        try:
            run(TrainConfig(num_train=300, steps=1, batch=4, alpha=1.0, **wrong))
        except ValueError as error:
            found.append(str(error))
    return found


def test_what_a_process_of_its_own_cannot_do_is_refused(pool: ProcessPool) -> None:
    for messages in pool.run(refusals, 2):
        assert messages[0].startswith("workers must be the number of processes, 2, got 3")
        assert messages[1].startswith("engine must be 'loop' or 'threads'")
        reasons = [
            "on_nonfinite='raise' needs the whole gradient first, 'ignore' does not",
            "clip_grad_norm needs the whole gradient first",
            *(
                f"{name} takes more than one pass over its vectors in a step"
                for name in ("csgdm", "relaysgd", "qg_dadam")
            ),
        ]
        overlap = "overlap must be False where nothing can be sent during backward, got True: "
        assert messages[2:7] == [overlap + reason for reason in reasons]
        assert messages[7].startswith("d2 can't use old messages")
        assert messages[8].startswith("csgdm can't use old messages")
        assert len(messages) == 9


def start(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """``qgm train`` of two processes that torchrun starts."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launch, "-m", "qgm_ext", "train", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **more}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "more", "line"),
    [
        ("--overlap", {}, "overlap must be False where nothing can be sent during backward, got True: on_nonfinite="),
        ("--topology rnig", {}, "topology must be one of binary_tree, "),
        ("--trace 2 --staleness 1 --out /nowhere/run", {}, "--trace needs --staleness 0, for torch's profiler crashes"),
        ("", {"GLOO_SOCKET_IFNAME": "eht0"}, "GLOO_SOCKET_IFNAME must name an interface with an address, of lo"),
    ],
    ids=["overlap", "topology", "trace", "interface"],
)
def test_under_torchrun_one_worker_says_in_one_line_what_is_wrong(words: str, more: dict[str, str], line: str) -> None:
    done = start(*words.split(), **more)
    assert done.returncode != 0
    said = [text for text in done.stderr.splitlines() if text.startswith("qgm: ")]
    assert len(said) == 1, done.stderr
    assert said[0].startswith(f"qgm: {line}")
    assert "ValueError" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("train --lrr 0.1", "No such option: --lrr"),
        ("train --lr much", "Invalid value for '--lr'"),
        ("trian", "No such command 'trian'"),
    ],
)
def test_what_the_parser_finds_wrong_is_told_once_a_machine(words: str, line: str) -> None:
    """With torchrun's store but without torchrun, which ends workers before they have spoken."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = os.environ | {
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "qgm_ext", *words.split()],
            env=common | {"RANK": str(rank), "GROUP_RANK": str(rank // 2)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(4)
    ]  # fmt: skip
    said = []
    for one in started:
        try:
            said.append(one.communicate(timeout=200)[1])
        finally:
            one.kill()
        assert one.returncode == 2
    for machine in (said[:2], said[2:]):
        spoken, silent = sorted(machine, key=len, reverse=True)
        assert line in spoken
        assert silent == ""


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
