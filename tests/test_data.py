"""Tests of qgm_ext.data: idx files written here in the genuine layout (and damaged), digits, batches."""

from __future__ import annotations

import gzip
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qgm_ext import data
from qgm_ext.data import Dataset, Partition, WorkerBatches, dirichlet_partition
from qgm_ext.data.batches import _permutations

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx_bytes(values: np.ndarray) -> bytes:
    """One idx file of bytes, as described on MNIST's page: 0, 0, type 8, dimensions, sizes (big-endian), values."""
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def raw_images(num_samples: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, size=(num_samples, 28, 28)).astype(np.uint8)


def write_idx_folder(folder: Path, compress: bool = False, rename: Callable[[str], str] = str) -> dict[str, np.ndarray]:
    """Write 30 training and 12 test images; return what is in each file."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        FILES[0]: raw_images(30, 0),
        FILES[1]: np.arange(30) % 10,
        FILES[2]: raw_images(12, 1),
        FILES[3]: np.arange(12) % 10,
    }
    for name, values in content.items():
        raw = idx_bytes(values)
        path = folder / (rename(name) + (".gz" if compress else ""))
        path.write_bytes(gzip.compress(raw) if compress else raw)
    return content


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", ""),
        ("mnist", "raw"),
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", ""),
        ("fashion-mnist", "raw"),
        ("fashion-mnist", "FashionMNIST/raw"),
    ],
)
def test_idx_files_are_read_from_the_usual_places(tmp_path: Path, name: str, folder: str, compress: bool) -> None:
    content = write_idx_folder(tmp_path / folder, compress)
    loaded = data.load(name, root=tmp_path)
    assert isinstance(loaded, Dataset)
    assert (loaded.name, loaded.num_classes, loaded.input_shape) == (name, 10, (1, 28, 28))
    mean, std = (0.1307, 0.3081) if name == "mnist" else (0.2860, 0.3530)
    for x, y, images, labels in (
        (loaded.train_x, loaded.train_y, content[FILES[0]], content[FILES[1]]),
        (loaded.test_x, loaded.test_y, content[FILES[2]], content[FILES[3]]),
    ):
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert x.is_contiguous()
        assert y.tolist() == labels.tolist()
        expected = ((images / 255 - mean) / std).astype(np.float32)[:, None]
        assert torch.equal(x, torch.from_numpy(expected))


def test_idx_files_with_a_dot_in_the_name_are_read(tmp_path: Path) -> None:
    write_idx_folder(tmp_path, rename=lambda name: name.replace("-idx", ".idx"))
    assert len(data.load("mnist", tmp_path).train_x) == 30


def test_gzip_is_recognised_by_content_not_by_name(tmp_path: Path) -> None:
    write_idx_folder(tmp_path)
    for name in FILES:
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert len(data.load("mnist", str(tmp_path)).test_x) == 12


def test_fashion_mnist_prefers_its_own_folder_to_mnist_files_beside_it(tmp_path: Path) -> None:
    write_idx_folder(tmp_path)
    other = write_idx_folder(tmp_path / "FashionMNIST" / "raw")
    other_images = other[FILES[0]][::-1].copy()
    (tmp_path / "FashionMNIST" / "raw" / FILES[0]).write_bytes(idx_bytes(other_images))
    fashion = data.load("fashion-mnist", tmp_path)
    mnist = data.load("mnist", tmp_path)
    assert torch.equal(fashion.train_x[0, 0] > 0, torch.from_numpy((other_images[0] / 255 - 0.2860) > 0))
    assert torch.equal(mnist.train_x[0, 0] > 0, torch.from_numpy((other_images[-1] / 255 - 0.1307) > 0))


def test_missing_files_say_what_where_and_how(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        data.load("fashion-mnist", tmp_path)
    message = str(caught.value)
    for part in (
        *FILES,
        "apt-get install dataset-fashion-mnist",
        str(tmp_path / "FashionMNIST/raw"),
        str(tmp_path / "raw"),
    ):
        assert part in message
    write_idx_folder(tmp_path / "raw")
    (tmp_path / "raw" / FILES[3]).unlink()
    with pytest.raises(FileNotFoundError, match="raw has only some of them, it lacks t10k-labels-idx1-ubyte"):
        data.load("mnist", tmp_path)


def truncate(raw: bytes) -> bytes:
    return raw[:-5]


def extend(raw: bytes) -> bytes:
    return raw + b"\0"


DAMAGE: list[tuple[str, Callable[[bytes], bytes], str]] = [
    (FILES[0], truncate, r"train-images-idx3-ubyte: expected 23536 bytes .*, got 23531 bytes"),
    (FILES[0], extend, r"train-images-idx3-ubyte: expected 23536 bytes .*, got 23537 bytes"),
    (FILES[1], truncate, r"train-labels-idx1-ubyte: expected 38 bytes .*, got 33 bytes"),
    (
        FILES[2],
        lambda raw: raw[:9],
        r"t10k-images-idx3-ubyte: expected an idx header of 16 bytes, got a file of 9 bytes",
    ),
    (FILES[3], lambda raw: b"", r"t10k-labels-idx1-ubyte: expected an idx header of 8 bytes, got a file of 0 bytes"),
    (FILES[0], lambda raw: b"\0\0\x08\x01" + raw[4:], r"expected magic number 0x00000803 \(images\), got 0x00000801"),
    (FILES[1], lambda raw: b"\0\0\x0d\x01" + raw[4:], r"expected magic number 0x00000801 \(labels\), got 0x00000d01"),
    (FILES[0], lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], r"expected 79228162458924105385300197391 bytes"),
    (FILES[0], lambda raw: idx_bytes(np.zeros((30, 27, 28))), r"images must be 28x28, got 27x28"),
    (FILES[0], lambda raw: idx_bytes(np.zeros((0, 28, 28))), r"train-images-idx3-ubyte: holds no images"),
    (FILES[3], lambda raw: idx_bytes(np.zeros(11)), r"holds 12 images, .*t10k-labels-idx1-ubyte 11 labels"),
    (FILES[1], lambda raw: idx_bytes(np.full(30, 10)), r"train-labels-idx1-ubyte: labels must be 0 to 9, got 10"),
    (FILES[0], lambda raw: gzip.compress(raw)[:-20], r"train-images-idx3-ubyte: damaged gzip file of \d+ bytes"),
    (FILES[0], lambda raw: gzip.compress(raw)[:40] + b"\xff" * 60, r"train-images-idx3-ubyte: damaged gzip file"),
    (FILES[0], lambda raw: b"\x1f\x8b", r"train-images-idx3-ubyte: damaged gzip file of 2 bytes"),
]


@pytest.mark.parametrize(("file", "change", "message"), DAMAGE, ids=[str(i) for i in range(len(DAMAGE))])
def test_damaged_idx_file_is_named(tmp_path: Path, file: str, change: Callable[[bytes], bytes], message: str) -> None:
    write_idx_folder(tmp_path)
    (tmp_path / file).write_bytes(change((tmp_path / file).read_bytes()))
    with pytest.raises(ValueError, match=message):
        data.load("mnist", tmp_path)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_fashion_mnist_of_debian() -> None:
    loaded = data.load("fashion-mnist", DEBIAN, num_train=16_000)
    assert loaded.train_x.shape == (16_000, 1, 28, 28)
    assert loaded.test_x.shape == (10_000, 1, 28, 28)
    assert torch.bincount(loaded.test_y).tolist() == [1000] * 10
    assert abs(loaded.train_x.mean().item()) < 0.01
    assert abs(loaded.train_x.std().item() - 1) < 0.01


def test_digits_shapes_ranges_and_split() -> None:
    digits = data.load("digits")
    assert digits.train_x.shape == (1438, 1, 8, 8)
    assert digits.test_x.shape == (359, 1, 8, 8)
    assert digits.train_y.shape == (1438,)
    assert digits.test_y.shape == (359,)
    assert (digits.name, digits.num_classes, digits.input_shape) == ("digits", 10, (1, 8, 8))
    assert digits.train_x.dtype == torch.float32
    assert digits.train_y.dtype == torch.int64
    train, test = torch.bincount(digits.train_y), torch.bincount(digits.test_y)
    assert len(train) == len(test) == 10
    assert ((test / (train + test) - 0.2).abs() < 0.005).all()
    assert abs(digits.train_x.mean().item()) < 1e-3
    assert abs(digits.train_x.std().item() - 1) < 1e-3
    assert abs(digits.test_x.mean().item()) < 0.02
    # 17 grey values and nothing else; together the two parts are scikit-learn's images, none lost and none twice.
    assert len(torch.unique(digits.train_x)) == 17
    pixels = torch.cat([digits.train_x, digits.test_x]).mul(0.3758).add(0.3052).mul(16).round().reshape(-1, 64)
    from sklearn.datasets import load_digits

    assert sorted(map(tuple, pixels.int().tolist())) == sorted(map(tuple, load_digits().data.astype(int).tolist()))


def test_digits_are_the_same_every_time() -> None:
    first, second = data.load("digits"), data.load("digits")
    for name in ("train_x", "train_y", "test_x", "test_y"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.test_y[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 3]


def test_digits_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'qgm_ext\[train\]'"):
        data.load("digits")


def test_num_train_takes_the_first_of_a_seeded_shuffle() -> None:
    whole = data.load("digits")
    part = data.load("digits", num_train=100, seed=3)
    chosen = np.random.RandomState(3).permutation(1438)[:100]
    assert torch.equal(part.train_x, whole.train_x[chosen])
    assert torch.equal(part.train_y, whole.train_y[chosen])
    assert torch.equal(part.test_x, whole.test_x)
    longer = data.load("digits", num_train=200, seed=3)
    assert torch.equal(longer.train_x[:100], part.train_x)
    assert not torch.equal(data.load("digits", num_train=100, seed=4).train_y, part.train_y)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("fashion_mnist", {}, ValueError, "unknown data set 'fashion_mnist'; did you mean 'fashion-mnist'"),
        ("digit", {}, ValueError, "did you mean 'digits'"),
        ("xyz", {}, ValueError, "unknown data set 'xyz'. Known: agnews, cifar10, digits, "),
        ("digits", {"num_train": 0}, ValueError, "num_train must be >= 1, got 0"),
        ("digits", {"num_train": 1439}, ValueError, "num_train=1439 is more than the 1438 training samples of digits"),
        ("digits", {"num_train": 5.0}, TypeError, "num_train must be an integer, got float"),
        ("digits", {"num_train": 5, "seed": -1}, ValueError, "seed must be in"),
    ],
)
def test_load_rejects_bad_arguments(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        data.load(name, **options)


def make_batches(
    num_samples: int = 230, num_workers: int = 4, batch_size: int = 8, seed: int = 0
) -> tuple[WorkerBatches, Partition, torch.Tensor, torch.Tensor]:
    x = torch.arange(num_samples * 2, dtype=torch.float32).reshape(num_samples, 1, 2)
    y = torch.arange(num_samples) % 10
    part = dirichlet_partition(y, num_workers, 1.0, 0)
    return WorkerBatches(x, y, part, batch_size, seed), part, x, y


def test_batches_are_the_samples_of_each_worker() -> None:
    batches, part, x, y = make_batches()
    assert batches.steps_per_epoch == 57 // 8 == 7
    for step in (0, 3, 6, 7, 100, 12345):
        batch_x, batch_y = batches.at(step)
        assert batch_x.shape == (4, 8, 1, 2)
        assert batch_y.shape == (4, 8)
        assert batch_x.dtype == torch.float32
        assert batch_y.dtype == torch.int64
        chosen = batches.indices(step)
        for worker in range(4):
            assert set(chosen[worker].tolist()) <= set(part.indices[worker].tolist())
        assert torch.equal(batch_x, x[chosen])
        assert torch.equal(batch_y, y[chosen])
        assert batches.epoch(step) == step // 7


def test_an_epoch_takes_each_sample_at_most_once_and_the_next_is_shuffled_anew() -> None:
    batches, part, _, _ = make_batches()
    epochs = [torch.cat([batches.indices(e * 7 + s) for s in range(7)], dim=1) for e in range(30)]
    for worker in range(4):
        for epoch in epochs:
            assert len(set(epoch[worker].tolist())) == 56
        assert len({tuple(epoch[worker].tolist()) for epoch in epochs}) == len(epochs)
        # The one sample that is left out changes; every sample is used in the long run.
        assert set(torch.cat([e[worker] for e in epochs]).tolist()) == set(part.indices[worker].tolist())


def test_a_batch_depends_on_seed_and_step_only() -> None:
    forward, *_ = make_batches()
    wanted = {step: forward.indices(step) for step in range(200)}
    backward, *_ = make_batches()
    for step in (199, 5, 64, 63, 65, 0, 198, 5):
        assert torch.equal(backward.indices(step), wanted[step])
    other, *_ = make_batches(seed=1)
    assert not torch.equal(other.indices(0), wanted[0])


def test_a_workers_batches_do_not_depend_on_the_other_workers() -> None:
    batches, part, x, y = make_batches()
    fewer = WorkerBatches(x, y, Partition(part.indices[:2]), 8, 0)
    for step in (0, 9, 500):
        assert torch.equal(fewer.indices(step), batches.indices(step)[:2])


def test_batches_golden() -> None:
    # Written down so that a resumed run gets the same samples under every version of numpy and torch.
    batches = WorkerBatches(
        torch.zeros(8, 1), torch.zeros(8, dtype=torch.int64), Partition([[0, 1, 2, 3], [4, 5, 6, 7]]), 3, 42
    )
    assert batches.steps_per_epoch == 1
    assert [batches.indices(step).tolist() for step in range(3)] == [
        [[1, 3, 0], [4, 5, 6]],
        [[0, 3, 2], [5, 4, 6]],
        [[0, 2, 1], [5, 4, 6]],
    ]


def splitmix64(state: int) -> tuple[int, int]:
    """One step of the generator in its published sequential form: (new state, output)."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return state, z ^ (z >> 31)


