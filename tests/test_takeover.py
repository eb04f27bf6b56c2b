"""Workers whose saved state is gone: it comes from where it still is, or a neighbour's takes its place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from process_pool import ProcessPool
from qgm_ext import StackedOptimizer, algorithms, topology
from qgm_ext.distributed import checkpoint, takeover
from qgm_ext.optim import Decentralized

SIZE, DIM = 4, 100
RING = topology.ring(SIZE)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(SIZE) as pool:
        yield pool


# Who takes up what ----------------------------------------------------------------------------------------------------

ALL = [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("seen", "unsaved", "expected"),
    [
        pytest.param([{}, {}, {}, {}], [], None, id="nothing"),
        pytest.param([{5: ALL, 6: ALL}] * 4, [], (6, ALL, ALL), id="all"),
        pytest.param([{5: ALL, 6: [0, 1, 3]}] * 4, [], (5, ALL, ALL), id="killed while saving"),
        pytest.param([{5: [0], 6: [0]}, {5: [1], 6: [1]}, {5: [2]}, {5: [3]}], [], (5, ALL, ALL), id="each its own"),
        pytest.param([{6: [0]}, {6: [1]}, {}, {6: [3]}], [], (6, [0, 1, 1, 3], [0, 1, 1, 3]), id="lost"),
        pytest.param([{6: [0]}, {6: [1]}, {3: [2]}, {6: [3]}], [], (6, [0, 1, 1, 3], [0, 1, 1, 3]), id="older"),
        pytest.param([{6: [3]}, {6: [2]}, {6: [1]}, {6: [0]}], [], (6, ALL, [3, 2, 1, 0]), id="other machines"),
        pytest.param([{6: [0, 1]}, {6: [0, 1]}, {}, {}], [], (6, [0, 1, 1, 0], [0, 1, 0, 0]), id="a machine of two"),
        pytest.param([{}, {}, {}, {9: [3]}], [], (9, [3, 3, 3, 3], [3, 3, 3, 3]), id="one left"),
        pytest.param([{1: [0]}, {1: [1]}, {}, {1: [3]}], [2], None, id="killed before it first saved"),
    ],
)
def test_choose(seen: list[dict[int, list[int]]], unsaved: list[int], expected: Any) -> None:
    assert takeover.choose(seen, unsaved, RING) == (None if expected is None else takeover.Sources(*expected))


def test_choose_asks_the_neighbour_that_is_heard_next() -> None:
    graph = topology.one_peer_exponential(8)
    for step in (4, 5, 6):
        seen = [{step: [rank]} if rank != 3 else {} for rank in range(8)]
        (neighbour,) = [j for j in graph.mixing(step).row(3)[0].tolist() if j != 3]
        found = takeover.choose(seen, [], graph)
        assert found is not None
        assert found.taken == {3: neighbour}


def test_algorithms_say_whether_workers_can_be_copied() -> None:
    good = {name for name in algorithms.names() if algorithms.get(name, lr=0.1).can_copy_workers}
    assert good >= {"dsgd", "qg_dsgdm_n", "d_adam", "slowmo", "csgdm", "sgp", "qg_sgp"}
    assert not good & {
        "d2",
        "exact_diffusion",
        "gradient_tracking",
        "momentum_tracking",
        "choco_sgd",
        "relaysgd",
        "gut",
    }


# In processes ---------------------------------------------------------------------------------------------------------


def target(rank: int) -> Tensor:
    return torch.randn(DIM, generator=torch.Generator().manual_seed(rank + 1))


def train(
    rank: int, folders: list[str], steps: int, algorithm: str, more: dict[str, Any], save_every: int = 1
) -> dict[str, Any]:
    """Go on with what is in the rank's folder for so many steps; what was loaded, and the parameters."""
    torch.manual_seed(rank)
    model = nn.Linear(DIM, 1, bias=False)
    nn.init.zeros_(model.weight)
    opt = Decentralized(model.parameters(), algorithm, topology=RING, lr=0.05, bucket_mb=1e-4, **more)
    try:
        loaded = checkpoint.load(folders[rank], model, opt)
    except ValueError as error:
        return {"error": str(error)}
    drawn = torch.rand(1)
    start = 0 if loaded is None else loaded.step
    for step in range(start, start + steps):
        model.weight.grad = (model.weight - target(rank)).detach()
        opt.step()
        if (step + 1) % save_every == 0:
            checkpoint.save(folders[rank], model, opt, step + 1, extra={"of": rank})
    return {"loaded": loaded, "x": model.weight.detach()[0].clone(), "drawn": drawn}


