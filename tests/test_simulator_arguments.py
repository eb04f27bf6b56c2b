"""What the Simulator refuses: arguments and batches that don't fit, and that nothing changes then."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qgm_ext import topology
from qgm_ext.simulator import Simulator
from simulator_runs import CLASSES, assert_unchanged, batch_norm, data, everything, mlp


class TwoDtypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2).bfloat16()


class TwoDevices(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2, device="meta")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "mlp"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"model": nn.ReLU()}, ValueError, "model must have at least one trainable parameter"),
        ({"model": nn.Linear(2, 2).requires_grad_(False)}, ValueError, "at least one trainable parameter"),
        ({"model": nn.LazyLinear(2)}, ValueError, "weight of the model has no shape yet"),
        ({"model": TwoDtypes()}, ValueError, "first.weight is torch.float32 and second.weight torch.bfloat16; dtype="),
        ({"model": TwoDevices()}, ValueError, "first.weight is on cpu and second.weight on meta; device="),
        ({"model": nn.Linear(2, 2, dtype=torch.complex64)}, TypeError, "must be float64, float32, bfloat16 or float16"),
        ({"topology": 4}, TypeError, "topology must be a qgm_ext.topology.Topology, got int"),
        ({"algorithm": "qg_dsgd"}, ValueError, "algorithm 'qg_dsgd' is not known, did you mean"),
        ({"engine": "vmpa"}, ValueError, "engine 'vmpa' is not known, did you mean 'vmap'?"),
        ({"engine": "turbo"}, ValueError, "engine 'turbo' is not known"),
        ({"clip_grad_norm": 0.0}, ValueError, "clip_grad_norm must be a finite number above 0, or None, got 0.0"),
        ({"clip_grad_norm": float("nan")}, ValueError, "clip_grad_norm must be"),
        ({"clip_grad_norm": "1"}, ValueError, "clip_grad_norm must be"),
        ({"on_nonfinite": "stop"}, ValueError, "on_nonfinite must be one of raise, skip, ignore, got 'stop'"),
        ({"dtype": torch.int32}, TypeError, "must be float64, float32, bfloat16 or float16, got torch.int32"),
        ({"dtype": "float32"}, TypeError, "dtype must be a torch.dtype, got str"),
        ({"lr": -1.0}, ValueError, "lr must be"),
        ({"momentun": 0.9}, TypeError, "dsgdm has no hyper-parameter 'momentun', did you mean 'momentum'"),
    ],
)
def test_wrong_arguments_are_refused(change, error, message):
    arguments = {"model": mlp(), "topology": topology.ring(4), "algorithm": "dsgdm", "lr": 0.1, **change}
    with pytest.raises(error, match=message):
        Simulator(arguments.pop("model"), arguments.pop("topology"), arguments.pop("algorithm"), **arguments)


def test_dtype_makes_parameters_alike():
    sim = Simulator(TwoDtypes(), topology.ring(2), "dsgd", lr=0.1, dtype=torch.float32)
    assert sim.opt.x.dtype == torch.float32


X, Y = data(0, 3)
PAIRS = list(zip(X, Y, strict=True))


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (PAIRS[:2], ValueError, r"one \(inputs, targets\) per worker, 3, got 2"),
        ([], ValueError, "per worker, 3, got 0"),
        ((X[:2], Y[:2]), ValueError, r"stacked inputs must be \[n, B, ...\] with n = 3 workers, got \[2, 6, 5\]"),
        ((X, Y[:2]), ValueError, r"stacked targets must be \[n, B, ...\] with n = 3 workers, got \[2, 6\]"),
        ([*PAIRS[:2], (X[2][:0], Y[2][:0])], ValueError, r"inputs of worker 2 are empty, shape \[0, 5\]"),
        ((X[:, :0], Y[:, :0]), ValueError, r"inputs are empty, shape \[3, 0, 5\]"),
        ((X, Y.to("meta")), ValueError, "targets are on meta, the models on cpu"),
        ([*PAIRS[:2], X[2]], TypeError, r"the batch of worker 2 must be a pair of tensors .*step_closure"),
        ([*PAIRS[:2], (X[2].numpy(), Y[2])], TypeError, "the batch of worker 2 must be a pair of tensors"),
        ([*PAIRS[:2], (X[2].to("meta"), Y[2])], ValueError, "inputs of worker 2 are on meta, the models on cpu"),
        (iter(PAIRS), TypeError, "batches must be a sequence"),
        (X, TypeError, "batches must be a sequence"),
    ],
)
def test_wrong_batches_are_refused_and_change_nothing(batches, error, message):
    sim = Simulator(batch_norm(), topology.ring(3), "dsgd", lr=0.1)
    before = everything(sim)
    with pytest.raises(error, match=message):
        sim.step(F.cross_entropy, batches)
    assert_unchanged(sim, before)
    assert sim.num_steps == 0


@pytest.mark.parametrize("engine", ["loop", "threads", "vmap"])
@pytest.mark.parametrize("lr", [-0.1, float("nan"), "0.1"])
def test_wrong_lr_is_refused_and_changes_nothing(lr, engine):
    sim = Simulator(batch_norm(), topology.ring(3), "dsgd", lr=0.1, engine=engine)
    before = everything(sim)
    with pytest.raises(ValueError, match="lr must be"):
        sim.step(F.cross_entropy, (X, Y), lr=lr)
    assert_unchanged(sim, before)


def test_an_error_in_the_last_worker_leaves_the_buffers_of_the_first():
    sim = Simulator(batch_norm(), topology.ring(3), "dsgd", lr=0.1)
    before = everything(sim)
    with pytest.raises(IndexError):
        sim.step(F.cross_entropy, [*PAIRS[:2], (X[2], Y[2] + CLASSES)])
    assert_unchanged(sim, before)


@pytest.mark.parametrize(("method", "name"), [("step", "loss_fn"), ("step_closure", "closure")])
def test_what_is_not_callable_is_refused(method, name):
    sim = Simulator(mlp(), topology.ring(3), "dsgd", lr=0.1)
    with pytest.raises(TypeError, match=f"{name} must be callable, got str"):
        getattr(sim, method)("cross_entropy", PAIRS)


@pytest.mark.parametrize(("batches", "error"), [(PAIRS[:2], ValueError), (iter(PAIRS), TypeError), ("abc", TypeError)])
def test_step_closure_refuses_wrong_batches(batches, error):
    sim = Simulator(mlp(), topology.ring(3), "dsgd", lr=0.1)
    with pytest.raises(error, match="batches must"):
        sim.step_closure(lambda model, batch: model(batch[0]).sum(), batches)
