"""The papers' training protocols: step sizes, augmentation, splits, texts and image files in whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qgm_ext.experiments import TrainConfig, Training, resume, run
from qgm_ext.experiments.schedules import Schedule
from test_datasets import AGNEWS, write_cifar, write_images
from test_models import write_pretrained

SMALL = {"workers": 2, "topology": "complete", "batch": 4, "steps": 4, "threads": 1}


@pytest.mark.parametrize(("workers", "peak"), [(16, 0.8), (32, 1.6)])
def test_the_step_size_of_the_cifar_runs_is_scaled_and_warmed_up_from_its_base(workers: int, peak: float) -> None:
    config = TrainConfig(workers=workers, batch=32, lr=0.1, base_batch=64, schedule="step", warmup_epochs=5, epochs=300)
    assert config.peak_lr == pytest.approx(peak)
    assert config.warmup_from == 0.1
    per_epoch = 97
    schedule = Schedule(
        name="step",
        lr=config.peak_lr,
        num_steps=config.num_steps(per_epoch),
        warmup_steps=5 * per_epoch,
        warmup_from=config.warmup_from,
        milestones=config.milestones,
    )
    # Linear in the fractional epoch, from lr to the peak; by 10 at one half and three quarters.
    for step in (0, 1, 100, 5 * per_epoch - 1):
        assert schedule.at(step) == pytest.approx(0.1 + (peak - 0.1) * (step / per_epoch) / 5)
    assert schedule.at(5 * per_epoch) == schedule.at(150 * per_epoch - 1) == pytest.approx(peak)
    assert schedule.at(150 * per_epoch) == schedule.at(225 * per_epoch - 1) == pytest.approx(peak / 10)
    assert schedule.at(225 * per_epoch) == schedule.at(300 * per_epoch - 1) == pytest.approx(peak / 100)


def test_a_run_uses_the_scaled_step_size() -> None:
    config = TrainConfig(**{**SMALL, "steps": 8}, lr=0.01, base_batch=4, num_train=32, eval_every=1, warmup_epochs=1)
    result = run(config)
    assert config.peak_lr == pytest.approx(0.02)
    assert [record["lr"] for record in result.metrics] == pytest.approx([0.01, 0.01 + 0.01 * 3 / 4, 0.02])


def test_without_base_batch_the_step_size_is_the_peak() -> None:
    config = TrainConfig(lr=0.3)
    assert (config.peak_lr, config.warmup_from) == (0.3, pytest.approx(0.03))
    assert TrainConfig(lr=0.1, workers=1, batch=8, base_batch=64).warmup_from == pytest.approx(0.0125)


def test_milestones_of_the_relaysum_runs() -> None:
    schedule = Schedule(name="step", lr=1.0, num_steps=200, milestones=(0.75, 0.9))
    assert [schedule.at(step) for step in (149, 150, 179, 180)] == [1.0, 0.1, 0.1, 0.01]


@pytest.mark.parametrize(
    ("milestones", "error", "message"),
    [
        ((0.5, 0.5), ValueError, "milestones must be ascending shares of the run in"),
        ((0.75, 0.5), ValueError, "milestones must be ascending"),
        ((0.0, 0.5), ValueError, "milestones must be ascending"),
        ((0.5, 1.5), ValueError, "milestones must be"),
        ("0.5", TypeError, "milestones must be a list of numbers, got '0.5'"),
        (0.5, TypeError, "milestones must be a list of numbers, got 0.5"),
    ],
)
def test_wrong_milestones_are_refused(milestones: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(milestones=milestones)


def test_augmented_runs_resume_to_the_same_bits_and_differ_from_plain_ones(tmp_path: Path) -> None:
    write_cifar(tmp_path / "data")
    words = {**SMALL, "data": "cifar10", "data_root": str(tmp_path / "data"), "partition": "iid"}
    config = TrainConfig(**words, augment="crop_flip")
    whole = run(config)
    with Training(config, tmp_path / "run", checkpoint_seconds=0) as training:
        training.run(should_stop=lambda: training.step == 2)
    again = resume(tmp_path / "run")
    assert again.finished
    assert torch.equal(again.simulator.opt.x, whole.simulator.opt.x)
    plain = run(TrainConfig(**words))
    assert not torch.equal(plain.simulator.opt.x, whole.simulator.opt.x)


def test_augmentation_does_not_depend_on_the_engine(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    seen = []
    for engine in ("loop", "vmap"):
        config = TrainConfig(
            **SMALL, data="cifar10", data_root=str(tmp_path), partition="iid", augment="erasing", engine=engine
        )
        with Training(config) as training:
            seen.append(training._inputs.batches.at(3)[0])
    assert torch.equal(*seen)


def test_a_run_on_image_files_with_a_validation_set(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": [(40, 30)] * 8, "b": [(30, 50)] * 8})
    config = TrainConfig(
        **SMALL, data="imagenet", data_root=str(tmp_path), model="cnn", partition="iid", validation=0.25,
        augment="resized_crop",
    )  # fmt: skip
    result = run(config, tmp_path / "run")
    assert result.finished
    assert {"validation_accuracy_local_mean", "accuracy_local_mean"} <= result.metrics[-1].keys()


def write_agnews(folder: Path) -> None:
    folder.mkdir()
    for name, times in (("train.csv", 8), ("test.csv", 2)):
        (folder / name).write_text("\n".join(AGNEWS * times) + "\n", encoding="utf-8")


def test_a_run_on_texts(tmp_path: Path) -> None:
    write_agnews(tmp_path / "agnews")
    words = {**SMALL, "data": "agnews", "data_root": str(tmp_path), "partition": "iid", "steps": 40}
    result = run(TrainConfig(**words, model="text_mlp", algorithm="qg_dadam", lr=0.01))
    assert result.metrics[-1]["accuracy_local_mean"] == 1.0
    with pytest.raises(ValueError, match="mlp is no model for agnews; there are distilbert, distilbert_small"):
        run(TrainConfig(**words))
    with pytest.raises(ValueError, match="text_mlp is no model for digits; there are cnn, lenet, mlp"):
        run(TrainConfig(**SMALL, model="text_mlp"))


def test_a_run_from_a_pretrained_model_and_its_tokenizer(tmp_path: Path) -> None:
    write_agnews(tmp_path / "agnews")
    write_pretrained(tmp_path / "model", length=128)
    config = TrainConfig(
        **SMALL, data="agnews", data_root=str(tmp_path), partition="iid", model="distilbert", algorithm="qg_dadam",
        pretrained=str(tmp_path / "model"), lr=1e-5,
    )  # fmt: skip
    assert config.engine == "loop"
    result = run(config)
    assert result.finished
    moved = result.simulator.models[0].model.distilbert.embeddings.word_embeddings.weight
    assert moved.shape == (9, 16)
    with pytest.raises(ValueError, match="pretrained is for distilbert; mlp starts"):
        run(TrainConfig(**SMALL, model="mlp", pretrained=str(tmp_path / "model")))


def test_workers_with_few_classes_each() -> None:
    config = TrainConfig(**{**SMALL, "workers": 8}, partition="classes", classes_per_worker=2)
    with Training(config) as training:
        labels = training.dataset.train_y
        assert all(len(labels[part].unique()) == 2 for part in training.partition.indices)
