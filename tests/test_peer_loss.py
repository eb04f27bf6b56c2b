"""Workers that are killed: the others end with an error that names them, or go on without them to the bits of the
stacked optimizer with the healed matrices. Real processes, Gloo, loopback; every test has a time limit.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from process_pool import Processes, process_group
from qgm_ext import StackedOptimizer, topology
from qgm_ext.distributed import PeerLostError, checkpoint
from qgm_ext.distributed.healing import HealingEngine
from qgm_ext.distributed.process_worker import ProcessWorker
from qgm_ext.experiments.worker_files import by_first
from qgm_ext.mixing import Mixing
from qgm_ext.optim import QGSGD, Decentralized

DIM = 300
PRELOAD = ["qgm_ext.optim", "torch.distributed.checkpoint", "test_peer_loss"]
BUCKET_MB = 6e-4  # 128 numbers, so that there are three buckets


class Death(NamedTuple):
    """When a worker is killed: in this step, ``delay`` seconds after its begin, or, None, halfway through its sends."""

    step: int
    delay: float | None


class Case(NamedTuple):
    algorithm: str
    graph: str
    n: int
    steps: int
    deaths: dict[int, Death]
    pause: float = 0.0  # seconds, at most, before each step
    on_peer_loss: str = "heal"
    timeout: float = 120.0
    save_every: int = 0
    silent: dict[int, int] = {}  # noqa: RUF012 - never changed; who does not answer from which step on
    store_of_rank_0: bool = False
    more: dict[str, Any] = {}  # noqa: RUF012 - never changed
    overlap: bool = False
    groups: int = 1  # of parameters


def target(worker: int) -> Tensor:
    """Where worker's loss, half the squared distance to it, is least."""
    return torch.randn(DIM, generator=torch.Generator().manual_seed(worker + 1))


def die_halfway(engine: HealingEngine) -> None:
    """Send the next message to the first receiver only, and die."""
    whole = engine._start_bucket
    numbers: list[int] = []

    def half(receivers: Any, outgoing: Any, incoming: Any, stamp: Any, turn: int) -> None:
        whole(receivers[:1], outgoing, incoming, stamp, turn)
        numbers.append(stamp.bucket)
        if len(numbers) == 3:
            sent = 0
            while sent < 3:
                event = engine._events.get(timeout=30)
                sent += not event.incoming
            os.kill(os.getpid(), signal.SIGKILL)

    engine._start_bucket = half  # type: ignore[method-assign]


