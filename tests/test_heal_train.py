"""``qgm train`` with on_peer_loss="heal": workers are killed, and the run goes on to its end without them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from process_pool import Processes, process_group
from qgm_ext.distributed.survivors import Survivors
from qgm_ext.evaluate import accuracy_and_loss
from qgm_ext.experiments.config import TrainConfig
from qgm_ext.experiments.train import Training

SIZE = 4
CONFIG: dict[str, Any] = {
    "workers": SIZE,
    "num_train": 400,
    "epochs": 4,
    "batch": 8,
    "threads": 1,
    "alpha": 1.0,
    "lr": 0.02,
    "topology": "ring",
    "eval_every": 1,
    "on_nonfinite": "ignore",
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_meeting(survivors: Survivors, moment: str) -> None:
    """At this moment of the next one."""
    if moment == "before it speaks":
        survivors._put = lambda key, content: die()  # type: ignore[method-assign]
    elif moment == "when it has spoken":
        survivors._engine.together = lambda done: die()  # type: ignore[method-assign, assign, return-value]
    else:  # when it makes the result
        put = survivors._put

        def half(key: str, content: Any) -> None:
            if "/result/" in key:
                die()
            put(key, content)

        survivors._put = half  # type: ignore[method-assign]


def one_worker(rank: int, store: str, out: str, deaths: dict[int, tuple[int, str]], seconds: float) -> None:
    with process_group(rank, SIZE, store):
        resumes = (Path(out) / "config.json").exists()
        torch.distributed.barrier()
        options: dict[str, Any] = {"checkpoint_seconds": seconds, "on_peer_loss": "heal"}
        made = Training.resume(out, **options) if resumes else Training(TrainConfig(**CONFIG), out, **options)
        with made as training:
            first, (step, moment) = training.step, deaths.get(rank, (-1, ""))

            def on_step(number: int) -> None:
                if number == step and not resumes:
                    if moment == "in a step":
                        die()
                    die_in_a_meeting(training._inputs.sim._survivors, moment)

            result = training.run(on_step=on_step)
            sim = result.simulator
            average = sim.average_model()
            said = {
                "first": first,
                "metrics": result.metrics,
                "summary": result.summary,
                "notes": training.notes,
                "model": sim.model.state_dict(),
                "average": None if average is None else average.state_dict(),
                "left": sim.left,
                "speaks": training.speaks,
                "judged": None
                if average is None
                else accuracy_and_loss(average, *training._inputs.test, 1024, F.cross_entropy),
            }
            torch.save(said, f"{store}-{rank}.pt")


def run(folder: Path, deaths: dict[int, tuple[int, str]], seconds: float = 5.0) -> dict[int, dict[str, Any]]:
    store = str(folder / f"store-{time.monotonic_ns()}")
    arguments = (store, str(folder / "run"), deaths, seconds)
    preload = ["qgm_ext.cli_train", "sklearn.datasets", "matplotlib.figure", "test_heal_train"]
    processes = Processes(one_worker, SIZE, *arguments, log=store, preload=preload)
    for rank, code in enumerate(processes.end()):
        assert code == (-signal.SIGKILL if rank in deaths else 0), f"rank {rank}\n{processes.logs}"
    return {rank: torch.load(f"{store}-{rank}.pt") for rank in range(SIZE) if rank not in deaths}


@pytest.mark.slow
@pytest.mark.parametrize(
    "deaths",
    [
        {2: (20, "in a step")},
        {3: (12, "before it speaks")},
        {1: (12, "when it has spoken")},
        {0: (12, "when it makes the result")},
        {1: (12, "before it speaks"), 2: (12, "when it has spoken")},
    ],
    ids=str,
)
def test_survivors_train_and_evaluate_to_the_end(tmp_path: Path, deaths: dict[int, tuple[int, str]]) -> None:
    found = run(tmp_path, deaths)
    left = sorted(found)
    metrics = found[left[0]]["metrics"]
    assert [record["step"] for record in metrics] == [0, 12, 24, 36, 48]
    assert metrics[-1]["loss"] < metrics[1]["loss"]
    sent = [record["bytes_sent"] for record in metrics]
    assert sent == sorted(sent)
    for rank, one in found.items():
        assert one["summary"]["lost_workers"] == sorted(deaths)
        assert one["left"] == left
        assert one["speaks"] == (rank == left[0])
        without_time = [
            [{k: v for k, v in record.items() if not k.startswith("seconds")} for record in some]
            for some in (one["metrics"], metrics)
        ]
        assert without_time[0] == without_time[1]
        own = [
            json.loads(line)
            for line in (tmp_path / "run" / f"worker-{rank}-of-{SIZE}" / "metrics.jsonl").read_text().splitlines()
        ]
        assert [record["step"] for record in own] == [0, 12, 24, 36, 48]
        assert {record["worker"] for record in own} == {rank}
    # The last evaluation is that of the mean of those that are left.
    first = found[left[0]]
    for name, value in first["average"].items():
        models = torch.stack([one["model"][name] for one in found.values()])
        assert torch.allclose(value, models.mean(0), rtol=1e-6, atol=1e-7)
    assert first["judged"][0] == metrics[-1]["accuracy_average"]
    assert (tmp_path / "run" / "summary.json").exists() == (0 not in deaths)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 20], ids=["before-it-saved", "later"])
def test_a_lost_worker_comes_back_with_the_state_of_a_neighbour(tmp_path: Path, step: int) -> None:
    """The others go on without it and save; when all are started again they are whole, from the step of the others."""
    before = run(tmp_path, {2: (step, "in a step")}, 0.0)
    kept = {
        path.name: sorted(p.name for p in path.iterdir()) for path in (tmp_path / "run" / "checkpoints").glob("step-*")
    }
    survivors = [f"worker-{rank}-of-{SIZE}" for rank in (0, 1, 3)]
    assert kept["step-00000048"] == survivors
    assert sum(set(survivors) <= set(names) for names in kept.values()) <= 3
    for rank, one in run(tmp_path, {}).items():
        assert one["first"] == 48
        assert "worker 2 takes up that of worker 1" in one["notes"][0]
        source = 1 if rank == 2 else rank
        assert all(torch.equal(value, before[source]["model"][name]) for name, value in one["model"].items())
        assert (one["summary"]["replaced_workers"], one["summary"]["lost_workers"]) == (1, [])
