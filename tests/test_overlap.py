"""overlap=True sends during backward and changes no bit: real processes, Gloo, loopback."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from process_pool import ProcessPool
from qgm_ext import Simulator, algorithms, topology
from qgm_ext.optim import QGSGD, Decentralized, DecentralizedOptimizer
from worker_runs import STEPS, flattened, gradient, learning_rate, make_topology, stacked, start_values

BUCKET_MB = 3e-4  # 64 numbers: every parameter of the tests lies in buckets of its own, the long ones in several


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(3) as made:
        yield made


def sends(opt: DecentralizedOptimizer) -> int:
    return opt.communication.wire_bytes_sent


# Every algorithm ------------------------------------------------------------------------------------------------------


def train_vectors(rank: int, cases: list[tuple[str, str, int]]) -> list[tuple[Tensor, str | None, list[bool]]]:
    found = []
    for name, graph, n in cases:
        params = [nn.Parameter(value) for value in start_values(torch.float32)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt = Decentralized(
                params, name, topology=make_topology(graph, n), lr=0.1, bucket_mb=BUCKET_MB, overlap=True
            )
            early = []
            for step in range(STEPS):
                for group in opt.param_groups:
                    group["lr"] = learning_rate(step)
                opt.zero_grad()
                before = sends(opt)
                # The gradient of this loss is the given one.
                loss = [(p * g).sum() for p, g in zip(params, gradient(step, rank, torch.float32), strict=True)]
                torch.stack(loss).sum().backward()
                early.append(sends(opt) > before)
                opt.step()
        found.append((flattened(params), opt.overlap_obstacle, early))
    return found


MANY_PASSES = {"choco_sgd", "qg_dadam", "relaysgd", "relaysgd_grad", "csgd", "csgdm", "csgdm_n", "cadam"}


@pytest.mark.filterwarnings("ignore")
def test_every_algorithm_has_the_bits_of_the_stacked_optimizer(pool: ProcessPool) -> None:
    n, cases = 3, []
    for k, name in enumerate(algorithms.names()):
        if algorithms.get_class(name).needs_model:
            continue
        graph = "chain" if name.startswith("relaysgd") else "ring"
        if name in ("sgp", "qg_sgp"):
            graph = "random_directed"
        elif name != "choco_sgd" and graph == "ring" and k % 2:
            graph = "one_peer_exponential"
        cases.append((name, graph, n))
    results = pool.run(train_vectors, n, cases)
    early_names = set()
    for k, (name, graph, _) in enumerate(cases):
        expected = stacked(name, graph, n, torch.float32, {})
        for rank in range(n):
            found, obstacle, early = results[rank][k]
            assert torch.equal(found, expected[rank]), f"{name}, rank {rank}"
            assert not early[0], "the first step gives parameters their places"
            assert (obstacle is None) == all(early[1:]), f"{name}: {obstacle}, {early}"
            if obstacle is None:
                early_names.add(name)
            else:
                assert obstacle == f"{name} takes more than one pass over its vectors in a step"
    assert {name for name, _, _ in cases} - early_names == MANY_PASSES


# Models ---------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """With a layer used twice, one that not every worker uses in every step, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 16)
        self.twice = nn.Linear(16, 16)
        self.sometimes = nn.Linear(16, 16)
        self.frozen = nn.Parameter(torch.ones(16), requires_grad=False)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor, extra: bool) -> Tensor:
        h = torch.tanh(self.first(x)) * self.frozen
        h = torch.tanh(self.twice(torch.tanh(self.twice(h))))
        if extra:
            h = h + self.sometimes(h)
        return self.last(h)


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def loss_of(model: Net, rank: int, step: int) -> Tensor:
    x, y = batch(rank, step)
    return F.cross_entropy(model(x, extra=(rank + step) % 2 == 0), y)


def groups(model: Net) -> list[dict[str, Any]]:
    weights = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": weights, "weight_decay": 1e-2}, {"params": [p for p in model.parameters() if p.dim() < 2]}]