def go(pool: ProcessPool, *arguments: Any) -> list[dict[str, Any]]:
    """:func:`train` in all processes, which may have to start first."""
    return pool.run(train, SIZE, *arguments, limit=240.0)


def stacked(algorithm: str, more: dict[str, Any], taken: dict[int, int], before: int, after: int) -> Tensor:
    """The rows of the StackedOptimizer, with some of them copied between two legs."""
    opt = StackedOptimizer(torch.zeros(SIZE, DIM), RING, algorithm, lr=0.05, **more)
    goals = torch.stack([target(rank) for rank in range(SIZE)])
    for _ in range(before):
        opt.step(opt.x - goals)
    for tensor in (opt.x, *opt.state.values()):
        rows = tensor.clone()
        for worker, other in taken.items():
            tensor[worker] = rows[other]
    for _ in range(after):
        opt.step(opt.x - goals)
    return opt.x


def folders_of(root: Path) -> list[str]:
    return [str(root / f"machine-{rank}") for rank in range(SIZE)]


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [("qg_dsgdm_n", {}), ("d_adam", {}), ("slowmo", {"slowmo_period": 3}), ("qg_dsgdm_n", {"message": "int8"})],
    ids=["qg_dsgdm_n", "d_adam", "slowmo", "int8"],
)
def test_a_lost_worker_takes_up_the_state_of_a_neighbour(
    pool: ProcessPool, tmp_path: Path, algorithm: str, more: dict[str, Any]
) -> None:
    folders = folders_of(tmp_path)
    before = go(pool, folders, 5, algorithm, more)
    shutil.rmtree(folders[2])
    found = go(pool, folders, 6, algorithm, more)
    taken = {2: 1}
    expected = stacked(algorithm, more, taken, 5, 6)
    for rank, one in enumerate(found):
        assert before[rank]["loaded"] is None
        loaded = one["loaded"]
        assert (loaded.step, loaded.resumed, loaded.taken) == (5, True, taken)
        assert loaded.extra == {"of": taken.get(rank, rank)}
        assert "not the state of every worker of step 5 any more: worker 2 takes up that of worker 1" in loaded.note
        assert torch.equal(one["x"], expected[rank]), f"rank {rank}"
    # Random numbers stay the worker's own.
    torch.manual_seed(2)
    nn.Linear(DIM, 1, bias=False)
    assert torch.equal(found[2]["drawn"], torch.rand(1))
    again = go(pool, folders, 0, algorithm, more)  # now whole again
    assert all(one["loaded"].taken == {} and one["loaded"].step == 11 for one in again)


def test_states_on_other_machines_are_found(pool: ProcessPool, tmp_path: Path) -> None:
    folders = folders_of(tmp_path)
    go(pool, folders, 5, "exact_diffusion", {})
    turned = folders[1:] + folders[:1]
    found = go(pool, turned, 6, "exact_diffusion", {})
    expected = stacked("exact_diffusion", {}, {}, 5, 6)
    for rank, one in enumerate(found):
        assert (one["loaded"].taken, one["loaded"].note) == ({}, "")
        assert one["loaded"].extra == {"of": rank}
        assert torch.equal(one["x"], expected[rank]), f"rank {rank}"


def test_what_a_copy_would_make_wrong_is_refused_by_name(pool: ProcessPool, tmp_path: Path) -> None:
    folders = folders_of(tmp_path)
    go(pool, folders, 2, "gradient_tracking", {})
    shutil.rmtree(folders[0])
    for one in go(pool, folders, 1, "gradient_tracking", {}):
        assert "lost the state of worker 0 of 4 at step 2, and with gradient_tracking none can take up" in one["error"]


def test_a_worker_that_never_saved_has_lost_nothing(pool: ProcessPool, tmp_path: Path) -> None:
    folders, others = folders_of(tmp_path), folders_of(tmp_path / "others")
    go(pool, folders, 1, "dsgd", {}, 2)  # they begin, but save nothing
    go(pool, others, 1, "dsgd", {})
    for rank in (0, 1):  # but these two do
        shutil.rmtree(folders[rank])
        shutil.copytree(others[rank], folders[rank])
    assert all(one["loaded"] is None for one in go(pool, folders, 0, "dsgd", {}))


