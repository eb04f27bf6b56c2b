"""Workers that don't wait for slow neighbours: real processes, Gloo, loopback; every test has a time limit."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from process_pool import ProcessPool
from qgm_ext import ops, topology
from qgm_ext.distributed import stale as stale_engine
from qgm_ext.distributed.stale import StaleEngine
from qgm_ext.optim import QGSGD, Decentralized, DecentralizedOptimizer
from test_peer_loss import Case, Death, run
from worker_runs import flattened, gradient, start_values, take_steps

N = 3
BUCKET_MB = 3e-4  # 64 numbers, so that there are several buckets


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(N) as made:
        yield made


# No step old: the bits of the engine that always waits ----------------------------------------------------------------

ALGORITHMS = ["dsgd", "dsgdm", "dsgdm_n", "qg_dsgdm", "qg_dsgdm_n", "d_adam", "damsgrad", "qg_dadam"]


def train_both(rank: int) -> list[tuple[str, bool, dict[int, tuple[int, ...]], int]]:
    found = []
    graph = topology.ring(N)
    for name in ALGORITHMS:
        results, ages, stale = [], {}, 0
        for with_stale_engine in (False, True):
            params = [nn.Parameter(value) for value in start_values(torch.float32)]
            groups = [{"params": params[:2]}, {"params": params[2:]}]
            opt = Decentralized(groups, name, topology=graph, lr=0.1, bucket_mb=BUCKET_MB, gossip_every=2, timeout=60)
            peers: Any = opt._runtime
            if with_stale_engine:
                peers._engine = StaleEngine(graph, rank, peers.exchange, opt._options.bucket_bytes, 0, 60.0)
            take_steps(opt, params, rank, range(4))
            with opt.no_gossip():
                take_steps(opt, params, rank, range(4, 5))
            take_steps(opt, params, rank, range(5, 9))
            opt.drain()
            ages, stale = opt.message_ages, opt.communication.stale_messages
            results.append(flattened(params))
        found.append((name, torch.equal(*results), ages, stale))
    return found


def test_no_step_old_are_the_bits_of_the_engine_that_waits(pool: ProcessPool) -> None:
    for rank, found in enumerate(pool.run(train_both, N)):
        assert [name for name, _, _, _ in found] == ALGORITHMS
        for name, equal, ages, stale in found:
            assert equal, f"{name}, rank {rank}"
            assert ages == {peer: (2 * 4,) for peer in range(N) if peer != rank}  # two groups, every second step
            assert stale == 0


# Old messages ---------------------------------------------------------------------------------------------------------


def ages_of_step(opt: DecentralizedOptimizer, before: dict[int, tuple[int, ...]]) -> dict[int, int]:
    """How old each neighbour's message was in the last step."""
    found = {}
    for peer, counts in opt.message_ages.items():
        more = [now - then for now, then in zip(counts, before.get(peer, [0] * len(counts)), strict=True)]
        assert sum(more) == 1
        found[peer] = more.index(1)
    return found


REPLAYED, DIM, LR = 15, 150, 0.25


def train_beside_a_slow_one(rank: int, staleness: int) -> tuple[list[Tensor], list[dict[int, int]], int]:
    p = nn.Parameter(torch.ones(DIM))
    opt = Decentralized(
        [p], "dsgd", topology=topology.ring(N), lr=LR, bucket_mb=BUCKET_MB, staleness=staleness, timeout=60
    )
    xs, ages = [p.detach().clone()], []
    for step in range(REPLAYED):
        time.sleep(0.02 if rank == N - 1 else 0.0)
        p.grad = gradient(step, rank, torch.float32)[2].repeat(3)[:DIM]
        before = opt.message_ages
        opt.step()
        ages.append(ages_of_step(opt, before))
        xs.append(p.detach().clone())
    opt.drain()
    return xs, ages, opt.communication.stale_messages