def train_net(rank: int, n: int, overlap: bool, how: str, arguments: dict[str, Any]) -> tuple[Tensor, int]:
    model = Net()
    graph = topology.one_peer_exponential(n)
    opt = QGSGD(groups(model), lr=0.1, topology=graph, bucket_mb=BUCKET_MB, overlap=overlap, **arguments)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    early = 0
    for step in range(5):
        opt.zero_grad()
        before = sends(opt)
        if how == "accumulate":
            with opt.no_sync():
                for more in range(2):
                    loss_of(model, rank, 100 + 2 * step + more).backward()
                    assert sends(opt) == before
        if how == "closure":

            def closure(step: int = step) -> Tensor:
                opt.zero_grad()
                loss = loss_of(model, rank, step)
                loss.backward()
                return loss

            assert opt.step(closure) > 0
        elif how == "no_gossip" and step % 2:
            with opt.no_gossip():
                loss_of(model, rank, step).backward()
                opt.step()
            assert sends(opt) == before
        else:
            loss_of(model, rank, step).backward()
            early += sends(opt) > before
            opt.step()
        schedule.step()
    return flattened(list(model.parameters())), early


@pytest.mark.parametrize(
    ("how", "arguments", "steps"),
    [
        ("plain", {}, 4),
        ("plain", {"maximize": True}, 4),
        ("accumulate", {}, 4),
        ("closure", {}, 0),
        ("no_gossip", {}, 2),
        ("plain", {"gossip_every": 2}, 2),
        ("plain", {"message": "int8"}, 4),
        ("accumulate", {"message": "bfloat16"}, 4),
    ],
    ids=["plain", "maximize", "no_sync", "closure", "no_gossip", "gossip_every", "int8", "bfloat16"],
)
def test_models_train_the_same(pool: ProcessPool, how: str, arguments: dict[str, Any], steps: int) -> None:
    n = 3
    plain = pool.run(train_net, n, n, False, how, arguments)
    for rank, (found, early) in enumerate(pool.run(train_net, n, n, True, how, arguments)):
        assert torch.equal(found, plain[rank][0]), f"rank {rank}"
        assert plain[rank][1] == 0
        assert early == steps


def train_mlp(rank: int, n: int) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    first = QGSGD(model.parameters(), lr=5.0, topology=topology.ring(n), overlap=True, bucket_mb=BUCKET_MB)
    with first.no_gossip():
        first.zero_grad()
        first.step()  # registers its hooks, which must not act once it is gone
    del first
    gc.collect()
    opt = QGSGD(model.parameters(), lr=0.1, topology=topology.ring(n), overlap=True, bucket_mb=BUCKET_MB)
    for step in range(5):
        opt.zero_grad()
        x, y = batch(rank, step)
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return flattened(list(model.parameters()))


def test_overlapped_workers_train_as_the_simulator(pool: ProcessPool) -> None:
    n = 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    sim = Simulator(model, topology.ring(n), "qg_dsgdm_n", lr=0.1)
    for step in range(5):
        sim.step(F.cross_entropy, [batch(rank, step) for rank in range(n)])
    for rank, found in enumerate(pool.run(train_mlp, n, n)):
        assert torch.equal(found, flattened(list(sim.models[rank].parameters())))


# What forbids it, and what comes too late -----------------------------------------------------------------------------


def with_obstacle(rank: int, arguments: dict[str, Any], scaled: bool) -> tuple[str | None, list[str], Tensor]:
    p = nn.Parameter(torch.ones(100))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        opt = QGSGD([p], lr=0.1, topology=topology.ring(2), overlap=True, **arguments)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
        for step in range(3):
            opt.zero_grad()
            before = sends(opt)
            scaler.scale((p * (rank + step)).square().sum()).backward()
            assert sends(opt) == before
            scaler.step(opt)
            scaler.update()
    messages = [str(one.message) for one in told if "overlap" in str(one.message)]
    return opt.overlap_obstacle, messages, p.detach()