def one_worker(rank: int, store: str, case: Case) -> None:
    """Train, die if that is the case's wish, and write down how it went."""
    draw = random.Random(rank)
    death = case.deaths.get(rank)
    with process_group(rank, case.n, store, of_rank_0=case.store_of_rank_0):
        graph = topology.get(case.graph, case.n)
        params = [nn.Parameter(part.clone()) for part in torch.zeros(DIM).split(DIM // case.groups)]
        opt = Decentralized(
            [{"params": [p]} for p in params],
            case.algorithm,
            topology=graph,
            lr=0.1,
            bucket_mb=BUCKET_MB,
            timeout=case.timeout,
            on_peer_loss=case.on_peer_loss,
            overlap=case.overlap,
            **case.more,
        )
        model = nn.Module()
        model.x = params[0]
        goal = target(rank)
        found: dict[str, Any] = {"losses": []}
        folder = Path(f"{store}-checkpoints")
        loaded = checkpoint.load(folder, model, opt) if case.save_every else None
        found["loaded"] = None if loaded is None else loaded.step
        try:
            for step in range(case.steps):
                time.sleep(draw.uniform(0.0, case.pause))
                if case.silent.get(rank) == step:
                    time.sleep(1.5 * case.timeout)
                    os._exit(0)
                if death is not None and death.step == step and loaded is None:
                    if death.delay is None:
                        die_halfway(opt._runtime._engine)
                    else:
                        threading.Timer(death.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
                        time.sleep(0.0 if death.delay else 1.0)
                opt.zero_grad()
                loss = 0.5 * ((torch.cat(list(params)) - goal) ** 2).sum()
                found["losses"].append(float(loss.detach()))
                loss.backward()  # the gradient is the difference, to the bit
                opt.step()
                if case.save_every and (step + 1) % case.save_every == 0:
                    checkpoint.save(folder, model, opt, step + 1)
        except PeerLostError as error:
            found |= {"peer": error.peer, "said": str(error)}
        found |= {"x": torch.cat([p.detach() for p in params]), "lost": opt.lost_workers}
        found["overlap_obstacle"] = opt.overlap_obstacle
        torch.save(found, f"{store}-{rank}.pt")


def run(folder: Path, case: Case, limit: float = 240.0, store: str = "") -> dict[int, dict[str, Any]]:
    """Run the case; what the survivors have to tell. A hang is a failure."""
    store = store or str(folder / f"store-{time.monotonic_ns()}")
    processes = Processes(one_worker, case.n, store, case, log=store, preload=PRELOAD)
    for rank, code in enumerate(processes.end(limit)):
        assert code == (-signal.SIGKILL if rank in case.deaths else 0), f"rank {rank}\n{processes.logs}"
    left = [rank for rank in range(case.n) if rank not in case.deaths and rank not in case.silent]
    return {rank: torch.load(f"{store}-{rank}.pt") for rank in left} | {-1: {"logs": processes.logs}}


def stacked(case: Case, lost: dict[int, int]) -> Tensor:
    """The stacked optimizer with the healed matrix of every step, [n, D]."""
    graph = topology.get(case.graph, case.n)
    matrices = []
    for step in range(case.steps):
        gone = [rank for rank, first in lost.items() if first <= step]
        matrices.append(graph.mixing(step).without(gone).to_matrix())
    healed = topology.from_sequence(matrices, allow_disconnected=True)  # which refuses what is not doubly stochastic
    x = torch.zeros(case.n, DIM)
    opt = StackedOptimizer(x, healed, case.algorithm, lr=0.1, **case.more)
    goals = torch.stack([target(worker) for worker in range(case.n)])
    for _ in range(case.steps):
        opt.step(opt.x - goals)
    return opt.x


def check_healed(case: Case, found: dict[int, dict[str, Any]]) -> dict[int, int]:
    """All survivors agree, and have the bits of the stacked optimizer; returns who was lost from which step on."""
    logs = found.pop(-1)["logs"]
    assert all("said" not in survivor for survivor in found.values()), [one.get("said") for one in found.values()]
    # Who was no neighbour of the lost one may have ended before it heard of it.
    lost: dict[int, int] = {}
    for survivor in found.values():
        for rank, first in survivor["lost"].items():
            assert lost.setdefault(rank, first) == first
    assert lost.keys() <= case.deaths.keys()
    for rank, first in lost.items():
        assert first in (case.deaths[rank].step, case.deaths[rank].step + 1, case.deaths[rank].step + 2)
        assert logs.count(f"rank {rank} of {case.n} is lost") <= 1, logs
    expected = stacked(case, lost)
    for rank, survivor in found.items():
        assert torch.equal(survivor["x"], expected[rank]), f"rank {rank}"
        assert len(survivor["losses"]) == case.steps
    return lost


HEALED = {
    "ring": Case("qg_dsgdm_n", "ring", 5, 12, {1: Death(3, 0.0), 3: Death(7, 0.0)}),
    "neighbours at once": Case("dsgdm", "ring", 5, 8, {1: Death(3, 0.0), 2: Death(3, 0.0)}),
    "first step": Case("dsgd", "complete", 4, 6, {0: Death(0, 0.0)}),
    "halfway": Case("qg_dsgdm", "ring", 4, 8, {2: Death(4, None)}),
    "sums of blocks": Case("qg_dadam", "ring", 4, 8, {3: Death(4, 0.0)}),
    "bfloat16": Case("qg_dsgdm_n", "ring", 4, 8, {2: Death(4, 0.0)}, more={"message": "bfloat16"}),
    "int8, halfway": Case("qg_dsgdm", "ring", 4, 8, {1: Death(4, None)}, more={"message": "int8"}),
    "int8, all neighbours": Case("dsgdm", "star", 4, 8, {0: Death(4, 0.0)}, more={"message": "int8"}),
    "overlap": Case("qg_dsgdm_n", "ring", 5, 10, {1: Death(3, 0.0), 3: Death(6, 0.0)}, overlap=True),
    "overlap, halfway": Case("qg_dsgdm", "ring", 4, 8, {2: Death(4, None)}, overlap=True),
    "two groups": Case("dsgdm", "ring", 4, 8, {2: Death(4, 0.0)}, groups=2),
    "overlap, two groups": Case("dsgdm", "ring", 4, 8, {2: Death(4, 0.0)}, overlap=True, groups=2),
    "time-varying": Case("d_adam", "random_matching", 4, 12, {2: Death(5, 0.0)}, more={"weight_decay": 0.01}),
}


@pytest.mark.parametrize("name", HEALED)
def test_survivors_go_on_with_the_healed_matrix(tmp_path: Path, name: str) -> None:
    case = HEALED[name]
    found = run(tmp_path, case)
    lost = check_healed(case, found)
    for rank, death in case.deaths.items():
        # Killed before it sent anything in its last step, or after one of two neighbours got its message of it.
        assert lost[rank] == death.step + (death.delay is None)
    assert all((one["overlap_obstacle"] is None) == case.overlap for one in found.values())


def random_deaths(seed: int, steps: int, count: int) -> dict[int, Death]:
    draw = random.Random(seed)
    ranks = draw.sample(range(8), count)
    return {rank: Death(draw.randrange(2, steps - 5), draw.uniform(0.0, 0.006)) for rank in ranks}


def kill_at_random_and_heal(folder: Path, seed: int, pause: float = 0.004, steps: int = 40) -> None:
    case = Case("qg_dsgdm_n", "ring", 8, steps, random_deaths(seed, steps, 1 + seed % 3), pause)
    found = run(folder, case)
    check_healed(case, found)
    for survivor in found.values():
        assert survivor["losses"][-1] < survivor["losses"][0]


def kill_at_random_and_raise(folder: Path, seed: int) -> None:
    deaths = random_deaths(100 + seed, 40, 1)
    ((victim, death),) = deaths.items()
    case = Case("qg_dsgdm_n", "ring", 8, 40, deaths, 0.004, "raise", timeout=60.0, save_every=5)
    store = str(folder / f"store-{time.monotonic_ns()}")
    found = run(folder, case, store=store)
    del found[-1]
    for rank, survivor in found.items():
        assert survivor.get("peer") == victim, f"rank {rank}: {survivor.get('said')}"
        assert f"rank {victim} of 8" in survivor["said"]
        assert len(survivor["losses"]) <= death.step + 8  # as far as messages are ahead in a ring
    # What they saved is whole: all of them take up the same step, and end.
    os.unlink(store)
    found = run(folder, case._replace(deaths={}, steps=5), store=store)
    del found[-1]
    steps = {survivor["loaded"] for survivor in found.values()}
    assert len(steps) == 1
    if death.step >= 5 + 1:
        assert steps.pop() in range(death.step - 10, death.step + 8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_random_kills_are_healed(tmp_path: Path, seed: int) -> None:
    kill_at_random_and_heal(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_random_kills_end_every_worker_with_the_name_of_the_lost(tmp_path: Path, seed: int) -> None:
    kill_at_random_and_raise(tmp_path, seed)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(2, 20))
@pytest.mark.parametrize("kill", [kill_at_random_and_heal, kill_at_random_and_raise], ids=["heal", "raise"])
def test_twenty_random_kills(tmp_path: Path, kill: Any, seed: int) -> None:
    kill(tmp_path, seed)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def meet(how: str, store: str, rank: int) -> Callable[[], object]:
    """A way in which all workers meet."""
    if how == "maximum":
        worker = ProcessWorker(Line(), topology.ring(4), "dsgd", lr=0.1)
        return lambda: worker.maximum(torch.tensor([rank]))
    if how == "first":
        return lambda: by_first(lambda: "")
    model = Line()
    opt = QGSGD(model.parameters(), lr=0.1, topology=topology.ring(4), on_nonfinite="skip", timeout=4.0)
    if how == "average":
        return lambda: checkpoint.consensus_model(model)
    if how in ("load", "hand over"):
        folder = f"{store}-checkpoints"
        checkpoint.save(folder, model, opt, 0)
        dist.barrier()
        folder += "" if rank == 2 else "-lost"  # so that rank 2 sends their states to the others
        return lambda: checkpoint.load(folder, model, opt)
    model.weight.grad = torch.ones(3)
    return opt.step


def die(*_: object) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def meet_without_one(rank: int, store: str, how: str) -> None:
    """Four workers, of whom rank 2 is gone after two steps, or before, when the others meet all together."""
    with process_group(rank, 4, store):
        if rank == 2 and how == "start":
            die()
        try:
            meeting = meet(how, store, rank)
            for step in range(4):
                if rank == 2 and step == 2:
                    if how == "silent":
                        time.sleep(15.0)
                        return
                    if how == "hand over":
                        checkpoint._read = die
                    else:
                        die()
                meeting()
        except PeerLostError as error:
            Path(f"{store}-{rank}").write_text(f"{error.peer} {error}")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["start", "dead", "silent", "maximum", "first", "average", "load", "hand over"])
def test_a_worker_that_is_missed_where_all_meet_is_named(tmp_path: Path, how: str) -> None:
    store = str(tmp_path / "store")
    processes = Processes(meet_without_one, 4, store, how, log=store, preload=PRELOAD)
    assert processes.end()[2] == (0 if how == "silent" else -signal.SIGKILL), processes.logs
    for rank in (0, 1, 3):
        assert Path(f"{store}-{rank}").read_text().startswith("2 rank 2 of 4 is lost, where all workers meet"), rank


def soak(folder: Path, seconds: float) -> None:
    """Random delays, up to ten steps long, and nobody is lost: the bits of the stacked optimizer, again and again."""
    end, seed = time.monotonic() + seconds, 0
    while seed == 0 or time.monotonic() < end:
        for on_peer_loss in ("raise", "heal"):
            graph = ("ring", "random_matching", "complete")[seed % 3]
            case = Case("qg_dsgdm_n", graph, 8, 40, {}, 0.02 * (seed % 4), on_peer_loss)
            assert check_healed(case, run(folder, case)) == {}
        seed += 1


@pytest.mark.slow
def test_random_delays_change_nothing(tmp_path: Path) -> None:
    soak(tmp_path, 1.0)


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_random_delays_for_ten_minutes(tmp_path: Path) -> None:
    soak(tmp_path, 600.0)


# The matrix, and what is refused --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_silent_worker_is_no_loss_to_heal(tmp_path: Path) -> None:
    case = Case("dsgd", "ring", 4, 6, {}, timeout=10.0, silent={2: 3})
    found = run(tmp_path, case)
    for rank in (0, 1, 3):
        assert re.search("silent in step [34], or waits for one that is", found[rank]["said"])
        assert len(found[rank]["losses"]) in (4, 5)


def test_a_store_that_is_lost_with_its_host_is_an_error(tmp_path: Path) -> None:
    case = Case("dsgd", "ring", 4, 30, {0: Death(3, 0.0)}, timeout=30.0, store_of_rank_0=True)
    found = run(tmp_path, case)
    assert found[1]["peer"] == found[3]["peer"] == 0
    for rank in (1, 2, 3):
        assert "the store at which workers agree on that is gone, too" in found[rank]["said"]


@pytest.mark.parametrize("name", ["ring", "complete", "star", "random_matching", "erdos_renyi"])
def test_a_matrix_without_workers_is_doubly_stochastic_among_the_others(name: str) -> None:
    graph = topology.get(name, 8)
    for step in range(3):
        whole = graph.mixing(step)
        assert whole.without([]) is whole
        lost = [2, 5]
        healed = whole.without(lost)
        assert healed is whole.without((5, 2, 5))
        left = np.delete(np.delete(healed.to_matrix(), lost, 0), lost, 1)
        assert np.abs(left.sum(0) - 1).max() < 1e-12
        assert np.abs(left.sum(1) - 1).max() < 1e-12
        assert (left == left.T).all()
        before = np.delete(np.delete(whole.to_matrix(), lost, 0), lost, 1)
        off = ~np.eye(6, dtype=bool)
        assert (left[off] == before[off]).all()
        assert (healed.to_matrix()[lost] == np.eye(8)[lost]).all()
    assert isinstance(healed, Mixing)


def refusals(rank: int, store: str) -> None:
    wrong: list[tuple[str, str, dict[str, Any], str]] = [
        ("qg_dsgdm_n", "one_peer_exponential", {}, "symmetric, .*those of 'one_peer_exponential' are not"),
        ("d2", "ring", {}, "d2 can't lose workers: .*on_peer_loss must be 'raise', got 'heal'"),
        ("gradient_tracking", "ring", {}, "gradient_tracking can't lose workers"),
        ("slowmo", "ring", {}, "slowmo can't lose workers"),
        ("relaysgd", "chain", {}, "relaysgd can't lose workers"),
        ("dsgd", "ring", {"on_nonfinite": "skip"}, "needs on_nonfinite='ignore', .*got 'skip'"),
    ]
    with process_group(rank, 3, store):
        for name, graph, more, message in wrong:
            made = topology.get(graph, 3)
            with pytest.raises(ValueError, match=message):
                Decentralized([nn.Parameter(torch.zeros(2))], name, topology=made, lr=0.1, on_peer_loss="heal", **more)


def test_what_can_not_heal_is_refused_at_the_start(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    processes = Processes(refusals, 3, store, log=store, preload=PRELOAD)
    assert processes.end() == [0, 0, 0], processes.logs


def test_on_peer_loss_must_be_known() -> None:
    with pytest.raises(ValueError, match="on_peer_loss must be one of raise, heal, got 'ignore'"):
        QGSGD([nn.Parameter(torch.zeros(2))], lr=0.1, on_peer_loss="ignore")  # type: ignore[arg-type]


def test_a_worker_alone_has_nobody_to_lose() -> None:
    opt = QGSGD([nn.Parameter(torch.zeros(2))], lr=0.1, on_peer_loss="heal")
    opt.step()
    assert opt.lost_workers == {}