def test_a_machine_of_some_workers_keeps_the_last_steps_of_them(pool: ProcessPool, tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("a", "a", "a", "b")]
    go(pool, folders, 8, "dsgd", {})
    for name in ("a", "b"):
        kept = sorted(int(path.name[5:]) for path in (tmp_path / name).glob("step-*"))
        assert kept[-2:] == [7, 8]
        assert len(kept) <= 4  # a neighbour may be one step behind, and its neighbour two


def test_damage_on_another_machine_is_told(pool: ProcessPool, tmp_path: Path) -> None:
    folders = folders_of(tmp_path)
    go(pool, folders, 2, "dsgd", {})
    (Path(folders[1]) / "step-00000002" / "worker-1-of-4" / "about.json").write_text("{}")
    shutil.rmtree(folders[2])
    errors = [one.get("error", "") for one in go(pool, folders, 0, "dsgd", {})]
    assert "worker-1-of-4 is damaged" in errors[1]
    assert "rank 1 can't read the checkpoint of worker 1; its own error says why" in errors[2]


def garbage(rank: int, what: str) -> str:
    content = {"checksums": {"a": 1}}
    tensors = {"a": torch.arange(5)}
    if rank == 0:
        if what == "length":
            torch.distributed.send(torch.tensor([1 << 40]), 1)
        elif what == "json":
            torch.distributed.send(torch.tensor([4]), 1)
            torch.distributed.send(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 1)
        else:
            takeover._send((content, tensors), 1, None, torch.device("cpu"))
        return ""
    with pytest.raises(ValueError, match="rank 0 sent something else than the checkpoint of worker 0: ") as caught:
        takeover._receive(0, 0, None, torch.device("cpu"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "said"),
    [("length", "it announces 1099511627776 bytes"), ("json", "Expecting value"), ("checksum", "wrong checksum of a")],
)
def test_garbage_is_refused_with_the_rank(pool: ProcessPool, what: str, said: str) -> None:
    assert said in pool.run(garbage, 2, what)[1]


# Under torchrun -------------------------------------------------------------------------------------------------------

_SCRIPT = """
import os, sys
from qgm_ext.cli import main
sys.argv += ["--out", f"{sys.argv.pop(1)}/machine-{os.environ['RANK']}"]
main()
"""


def newest_step(out: Path) -> int:
    return max((int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_a_worker_killed_with_its_disk_comes_back_by_torchrun(tmp_path: Path, victim: int) -> None:
    """kill -9, its files are removed, torchrun starts all again, and the run goes on to its end."""
    script = tmp_path / "worker.py"
    script.write_text(_SCRIPT)
    options = ["--num-train", "400", "--epochs", "6", "--batch", "4", "--alpha", "1", "--threads", "1", "--lr", "0.02"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(SIZE)]
    command += ["--max-restarts", "1", str(script), str(tmp_path), "train", *options, "--checkpoint-seconds", "0.1"]
    out = tmp_path / f"machine-{victim}"
    with open(tmp_path / "log", "w") as log:
        torchrun = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 120
            while newest_step(out) < 20 and time.monotonic() < end:
                time.sleep(0.01)
            pid = int((out / f"worker-{victim}-of-{SIZE}" / ".lock").read_text())
            os.kill(pid, signal.SIGSTOP)  # so that it writes nothing any more
            time.sleep(0.2)
            shutil.rmtree(out)
            os.kill(pid, signal.SIGKILL)
            assert torchrun.wait(timeout=180) == 0, (tmp_path / "log").read_text()
        finally:
            torchrun.kill()
            torchrun.wait()
    text = (tmp_path / "log").read_text()
    assert text.count(f"worker {victim} takes up that of worker") == 1, text
    assert f"rank {victim} of {SIZE} takes up the state of worker" in text
    assert "resumed at step" in text
    summary = json.loads((tmp_path / "machine-0" / "summary.json").read_text())
    assert summary["replaced_workers"] == 1
    records = [json.loads(line) for line in (tmp_path / "machine-0" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == summary["step"] > 20
    losses = [record["loss"] for record in records if record["loss"] is not None]
    assert losses[-1] < losses[0]
    assert records[-1]["accuracy_local_min"] > records[0]["accuracy_local_min"]
    for rank in range(SIZE):
        file = tmp_path / f"machine-{rank}" / f"worker-{rank}-of-{SIZE}" / "metrics.jsonl"
        own = [json.loads(line) for line in file.read_text().splitlines()]
        assert {record["worker"] for record in own} == {rank}
        assert own[-1]["step"] == records[-1]["step"]
