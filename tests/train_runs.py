"""Small training runs, stopped where a test wants it, and that two of them had the same outcome."""

from __future__ import annotations

import torch

from qgm_ext.experiments import TrainConfig, Training

SMALL = {"workers": 4, "num_train": 200, "batch": 8, "threads": 1}


def small(**changes):
    return TrainConfig(**{**SMALL, "steps": 12, **changes})


def without_times(record):
    times = {
        "seconds",
        "seconds_training",
        "worker_steps_per_second",
        "share_gradient",
        "share_optimizer",
        "share_evaluation",
    }
    return {key: value for key, value in record.items() if key not in times}


def metrics_of(result):
    return [without_times(record) for record in result.metrics]


def vectors_of(result):
    opt = result.simulator.opt
    return {"x": opt.x.clone(), **{name: vector.clone() for name, vector in opt.state.items()}}


def assert_same_outcome(a, b):
    assert metrics_of(a) == metrics_of(b)
    left, right = vectors_of(a), vectors_of(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def train_until(config, out, step):
    """Start or continue a run and stop it after ``step`` steps, as ctrl-C does."""
    make = Training.resume(out) if (out / "config.json").exists() else Training(config, out)
    with make as training:
        return training.run(should_stop=lambda: training.step >= step)
