"""Training runs: they learn, they are the same twice, and their files hold what happened."""

from __future__ import annotations

import json

import pytest
import torch

from qgm_ext import data, models, topology
from qgm_ext.experiments import TrainConfig, Training, resume, run
from qgm_ext.experiments import config as configs
from qgm_ext.simulator import Simulator
from qgm_ext.stacked import NonFiniteGradientError
from train_runs import assert_same_outcome, small


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