def test_what_is_merged_is_the_message_of_the_age_that_is_counted(pool: ProcessPool) -> None:
    staleness = 2
    results = pool.run(train_beside_a_slow_one, N, staleness)
    sent = []  # [worker][step]
    for rank, (xs, _, _) in enumerate(results):
        sent.append([])
        for step in range(REPLAYED):
            g = gradient(step, rank, torch.float32)[2].repeat(3)[:DIM]
            sent[-1].append(torch.empty(DIM))
            ops.local_step_(xs[step], g, [], [sent[-1][-1]], "dsgd", [LR, 0.0], None)
    mixing = topology.ring(N).mixing()
    for rank, (xs, ages, stale) in enumerate(results):
        columns, weights = mixing.row(rank)
        for step in range(REPLAYED):
            assert all(0 <= age <= min(staleness, step) for age in ages[step].values())
            received = [sent[peer][step - ages[step].get(peer, 0)] for peer in columns.tolist()]
            x, g = xs[step].clone(), gradient(step, rank, torch.float32)[2].repeat(3)[:DIM]
            ops.merge_(x, g, [], received, weights.tolist(), mixing.form == "mean", "dsgd", [LR, 0.0], None)
            assert torch.equal(x, xs[step + 1]), f"rank {rank}, step {step}, ages {ages[step]}"
        assert stale == sum(age > 0 for one in ages for age in one.values())
    assert any(one[N - 1] > 0 for one in results[0][1]), "the slow worker's messages were never late"


def train_two(rank: int) -> list[tuple[float, float]]:
    """Without gradients equal parameters stay what they are, unless messages get into the other optimizer."""
    values = (1.0, 100.0)
    params = [nn.Parameter(torch.full((DIM,), value)) for value in values]
    if rank == 0:  # as if it had made other optimizers before
        next(stale_engine._numbers)
    opts = [Decentralized([p], "dsgd", topology=topology.ring(N), lr=0.1, staleness=2, timeout=60) for p in params]
    for step in range(20):
        time.sleep(0.01 if rank == N - 1 else 0.0)
        for p, opt in zip(params, opts, strict=True) if step % 2 else zip(params[::-1], opts[::-1], strict=True):
            p.grad = torch.zeros(DIM)
            opt.step()
    for opt in opts:
        opt.drain()
    return [(float(p.detach().min()), float(p.detach().max())) for p in params]


def test_two_optimizers_do_not_take_each_others_messages(pool: ProcessPool) -> None:
    for found in pool.run(train_two, N):
        assert found == [(1.0, 1.0), (100.0, 100.0)]


STOP, STALENESS = 4, 3


def run_ahead(rank: int) -> tuple[dict[int, tuple[int, ...]], bool]:
    """The last worker goes on after step STOP only when all others say that they are STALENESS steps ahead."""
    store = distributed_c10d._get_default_store()
    p = nn.Parameter(torch.ones(DIM))
    opt = QGSGD([p], lr=0.1, topology=topology.complete(N), staleness=STALENESS, timeout=60)
    early = False
    for step in range(STOP + STALENESS + 3):
        if rank == N - 1 and step == STOP + 1:
            store.wait([f"ahead/{peer}" for peer in range(N - 1)])
            time.sleep(0.3)
            early = any(store.check([f"too far/{peer}"]) for peer in range(N - 1))
        p.grad = torch.ones(DIM)
        opt.step()
        if rank < N - 1 and step >= STOP + STALENESS:
            store.set(f"ahead/{rank}" if step == STOP + STALENESS else f"too far/{rank}", "")
    opt.drain()
    return opt.message_ages, early


def test_workers_get_as_far_ahead_as_allowed_and_no_further(pool: ProcessPool) -> None:
    results = pool.run(run_ahead, N)
    assert not results[N - 1][1]
    for rank in range(N - 1):
        assert results[rank][0][N - 1][STALENESS] >= 1
        assert sum(results[rank][0][N - 1]) == STOP + STALENESS + 3


