"""Training runs: they learn, they are the same twice, and a run that was stopped or killed goes on to the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch

from qgm_ext import algorithms, data, models, topology
from qgm_ext.experiments import TrainConfig, Training, resume, run, runfolder
from qgm_ext.experiments import config as configs
from qgm_ext.experiments.schedules import Schedule
from qgm_ext.models import registry
from qgm_ext.simulator import Simulator
from qgm_ext.stacked import NonFiniteGradientError

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


# Runs -----------------------------------------------------------------------------------------------------------------


def test_digits_run_beats_chance_by_far_and_is_the_same_twice():
    config = TrainConfig(epochs=30, threads=1)
    assert (config.algorithm, config.topology, config.workers, config.alpha) == ("qg_dsgdm_n", "ring", 16, 0.1)
    results = []
    for unrelated in (1, 2):  # the seed is the config's, not the caller's
        torch.manual_seed(unrelated)
        results.append(run(config))
    first, second = results
    assert first.summary["accuracy_local_mean"] > 0.85
    assert first.summary["accuracy_local_min"] > 0.75
    assert first.summary["accuracy_average"] > 0.90
    assert first.metrics[0]["accuracy_local_mean"] < 0.25  # chance is 0.1
    assert first.summary["consensus_distance"] > 0
    assert_same_outcome(first, second)


def test_a_run_is_the_plain_loop_that_it_stands_for():
    config = small(seed=5, lr=0.2, schedule="step", algorithm="dsgdm", hyper={"momentum": 0.5})
    dataset = data.load("digits", num_train=200, seed=5)
    partition = data.dirichlet_partition(dataset.train_y.numpy(), 4, 0.1, 5)
    batches = data.WorkerBatches(dataset.train_x, dataset.train_y, partition, 8, 5)
    torch.manual_seed(5)
    model = models.get("mlp", dataset.input_shape, 10)
    sim = Simulator(model, topology.ring(4), "dsgdm", lr=0.2, momentum=0.5, engine="threads")
    losses = [
        float(sim.step(torch.nn.functional.cross_entropy, batches.at(step), lr=lr).double().mean())
        for step, lr in enumerate([0.2] * 6 + [0.2 * 0.1] * 3 + [0.2 * 0.01] * 3)
    ]
    result = run(config)
    assert torch.equal(result.simulator.opt.x, sim.opt.x)
    means = [sum(losses[:6]) / 6, sum(losses[6:]) / 6]
    assert [record["loss"] for record in result.metrics] == [None, *map(pytest.approx, means)]
    found = sim.evaluate(dataset.test_x, dataset.test_y)
    assert result.summary["accuracy_local_mean"] == pytest.approx(found.accuracy_local_mean)
    assert result.summary["accuracy_local_min"] == pytest.approx(found.accuracy_local_min)
    assert result.summary["accuracy_average"] == pytest.approx(found.accuracy_average)
    assert result.summary["consensus_distance"] == pytest.approx(found.consensus_distance)


def test_threads_engine_gives_the_same_bits_with_any_number_of_threads():
    assert_same_outcome(run(small(threads=1)), run(small(threads=2)))


def test_another_seed_gives_another_model_partition_and_result():
    trainings = [Training(small(seed=seed)) for seed in (0, 1)]
    digests = {training.partition.digest() for training in trainings}
    results = [training.run() for training in trainings]
    assert len(digests) == 2
    assert not torch.equal(results[0].simulator.opt.x, results[1].simulator.opt.x)


def test_a_run_leaves_the_callers_random_numbers_and_threads_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before = torch.get_num_threads()
    run(small(threads=2 if before == 1 else 1))
    assert torch.get_num_threads() == before
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("partition", ["dirichlet", "iid", "sorted"])
def test_validation_samples_go_to_no_worker(partition):
    config = small(validation=0.25, seed=7, partition=partition)
    with Training(config) as training:
        held_out = set(training.validation_indices.tolist())
        given = [set(part.tolist()) for part in training.partition.indices]
        assert len(held_out) == 50
        assert [len(part) for part in given] == [37] * 4  # of the 150 samples that are left
        assert not held_out.intersection(*given)
        assert set().union(*given) <= set(range(200)) - held_out
        expected = {
            "dirichlet": lambda labels: data.dirichlet_partition(labels, 4, 0.1, 7),
            "iid": lambda labels: data.iid_partition(labels, 4, 7),
            "sorted": lambda labels: data.sorted_partition(labels, 4),
        }
        kept = sorted(set(range(200)) - held_out)
        labels = training.dataset.train_y[kept].numpy()
        assert training.partition.digest() == expected[partition](labels).within(kept).digest()
        result = training.run()
        x, y = training.dataset.train_x[sorted(held_out)], training.dataset.train_y[sorted(held_out)]
        found = result.simulator.evaluate(x, y)
    last = result.metrics[-1]
    assert last["validation_accuracy_local_mean"] == found.accuracy_local_mean
    assert last["validation_accuracy_local_min"] == found.accuracy_local_min
    assert last["validation_accuracy_average"] == found.accuracy_average
    assert last["validation_loss_local_mean"] == found.loss_local_mean
    assert result.summary["validation_accuracy_local_mean"] == found.accuracy_local_mean
    assert last["accuracy_local_mean"] != last["validation_accuracy_local_mean"]


def test_a_run_with_validation_set_resumes_to_the_same_bits(tmp_path):
    config = small(validation=0.2)
    train_until(config, tmp_path / "run", 5)
    assert_same_outcome(resume(tmp_path / "run"), run(config))
    assert (tmp_path / "run" / "learning_curves.png").stat().st_size > 0


def test_too_small_a_validation_set_is_named():
    with pytest.raises(ValueError, match=r"fraction=0.001 of 200 samples are 0; both parts need at least one"):
        Training(small(validation=0.001))


@pytest.mark.parametrize("partition", ["iid", "sorted"])
def test_other_partitions(partition):
    with Training(small(partition=partition)) as training:
        assert training.partition.method == partition
        assert training.run().finished


def test_clipping_and_dtype_reach_the_simulator():
    result = run(small(clip=1e-3, dtype="float64"))
    assert result.simulator.clip_grad_norm == 1e-3
    assert result.simulator.opt.x.dtype == torch.float64
    assert float(result.simulator.g.norm(dim=1).max()) <= 1e-3 * (1 + 1e-9)


def test_a_diverging_run_raises_or_skips():
    with pytest.raises(NonFiniteGradientError, match="is not finite in step"):
        run(small(lr=1e30))
    skipped = run(small(lr=1e30, on_nonfinite="skip"))
    assert skipped.summary["skipped_steps"] > 0
    assert torch.isfinite(skipped.simulator.opt.x).all()


@pytest.mark.parametrize("name", algorithms.names())
def test_every_algorithm_runs_and_resumes_to_the_same_bits(name, tmp_path):
    config = small(algorithm=name, topology="chain", steps=7)  # a chain is what every family accepts
    train_until(config, tmp_path / "run", 3)
    assert_same_outcome(resume(tmp_path / "run"), run(config))


@pytest.mark.parametrize("engine", ["loop", "vmap", "auto"])
def test_every_engine_resumes_to_the_same_bits(engine, tmp_path):
    config = small(engine=engine)
    stopped = train_until(config, tmp_path / "run", 5)
    chosen = stopped.simulator.engine
    resumed = resume(tmp_path / "run")
    assert resumed.simulator.engine == chosen != "auto"
    assert_same_outcome(resumed, run(small(engine=chosen)))


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_stopped_run_resumes_to_the_same_bits_wherever_it_was_stopped(model, tmp_path):
    config = small(model=model, schedule="cosine", warmup_epochs=1)
    whole = run(config)
    for steps in ([0], [1, 2], [6], [5, 7, 11], [12]):
        out = tmp_path / "-".join(map(str, steps))
        for step in steps:
            stopped = train_until(config, out, step)
            assert stopped.finished == (step == 12)
        assert_same_outcome(resume(out), whole)


def test_models_that_draw_random_numbers_resume_to_the_same_bits(tmp_path, monkeypatch):
    def with_dropout(input_shape, num_classes):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, num_classes))

    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    models.register("dropout", with_dropout, draws=True)
    config = small(model="dropout")
    assert config.engine == "loop"
    train_until(config, tmp_path / "run", 5)
    torch.rand(7)
    assert_same_outcome(resume(tmp_path / "run"), run(config))


def test_files_of_a_run(tmp_path):
    out = tmp_path / "new" / "run"
    result = run(small(), out)
    names = sorted(entry.name for entry in out.iterdir())
    assert names == [
        ".lock",
        "checkpoint.pt",
        "config.json",
        "learning_curves.png",
        "metrics.jsonl",
        "partition.npz",
        "summary.json",
    ]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.metrics
    assert [line["step"] for line in lines] == [0, 6, 12]
    assert set(lines[0]) == {
        "step",
        "epoch",
        "loss",
        "accuracy_local_mean",
        "accuracy_local_min",
        "accuracy_local_max",
        "accuracy_average",
        "consensus_distance",
        "lr",
        "bytes_sent",
        "seconds",
        "seconds_training",
    }
    summary = json.loads((out / "summary.json").read_text())
    assert summary.items() >= result.summary.items()
    assert summary["accuracy_local_min"] <= summary["accuracy_local_mean"] <= summary["accuracy_local_max"]
    assert summary["worker_steps_per_second"] > 0
    assert 0 < summary["share_gradient"] + summary["share_optimizer"] + summary["share_evaluation"] <= 1
    assert configs.loads(out / "config.json")[0] == result.config
    assert data.Partition.load(out / "partition.npz").num_workers == 4
    assert (out / "learning_curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    for name, stacked in checkpoint["simulator"]["parameters"].items():
        for worker, model in enumerate(result.simulator.models):
            assert torch.equal(stacked[worker], model.get_parameter(name))


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(tmp_path):
    first = run(small(), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "summary.json").unlink()
    assert_same_outcome(resume(tmp_path), first)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert without_times(json.loads((tmp_path / "summary.json").read_text())).items() >= (
        without_times(first.summary).items()
    )


def test_a_run_that_can_not_start_leaves_a_folder_that_another_can_use(tmp_path):
    for wrong in ({"batch": 51}, {"num_train": 10_000}, {"workers": 150}):
        with pytest.raises(ValueError, match=r"batch_size=51|num_train=10000|too few samples"):
            run(small(**wrong), tmp_path)
    assert run(small(), tmp_path).finished


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with Training(small(), tmp_path), pytest.raises(ValueError, match="in use by another run"):
        Training.resume(tmp_path)
    with pytest.raises(ValueError, match="not empty"):
        Training(small(), tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full_after_a_while(handle):
        calls.append(handle)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch, Training(small(), tmp_path, checkpoint_seconds=0) as training:
        patch.setattr(os, "fsync", full_after_a_while)
        with pytest.raises(OSError, match="No space"):
            training.run()
        assert 1 < training.step < 12
    assert not list(tmp_path.glob(".*.tmp"))
    assert 1 <= torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] <= training.step
    assert_same_outcome(resume(tmp_path), run(small()))


def test_resume_names_what_contradicts_the_run(tmp_path):
    train_until(small(), tmp_path, 3)
    given = {"seed": 1, "lr": 0.1, "topology": "ring", "hyper": {"momentum": 0.5, "qg_momentum": 0.9}}
    with pytest.raises(ValueError, match=r"with other options: seed is 0 in the run, 1 was given; momentum is 0.9 in"):
        Training.resume(tmp_path, given=given)


def test_resume_notices_files_that_do_not_belong_together(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        train_until(small(seed=seed), tmp_path / name, 3)
    for file, message in (
        (runfolder.CHECKPOINT, r"checkpoint\.pt belongs to another run"),
        (runfolder.PARTITION, r"partition\.npz is not the partition"),
    ):
        shutil.copytree(tmp_path / "a", tmp_path / file)
        shutil.copy(tmp_path / "b" / file, tmp_path / file / file)
        with pytest.raises(ValueError, match=message):
            Training.resume(tmp_path / file)


def test_resume_notices_other_data(tmp_path, monkeypatch):
    train_until(small(), tmp_path, 3)
    load = data.load

    def other(*arguments, **options):
        dataset = load(*arguments, **options)
        dataset.train_x[0, 0, 0, 0] += 1
        return dataset

    monkeypatch.setattr(data, "load", other)
    with pytest.raises(ValueError, match="data set digits is not the one"):
        Training.resume(tmp_path)


@pytest.mark.parametrize("file", [runfolder.CHECKPOINT, runfolder.PARTITION, runfolder.CONFIG])
def test_resume_names_a_damaged_file(tmp_path, file):
    train_until(small(), tmp_path, 3)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=file):
        Training.resume(tmp_path)
    (tmp_path / file).write_bytes(content)
    Training.resume(tmp_path).close()  # and the failed attempt has given up the folder


def test_resume_names_a_checkpoint_of_another_version(tmp_path):
    train_until(small(), tmp_path, 3)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save({**checkpoint, "format": "qgm_ext.checkpoint/9"}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of version 'qgm_ext.checkpoint/9'"):
        Training.resume(tmp_path)


def test_resume_says_when_torch_is_another(tmp_path):
    train_until(small(), tmp_path, 3)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    with Training.resume(tmp_path) as training:
        assert len(training.notes) == 1
        assert "torch 1.0" in training.notes[0]


def test_tensorboard_events_hold_each_point_once(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = small(eval_every=1)
    with Training(config, tmp_path, tensorboard=True) as training:
        training.run(should_stop=lambda: training.step >= 7)
    result = resume(tmp_path)
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(event.step, event.value) for event in events.Scalars("accuracy/local_mean")]
    assert points == [(record["step"], pytest.approx(record["accuracy_local_mean"])) for record in result.metrics]
    assert len(events.Scalars("loss/training")) == len(points) - 1  # no loss before the first step


def test_tensorboard_needs_a_folder():
    with pytest.raises(ValueError, match="tensorboard needs an out folder"):
        Training(small(), tensorboard=True)


# kill -9 --------------------------------------------------------------------------------------------------------------
# A real process each time, forked from a server that has done the imports, or each would take seconds to start.


def _command_line(arguments, kill=None):
    """In the child: run qgm, and die by SIGKILL before or after a file is put in its place for the nth time."""
    from qgm_ext.cli import main

    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    if kill is not None:
        file, nth, when = kill
        replace, count = os.replace, 0

        def replace_or_die(source, target):
            nonlocal count
            count += Path(target).name == file
            dies = Path(target).name == file and count == nth
            if dies and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace_or_die
    sys.argv = ["qgm", *arguments]
    main()


@pytest.fixture(scope="module")
def start_qgm():
    """Starts ``qgm train`` with these arguments in a process of its own, and returns the process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qgm_ext.cli", "sklearn.datasets", "matplotlib.figure"])

    def start(*arguments, kill=None):
        process = context.Process(target=_command_line, args=(["train", *map(str, arguments)], kill))
        process.start()
        return process

    return start