@pytest.mark.parametrize(
    ("arguments", "scaled", "reason"),
    [
        ({"clip_grad_norm": 1.0}, False, "clip_grad_norm needs the whole gradient first"),
        ({"on_nonfinite": "skip"}, False, "on_nonfinite='skip' needs the whole gradient first, 'ignore' does not"),
        ({}, True, "torch.amp.GradScaler needs the whole gradient first"),
    ],
    ids=["clip_grad_norm", "on_nonfinite", "GradScaler"],
)
def test_what_forbids_early_sends_is_told_once(
    pool: ProcessPool, arguments: dict[str, Any], scaled: bool, reason: str
) -> None:
    results = pool.run(with_obstacle, 2, arguments, scaled)
    for obstacle, messages, found in results:
        assert obstacle == reason
        assert messages == [f"overlap=True has no effect: {reason}"]
        assert torch.equal(found, results[0][2])
        assert not torch.equal(found, torch.ones(100))


def too_late(rank: int, what: str) -> list[str]:
    p, q = nn.Parameter(torch.ones(100)), nn.Parameter(torch.ones(3))
    opt = QGSGD([p, q], lr=0.1, topology=topology.ring(2), overlap=True, bucket_mb=BUCKET_MB)

    def backward() -> None:
        (p.square().sum() + q.sum()).backward()

    def interfere() -> None:
        if what == "backward":
            backward()
        elif what == "clip":
            nn.utils.clip_grad_norm_([p, q], 0.1)
            opt.step()
        elif what == "zero_grad":
            opt.zero_grad()
            opt.step()
        elif what == "accumulate":
            with opt.no_sync():
                backward()
            opt.step()
        elif what == "lr":
            opt.param_groups[0]["lr"] = 0.2
            opt.step()
        elif what == "momentum":
            opt.param_groups[0]["momentum"] = 0.5
            opt.step()
        elif what == "maximize":
            opt.param_groups[0]["maximize"] = True
            opt.step()
        elif what == "parameter":
            with torch.no_grad():
                q.clamp_(max=0.5)
            opt.step()
        elif what == "no_gossip":
            with opt.no_gossip():
                opt.step()
        elif what == "scaler":
            scaler = torch.amp.GradScaler("cpu")
            scaler.scale(torch.ones(()))
            scaler.step(opt)
        elif what == "state_dict":
            opt.state_dict()
        elif what == "load_state_dict":
            opt.load_state_dict({})
        else:
            opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})

    backward()
    opt.step()
    opt.zero_grad()
    backward()
    with pytest.raises(RuntimeError) as error:
        interfere()
    return [str(error.value)]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("backward", r"parameter of shape \[(100|3)\] got another gradient after the step had begun .*no_sync"),
        ("clip", r"the gradient of a parameter of shape \[(100|3)\] was changed between backward\(\) and step\(\)"),
        ("zero_grad", r"the gradient of a parameter of shape \[(100|3)\] was changed between"),
        ("accumulate", r"the gradient of a parameter of shape \[(100|3)\] was changed between"),
        ("lr", "lr became 0.2 from 0.1 between"),
        ("momentum", "hyper-parameters became .*momentum=0.5.* from .*momentum=0.9.* between"),
        ("maximize", "maximize became True between"),
        ("parameter", r"a parameter of shape \[3\] was changed between"),
        ("no_gossip", r"no_gossip\(\) was entered between"),
        ("scaler", "torch.amp.GradScaler came in between"),
        ("state_dict", r"state_dict\(\) came between backward\(\) and step\(\)"),
        ("load_state_dict", r"load_state_dict\(\) came between"),
        ("add_param_group", r"add_param_group\(\) came between"),
    ],
)
def test_what_comes_after_the_messages_have_left_is_an_error(pool: ProcessPool, what: str, message: str) -> None:
    for (said,) in pool.run(too_late, 2, what, limit=60.0):
        assert re.search(message, said), said


def test_a_worker_alone_has_nothing_to_overlap() -> None:
    p = nn.Parameter(torch.ones(3))
    assert QGSGD([p], lr=0.1).overlap_obstacle == "overlap is False"
    opt = QGSGD([p], lr=0.1, overlap=True)
    assert opt.overlap_obstacle == "a worker alone sends nothing"
    with opt.no_sync():
        p.sum().backward()
    opt.step()
    with pytest.raises(TypeError, match="overlap must be True or False, got 1"):
        QGSGD([p], lr=0.1, overlap=1)
