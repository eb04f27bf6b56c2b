"""Presets: each fits its data (small files in the genuine layout) and shows its papers' figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from qgm_ext.cli import app
from qgm_ext.experiments import inputs
from qgm_ext.experiments.comparison_files import preset, preset_names
from test_datasets import AGNEWS, write_cifar, write_images

PAPERS = [name for name in preset_names() if not name.startswith(("paper-small", "text-small"))]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small stand-ins for CIFAR-10, ImageNet and AG News."""
    root = tmp_path_factory.mktemp("data")
    write_cifar(root / "cifar-10-batches-py", per_batch=100)
    write_images(root / "imagenet", {name: [(16, 12)] * 40 for name in "abcdefghij"})
    (root / "agnews").mkdir()
    for name, times in (("train.csv", 100), ("test.csv", 1)):
        (root / "agnews" / name).write_text("\n".join(AGNEWS * times) + "\n", encoding="utf-8")
    return root


def test_all_presets_are_there() -> None:
    assert preset_names() == [
        "momentum-tracking",
        "momentum-tracking-lenet",
        "paper-agnews",
        "paper-imagenet",
        "paper-small",
        "paper-small-cnn",
        "paper-small-cnn-social-long",
        "paper-small-social",
        "paper-small-social-long",
        "paper-table1",
        "paper-vgg",
        "relaysum-table2",
        "text-small",
    ]


@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_preset_fits_its_data(name: str, files: Path) -> None:
    for needed, package in (("imagenet", "torchvision"), ("agnews", "transformers")):
        if needed in name:
            pytest.importorskip(package, reason=f"{package} is not installed")
    plan = preset(name, train={"data_root": str(files), "device": "cpu"})
    dataset = None
    for cell in plan.cells():
        config = plan.config(cell, cell.method.lrs[0], plan.seeds[0])
        if dataset is None:
            dataset = inputs.load_data(config)
            with torch.device("meta"):
                model = inputs.make_model(config, dataset)
                if dataset.vocabulary is None:  # transformers looks at the numbers, which a meta tensor lacks
                    assert model(torch.zeros(2, *dataset.input_shape)).shape == (2, dataset.num_classes)
        if cell.method is plan.methods[0] and (cell.alpha is None or cell.alpha >= 1):  # small data, few tries
            split = inputs.make_partition(config, dataset, np.arange(len(dataset.train_y)))
            assert split.num_workers == cell.workers
        assert 0 < config.peak_lr <= 2


@pytest.mark.parametrize("name", PAPERS)
def test_a_dry_run_shows_published_figures_before_it_needs_the_data(name: str, tmp_path: Path) -> None:
    words = ["compare", "--preset", name, "--dry-run", "--data-root", str(tmp_path), "--device", "cpu"]
    result = CliRunner(env={"COLUMNS": "600", "NO_COLOR": "1"}).invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    output = result.output
    assert "not found. Looked in:" in output
    figures = preset(name).published
    assert figures
    shown = " ".join(output.split())
    for figure in figures:
        assert f"published: {figure.value:g}" in shown, figure
        assert figure.source in shown
    assert ("not verified" in shown) == any(not f.verified or "not verified" in f.note + f.source for f in figures)
    assert not (tmp_path / "out").exists()


def test_relaysums_table_is_of_the_worst_worker() -> None:
    metrics = {name: preset(name).metric for name in preset_names()}
    assert metrics.pop("relaysum-table2") == "worst"
    assert set(metrics.values()) == {"mean"}


def test_the_papers_protocol_is_in_table_1() -> None:
    plan = preset("paper-table1")
    peaks = {}
    for cell in plan.cells():
        config = plan.config(cell, cell.method.lrs[0], plan.seeds[0])
        peaks[cell.workers] = config.peak_lr
        assert (config.batch, config.epochs, config.schedule, config.milestones) == (32, 300, "step", (0.5, 0.75))
        assert (config.warmup_epochs, config.warmup_from, config.augment, config.validation) == (5, 0.1, "crop_flip", 0)
        assert config.hyper["weight_decay"] == 1e-4
    assert peaks == pytest.approx({16: 0.8, 32: 1.6})
    assert {figure.value for figure in plan.published} == {89.9, 88.88, 74.55, 89.95, 88.41}
