"""Schedules and configs of training runs: values, files, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from qgm_ext import algorithms
from qgm_ext.experiments import TrainConfig, Training, run
from qgm_ext.experiments import config as configs
from qgm_ext.experiments.schedules import Schedule
from train_runs import small, train_until

# Schedules ------------------------------------------------------------------------------------------------------------


def test_step_schedule_drops_at_one_half_and_three_quarters():
    schedule = Schedule(name="step", lr=2.0, num_steps=100)
    assert [schedule.at(step) for step in (0, 49, 50, 74, 75, 99)] == [2.0, 2.0, 0.2, 0.2, 0.02, 0.02]


def test_cosine_schedule_ends_near_zero_and_is_half_in_the_middle():
    schedule = Schedule(name="cosine", lr=2.0, num_steps=100)
    assert schedule.at(0) == 2.0
    assert schedule.at(50) == pytest.approx(1.0)
    assert 0 < schedule.at(99) < 1e-3


def test_warmup_is_a_line_per_iteration_from_its_start():
    schedule = Schedule(name="constant", lr=1.0, num_steps=100, warmup_steps=4, warmup_from=0.2)
    assert [schedule.at(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_the_run_uses_the_schedule():
    result = run(small(schedule="step", lr=0.1, steps=24, warmup_epochs=1, warmup_from=0.05, eval_every=1))
    assert [record["step"] for record in result.metrics] == [0, 6, 12, 18, 24]
    assert [record["lr"] for record in result.metrics] == pytest.approx([0.05, 0.05 + 0.05 * 5 / 6, 0.1, 0.01, 0.001])


# Config ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("algorithm", "qg_dsgdmn", "did you mean 'qg_dsgdm_n'"),
        ("topology", "rnig", "did you mean 'ring'"),
        ("data", "fashion", "did you mean 'fashion-mnist'"),
        ("model", "mpl", "did you mean 'mlp'"),
        ("partition", "dirichelt", "did you mean 'dirichlet'"),
        ("schedule", "cosin", "did you mean 'cosine'"),
        ("dtype", "float23", "did you mean 'float32'"),
        ("engine", "vmpa", "did you mean 'vmap'"),
        ("on_nonfinite", "rase", "did you mean 'raise'"),
        ("device", "cpu:0", "device must be 'cpu', 'cuda' or 'cuda:i'"),
        ("workers", 0, "workers must be at least 1, got 0"),
        ("workers", 2.5, "workers must be an integer"),
        ("batch", -1, "batch must be at least 1"),
        ("epochs", 0, "epochs must be at least 1"),
        ("num_train", 0, "num_train must be at least 1"),
        ("validation", 1.0, r"validation must be in \[0, 1\), got 1"),
        ("validation", -0.1, "validation must be a finite number of at least 0"),
        ("validation", float("nan"), "validation must be a finite number"),
        ("threads", 0, "threads must be at least 1"),
        ("eval_every", 0, "eval_every must be at least 1"),
        ("seed", -1, "seed must be in"),
        ("seed", 2**32, "seed must be in"),
        ("alpha", 0, "alpha must be a finite number > 0"),
        ("alpha", -1.0, "alpha must be a finite number"),
        ("alpha", float("nan"), "alpha must be a finite number"),
        ("lr", float("nan"), "lr must be a finite number"),
        ("lr", -0.1, "lr must be a finite number"),
        ("clip", 0.0, "clip must be a finite number > 0"),
        ("clip", float("inf"), "clip must be a finite number"),
        ("warmup_epochs", -1.0, "warmup_epochs must be a finite number"),
        ("warmup_epochs", 101.0, "warmup_epochs must be at most the 100 epochs"),
        ("warmup_from", 0.2, r"warmup_from must be in \[0, 0\.1\]"),
        ("hyper", {"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ("hyper", {"momentun": 0.5}, "did you mean 'momentum'"),
        ("hyper", {"lr": 0.5}, "lr is an argument of its own"),
        ("data_root", 3, "data_root must be a string"),
    ],
)
def test_wrong_values_are_named(field, value, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TrainConfig(**{field: value})


def test_epochs_and_steps_exclude_each_other():
    with pytest.raises(ValueError, match="give epochs or steps, not both"):
        TrainConfig(epochs=1, steps=2)


def test_a_hyper_parameter_that_the_algorithm_lacks_is_named():
    with pytest.raises(TypeError, match="dsgd has no hyper-parameter 'momentum'"):
        TrainConfig(algorithm="dsgd", hyper={"momentum": 0.9})


def test_an_algorithm_from_outside_brings_its_own_defaults_and_types(monkeypatch, tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Outside(algorithms.get_class("dsgd")):
        name: ClassVar[str] = "outside"
        lr: float = 0.25
        betas: tuple[float, float] = (0.9, 0.999)
        variant: Literal["v0", "v1"] = "v0"
        rho: float = 0.5
        wide: bool = False

    monkeypatch.setitem(algorithms.base._registry, "outside", Outside)
    hyper = {
        name: configs.parse_hyper("outside", name, text)
        for name, text in {"betas": "0.8,0.9", "variant": "v1", "rho": "1", "wide": "True"}.items()
    }
    assert hyper == {"betas": (0.8, 0.9), "variant": "v1", "rho": 1.0, "wide": True}
    config = small(algorithm="outside", hyper=hyper)
    assert config.lr == 0.25
    train_until(config, tmp_path, 3)
    with Training.resume(tmp_path, given={"hyper": hyper}) as training:
        assert training.config == config
        assert training.run().finished


def test_social_topology_brings_its_own_number_of_workers():
    assert TrainConfig(topology="social").workers == 32
    assert TrainConfig(topology="one-peer-exponential").workers == 16


def test_config_survives_its_file(tmp_path):
    config = small(algorithm="dsgdm", hyper={"momentum": 0.1 + 0.2}, lr=1 / 3, clip=1.0, data_root="/data")
    path = tmp_path / "config.json"
    path.write_text(configs.dumps(config, {"torch": "x"}))
    loaded, about = configs.loads(path)
    assert loaded == config
    assert about["torch"] == "x"


def test_config_of_a_run_from_before_there_were_options_of_processes_is_read_and_has_the_same_digest(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(configs.dumps(small(), {}))
    assert not {"overlap", "bucket_mb", "staleness"} & json.loads(path.read_text())["config"].keys()
    assert configs.loads(path)[0] == small()
    chosen = small(overlap=True, bucket_mb=0.5, on_nonfinite="ignore")
    path.write_text(configs.dumps(chosen, {}))
    stored = json.loads(path.read_text())["config"]
    assert (stored["overlap"], stored["bucket_mb"]) == (True, 0.5)
    assert configs.loads(path)[0] == chosen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-30], "damaged: not JSON"),
        (lambda text: "\x00" * 10, "damaged: not JSON"),
        (lambda text: "[]", "no 'format'"),
        (lambda text: text.replace(configs.CONFIG_FORMAT, "qgm_ext.train/9"), "is of version 'qgm_ext.train/9'"),
        (lambda text: text.replace('"seed": 0', '"sead": 0'), "missing or unknown fields sead, seed"),
        (lambda text: text.replace('"seed": 0', '"seed": -4'), "damaged: seed must be in"),
        (lambda text: text.replace('"hyper": {', '"hyper": 3, "x": {'), "damaged"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, change, message):
    path = tmp_path / "config.json"
    path.write_text(change(configs.dumps(small(), {})))
    with pytest.raises(ValueError, match=message) as caught:
        configs.loads(path)
    assert str(path) in str(caught.value)