@pytest.mark.parametrize("size", [0, 1, 2, 17, 1001])
@pytest.mark.parametrize(("seed", "worker", "epoch"), [(0, 0, 0), (2**63 - 1, 1023, 10**9), (6, 3, 2)])
def test_permutation_sorts_the_published_generator(size: int, seed: int, worker: int, epoch: int) -> None:
    assert splitmix64(1234567)[1] == 6457827717110365317  # from the generator's public test vectors
    key = splitmix64(seed)[1]
    key = splitmix64((key ^ worker) - 0x9E3779B97F4A7C15)[1]
    state = splitmix64((key ^ epoch) - 0x9E3779B97F4A7C15)[1]
    keys = []
    for _ in range(size):
        state, output = splitmix64(state)
        keys.append(output)
    got = _permutations(size, seed, np.array([worker], np.uint64), np.array([epoch], np.uint64))
    assert got.tolist() == [[sorted(range(size), key=keys.__getitem__)]]


def test_permutations_are_uniform() -> None:
    # 6,000 permutations of 3: each of the 6 comes up about 1,000 times (standard deviation 29).
    one, many = np.zeros(1, np.uint64), np.arange(6000, dtype=np.uint64)
    for draws in (
        np.concatenate([_permutations(3, seed, one, one)[0] for seed in range(6000)]),
        _permutations(3, 0, many, one)[0],
        _permutations(3, 0, one, many)[:, 0],
    ):
        counts = np.unique(draws, axis=0, return_counts=True)[1]
        assert len(counts) == 6
        assert abs(counts - 1000).max() < 150