ARGUMENTS = ("--workers", 4, "--num-train", 200, "--batch", 8, "--threads", 1, "--eval-every", 1)


def files_of(out):
    """What must be equal in two runs: every file's content without times."""
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "names": sorted(entry.name for entry in out.iterdir()),
        "config": (out / "config.json").read_text(),
        "partition": data.Partition.load(out / "partition.npz").digest(),
        "metrics": [without_times(line) for line in lines],
        "summary": without_times(json.loads((out / "summary.json").read_text())),
        "curves": (out / "learning_curves.png").read_bytes(),
    }, checkpoint["simulator"]


def assert_same_files(a, b):
    (left, state), (right, other) = files_of(a), files_of(b)
    assert left == right
    assert state["optimizer"]["num_steps"] == other["optimizer"]["num_steps"]
    for tensors, others in (
        (state["parameters"], other["parameters"]),
        (state["optimizer"]["state"], other["optimizer"]["state"]),
    ):
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[name]), name


KILLS = [
    *(("config.json", 1, when) for when in ("before", "after")),
    *(("partition.npz", 1, when) for when in ("before", "after")),
    *(("metrics.jsonl", 1, when) for when in ("before", "after")),
    *(("checkpoint.pt", nth, when) for nth in (1, 3) for when in ("before", "after")),
    *(("learning_curves.png", 1, when) for when in ("before", "after")),
    *(("summary.json", 1, when) for when in ("before", "after")),
]


