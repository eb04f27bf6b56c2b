"""StackedOptimizer: arguments, state, resuming, non-finite gradients."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import qgm_ext as qgm
from qgm_ext.stacked import NonFiniteGradientError


def make(n: int = 4, dim: int = 100, dtype: torch.dtype = torch.float32, **options) -> qgm.StackedOptimizer:
    options = {"lr": 0.1, "algorithm": "qg_dsgdm_n", "topology": qgm.topology.ring(n), **options}
    x = torch.randn(1, dim, generator=torch.Generator().manual_seed(0)).to(dtype).expand(n, dim).contiguous()
    return qgm.StackedOptimizer(x, **options)


def gradients(opt: qgm.StackedOptimizer, step: int) -> torch.Tensor:
    return torch.randn(opt.x.shape, generator=torch.Generator().manual_seed(100 + step)).to(opt.x.dtype)


def test_x_is_updated_in_place_and_shared():
    x = torch.ones(3, 5)
    opt = qgm.StackedOptimizer(x, qgm.topology.ring(3), "dsgd", lr=0.5)
    opt.step(torch.ones(3, 5))
    assert torch.equal(x, torch.full((3, 5), 0.5))
    assert opt.x.data_ptr() == x.data_ptr()


def test_parameters_that_require_grad_are_stepped():
    x = torch.ones(2, 3, requires_grad=True)
    opt = qgm.StackedOptimizer(x, qgm.topology.ring(2), "dsgd", lr=0.5)
    (x.sum()).backward()
    opt.step(x.grad)
    assert torch.equal(x.detach(), torch.full((2, 3), 0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_state_has_the_compute_dtype(dtype):
    opt = make(dtype=dtype)
    assert opt.state["qg_momentum_buffer"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert opt.state["qg_momentum_buffer"].shape == opt.x.shape


def test_workers_whose_neighbours_all_have_smaller_numbers_keep_the_order_of_the_step():
    # No weight of their own, so every message that worker 3 needs is made before its own.
    matrix = [[0.0, 0.5, 0.5, 0.0], [0.5, 0.0, 0.0, 0.5], [0.5, 0.0, 0.0, 0.5], [0.0, 0.5, 0.5, 0.0]]
    opt = make(topology=qgm.topology.from_matrix(matrix), momentum=0.0, qg_momentum=0.5, dtype=torch.float64)
    before, g = opt.x.clone(), gradients(opt, 0)
    opt.step(g)
    expected = torch.tensor(matrix, dtype=torch.float64) @ (before - 0.1 * g)
    torch.testing.assert_close(opt.x, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(opt.state["qg_momentum_buffer"], 0.5 * (before - expected) / 0.1, rtol=1e-12, atol=1e-12)


def test_lr_of_one_step_and_of_all_later_steps():
    opt, other = make(), make(lr=0.02)
    opt.step(gradients(opt, 0), lr=0.02)
    other.step(gradients(opt, 0))
    assert torch.equal(opt.x, other.x)
    assert opt.lr == 0.1
    opt.lr = 0.03
    other.lr = 0.03
    opt.step(gradients(opt, 1))
    other.step(gradients(opt, 1))
    assert torch.equal(opt.x, other.x)


BY_GRADIENTS = [name for name in qgm.algorithms.names() if not qgm.algorithms.get_class(name).needs_model]


@pytest.mark.filterwarnings("ignore:d2.*eigenvalue")
@pytest.mark.parametrize("algorithm", BY_GRADIENTS)
@pytest.mark.parametrize("topology", [qgm.topology.ring(4), qgm.topology.one_peer_exponential(4)], ids=lambda t: t.name)
def test_resumed_run_equals_uninterrupted_to_the_bit(algorithm, topology):
    if algorithm.startswith("relaysgd"):
        topology = qgm.topology.chain(4) if topology.name == "ring" else qgm.topology.double_binary_trees(4)

    if algorithm == "choco_sgd":
        topology = qgm.topology.exponential(4)

    def fresh() -> qgm.StackedOptimizer:
        return make(algorithm=algorithm, topology=topology)

    straight, first, resumed = fresh(), fresh(), fresh()
    for t in range(7):
        straight.step(gradients(straight, t), lr=0.1 / (t + 1))
    for t in range(3):
        first.step(gradients(first, t), lr=0.1 / (t + 1))
    file = io.BytesIO()
    torch.save({"x": first.x, "opt": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.x.copy_(saved["x"])
    resumed.load_state_dict(saved["opt"])
    for t in range(3, 7):
        resumed.step(gradients(resumed, t), lr=0.1 / (t + 1))
    assert torch.equal(straight.x, resumed.x)
    for name, vector in {**straight.state, **straight.scalars}.items():
        assert torch.equal(vector, {**resumed.state, **resumed.scalars}[name])
    assert straight.bytes_sent == resumed.bytes_sent > 0


def test_deepcopy_is_independent():
    opt = make()
    opt.step(gradients(opt, 0))
    twin = copy.deepcopy(opt)
    twin.step(gradients(opt, 1))
    assert not torch.equal(opt.x, twin.x)
    opt.step(gradients(opt, 1))
    assert torch.equal(opt.x, twin.x)


def test_state_dict_of_another_algorithm_is_refused_and_nothing_changes():
    opt = make()
    opt.step(gradients(opt, 0))
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="momentum is 0.5 there and 0.9 here"):
        opt.load_state_dict(make(momentum=0.5).state_dict())
    with pytest.raises(ValueError, match="name is 'dsgd' there and 'qg_dsgdm_n' here"):
        opt.load_state_dict(make(algorithm="dsgd").state_dict())
    with pytest.raises(ValueError, match=r"state qg_momentum_buffer must be \[4, 100\] torch.float32, got \[4, 99\]"):
        opt.load_state_dict(make(dim=99).state_dict())
    with pytest.raises(ValueError, match="state_dict lacks num_steps"):
        opt.load_state_dict({key: value for key, value in before.items() if key != "num_steps"})
    assert opt.num_steps == 1
    assert torch.equal(opt.state["qg_momentum_buffer"], before["state"]["qg_momentum_buffer"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradient(bad):
    g = torch.zeros(4, 100)
    g[2, 7] = bad
    opt = make(on_nonfinite="raise")
    opt.step(gradients(opt, 0))
    x, m = opt.x.clone(), opt.state["qg_momentum_buffer"].clone()
    with pytest.raises(NonFiniteGradientError, match="gradient of worker 2 is not finite in step 1"):
        opt.step(g)
    skipping = make(on_nonfinite="skip")
    skipping.step(gradients(skipping, 0))
    skipping.step(g)
    assert (skipping.num_steps, skipping.skipped_steps) == (1, 1)
    for other in (opt, skipping):
        assert torch.equal(other.x, x)
        assert torch.equal(other.state["qg_momentum_buffer"], m)
    ignoring = make()
    ignoring.step(g)
    assert not torch.isfinite(ignoring.x).all()


def test_a_step_allocates_nothing_of_the_size_of_the_state():
    opt = make(n=4, dim=200_000)
    g = gradients(opt, 0)
    opt.step(g)
    with torch.profiler.profile(profile_memory=True) as profile:
        opt.step(g)
    assert sum(max(0, event.cpu_memory_usage) for event in profile.events()) < 4 * opt.x.shape[1]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(4)}, ValueError, r"x must have shape \[n, D\]"),
        ({"x": torch.zeros(4, 0)}, ValueError, r"D >= 1, got \[4, 0\]"),
        ({"x": torch.zeros(4, 3, dtype=torch.complex64)}, TypeError, "must be float64, float32, bfloat16 or float16"),
        ({"x": torch.zeros(3, 4).T}, ValueError, "contiguous rows that don't overlap"),
        ({"x": torch.zeros(1, 3).expand(4, 3)}, ValueError, "contiguous rows that don't overlap"),
        ({"topology": "ring"}, TypeError, "topology must be a qgm_ext.topology.Topology, got str"),
        ({"topology": qgm.topology.ring(5)}, ValueError, "topology has 5 workers, but x has 4 rows"),
        ({"algorithm": "qgdsgdm"}, ValueError, "did you mean 'qg_dsgdm'"),
        ({"algorithm": 3}, TypeError, "algorithm must be a name or an Algorithm, got int"),
        ({"on_nonfinite": "stop"}, ValueError, "on_nonfinite must be one of raise, skip, ignore, got 'stop'"),
        ({"lr": None}, ValueError, "lr must be a finite number"),
        ({"algorithm": qgm.algorithms.get("dsgd", lr=0.1)}, TypeError, r"hyper-parameters \(lr\) go with an algorithm"),
    ],
)
def test_constructor_names_the_wrong_argument(changes, error, message):
    arguments = {"x": torch.zeros(4, 3), "topology": qgm.topology.ring(4), "algorithm": "dsgd", "lr": 0.1, **changes}
    with pytest.raises(error, match=message):
        qgm.StackedOptimizer(**arguments)


@pytest.mark.parametrize(
    ("g", "lr", "error", "message"),
    [
        (torch.zeros(4, 99), None, ValueError, r"g must be like x, \[4, 100\] torch.float32 on cpu, got \[4, 99\]"),
        (torch.zeros(4, 100).double(), None, ValueError, "got .* torch.float64"),
        (torch.zeros(4, 100, device="meta"), None, ValueError, "on meta"),
        (None, None, TypeError, "g must be a torch.Tensor, got NoneType"),
        (torch.zeros(4, 100), -0.1, ValueError, "lr must be a finite number of at least 0, got -0.1"),
        (torch.zeros(4, 100), float("nan"), ValueError, "lr must be a finite number"),
    ],
)
def test_step_names_the_wrong_argument_and_changes_nothing(g, lr, error, message):
    opt = make()
    opt.step(gradients(opt, 0))
    before = opt.x.clone()
    with pytest.raises(error, match=message):
        opt.step(g, lr=lr)
    assert torch.equal(opt.x, before)
    assert opt.num_steps == 1
