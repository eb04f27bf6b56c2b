"""Algorithms that take gradients at other models give the bits of the Simulator in processes: Gloo, loopback."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qgm_ext as qgm
from process_pool import ProcessPool
from qgm_ext import algorithms, models, topology
from qgm_ext.optim import CrossGradient, Decentralized
from qgm_ext.stacked import NonFiniteGradientError
from rows import ALGORITHMS
from rows.slow import CLASSES, FEATURES, batches, lr_at, smooth_mlp
from worker_runs import make_topology

NAMES = [name for name in ALGORITHMS if algorithms.get_class(name).needs_model]
STEPS = 5
CASES = [(name, hyper) for name in NAMES for hyper in ALGORITHMS[name].cases.values()]


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(4) as made:
        yield made


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def small_model(dtype: torch.dtype) -> nn.Module:
    """Without statistics, for dtypes that have none; its features are those of the last layer but one."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(FEATURES, 70), nn.Tanh(), nn.Linear(70, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    return models.declare_feature_layer(net.to(dtype), "3")


def own_batch(step: int, n: int, worker: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    inputs, targets = batches(step, n)
    return inputs[worker].to(dtype), targets[worker]


def make_model(dtype: torch.dtype) -> nn.Module:
    return smooth_mlp() if dtype == torch.float64 else small_model(dtype)


def everything(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


def assert_same(tensors: list[Tensor], model: nn.Module, what: str) -> None:
    for mine, theirs in zip(tensors, everything(model), strict=True):
        assert torch.equal(mine, theirs), what


Case = tuple[str, str, int, torch.dtype, dict[str, Any]]


def take(rank: int, case: Case, opt: CrossGradient, steps: range) -> list[float]:
    _, _, n, dtype, _ = case
    losses = []
    for step in steps:
        opt.param_groups[0]["lr"] = lr_at(step)
        losses.append(float(opt.step(loss_of, own_batch(step, n, rank, dtype))))
    return losses


def build(rank: int, case: Case, **options: Any) -> tuple[nn.Module, CrossGradient]:
    name, graph, n, dtype, hyper = case
    model = make_model(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p += rank  # which the broadcast must replace
    return model, CrossGradient(model, name, topology=make_topology(graph, n), lr=0.3, **hyper, **options)


def train_all(rank: int, cases: list[Case]) -> list[Any]:
    found = []
    for case in cases:
        model, opt = build(rank, case)
        losses = take(rank, case, opt, range(STEPS))
        found.append((everything(model), losses, opt.communication.bytes_sent))
    return found


def simulate(case: Case, **options: Any) -> tuple[qgm.Simulator, list[Tensor]]:
    name, graph, n, dtype, hyper = case
    sim = qgm.Simulator(make_model(dtype), make_topology(graph, n), name, lr=0.3, **hyper, **options)
    losses = []
    for step in range(STEPS):
        batches_of_all = [own_batch(step, n, worker, dtype) for worker in range(n)]
        losses.append(sim.step_closure(loss_of, batches_of_all, lr=lr_at(step)))
    return sim, losses


def graphs_of(name: str) -> list[str]:
    """What the algorithm takes: neighbours that change, where it keeps nothing of them."""
    changing = name not in ("comp_ngc", "comp_n_saddle", "comp_q_saddle")
    return ["ring", "star", "random_matching" if changing else "chain"]


def all_cases(n: int) -> list[Case]:
    dtypes = [torch.float64, torch.float32, torch.bfloat16]
    found: list[Case] = []
    for k, (name, hyper) in enumerate(CASES):
        graphs = graphs_of(name)
        found.append((name, graphs[(k + n) % len(graphs)], n, dtypes[(k + n) % 3], hyper))
    for k, name in enumerate(NAMES):
        found.append((name, graphs_of(name)[(k + n + 1) % 3], n, dtypes[(k + n + 1) % 3], {"weight_decay": 1e-3}))
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.filterwarnings("ignore:ccl with momentum")
def test_every_method_equals_the_simulator(pool: ProcessPool, n: int) -> None:
    wanted = all_cases(n)
    results = pool.run(train_all, n, wanted)
    for k, case in enumerate(wanted):
        sim, losses = simulate(case)
        for rank in range(n):
            tensors, found, _ = results[rank][k]
            assert_same(tensors, sim.models[rank], f"{case}, rank {rank}")
            assert found == [float(loss[rank]) for loss in losses], f"{case}, rank {rank}"
        assert sum(results[rank][k][2] for rank in range(n)) == sim.opt.bytes_sent, case


def restart(rank: int, cases: list[Case]) -> list[list[Tensor]]:
    found = []
    for case in cases:
        model, opt = build(rank, case)
        take(rank, case, opt, range(2))
        file = io.BytesIO()
        torch.save({"opt": opt.state_dict(), "model": model.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model, opt = build(rank, case, broadcast_parameters=False)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
        take(rank, case, opt, range(2, STEPS))
        found.append(everything(model))
    return found


def check_against_simulator(pool: ProcessPool, train: Callable[[int, list[Case]], list[list[Tensor]]]) -> None:
    """Every method, trained by three workers, has the bits of the Simulator."""
    n = 3
    wanted: list[Case] = [(name, graphs_of(name)[-1], n, torch.float32, {}) for name in NAMES]
    results = pool.run(train, n, wanted)
    for k, case in enumerate(wanted):
        sim, _ = simulate(case)
        for rank in range(n):
            assert_same(results[rank][k], sim.models[rank], f"{case}, rank {rank}")


@pytest.mark.filterwarnings("ignore:ccl with momentum")
def test_a_restart_goes_on_to_the_same_bits(pool: ProcessPool) -> None:
    check_against_simulator(pool, restart)


def elsewhere_in_memory(p: Tensor) -> Tensor:
    """The same values, where they can with another order of dimensions in memory."""
    return p.detach().t().clone(memory_format=torch.contiguous_format).t()


def replace_parameters(model: nn.Module, opt: CrossGradient) -> None:
    """New Parameter objects, with the state of the old ones."""
    fresh = []
    for name, old in list(model.named_parameters()):
        new = nn.Parameter(elsewhere_in_memory(old))
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], new)
        opt.state[new] = opt.state.pop(old)
        fresh.append(new)
    opt.param_groups[0]["params"] = fresh


def rebind_alone(rank: int, cases: list[Case]) -> list[list[Tensor]]:
    found = []
    for case in cases:
        model, opt = build(rank, case, timeout=20.0)
        for step in range(STEPS):
            if rank == 1 and step in (0, 2):
                for p in model.parameters():
                    p.data = elsewhere_in_memory(p)
            if rank == 1 and step == 3:
                replace_parameters(model, opt)
            take(rank, case, opt, range(step, step + 1))
        found.append(everything(model))
    return found


@pytest.mark.filterwarnings("ignore:ccl with momentum")
def test_one_worker_alone_may_put_its_parameters_elsewhere(pool: ProcessPool) -> None:
    check_against_simulator(pool, rebind_alone)


def start_apart(rank: int, cases: list[Case]) -> list[list[Tensor]]:
    found = []
    for case in cases:
        model, opt = build(rank, case, broadcast_parameters=False)
        take(rank, case, opt, range(STEPS))
        found.append(everything(model))
    return found


@pytest.mark.filterwarnings("ignore:ccl with momentum")
def test_workers_that_start_apart_equal_the_simulator(pool: ProcessPool) -> None:
    n = 3
    wanted: list[Case] = [(name, "chain", n, torch.float64, {}) for name in NAMES]
    results = pool.run(start_apart, n, wanted)
    for k, case in enumerate(wanted):
        name, graph, _, dtype, hyper = case
        sim = qgm.Simulator(make_model(dtype), make_topology(graph, n), name, lr=0.3, **hyper)
        with torch.no_grad():
            for rank, one in enumerate(sim.models):
                for p in one.parameters():
                    p += rank
        for step in range(STEPS):
            sim.step_closure(loss_of, [own_batch(step, n, worker, dtype) for worker in range(n)], lr=lr_at(step))
        for rank in range(n):
            assert_same(results[rank][k], sim.models[rank], f"{case}, rank {rank}")


def clip_and_skip(rank: int, name: str) -> tuple[list[Tensor], int, str]:
    case: Case = (name, "ring", 3, torch.float32, {})
    model, opt = build(rank, case, on_nonfinite="skip", clip_grad_norm=0.5)
    for step in range(4):
        x, y = own_batch(step, 3, rank, torch.float32)
        if step in (0, 2) and rank == 1:
            x = x * float("nan")
        opt.step(loss_of, (x, y))
    opt.on_nonfinite = "raise"
    before = everything(model)
    with pytest.raises(NonFiniteGradientError) as error:
        opt.step(loss_of, (x * float("inf"), y))
    assert all(map(torch.equal, before, everything(model)))
    return before, opt.skipped_steps, str(error.value)


@pytest.mark.parametrize("name", ["ngc", "comp_ngc", "comp_q_saddle"])
def test_clipping_and_leaving_out_steps_equal_the_simulator(pool: ProcessPool, name: str) -> None:
    results = pool.run(clip_and_skip, 3, name)
    model = make_model(torch.float32)
    sim = qgm.Simulator(model, topology.ring(3), name, lr=0.3, on_nonfinite="skip", clip_grad_norm=0.5)
    for step in range(4):
        pairs = [own_batch(step, 3, worker, torch.float32) for worker in range(3)]
        if step in (0, 2):
            pairs[1] = (pairs[1][0] * float("nan"), pairs[1][1])
        sim.step_closure(loss_of, pairs)
    for rank, (tensors, skipped, text) in enumerate(results):
        assert skipped == sim.opt.skipped_steps == 2
        assert text.startswith("the gradient of workers 0, 1, 2 is not finite")
        assert_same(tensors, sim.models[rank], f"{name}, rank {rank}")


def test_a_worker_alone_needs_no_processes() -> None:
    case: Case = ("q_saddle", "ring", 1, torch.float32, {})
    model, opt = build(0, case)
    losses = take(0, case, opt, range(STEPS))
    sim, expected = simulate(case)
    assert losses == [float(one) for one in expected]
    assert all(map(torch.equal, everything(model), sim.models[0].state_dict().values()))
    other = copy.deepcopy(opt)
    again = float(other.step(loss_of, own_batch(9, 1, 0, torch.float32)))
    assert again == float(opt.step(loss_of, own_batch(9, 1, 0, torch.float32)))
    assert all(map(torch.equal, everything(model), everything(other.model)))
    assert all(p.grad is None for p in model.parameters())


def test_what_does_not_fit_is_named() -> None:
    model = small_model(torch.float32)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got generator"):
        CrossGradient(model.parameters(), "ngc", lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes one gradient a step, .* use qgm_ext.optim.Decentralized"):
        CrossGradient(model, "dsgd", lr=0.1)
    with pytest.raises(ValueError, match="must have the model; use qgm_ext.optim.CrossGradient, or qgm_ext.Simulator"):
        Decentralized(model.parameters(), "ngc", lr=0.1)
    with pytest.raises(ValueError, match="overlap must be False: ngc takes several gradients"):
        CrossGradient(model, "ngc", lr=0.1, overlap=True)
    with pytest.raises(ValueError, match="gossip_every must be 1, got 2"):
        CrossGradient(model, "ngc", lr=0.1, gossip_every=2)
    with pytest.raises(ValueError, match="ngc can't send its messages as int8"):
        CrossGradient(model, "ngc", lr=0.1, message="int8")
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match=r"one dtype and device, got torch.float32 on cpu, torch.float64 on cpu"):
        CrossGradient(mixed, "ngc", lr=0.1)
    with pytest.raises(ValueError, match="does not say which layer's output are its features"):
        CrossGradient(nn.Linear(2, 2), "ccl", lr=0.1)
    opt = CrossGradient(model, "ngc", lr=0.1)
    with pytest.raises(ValueError, match="steps the parameters of its model alone"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    batch = own_batch(0, 1, 0, torch.float32)
    with pytest.raises(TypeError, match="closure must be callable, got tuple"):
        opt.step(batch, loss_of)  # type: ignore[arg-type]
    before = everything(model)
    with pytest.raises(ValueError, match="the loss must be a scalar"):
        opt.step(lambda model, batch: model(batch[0]), batch)
    assert all(map(torch.equal, before, everything(model)))
    with pytest.raises(ValueError, match="it can't leave out gossip"), opt.no_gossip():
        pass


def test_copies_of_neighbours_need_the_same_neighbours() -> None:
    with pytest.raises(ValueError, match=r"comp_q_saddle .* topology 'one_peer_exponential' is time-varying"):
        qgm.Simulator(small_model(torch.float32), topology.one_peer_exponential(4), "comp_q_saddle", lr=0.1)