def test_unequal_shards_use_the_smallest_and_batches_keep_the_dtype() -> None:
    x, y = torch.randn(10, 3, dtype=torch.float64), torch.zeros(10, dtype=torch.int32)
    batches = WorkerBatches(x, y, Partition([[0, 1, 2], [3, 4, 5, 6, 7, 8, 9]]), 2, 0)
    assert batches.steps_per_epoch == 1
    for step in range(100):
        first, second = batches.indices(step).tolist()
        assert set(first) <= {0, 1, 2}
        assert set(second) <= {3, 4, 5, 6, 7, 8, 9}
    batch_x, batch_y = batches.at(4)
    assert batch_x.dtype == torch.float64
    assert batch_y.dtype == torch.int32


def test_a_batch_is_a_copy() -> None:
    batches, _, x, _ = make_batches()
    before = x.clone()
    batches.at(0)[0].fill_(-1)
    batches.indices(0).fill_(-1)
    assert torch.equal(x, before)
    assert batches.indices(0).min() >= 0


X, Y = torch.zeros(20, 2), torch.zeros(20, dtype=torch.int64)
SPLIT = Partition([np.arange(10), np.arange(10, 20)])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 11}, ValueError, "batch_size=11 is larger than the 10 samples of worker 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer, got float"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"dataset_x": [[1.0]]}, TypeError, "dataset_x must be a torch.Tensor, got list"),
        (
            {"dataset_y": Y[:19]},
            ValueError,
            r"dataset_y must be \[N\] for dataset_x \[N, ...\], got \[19\] and \[20, 2\]",
        ),
        ({"dataset_x": X.to("meta")}, ValueError, "dataset_x is on meta, dataset_y on cpu; they must match"),
        ({"dataset_x": X[:15], "dataset_y": Y[:15]}, ValueError, "refers to sample 19, but there are only 15 samples"),
        ({"partition": [[0]]}, TypeError, "partition must be a Partition, got list"),
    ],
)
def test_worker_batches_rejects_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "dataset_x": X,
        "dataset_y": Y,
        "partition": SPLIT,
        "batch_size": 4,
        "seed": 0,
    } | change
    with pytest.raises(error, match=message):
        WorkerBatches(**arguments)


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (0.5, TypeError)])
def test_a_bad_step_is_an_error(step: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="step must be"):
        WorkerBatches(X, Y, SPLIT, 4, 0).at(step)
