"""Messages in bfloat16 and int8: what rounding promises, and what training with it does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qgm_ext as qgm
from qgm_ext import StackedOptimizer, algorithms, messages, topology
from qgm_ext.flat import FlatLayout
from rows import ALGORITHMS
from rows.base import Quadratics

ROUNDED = ["bfloat16", "int8"]
ABLE = [name for name in algorithms.names() if algorithms.get_class(name).rounding_obstacle is None]
F64 = torch.float64


def rounded(values: torch.Tensor, name: str) -> torch.Tensor:
    """What a receiver reads."""
    written = messages.make(name, [])
    assert written is not None
    packed = torch.empty(written.nbytes(len(values), values.dtype), dtype=torch.uint8)
    written.write(values, packed)
    out = torch.empty_like(values)
    written.read(packed, out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
def test_rounding_is_as_near_as_the_format_allows(size, dtype):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=F64).to(dtype)
    assert torch.equal(rounded(values, "bfloat16"), values.to(torch.bfloat16).to(dtype))
    got = rounded(values, "int8")
    for block in range(0, size, 64):
        part = values[block : block + 64]
        step = part.abs().max() / 127
        error = (got[block : block + 64] - part).abs().max()
        assert error <= step / 2 * (1 + 1e-5)
        assert len(part) < 3 or error > 0


@pytest.mark.parametrize("name", ROUNDED)
def test_zero_stays_zero_and_infinity_and_nan_are_not_hidden(name):
    assert torch.equal(rounded(torch.zeros(70), name), torch.zeros(70))
    for bad in (float("inf"), float("nan")):
        values = torch.ones(128)
        values[3] = bad
        got = rounded(values, name)
        assert not torch.isfinite(got[:64]).all()
        assert torch.isfinite(got[64:]).all()


@pytest.mark.parametrize("name", ROUNDED)
def test_the_memory_makes_up_for_what_was_lost(name):
    """The sum of what was sent is the sum of the messages, but for the memory of the last one."""
    written = messages.make(name, [])
    generator = torch.Generator().manual_seed(0)
    error, total, sent = torch.zeros(200, dtype=F64), torch.zeros(200, dtype=F64), torch.zeros(200, dtype=F64)
    packed, lost = torch.empty(written.nbytes(200, F64), dtype=torch.uint8), torch.empty(200, dtype=F64)
    for _ in range(50):
        exact = torch.randn(200, generator=generator, dtype=F64)
        message = exact.clone()
        written.send(message, error, packed, lost)
        torch.testing.assert_close(message + lost, exact, rtol=1e-14, atol=1e-14)
        total, sent = total + exact, sent + message
    torch.testing.assert_close(sent + error, total, rtol=1e-12, atol=1e-12)
    assert 0 < error.abs().max() < 0.1


@pytest.mark.filterwarnings("ignore:.*gut.*diverges")
@pytest.mark.parametrize("message", ROUNDED)
@pytest.mark.parametrize("name", ABLE)
def test_heterogeneous_quadratic_ends_near_the_predicted_point(name, message):
    row = ALGORITHMS[name]
    problem, topo = Quadratics(n=row.n), row.graph(row.n)
    opt = StackedOptimizer(torch.zeros_like(problem.a), topo, name, message=message, **row.hyper)
    tail = torch.zeros_like(problem.a)
    for step in range(1500):
        opt.step(problem.gradient(opt.x))
        if step >= 1000:
            tail += opt.x / 500
    start = problem.optimum.abs().max()
    assert (tail.mean(0) - problem.optimum).abs().max() < 0.5 * start
    if row.point is not None:
        expected = row.point(problem, torch.tensor(topo.matrix()))
        assert (tail - expected).abs().max() < 0.05 * start, (tail - expected).abs().max() / start


@pytest.mark.parametrize("message", ROUNDED)
def test_the_mean_is_that_of_exact_messages(message):
    """Also the sum over workers, for a column-stochastic matrix."""
    x = torch.randn(8, 300, generator=torch.Generator().manual_seed(1), dtype=F64)
    opt = StackedOptimizer(x.clone(), topology.ring(8), "dsgd", lr=0.0, message=message)
    directed = StackedOptimizer(x.clone(), topology.random_directed(8), "sgp", lr=0.0, message=message)
    for _ in range(300):
        opt.step(torch.zeros_like(x))
        directed.step(torch.zeros_like(x))
    torch.testing.assert_close(opt.x.mean(0), x.mean(0), rtol=0, atol=1e-12)
    assert opt.consensus_distance() < 0.02 * float((x - x.mean(0)).square().sum(1).mean().sqrt())
    weights = directed.scalars["push_sum_weight"][:, None]
    torch.testing.assert_close((weights * directed.x).sum(0), x.sum(0), rtol=0, atol=1e-11)


@pytest.mark.parametrize("message", ROUNDED)
def test_a_saved_run_continues_to_the_same_bits_and_knows_its_messages(message):
    def build(kind=message):
        return StackedOptimizer(torch.zeros(5, 90), topology.ring(5), "gradient_tracking", lr=0.1, message=kind)

    def go(opt, begin, end):
        for t in range(begin, end):
            opt.step(torch.randn(5, 90, generator=torch.Generator().manual_seed(t)))

    whole, first, second = build(), build(), build()
    go(whole, 0, 6)
    go(first, 0, 3)
    assert list(first.state) == ["correction", "message_error_0", "message_error_1"]
    second.x.copy_(first.x)
    second.load_state_dict(first.state_dict())
    go(second, 3, 6)
    assert torch.equal(second.x, whole.x)
    with pytest.raises(ValueError, match=f"state_dict is of messages in {message}, but here they are float32"):
        build("float32").load_state_dict(first.state_dict())


def test_bytes_count_the_numbers_and_scales_of_each_parameter():
    layout = FlatLayout([(3,), (70,), (2, 5)])
    for message, size in (("bfloat16", 2 * 83), ("int8", 83 + 4 * (1 + 2 + 1))):
        x = layout.allocate(4, dtype=torch.float32, device="cpu")
        opt = StackedOptimizer(x, topology.ring(4), "damsgrad", layout=layout, lr=0.1, message=message)
        opt.step(torch.zeros_like(x))
        assert opt.bytes_sent == 2 * 8 * size


@pytest.mark.parametrize("message", ROUNDED)
def test_a_worker_without_a_partner_keeps_its_step(message):
    """In a matching of five workers one is left over in every round."""
    topo = topology.random_matching(5, seed=1)
    plain = StackedOptimizer(torch.zeros(5, 70), topo, "dsgd", lr=0.1)
    opt = StackedOptimizer(torch.zeros(5, 70), topo, "dsgd", lr=0.1, message=message)
    g = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    alone = [i for i in range(5) if len(topo.mixing(0).row(i)[0]) == 1]
    assert len(alone) == 1
    plain.step(g)
    opt.step(g)
    assert torch.equal(opt.x[alone], plain.x[alone])
    assert not torch.equal(opt.x, plain.x)
    assert (opt.state["message_error"][alone] == 0).all()


@pytest.mark.parametrize("message", ROUNDED)
def test_the_simulator_trains_with_rounded_messages(message):
    torch.manual_seed(0)
    sim = qgm.Simulator(nn.Linear(4, 2), topology.ring(4), "qg_dsgdm_n", lr=0.2, message=message)
    x = torch.randn(4, 32, 4)
    y = (x[..., 0] > 0).long()
    losses = [sim.step(nn.functional.cross_entropy, (x, y)).mean().item() for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert sim.opt.bytes_sent_per_step == 8 * ({"bfloat16": 20, "int8": 10 + 2 * 4}[message])


@pytest.mark.parametrize(
    ("name", "obstacle"),
    [
        ("choco_sgd", "it compresses them itself"),
        ("relaysgd", "relayed sums are sent as they are"),
        ("csgdm", "it averages exactly"),
    ],
)
def test_algorithms_that_cannot_round_say_why(name, obstacle):
    graph = topology.chain(4) if name == "relaysgd" else topology.ring(4)
    with pytest.raises(ValueError, match=f"{name} can't send its messages as int8: {obstacle}"):
        StackedOptimizer(torch.zeros(4, 8), graph, name, lr=0.1, message="int8")
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="q_saddle can't send its messages as int8"):
        qgm.Simulator(model, topology.ring(3), "q_saddle", lr=0.1, message="int8")


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match="message must be one of float32, bfloat16, int8, got 'bf16'"):
        StackedOptimizer(torch.zeros(4, 8), topology.ring(4), "dsgd", lr=0.1, message="bf16")