def train_to_the_mean(rank: int) -> tuple[float, list[int], dict[int, tuple[int, ...]]]:
    """Each worker's loss is half the squared distance to its number; the mean loss is least at their mean."""
    p = nn.Parameter(torch.full((DIM,), 5.0))
    opt = QGSGD([p], lr=0.1, topology=topology.ring(N), bucket_mb=BUCKET_MB, staleness=4, timeout=60)
    losses = []
    for step in range(150):
        time.sleep(0.004 if rank == step // 50 else 0.0)  # each is the slow one for a while
        p.grad = p.detach() - rank
        losses.append(float(((p.detach() - (N - 1) / 2) ** 2).mean()))
        opt.step()
    opt.drain()
    before = opt.message_ages
    p.grad = torch.zeros(DIM)
    opt.step()
    after_drain = ages_of_step(opt, before)
    state = opt.state_dict()
    opt.step()
    opt.load_state_dict(state)
    before = opt.message_ages
    opt.step()
    fresh = [*after_drain.values(), *ages_of_step(opt, before).values()]
    opt.drain()
    engine: Any = opt._runtime._engine
    fresh += [int(waiter.is_waiting) for waiter in engine._waiters.values()]
    ages = opt.message_ages
    del opt, engine
    gc.collect()
    fresh.append(sum(thread.name == "qgm_ext wait" for thread in threading.enumerate()))
    return losses[-1] / losses[0], fresh, ages


def test_training_converges_and_drain_leaves_nothing_behind(pool: ProcessPool) -> None:
    for loss, fresh, ages in pool.run(train_to_the_mean, N):
        assert loss < 0.01
        assert sum(sum(counts[1:]) for counts in ages.values()) > 0
        assert fresh == [0] * len(fresh), "old messages after a drain, or threads that wait"


# When something is wrong ----------------------------------------------------------------------------------------------


def drain_apart(rank: int) -> str:
    p = nn.Parameter(torch.ones(DIM))
    opt = QGSGD([p], lr=0.1, topology=topology.ring(2), staleness=2, timeout=60)
    try:
        for step in range(4):
            p.grad = torch.ones(DIM)
            if rank == 0 and step == 2:
                opt.drain()
            opt.step()
        opt.drain()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_workers_that_drain_after_other_steps_are_told(pool: ProcessPool) -> None:
    said = pool.run(drain_apart, 2)
    assert all(text.startswith(("MessageError: rank", "PeerLostError: rank")) for text in said), said
    assert any("sent another message than was due: " in text for text in said)


def test_a_lost_worker_ends_the_others(tmp_path: Path) -> None:
    case = Case(
        "qg_dsgdm_n", "ring", 4, 30, {1: Death(3, 0.0)}, on_peer_loss="raise", timeout=60.0, more={"staleness": 3}
    )
    found = run(tmp_path, case)
    for rank in (0, 2, 3):
        assert found[rank]["peer"] == 1, found[rank]["said"]
        assert len(found[rank]["losses"]) < 30


def test_who_forgets_to_drain_ends_all_the_same(tmp_path: Path) -> None:
    case = Case("dsgd", "ring", 3, 20, {}, 0.02, on_peer_loss="raise", timeout=60.0, more={"staleness": 2})
    found = run(tmp_path, case)  # which wants every process to end without a signal
    del found[-1]
    assert any("said" not in worker for worker in found.values())


def refusals(rank: int) -> list[str]:
    found = []
    for name, graph, more in (
        ("dsgd", "one_peer_exponential", {}),
        ("dsgd", "random_matching", {}),
        ("sgp", "random_directed", {}),
        ("d2", "ring", {}),
        ("csgdm", "ring", {}),
        ("dsgd", "ring", {"on_nonfinite": "skip"}),
    ):
        with pytest.raises(ValueError, match="stale|old") as caught:
            Decentralized(
                [nn.Parameter(torch.ones(2))], name, topology=topology.get(graph, N), lr=0.1, staleness=2, **more
            )
        found.append(str(caught.value))
    return found


def test_what_old_messages_would_spoil_is_refused(pool: ProcessPool) -> None:
    for found in pool.run(refusals, N):
        directed, matching, push_sum, tracking, mean, nonfinite = found
        assert directed.startswith("staleness=2 needs a topology whose mixing matrices are symmetric")
        assert matching.startswith("staleness=2 needs a topology that stays the same in all steps")
        assert push_sum.startswith("staleness=2 needs a topology whose mixing matrices are symmetric")
        assert tracking.startswith("d2 can't use old messages")
        assert mean.startswith("csgdm can't use old messages")
        assert nonfinite.startswith("staleness=2 needs on_nonfinite='ignore'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"staleness": -1}, "staleness must be an integer of at least 0, got -1"),
        ({"staleness": 1.0}, "staleness must be an integer of at least 0, got 1.0"),
        ({"staleness": True}, "staleness must be an integer of at least 0, got True"),
        ({"staleness": 1, "overlap": True}, "staleness=1 needs overlap=False and message='float32'"),
        ({"staleness": 1, "message": "int8"}, "staleness=1 needs overlap=False and message='float32'"),
        ({"staleness": 1, "on_peer_loss": "heal"}, "staleness must be 0 with on_peer_loss='heal', got 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QGSGD([nn.Parameter(torch.zeros(2))], lr=0.1, **options)


def test_a_worker_alone_waits_for_nobody() -> None:
    opt = QGSGD([nn.Parameter(torch.zeros(2))], lr=0.1, staleness=2)
    opt.step()
    opt.drain()
    assert opt.message_ages == {}
