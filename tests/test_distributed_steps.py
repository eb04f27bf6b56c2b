"""What a step over a process group can do besides averaging: real processes, Gloo, loopback."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from process_pool import ProcessPool
from qgm_ext import StackedOptimizer, algorithms, topology
from qgm_ext.distributed import Communication, MessageError, PeerLostError
from qgm_ext.flat import FlatLayout
from qgm_ext.optim import DSGD, QGSGD, Decentralized
from qgm_ext.stacked import NonFiniteGradientError
from worker_runs import SHAPES, STEPS, flattened, make_topology, stacked, start_values, take_steps


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(3) as made:
        yield made


# Steps without gossip -------------------------------------------------------------------------------------------------


def names_without_simulator() -> list[str]:
    return [name for name in algorithms.names() if not algorithms.get_class(name).needs_model]


def sequence(name: str, n: int, gossips: list[bool]) -> topology.Topology:
    """Steps with and without gossip as a topology: the identity, and in between the rounds of ``name`` in turn."""
    rounds = make_topology(name, n)
    taken = np.cumsum([0, *gossips])
    matrices = [rounds.matrix(int(r)) if gossip else np.eye(n) for r, gossip in zip(taken[:-1], gossips, strict=True)]
    return topology.from_sequence(matrices, allow_disconnected=True)


def seldom(rank: int, cases: list[tuple[str, str, int, dict[str, Any]]]) -> list[Tensor]:
    found = []
    for name, graph, n, hyper in cases:
        params = [nn.Parameter(value) for value in start_values(torch.float32)]
        opt = Decentralized(params, name, topology=make_topology(graph, n), lr=0.1, gossip_every=2, **hyper)
        take_steps(opt, params, rank, range(STEPS))
        found.append(flattened(params))
    return found


def by_hand(rank: int, cases: list[tuple[str, str, int, dict[str, Any]]]) -> list[Tensor]:
    """The same with no_gossip: in the first step and the third, the workers are alone."""
    found = []
    for name, graph, n, hyper in cases:
        params = [nn.Parameter(value) for value in start_values(torch.float32)]
        opt = Decentralized(params, name, topology=make_topology(graph, n), lr=0.1, **hyper)
        for step in range(STEPS):
            if step % 2 == 0:
                with opt.no_gossip():
                    take_steps(opt, params, rank, range(step, step + 1))
            else:
                take_steps(opt, params, rank, range(step, step + 1))
        found.append(flattened(params))
    return found


@pytest.mark.parametrize("function", [seldom, by_hand], ids=["gossip_every", "no_gossip"])
@pytest.mark.filterwarnings("ignore")
def test_steps_without_gossip_are_those_of_the_identity(pool: ProcessPool, function: Any) -> None:
    n = 3
    cases: list[tuple[str, str, int, dict[str, Any]]] = []
    for k, name in enumerate(names_without_simulator()):
        if algorithms.get(name, lr=0.1).can_skip_gossip:
            push_sum = algorithms.get_class(name).any_columns
            cases.append((name, "ring" if push_sum or k % 2 else "one_peer_exponential", n, {}))
    cases.append(("momentum_tracking", "ring", n, {"init": "zero"}))
    assert len(cases) > 15
    results = pool.run(function, n, cases)
    for k, (name, graph, _, hyper) in enumerate(cases):
        expected = stacked(name, sequence(graph, n, [False, True, False, True]), n, torch.float32, hyper)
        for rank in range(n):
            assert torch.equal(results[rank][k], expected[rank]), f"{cases[k]}, rank {rank}"


def refusals(rank: int, name: str, graph: str) -> tuple[str, str]:
    params = [nn.Parameter(torch.zeros(3))]
    with pytest.raises(ValueError, match="gossip_every must be 1, got 4") as at_start:
        Decentralized(params, name, topology=topology.get(graph, 2), lr=0.1, gossip_every=4)
    opt = Decentralized(params, name, topology=topology.get(graph, 2), lr=0.1)
    with pytest.raises(ValueError, match="it can't leave out gossip") as in_context, opt.no_gossip():
        pass
    opt.step()  # with gossip, as before
    return str(at_start.value), str(in_context.value)


@pytest.mark.parametrize("name", ["csgd", "csgdm", "csgdm_n", "cadam", "slowmo", "momentum_tracking", "choco_sgd"])
def test_algorithms_that_need_the_others_in_every_step_say_so(pool: ProcessPool, name: str) -> None:
    for at_start, in_context in pool.run(refusals, 2, name, "ring"):
        assert at_start.startswith(f"{name} needs the other workers in every step")
        assert in_context.startswith(f"{name} needs the other workers in every step")


@pytest.mark.parametrize("name", ["relaysgd", "relaysgd_grad"])
def test_relayed_sums_need_the_others_in_every_step(pool: ProcessPool, name: str) -> None:
    pool.run(refusals, 2, name, "chain")


def test_every_algorithm_says_whether_it_can_skip_gossip() -> None:
    """Those that must not are the ones that the two tests above name."""
    refusing = {name for name in names_without_simulator() if not algorithms.get(name, lr=0.1).can_skip_gossip}
    named = {"csgd", "csgdm", "csgdm_n", "cadam", "slowmo", "momentum_tracking", "choco_sgd", "relaysgd"}
    assert refusing == named | {"relaysgd_grad"}


def alone_on_one_side(rank: int) -> str:
    params = [nn.Parameter(torch.zeros(3))]
    opt = DSGD(params, lr=0.1, topology=topology.complete(2), timeout=5.0)
    if rank == 0:
        with opt.no_gossip():
            opt.step()
    with pytest.raises((MessageError, PeerLostError)) as error:
        opt.step()
    return type(error.value).__name__


def test_workers_that_do_not_agree_on_gossip_fail(pool: ProcessPool) -> None:
    assert "MessageError" in pool.run(alone_on_one_side, 2, limit=60.0)


def accumulate(rank: int, n: int) -> Tensor:
    model = nn.Linear(4, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    opt = QGSGD(model.parameters(), lr=0.1, topology=topology.ring(n))
    for step in range(3):
        opt.zero_grad()
        for half in range(2):
            x = torch.full((3, 4), float(1 + rank + 2 * half + step))
            model(x).square().sum().backward()
        opt.step()
    return flattened(list(model.parameters()))


def test_gradients_accumulate_over_backward_passes(pool: ProcessPool) -> None:
    """Two backward passes and one step are the step on the sum of both losses, averaged once."""
    n = 2
    models = [nn.Linear(4, 2) for _ in range(n)]
    momentum = [torch.zeros(10) for _ in range(n)]
    for model in models:
        for p in model.parameters():
            nn.init.constant_(p, 0.5)
    for step in range(3):
        halves = []
        for rank, model in enumerate(models):
            model.zero_grad()
            x = [torch.full((3, 4), float(1 + rank + 2 * half + step)) for half in range(2)]
            model(torch.cat(x)).square().sum().backward()
            g = torch.cat([p.grad.flatten() for p in model.parameters()])
            halves.append(flattened(list(model.parameters())) - 0.1 * (g + 0.9 * (0.9 * momentum[rank] + g)))
        mean = (halves[0] + halves[1]) / 2
        for rank, model in enumerate(models):
            old = flattened(list(model.parameters()))
            momentum[rank] = 0.9 * momentum[rank] + 0.1 * (old - mean) / 0.1
            nn.utils.vector_to_parameters(mean.clone(), model.parameters())
    for found in pool.run(accumulate, n, n):
        torch.testing.assert_close(found, flattened(list(models[0].parameters())), rtol=1e-4, atol=1e-4)


# What a step communicates ---------------------------------------------------------------------------------------------


def communicate(rank: int, cases: list[tuple[str, str, int, dict[str, Any]]]) -> list[list[Communication]]:
    found = []
    for name, graph, n, hyper in cases:
        params = [nn.Parameter(value) for value in start_values(torch.float32)]
        opt = Decentralized(params, name, topology=make_topology(graph, n), lr=0.1, bucket_mb=6e-4, **hyper)
        steps = []
        for step in range(2):
            take_steps(opt, params, rank, range(step, step + 1))
            steps.append(opt.last_communication)
        found.append([*steps, opt.communication])
    return found


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.filterwarnings("ignore")
def test_bytes_are_those_that_the_algorithm_counts(pool: ProcessPool, n: int) -> None:
    cases: list[tuple[str, str, int, dict[str, Any]]] = []
    for name in names_without_simulator():
        graph = "ring"
        if name.startswith("relaysgd"):
            graph = "double_binary_trees" if name == "relaysgd" and n > 2 else "chain"
        elif algorithms.get_class(name).any_columns and not name.startswith("c"):
            graph = "random_directed"
        cases.append((name, graph, n, {}))
    cases.append(("dsgd", "one_peer_exponential", n, {}))
    cases.append(("choco_sgd", "chain", n, {"compressor": "int8"}))
    cases += [("gradient_tracking", "ring", n, {"message": message}) for message in ("bfloat16", "int8")]
    results = pool.run(communicate, n, cases)
    layout = FlatLayout(SHAPES)
    for k, (name, graph, _, hyper) in enumerate(cases):
        opt = StackedOptimizer(
            layout.allocate(n, dtype=torch.float32, device="cpu"),
            make_topology(graph, n),
            name,
            layout=layout,
            lr=0.1,
            **hyper,
        )
        for step in range(2):
            opt.step(torch.ones_like(opt.x))
            now = [results[rank][k][step] for rank in range(n)]
            assert sum(one.bytes_sent for one in now) == opt.bytes_sent_per_step > 0, cases[k]
            assert sum(one.bytes_received for one in now) == opt.bytes_sent_per_step, cases[k]
            assert sum(one.wire_bytes_sent for one in now) == sum(one.wire_bytes_received for one in now)
        total = [results[rank][k][2] for rank in range(n)]
        assert sum(one.bytes_sent for one in total) == opt.bytes_sent


def compress(rank: int, compressors: list[str]) -> list[Communication]:
    found = []
    for compressor in compressors:
        params = [nn.Parameter(torch.ones(100)), nn.Parameter(torch.ones(10))]
        opt = Decentralized(params, "choco_sgd", lr=0.1, topology=topology.chain(3), compressor=compressor)
        opt.step()
        found.append(opt.communication)
    return found


def test_compressed_messages_are_no_longer_on_the_wire_than_counted(pool: ProcessPool) -> None:
    """But for 64 bytes of header."""
    sizes = {"sign": 13 + 4 + 2 + 4, "top_k": 9 * 8 + 8, "random_k": 9 * 4 + 8 + 4 + 8, "qsgd": 63 + 4 + 7 + 4}
    for rank, found in enumerate(pool.run(compress, 3, list(sizes))):
        links = 2 if rank == 1 else 1
        for communication, size in zip(found, sizes.values(), strict=True):
            assert communication.bytes_sent == links * size
            assert communication.wire_bytes_sent == communication.wire_bytes_received == links * (size + 64)


def rounded(rank: int, formats: list[str]) -> list[int]:
    found = []
    for message in formats:
        opt = QGSGD([nn.Parameter(torch.ones(128))], lr=0.1, topology=topology.chain(2), message=message)
        opt.step()
        found.append(opt.communication.wire_bytes_sent)
    return found


def test_rounded_messages_are_short_on_the_wire(pool: ProcessPool) -> None:
    for found in pool.run(rounded, 2, ["float32", "bfloat16", "int8"]):
        assert found == [64 + 4 * 128, 64 + 2 * 128, 64 + 128 + 2 * 4]


def count_exactly(rank: int) -> list[Communication]:
    params = [nn.Parameter(torch.zeros(100)), nn.Parameter(torch.zeros(10))]
    opt = QGSGD(params, lr=0.1, topology=topology.chain(3), bucket_mb=25.0)
    opt.step()
    with opt.no_gossip():
        opt.step()
    return [opt.communication, opt.last_communication]


def test_bytes_of_one_worker(pool: ProcessPool) -> None:
    """A chain of three: 110 numbers to each neighbour, on the wire 192 with the gaps, and 64 bytes of header."""
    for rank, (total, last) in enumerate(pool.run(count_exactly, 3)):
        links = 2 if rank == 1 else 1
        assert (total.bytes_sent, total.bytes_received) == (links * 440, links * 440)
        assert (total.wire_bytes_sent, total.wire_bytes_received) == (links * 832, links * 832)
        assert total.seconds > 0.0
        assert last == Communication()


def test_a_worker_alone_communicates_nothing() -> None:
    for opt in (
        QGSGD([nn.Parameter(torch.zeros(3))], lr=0.1),
        Decentralized([nn.Parameter(torch.zeros(3))], "d2", lr=1),
    ):
        opt.step()
        assert opt.communication == opt.last_communication == Communication()


# Loss scaling ---------------------------------------------------------------------------------------------------------

SCALE, AMP_STEPS, OVERFLOWS = 1024.0, 5, {1: (1,), 3: (0, 1)}  # step: the workers whose gradients overflow


def scaled_gradient(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(70, generator=generator)


def scale_losses(rank: int, n: int, on_nonfinite: str, unscale: bool) -> tuple[Tensor, int, float]:
    p = nn.Parameter(torch.zeros(70))
    opt = QGSGD([p], lr=0.1, weight_decay=0.1, topology=topology.ring(n), on_nonfinite=on_nonfinite, timeout=20.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=2)
    for step in range(AMP_STEPS):
        opt.zero_grad()
        factor = torch.full((70,), float("inf")) if rank in OVERFLOWS.get(step, ()) else scaled_gradient(step, rank)
        scaler.scale((p * factor).sum()).backward()
        if unscale:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_([p], 1.0)
        scaler.step(opt)
        scaler.update()
    return p.detach(), opt.skipped_steps, scaler.get_scale()


@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscaled-and-clipped"])
@pytest.mark.parametrize("on_nonfinite", ["ignore", "skip"])
@pytest.mark.parametrize("n", [2, 3])
def test_grad_scaler_keeps_workers_in_step(pool: ProcessPool, n: int, on_nonfinite: str, unscale: bool) -> None:
    """A worker whose gradients overflow takes part with a zero gradient, or all workers skip."""
    opt = StackedOptimizer(torch.zeros(n, 70), topology.ring(n), "qg_dsgdm_n", lr=0.1, weight_decay=0.1)
    for step in range(AMP_STEPS):
        g = torch.stack([scaled_gradient(step, rank) for rank in range(n)])
        if unscale:
            for row in g:
                p = nn.Parameter(torch.zeros(70))
                p.grad = row
                nn.utils.clip_grad_norm_([p], 1.0)
        overflows = OVERFLOWS.get(step, ())
        g[list(overflows)] = 0.0
        if not overflows or on_nonfinite == "ignore":
            opt.step(g)
    for rank, (found, skipped, scale) in enumerate(pool.run(scale_losses, n, n, on_nonfinite, unscale, limit=60.0)):
        assert torch.equal(found, opt.x[rank]), f"rank {rank}"
        assert skipped == (len(OVERFLOWS) if on_nonfinite == "skip" else 0)
        overflowed = sum(rank in ranks for ranks in OVERFLOWS.values())
        # Halved for each overflow, doubled after two steps without one.
        assert scale == {0: SCALE * 4, 1: SCALE * 2 / 2, 2: SCALE / 4}[overflowed]


def raise_together(rank: int) -> str:
    p = nn.Parameter(torch.zeros(3))
    opt = QGSGD([p], lr=0.1, topology=topology.ring(2), on_nonfinite="raise", timeout=20.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale((p * (float("inf") if rank == 1 else 1.0)).sum()).backward()
    with pytest.raises(NonFiniteGradientError) as error:
        scaler.step(opt)
    assert torch.equal(p.detach(), torch.zeros(3))
    return str(error.value)


def test_grad_scaler_and_raise(pool: ProcessPool) -> None:
    for said in pool.run(raise_together, 2):
        assert said.startswith("the gradient of worker 1 is not finite")
