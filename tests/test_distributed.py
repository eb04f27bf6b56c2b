"""Training over a process group gives the bits of the stacked optimizer: real processes, Gloo, loopback."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from process_pool import ProcessPool
from qgm_ext import Simulator, StackedOptimizer, algorithms, topology
from qgm_ext.distributed import DisagreementError, MessageError, PeerLostError
from qgm_ext.distributed.exchange import Message, Stamp
from qgm_ext.optim import DSGD, QGSGD, Decentralized, DSGDm
from worker_runs import STEPS, flattened, make_topology, stacked, start_values, take_steps


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(5) as made:
        yield made


def train(
    rank: int, name: str, graph: str, n: int, dtype: torch.dtype, hyper: dict[str, Any], bucket_mb: float
) -> Tensor:
    """One worker's run; workers other than 0 start from other values, which the broadcast must replace."""
    params = [nn.Parameter(value if rank == 0 else value + 1) for value in start_values(dtype)]
    opt = Decentralized(params, name, topology=make_topology(graph, n), lr=0.1, bucket_mb=bucket_mb, **hyper)
    assert (opt.worker, opt.num_workers) == (rank, n)
    take_steps(opt, params, rank, range(STEPS))
    return flattened(params)


def train_all(rank: int, cases: list[tuple[Any, ...]]) -> list[Tensor]:
    return [train(rank, *case) for case in cases]


TREES = {"relaysgd", "relaysgd_grad"}
PUSH_SUM = {"sgp", "qg_sgp"}
STATIC = {"choco_sgd"}


def cases(n: int) -> list[tuple[Any, ...]]:
    """Every algorithm, on topologies and in dtypes that change from one to the next; one bucket and many."""
    found: list[tuple[Any, ...]] = []
    names = [name for name in algorithms.names() if not algorithms.get_class(name).needs_model]
    graphs = ["ring", "one_peer_exponential", "exponential", "complete", "random_matching", "chain", "two_directed"]
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float16]
    for k, name in enumerate(names):
        graph = graphs[(k + n) % len(graphs)]
        if name in TREES:
            graph = "double_binary_trees" if n > 2 and name == "relaysgd" else "chain"
        elif name in PUSH_SUM:
            graph = "random_directed"
        elif name in STATIC:
            graph = "ring"
        hyper = {"local_step": 2} if name == "qg_dsgdm" else {}
        found.append((name, graph, n, dtypes[(k + n) % len(dtypes)], hyper, 25.0 if k % 2 else 3e-4))
    for compressor in ("top_k", "random_k", "qsgd", "int8", "bfloat16", "none"):
        found.append(("choco_sgd", "ring", n, torch.float32, {"compressor": compressor, "momentum": 0.9}, 25.0))
    found.append(("qg_dadam", "ring", n, torch.float32, {"variant": "v1"}, 25.0))
    found.append(("relaysgd", "chain", n, torch.float32, {"fill": "current", "momentum": 0.0}, 25.0))
    found.append(("momentum_tracking", "ring", n, torch.float32, {"init": "zero"}, 25.0))
    for k, name in enumerate(name for name in names if algorithms.get_class(name).rounding_obstacle is None):
        graph = "random_directed" if name in PUSH_SUM else graphs[(k + 2 * n) % len(graphs)]
        message = ("bfloat16", "int8")[(k + n) % 2]
        found.append((name, graph, n, dtypes[(k + n) % len(dtypes)], {"message": message}, 25.0 if k % 2 else 3e-4))
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.filterwarnings("ignore:d2")
def test_every_algorithm_equals_the_stacked_optimizer(pool: ProcessPool, n: int) -> None:
    wanted = cases(n)
    results = pool.run(train_all, n, wanted)
    for k, case in enumerate(wanted):
        expected = stacked(*case[:5])
        for rank in range(n):
            assert torch.equal(results[rank][k], expected[rank]), f"{case}, rank {rank}"


def long_gradient(step: int, worker: int) -> Tensor:
    return torch.randn(10_000, generator=torch.Generator().manual_seed(1000 * step + worker + 1))


def train_long(rank: int, n: int) -> Tensor:
    p = nn.Parameter(torch.ones(10_000))
    opt = Decentralized([p], "qg_dadam", topology=topology.ring(n), lr=0.1, bucket_mb=1e-3)
    for step in range(STEPS):
        p.grad = long_gradient(step, rank)
        opt.step()
    return p.detach()


def test_norm_of_a_model_in_several_buckets_is_that_of_the_stacked_optimizer(pool: ProcessPool) -> None:
    n = 3
    opt = StackedOptimizer(torch.ones(n, 10_000), topology.ring(n), "qg_dadam", lr=0.1)
    for step in range(STEPS):
        opt.step(torch.stack([long_gradient(step, worker) for worker in range(n)]))
    for rank, found in enumerate(pool.run(train_long, n, n)):
        assert torch.equal(found, opt.x[rank]), f"rank {rank}"


