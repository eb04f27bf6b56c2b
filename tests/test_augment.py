"""Augmentations: what they do to an image, and that they are functions of (seed, step, worker, position)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from qgm_ext import data
from qgm_ext.data import Dataset, ImageFiles, Partition, WorkerBatches, augment
from qgm_ext.data.augment import CropFlip, Erasing
from qgm_ext.data.image_files import CROP_DRAWS, _random_box


def images(count: int, channels: int = 2, height: int = 6, width: int = 5) -> torch.Tensor:
    return torch.arange(1.0, 1 + count * channels * height * width).reshape(count, channels, height, width)


def test_crop_flip_shifts_into_black_and_flips() -> None:
    x = images(3)
    black = (-1.0, -2.0)
    change = CropFlip(black, padding=1)
    rows = torch.tensor([2, 0, 1, 1])
    # Offsets 0, 1, 2 of the padded image from uniforms in thirds; the last number below one half flips.
    uniforms = np.array([[0.5, 0.5, 0.9], [0.0, 0.99, 0.9], [0.99, 0.0, 0.9], [0.5, 0.5, 0.1]])
    found = change(x, rows, uniforms)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), value=float("nan"))
    for channel, value in enumerate(black):
        padded[:, channel] = padded[:, channel].nan_to_num(nan=value)
    assert torch.equal(found[0], x[2])
    assert torch.equal(found[1], padded[0, :, 0:6, 2:7])
    assert torch.equal(found[2], padded[1, :, 2:8, 0:5])
    assert torch.equal(found[3], x[1].flip(-1))
    assert found.is_contiguous()


def test_erasing_sets_one_rectangle_of_half_of_the_images_to_zero() -> None:
    x = torch.ones(400, 3, 32, 32)
    uniforms = np.random.RandomState(0).random_sample((400, 5))
    found = Erasing()(x, torch.arange(400), uniforms)
    erased = (found == 0).all(1)
    assert torch.equal(erased, (found == 0).any(1))
    areas = erased.sum((1, 2))
    assert torch.equal(areas > 0, torch.from_numpy(uniforms[:, 0] < 0.5))
    assert 0.015 < areas[areas > 0].min() / 1024 < 0.05
    assert 0.25 < areas.max() / 1024 < 0.36
    for mask in erased[areas > 0]:
        down, across = mask.any(1), mask.any(0)
        assert torch.equal(mask, down[:, None] & across[None, :])


def test_random_parts_are_of_the_right_size_and_inside() -> None:
    uniforms = np.random.RandomState(1).random_sample((500, CROP_DRAWS))
    for own in uniforms:
        left, top, right, bottom = _random_box(200, 150, own)
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 150
        assert 0.07 < (right - left) * (bottom - top) / 30000 <= 1
        assert 0.7 < (right - left) / (bottom - top) < 1.4
    # Nothing of the wanted area fits into a narrow strip: the largest part with the nearest ratio, in the middle.
    assert _random_box(100, 10, np.full(CROP_DRAWS, 0.9)) == (43, 0, 56, 10)


def write_files(tmp_path, count: int = 4) -> ImageFiles:
    random = np.random.RandomState(0)
    paths = []
    for i in range(count):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(random.randint(0, 256, size=(40 + i, 50, 3)).astype(np.uint8)).save(paths[-1])
    return ImageFiles(paths, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), size=16)


def test_random_crops_of_files_are_pillows(tmp_path) -> None:
    files = write_files(tmp_path)
    uniforms = np.random.RandomState(2).random_sample((2, CROP_DRAWS))
    uniforms[:, -1] = 0.9, 0.1
    found = files.random_crops(torch.tensor([3, 1]), uniforms)
    for image, path, own in zip(found, (files.paths[3], files.paths[1]), uniforms, strict=True):
        part = Image.open(path).crop(_random_box(*Image.open(path).size, own)).resize((16, 16), Image.BILINEAR)
        expected = (torch.from_numpy(np.asarray(part).copy()).permute(2, 0, 1) / 255 - 0.5) / 0.25
        torch.testing.assert_close(image, expected if own[-1] >= 0.5 else expected.flip(-1), rtol=1e-5, atol=1e-5)


def batches(change: augment.Augmentation | None, seed: int = 3) -> WorkerBatches:
    split = Partition([np.arange(0, 8), np.arange(8, 16), np.arange(16, 24)])
    return WorkerBatches(images(24, 3, 8, 8), torch.arange(24), split, 4, seed, change)


def test_batches_are_changed_as_a_function_of_seed_step_and_worker() -> None:
    change = CropFlip((0.0, 0.0, 0.0))
    first = batches(change)
    x, y = first.at(5)
    plain_x, plain_y = batches(None).at(5)
    assert torch.equal(y, plain_y)
    assert not torch.equal(x, plain_x)
    first.at(0)
    assert torch.equal(first.at(5)[0], x)
    assert torch.equal(batches(change).at(5)[0], x)
    workers = np.arange(3, dtype=np.uint64)
    drawn = first._uniforms(5, workers, 3)
    assert not (drawn == batches(change, seed=4)._uniforms(5, workers, 3)).any()
    assert not (drawn == first._uniforms(6, workers, 3)).any()
    for worker in range(3):
        own_x, own_y = first.at(5, worker)
        assert torch.equal(own_x, x[worker])
        assert torch.equal(own_y, y[worker])
    with pytest.raises(ValueError, match=r"worker must be in \[0, 3\), got 3"):
        first.at(5, 3)


def test_random_numbers_are_uniform_and_all_different() -> None:
    made = batches(CropFlip((0.0, 0.0, 0.0)))
    drawn = np.concatenate([made._uniforms(step, np.arange(3, dtype=np.uint64), 8) for step in range(200)])
    assert drawn.shape == (200 * 12, 8)
    assert len(np.unique(drawn)) == drawn.size
    assert 0 <= drawn.min() < 0.001 < 0.999 < drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.01
    assert np.abs(np.corrcoef(drawn.T) - np.eye(8)).max() < 0.1


def test_batches_come_from_files(tmp_path) -> None:
    files = write_files(tmp_path)
    split = Partition([np.array([0, 1]), np.array([2, 3])])
    made = WorkerBatches(files, torch.arange(4), split, 2, 0)
    x, _ = made.at(0)
    assert torch.equal(x, files.index_select(0, made.indices(0).flatten()).view(2, 2, 3, 16, 16))
    changed = WorkerBatches(files, torch.arange(4), split, 2, 0, augment.ResizedCrop())
    assert torch.equal(changed.at(1, 1)[0], changed.at(1)[0][1])


def test_augmentations_that_do_not_fit_the_data_are_refused(tmp_path) -> None:
    digits = data.load("digits")
    assert augment.make("none", digits) is None
    assert isinstance(augment.make("crop_flip", digits), CropFlip)
    files = write_files(tmp_path)
    pictures = Dataset("files", files, torch.arange(4), files, torch.arange(4), 4, black=(-2.0, -2.0, -2.0))
    assert isinstance(augment.make("resized_crop", pictures), augment.ResizedCrop)
    with pytest.raises(ValueError, match="augment must be one of none, crop_flip, erasing, resized_crop, got 'crop'"):
        augment.make("crop", digits)
    with pytest.raises(ValueError, match="'resized_crop' is for images in files .*; digits has images"):
        augment.make("resized_crop", digits)
    with pytest.raises(ValueError, match="'crop_flip' is for images in memory; files has images in files"):
        augment.make("crop_flip", pictures)
    tokens = torch.zeros(4, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="'erasing' is for images in memory; texts has no images"):
        augment.make("erasing", Dataset("texts", tokens, torch.arange(4), tokens, torch.arange(4), 4, vocabulary=3))