def test_kill_around_every_file_leaves_a_run_that_goes_on_to_the_same_bits(start_qgm, tmp_path):
    arguments = (*ARGUMENTS, "--steps", 20, "--checkpoint-seconds", 0)
    whole = start_qgm(*arguments, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    for kill in KILLS:
        started = (out / "config.json").exists()
        options = ("--resume", out, "--checkpoint-seconds", 0) if started else (*arguments, "--out", out)
        process = start_qgm(*options, kill=kill)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, kill
    last = start_qgm("--resume", out)
    for process in (whole, last):
        process.join(60)
        assert process.exitcode == 0
    assert_same_files(out, tmp_path / "whole")


def test_kill_at_random_moments_leaves_a_run_that_goes_on_to_the_same_bits(start_qgm, tmp_path):
    moments = random.Random(0)
    arguments = (*ARGUMENTS, "--steps", 600, "--checkpoint-seconds", 0.02)
    whole = start_qgm(*arguments, "--out", tmp_path / "whole")
    whole.join(60)
    assert whole.exitcode == 0
    out, kills = tmp_path / "killed", 0
    for _ in range(6):
        started = (out / "config.json").exists()
        options = ("--resume", out, "--checkpoint-seconds", 0.02) if started else (*arguments, "--out", out)
        process = start_qgm(*options)
        limit = time.monotonic() + 60
        while process.is_alive() and not (out / "config.json").exists() and time.monotonic() < limit:
            time.sleep(0.01)
        process.join(moments.uniform(0.0, 0.6))
        kills += process.is_alive()
        process.kill()
        process.join(60)
    assert kills >= 1  # more on all but very fast machines
    last = start_qgm("--resume", out)
    last.join(60)
    assert last.exitcode == 0
    assert_same_files(out, tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_a_checkpoint(start_qgm, tmp_path, number, code):
    out = tmp_path / "run"
    process = start_qgm(*ARGUMENTS, "--steps", 100_000, "--out", out)
    _wait_for(out / "metrics.jsonl")
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    assert 0 <= torch.load(out / "checkpoint.pt", weights_only=True)["step"] < 100_000
    with Training.resume(out) as training:
        step = training.step
        assert training.run(should_stop=lambda: training.step >= step + 2).metrics


def _wait_for(path, seconds=30.0):
    end = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        if time.monotonic() > end:
            raise TimeoutError(path)
        time.sleep(0.01)