# The drop-ins, and what can go wrong ----------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def batch(worker: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + worker)
    return torch.randn(16, 6, generator=generator), torch.randint(0, 3, (16,), generator=generator)


OPTIMIZERS = {
    "qg_dsgdm_n": lambda params, **more: QGSGD(params, lr=0.1, weight_decay=1e-3, **more),
    "dsgdm": lambda params, **more: DSGDm(params, lr=0.1, weight_decay=1e-3, **more),
    "dsgd": lambda params, **more: DSGD(params, lr=0.1, weight_decay=1e-3, **more),
}


def train_model(rank: int, name: str, n: int, restart: bool) -> Tensor:
    model = mlp()
    opt = OPTIMIZERS[name](model.parameters(), topology=topology.one_peer_exponential(n))
    for step in range(6):
        if restart and step == 3:
            saved, values = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
            model = mlp()
            model.load_state_dict(values)
            more = {"topology": topology.one_peer_exponential(n), "broadcast_parameters": False}
            opt = OPTIMIZERS[name](model.parameters(), **more)
            opt.load_state_dict(saved)
        opt.zero_grad()
        x, y = batch(rank, step)
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
    return flattened(list(model.parameters()))


@pytest.mark.parametrize("restart", [False, True], ids=["in-one-go", "resumed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_drop_ins_train_as_the_simulator(pool: ProcessPool, name: str, restart: bool) -> None:
    n = 3
    sim = Simulator(mlp(), topology.one_peer_exponential(n), name, lr=0.1, weight_decay=1e-3)
    for step in range(6):
        sim.step(nn.functional.cross_entropy, [batch(worker, step) for worker in range(n)])
    results = pool.run(train_model, n, name, n, restart)
    for rank, model in enumerate(sim.models):
        assert torch.equal(results[rank], flattened(list(model.parameters()))), f"rank {rank}"


def move_alone(rank: int, n: int, how: str, when: int, overlap: bool) -> list[Tensor]:
    """Rank 1, and it alone, changes before step ``when`` where it has its weights in memory, or in which order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.Linear(4, 3))
    opt = QGSGD(model.parameters(), lr=0.1, topology=topology.ring(n), overlap=overlap)
    for step in range(5):
        if rank == 1 and step == when:
            if how == "memory format":
                model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            elif how == "shared memory":
                model.share_memory()
            else:
                for p in model.parameters():
                    p.data = p.data.clone()
        opt.zero_grad()
        generator = torch.Generator().manual_seed(100 * step + rank)
        loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in model.parameters())
        assert isinstance(loss, Tensor)
        loss.backward()
        opt.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("overlap", [False, True], ids=["together", "overlap"])
@pytest.mark.parametrize("how", ["memory format", "shared memory", "other memory"])
def test_memory_of_one_worker_that_moves_changes_nothing(pool: ProcessPool, how: str, overlap: bool) -> None:
    n = 3
    expected = pool.run(move_alone, n, n, how, -1, overlap)
    for when in (2,) if how == "shared memory" else (0, 2):  # before the first step it would be refused
        for rank, found in enumerate(pool.run(move_alone, n, n, how, when, overlap)):
            assert all(map(torch.equal, found, expected[rank])), f"rank {rank}, before step {when}"


def build_unlike(rank: int, field: str) -> str:
    lr, shape, dtype, graph, name = 0.1, 4, torch.float32, "ring", "qg_dsgdm_n"
    if rank == 1:
        lr = 0.2 if field == "lr" else lr
        shape = 5 if field == "shape" else shape
        dtype = torch.float64 if field == "dtype" else dtype
        graph = "complete" if field == "topology" else graph
        name = "dsgd" if field == "algorithm" else name
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)), nn.Parameter(torch.zeros(2, 3))]
    if rank == 1 and field == "memory format":
        params[1] = nn.Parameter(torch.zeros(3, 2).t())
    with pytest.raises(DisagreementError) as error:
        Decentralized(params, name, topology=topology.get(graph, 4), lr=lr)
    return str(error.value)


@pytest.mark.parametrize(
    ("field", "wanted"),
    [
        ("lr", "lr of the optimizer of rank 1 is 0.2, and of rank 0 0.1"),
        ("shape", r"parameter 0 of the optimizer of rank 1 is \[\[5\], .*and of rank 0 \[\[4\]"),
        ("dtype", 'parameter 0 .* of rank 1 is .*torch.float64", true.*rank 0 .*torch.float32"'),
        ("memory format", r"parameter 1 .* of rank 1 is .*\[1, 2\]\], and of rank 0 .*\[3, 1\]\]"),
        ("topology", 'topology of rank 1 is {"name": "complete"'),
        ("algorithm", 'name of the optimizer of rank 1 is "dsgd", and of rank 0 "qg_dsgdm_n"'),
    ],
)
def test_workers_that_are_started_differently_name_rank_and_field(pool: ProcessPool, field: str, wanted: str) -> None:
    said = pool.run(build_unlike, 4, field)
    assert len(set(said)) == 1, "every rank says the same"
    assert re.search(wanted, said[0]), said[0]


def keep_own_start(rank: int) -> tuple[Tensor, str]:
    params = [nn.Parameter(torch.full((3,), float(rank)))]
    opt = DSGD(params, lr=0.0, topology=topology.complete(3), broadcast_parameters=False)
    opt.step()
    with pytest.raises(ValueError, match="same parameters") as error:
        Decentralized(
            [nn.Parameter(torch.full((3,), float(rank)))],
            "gut",
            topology=topology.ring(3),
            lr=0.1,
            broadcast_parameters=False,
        )
    return params[0].detach(), str(error.value)


def test_workers_may_keep_their_own_start(pool: ProcessPool) -> None:
    for value, said in pool.run(keep_own_start, 3):
        assert torch.equal(value, torch.ones(3))
        assert said.startswith("gut needs all workers to start from the same parameters")


def lose_a_peer(rank: int) -> tuple[float, int, str]:
    params = [nn.Parameter(torch.zeros(10))]
    opt = QGSGD(params, lr=0.1, topology=topology.ring(4), timeout=2.0)
    params[0].grad = torch.ones(10)
    opt.step()
    if rank == 2:
        time.sleep(9.0)  # does not answer while the others wait
        return 0.0, rank, ""
    begin = time.monotonic()

    def five_steps() -> None:
        for _ in range(5):
            opt.step()

    with pytest.raises(PeerLostError) as error:
        five_steps()
    return time.monotonic() - begin, error.value.peer, str(error.value)


def test_a_peer_that_does_not_answer_is_named_by_all(pool: ProcessPool) -> None:
    for rank, (seconds, peer, said) in enumerate(pool.run(lose_a_peer, 4, limit=60.0)):
        assert peer == 2, said
        assert rank == 2 or ("rank 2 of 4" in said and seconds < 30.0), said


def skip_together(rank: int) -> tuple[int, Tensor]:
    params = [nn.Parameter(torch.zeros(3))]
    opt = QGSGD(params, lr=0.1, topology=topology.ring(3), on_nonfinite="skip")
    params[0].grad = torch.full((3,), float("nan") if rank == 1 else 1.0)
    opt.step()
    return opt.skipped_steps, params[0].detach()


def test_a_gradient_that_is_not_finite_is_skipped_by_all(pool: ProcessPool) -> None:
    for skipped, value in pool.run(skip_together, 3):
        assert skipped == 1
        assert torch.equal(value, torch.zeros(3))


def uneven_use(rank: int) -> tuple[Tensor, Tensor]:
    used, unused, frozen = (nn.Parameter(torch.ones(3)) for _ in range(3))
    frozen.requires_grad_(False)
    opt = DSGD([used, unused, frozen], lr=0.5, topology=topology.complete(2))
    (used * used).sum().backward()  # used twice
    if rank == 0:
        unused.sum().backward()  # by one worker only
    opt.step()
    return torch.cat([used.detach(), unused.detach()]), frozen.detach()


def test_parameters_used_twice_unused_or_frozen(pool: ProcessPool) -> None:
    for moved, frozen in pool.run(uneven_use, 2):
        assert torch.equal(moved, torch.tensor([0.0, 0.0, 0.0, 0.75, 0.75, 0.75]))
        assert torch.equal(frozen, torch.ones(3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"timeout": 0}, ValueError, "timeout must be a finite number above 0, got 0"),
        ({"bucket_mb": -1}, ValueError, "bucket_mb must be a finite number above 0, got -1"),
        ({"broadcast_parameters": 1}, TypeError, "broadcast_parameters must be True or False, got 1"),
        ({"clip_grad_norm": float("nan")}, ValueError, "clip_grad_norm must be a finite number above 0, got nan"),
        ({"bucket_md": 1}, TypeError, "unexpected keyword argument 'bucket_md', did you mean 'bucket_mb'"),
    ],
)
def test_options_of_the_runtime_are_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QGSGD([nn.Parameter(torch.zeros(2))], lr=0.1, **arguments)


def test_algorithms_that_need_the_model_say_so() -> None:
    with pytest.raises(ValueError, match=r"ngc takes gradients at other points .* use qgm_ext.optim.CrossGradient"):
        Decentralized([nn.Parameter(torch.zeros(2))], "ngc", lr=0.1)


def test_a_message_that_was_not_due_is_refused() -> None:
    message = Message(16, torch.device("cpu"))
    message.stamp(3, Stamp(5, 0, 1))
    message.check(3, Stamp(5, 0, 1))
    with pytest.raises(MessageError, match="rank 3 sent another message than was due: step 5 instead of 6") as error:
        message.check(3, Stamp(6, 0, 1))
    assert error.value.peer == 3
    message.buffer.fill_(7)
    with pytest.raises(MessageError, match="rank 3 sent garbage instead of its message of step 5"):
        message.check(3, Stamp(5, 0, 1))
