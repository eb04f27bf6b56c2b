"""What the optimizers take and refuse: hyper-parameters, parameters, topologies and process groups."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qgm_ext import topology
from qgm_ext.optim import QGSGD
from small_training import assert_same, every_optimizer, mlp, train

# Wrong arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, "lr must be a finite number of at least 0, got -0.1"),
        ({"lr": math.nan}, ValueError, "lr must be a finite number of at least 0, got nan"),
        ({"lr": math.inf}, ValueError, "lr must be a finite number"),
        ({"lr": "0.1"}, ValueError, "lr must be a finite number of at least 0, got '0.1'"),
        ({"lr": None}, ValueError, "lr must be a finite number of at least 0, got None"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": torch.tensor([0.1, 0.2])}, ValueError, r"lr must be a number or a tensor of one element, .* \[2\]"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.5}, ValueError, r"momentum must be in \[0, 1\), got -0.5"),
        ({"qg_momentum": 1.1}, ValueError, r"qg_momentum must be in \[0, 1\], got 1.1"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be a finite number of at least 0, got -1"),
        ({"local_step": 0}, ValueError, "local_step must be an integer of at least 1, got 0"),
        ({"local_step": 1.5}, ValueError, "local_step must be an integer of at least 1, got 1.5"),
        ({"nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
        ({"maximize": "yes"}, TypeError, "maximize must be True or False, got 'yes'"),
        ({"topology": "ring"}, TypeError, "topology must be a qgm_ext.topology.Topology or None, got str"),
        ({"foreach": True}, TypeError, "foreach"),
        ({"fused": True}, TypeError, "fused"),
        ({"differentiable": True}, TypeError, "differentiable"),
        ({"capturable": True}, TypeError, "capturable"),
    ],
    ids=str,
)
def test_wrong_argument(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QGSGD([nn.Parameter(torch.zeros(2))], **{"lr": 0.1, **arguments})
    if "topology" not in arguments and "f" not in message[:1] and error is ValueError:
        with pytest.raises(error, match=message):
            QGSGD([{"params": [nn.Parameter(torch.zeros(2))], **arguments}], 0.1)


@every_optimizer
def test_wrong_parameters(make) -> None:
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        make([])
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts, but got"):
        make(p)
    with pytest.raises(TypeError, match="optimizer can only optimize Tensors, but one of the params is int"):
        make([p, 3])
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        make([p * 2])
    with pytest.raises(TypeError, match="ordered collections"):
        make([{"params": {p}}])
    with pytest.raises(ValueError, match="must not hold a parameter twice"):
        make([p, q, p])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        make([{"params": p}, {"params": [q, p]}])
    with pytest.raises(ValueError, match="all optimizer params should be with/without names"):
        make([("a", p), q])
    with pytest.raises(ValueError, match="all optimizer param groups should be with/without names"):
        make([{"params": [p]}, {"params": [("q", q)]}])
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=r"parameters must be float64, float32, bfloat16 or float16, got"):
            make([nn.Parameter(torch.zeros(2, dtype=dtype))])
    with pytest.raises(TypeError, match=r"must be float64, float32, bfloat16 or float16, got torch\.int64"):
        make([torch.zeros(2, dtype=torch.int64)])


def test_failed_add_param_group_leaves_the_optimizer() -> None:
    model = mlp()
    optimizer = QGSGD(model.parameters(), 0.05)
    extra = nn.Parameter(torch.zeros(2))
    for group in ({"params": extra, "momentum": 2.0}, {"params": extra, "algorithm": "dsgd"}):
        with pytest.raises(ValueError, match=r"momentum must be|algorithm of a parameter group must be 'qg_dsgdm'"):
            optimizer.add_param_group(group)
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([extra])  # type: ignore[arg-type]
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, 1)


def test_hyperparameter_spoilt_between_steps_is_refused_and_nothing_lost() -> None:
    model = mlp()
    optimizer = QGSGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], 0.05)
    train(model, optimizer, 1)
    before = [p.detach().clone() for p in model.parameters()]
    for name, value in (("lr", math.nan), ("lr", -1.0), ("momentum", 1.5), ("nesterov", None)):
        old = optimizer.param_groups[1][name]
        optimizer.param_groups[1][name] = value
        with pytest.raises((ValueError, TypeError), match=f"{name} must be"):
            train(model, optimizer, 1)
        optimizer.param_groups[1][name] = old
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# One worker or many ---------------------------------------------------------------------------------------------------


def test_topology_of_one_worker_is_accepted() -> None:
    model, other = mlp(), mlp()
    train(model, QGSGD(model.parameters(), 0.05, topology=topology.ring(1)), 3)
    train(other, QGSGD(other.parameters(), 0.05), 3)
    assert_same(model, other)


def test_topology_of_many_workers_needs_processes() -> None:
    with pytest.raises(ValueError, match=r"16 workers, but this is a single process: .*torchrun --nproc-per-node 16"):
        QGSGD(mlp().parameters(), 0.05, topology=topology.ring(16))


def test_group_needs_torch_distributed() -> None:
    with pytest.raises(ValueError, match=r"group needs torch.distributed, which is not initialised, got object"):
        QGSGD(mlp().parameters(), 0.05, group=object())  # type: ignore[arg-type]


@pytest.fixture
def process_group():
    """The default process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_process_group_of_one_process_is_one_worker(process_group) -> None:
    model, other = mlp(), mlp()
    train(model, QGSGD(model.parameters(), 0.05, topology=topology.ring(1), group=process_group), 3)
    train(other, QGSGD(other.parameters(), 0.05), 3)
    assert_same(model, other)
    with pytest.raises(ValueError, match="topology has 4 workers, but the process group has 1"):
        QGSGD(mlp().parameters(), 0.05, topology=topology.ring(4))


def test_process_group_of_many_processes_needs_a_topology(process_group, monkeypatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 4)
    with pytest.raises(ValueError, match=r"the process group has 4 workers, so topology must say .* got None"):
        QGSGD(mlp().parameters(), 0.05)


def test_process_group_of_others_is_refused(process_group) -> None:
    with pytest.raises(ValueError, match="group must have this process as a member"):
        QGSGD(mlp().parameters(), 0.05, group=dist.GroupMember.NON_GROUP_MEMBER)
