"""Tests of qgm_ext.data.partition: against a slow text of the same partition, golden values, properties, files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qgm_ext.data import Partition, classes_partition, dirichlet_partition, hold_out, iid_partition, sorted_partition


def slow_dirichlet(
    labels: Sequence[int], num_workers: int, alpha: float, seed: int, max_tries: int
) -> list[list[int]] | None:
    """The description in words of the paper's partition, one draw and one sample at a time; None if no try succeeds."""
    random = np.random.RandomState(seed)
    pairs = np.array([[index, label] for index, label in enumerate(labels)])
    random.shuffle(pairs)
    rest = [(int(index), int(label)) for index, label in pairs]
    total, row = len(rest), []
    chunk = int(10 / num_workers * total)
    remaining = num_workers
    while remaining > 0:
        k = min(10, remaining)
        remaining -= k
        block, rest = (rest, []) if remaining == 0 else (rest[:chunk], rest[chunk:])
        for _ in range(max_tries):
            bins: list[list[int]] = [[] for _ in range(k)]
            for label in sorted(set(labels)):
                members = [index for index, own in block if own == label]
                p = random.dirichlet([alpha] * k)
                for j in range(k):
                    if len(bins[j]) >= len(block) / k:
                        p[j] = p[j] * 0
                with np.errstate(invalid="ignore"):
                    edges = np.cumsum(p / p.sum()) * len(members)
                low = 0
                for j in range(k):
                    # No mass for anybody below the cap: the last worker gets the class.
                    broken = bool(np.isnan(edges).any())
                    high = len(members) if j == k - 1 else (0 if broken else int(edges[j]))
                    bins[j] += members[low:high]
                    low = high
            if min(len(b) for b in bins) >= int(0.5 * len(block) / k):
                break
        else:
            return None
        for b in bins:
            row += b
    each = int(total / num_workers)
    return [row[i * each : (i + 1) * each] for i in range(num_workers)]


def balanced(num_samples: int, num_classes: int) -> np.ndarray:
    return np.arange(num_samples) % num_classes


@pytest.mark.parametrize(
    ("num_samples", "num_classes", "num_workers", "alpha", "seed"),
    [
        (1437, 10, 16, 0.1, 6),
        (1437, 10, 32, 1.0, 7),
        (500, 10, 10, 10.0, 0),
        (501, 7, 11, 0.3, 1),
        (333, 10, 16, 0.001, 1),  # numpy returns NaN for some of the accepted draws
        (300, 30, 5, 0.0005, 0),
        (64, 4, 1, 0.5, 2),
        (100, 3, 2, 0.05, 5),
        (90, 1, 3, 1.0, 4),
        (1000, 100, 20, 0.1, 9),
    ],
)
def test_dirichlet_partition_matches_slow_text(
    num_samples: int, num_classes: int, num_workers: int, alpha: float, seed: int
) -> None:
    labels = balanced(num_samples, num_classes)
    expected = slow_dirichlet(labels.tolist(), num_workers, alpha, seed, 2000)
    assert expected is not None
    got = dirichlet_partition(labels, num_workers, alpha, seed)
    assert [part.tolist() for part in got.indices] == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    labels=st.lists(st.integers(0, 5), min_size=24, max_size=160),
    num_workers=st.integers(1, 24),
    alpha=st.sampled_from([0.01, 0.1, 0.5, 1.0, 10.0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_dirichlet_partition_properties(labels: list[int], num_workers: int, alpha: float, seed: int) -> None:
    assume(len(labels) >= 2 * num_workers + 2)
    tries = 150
    expected = slow_dirichlet(labels, num_workers, alpha, seed, tries)
    if expected is None:
        with pytest.raises(ValueError, match="no Dirichlet partition found"):
            dirichlet_partition(labels, num_workers, alpha, seed, max_tries=tries)
        return
    part = dirichlet_partition(labels, num_workers, alpha, seed, max_tries=tries)
    assert [p.tolist() for p in part.indices] == expected
    assert part.sizes == [len(labels) // num_workers] * num_workers
    used = np.concatenate(part.indices)
    assert len(set(used.tolist())) == len(used)
    assert used.min() >= 0
    assert used.max() < len(labels)
    assert all(p.dtype == np.int64 for p in part.indices)


# Digests of the indices: they change only if the drawn samples change, which would make saved results irreproducible.
GOLDEN = {
    (1437, 10, 16, 0.1, 6): "0b163cfa8f4591fe39de95c9a2e622e9d265bce1fd4370bbb748658f4f4c5885",
    (1437, 10, 32, 10.0, 6): "f61ac8e9254cbbdf1b99d1b8e8e7dd5333689c7627ebadc428718313425aec7e",
    (200, 4, 3, 1.0, 0): "cb3fec5aaf674e255a44f0c4b80c7a95a0bb7e35c7ea2d7307c25e39c43cd434",
}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: "N={}-C={}-n={}-alpha={}-seed={}".format(*case))
def test_dirichlet_partition_golden(case: tuple[int, int, int, float, int]) -> None:
    num_samples, num_classes, num_workers, alpha, seed = case
    part = dirichlet_partition(balanced(num_samples, num_classes), num_workers, alpha, seed)
    assert part.digest() == GOLDEN[case]


def test_dirichlet_partition_of_a_tiny_set_is_as_written_down() -> None:
    part = dirichlet_partition([0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1], num_workers=3, alpha=1.0, seed=0)
    assert [p.tolist() for p in part.indices] == [[6, 4, 10, 11], [2, 1, 8, 0], [7, 9, 3, 5]]


def test_dirichlet_partition_same_seed_same_other_seed_differs() -> None:
    labels = balanced(1437, 10)
    first, again, other = (dirichlet_partition(labels, 16, 0.1, seed) for seed in (6, 6, 7))
    assert first.digest() == again.digest()
    assert first.digest() != other.digest()


def test_dirichlet_partition_leaves_the_global_generator_alone() -> None:
    np.random.seed(1)  # noqa: NPY002 (the global generator is what is tested)
    expected = np.random.RandomState(1).rand()
    dirichlet_partition(balanced(200, 10), 4, 1.0, 0)
    assert np.random.rand() == expected  # noqa: NPY002


def skew(part: Partition, labels: np.ndarray) -> float:
    """Mean over workers of the share of their most frequent class: 1/classes is uniform, 1 is one class each."""
    counts = part.histogram(labels)
    return float((counts.max(axis=1) / counts.sum(axis=1)).mean())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_small_alpha_is_more_skewed_than_large(seed: int) -> None:
    labels = balanced(2000, 10)
    small, middle, large = (skew(dirichlet_partition(labels, 16, alpha, seed), labels) for alpha in (0.1, 1.0, 100.0))
    assert small > middle > large
    assert large < 0.2
    assert small > 0.4
    assert skew(iid_partition(labels, 16, seed), labels) < 0.2


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda v: np.array(v, dtype=np.uint8)])
def test_labels_of_every_kind_give_the_same(kind: Any) -> None:
    labels = balanced(100, 3).tolist()
    assert dirichlet_partition(kind(labels), 4, 1.0, 0).digest() == dirichlet_partition(labels, 4, 1.0, 0).digest()


def test_labels_with_gaps_lose_no_samples() -> None:
    labels = balanced(100, 4)
    with_gaps = np.array([-3, 7, 50, 1000])[labels]
    assert dirichlet_partition(with_gaps, 4, 1.0, 0).digest() == dirichlet_partition(labels, 4, 1.0, 0).digest()


@pytest.mark.parametrize("num_workers", [1, 2, 9, 10, 11, 16, 20, 32, 49, 103])
def test_too_few_samples_says_how_many_suffice(num_workers: int) -> None:
    with pytest.raises(ValueError, match=f"too few samples: {num_workers} workers need at least") as caught:
        dirichlet_partition([], num_workers, 1.0, 0)
    needed = int(str(caught.value).split("at least ")[1].split()[0])
    assert needed >= 2 * num_workers
    with pytest.raises(ValueError, match=f"need at least {needed} labels .*, got {needed - 1}"):
        dirichlet_partition(balanced(needed - 1, 2), num_workers, 1e4, 0)
    part = dirichlet_partition(balanced(needed, 2), num_workers, 1e4, 0)
    assert part.sizes == [needed // num_workers] * num_workers


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": 0.0}, ValueError, "alpha must be a finite number > 0, got 0.0"),
        ({"alpha": -1}, ValueError, "alpha must be a finite number > 0, got -1.0"),
        ({"alpha": float("nan")}, ValueError, "alpha must be a finite number > 0, got nan"),
        ({"alpha": float("inf")}, ValueError, "alpha must be a finite number > 0, got inf"),
        ({"alpha": "0.1"}, TypeError, "alpha must be a number, got str"),
        ({"num_workers": 0}, ValueError, "num_workers must be >= 1, got 0"),
        ({"num_workers": 2.0}, TypeError, "num_workers must be an integer, got float"),
        ({"num_workers": True}, TypeError, "num_workers must be an integer, got bool"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 4294967296\), got -1"),
        ({"seed": None}, TypeError, "seed must be an integer, got NoneType"),
        ({"labels": [[0, 1], [1, 0]]}, ValueError, r"labels must be 1-D, one class per sample, got shape \[2, 2\]"),
        ({"labels": [0.5, 1.0]}, TypeError, "labels must be integers, got dtype float64"),
        ({"labels": ["a", "b"]}, TypeError, "labels must be integers, got dtype <U1"),
        ({"max_tries": 0}, ValueError, "max_tries must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"labels": [0, 1] * 20, "num_workers": 2, "alpha": 1.0, "seed": 0} | change
    with pytest.raises(error, match=message):
        dirichlet_partition(**arguments)


def test_a_partition_that_cannot_succeed_ends_with_an_error() -> None:
    # One class for each of two workers is the best that two classes at tiny alpha can do; ten workers can't be filled.
    with pytest.raises(
        ValueError, match=r"no Dirichlet partition found: in 3000 tries with alpha=0.001, 2 classes and 10"
    ):
        dirichlet_partition(balanced(1000, 2), 10, 0.001, 0, max_tries=3000)


def test_iid_partition_is_a_cut_of_a_shuffle() -> None:
    part = iid_partition(balanced(103, 10), 10, 3)
    order = np.arange(103)
    np.random.RandomState(3).shuffle(order)
    assert np.concatenate(part.indices).tolist() == order[:100].tolist()
    assert (part.method, part.seed, part.alpha) == ("iid", 3, None)


def test_sorted_partition_is_stable() -> None:
    part = sorted_partition([2, 0, 1, 0, 2, 1], 3)
    assert [p.tolist() for p in part.indices] == [[1, 3], [2, 5], [0, 4]]
    assert (part.method, part.seed, part.alpha) == ("sorted", None, None)


@pytest.mark.parametrize(
    "make", [lambda labels, n: iid_partition(labels, n, 0), sorted_partition], ids=["iid", "sorted"]
)
def test_plain_partitions_need_one_sample_each(make: Any) -> None:
    assert make([0, 1, 2], 3).sizes == [1, 1, 1]
    with pytest.raises(ValueError, match="too few samples: 4 workers need at least 4 labels, got 3"):
        make([0, 1, 2], 4)


def test_histogram_counts_by_worker_and_class() -> None:
    part = Partition([np.array([0, 1, 2]), np.array([], dtype=np.int64), np.array([5, 4])])
    counts = part.histogram([0, 0, 2, 1, 1, 0], num_classes=4)
    assert counts.tolist() == [[2, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert counts.dtype == np.int64
    assert part.histogram([0, 0, 2, 1, 1, 0]).shape == (3, 3)


def test_histogram_rejects_other_labels() -> None:
    part = Partition([np.array([0, 5])])
    with pytest.raises(ValueError, match="refers to sample 5, but there are only 3 samples"):
        part.histogram([0, 1, 2])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), got \[0, 3\]"):
        part.histogram([0, 1, 2, 3, 1, 1], num_classes=2)


def test_describe_prints_every_count() -> None:
    labels = balanced(40, 4)
    part = dirichlet_partition(labels, 3, 0.5, 1)
    text = part.describe(labels)
    lines = text.splitlines()
    assert lines[0] == "dirichlet partition, alpha 0.5, seed 1: 3 workers, 13 samples each"
    rows = [[int(cell) for cell in line.split()] for line in lines[2:]]
    assert rows == [[i, 13, *counts] for i, counts in enumerate(part.histogram(labels).tolist())]
    assert len({len(line) for line in lines[1:]}) == 1
    assert part.describe(labels, max_workers=1).splitlines()[-1] == "(and 2 more workers)"


def test_save_and_load_give_the_same(tmp_path: Path) -> None:
    file = tmp_path / "partition.npz"
    for part in (
        dirichlet_partition(balanced(200, 10), 7, 0.3, 5),
        sorted_partition([1, 0], 2),
        Partition([np.array([3]), []]),
    ):
        part.save(file)
        back = Partition.load(file)
        assert [p.tolist() for p in back.indices] == [p.tolist() for p in part.indices]
        assert (back.seed, back.alpha, back.method) == (part.seed, part.alpha, part.method)
        assert back.digest() == part.digest()
    assert os.listdir(tmp_path) == ["partition.npz"]


@pytest.mark.parametrize(("module", "function"), [(np, "savez"), (os, "fsync"), (os, "replace")])
def test_save_keeps_the_old_file_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, function: str
) -> None:
    file = tmp_path / "partition.npz"
    iid_partition([0] * 10, 2, 0).save(file)
    before = file.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, function, full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/partition\.npz'"):
        iid_partition([0] * 10, 2, 1).save(file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["partition.npz"]


def test_load_rejects_damaged_files(tmp_path: Path) -> None:
    file = tmp_path / "partition.npz"
    part = iid_partition([0] * 100, 5, 0)
    part.save(file)
    digest = part.digest()
    whole = file.read_bytes()
    for damaged in (b"", b"not a zip", whole[: len(whole) // 2], whole[:-1]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"partition\.npz is not a readable partition") as caught:
            Partition.load(file)
        assert "pickle" not in str(caught.value)  # numpy would tell how to load one
    messages = []
    for position in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[position] ^= 0xFF
        file.write_bytes(bytes(changed))
        try:
            # Only a byte that says nothing about the content (a date, an attribute) may go unnoticed.
            assert Partition.load(file).digest() == digest, position
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > len(whole) / 7 / 2
    assert all("partition.npz is not a readable partition" in message for message in messages)
    np.savez(file, other=np.zeros(3))
    with pytest.raises(ValueError, match=r"partition\.npz is not a readable partition"):
        Partition.load(file)
    meta = {"format": "qgm_ext.partition/1", "method": "iid", "seed": 0, "alpha": None}
    np.savez(file, meta=np.array(json.dumps(meta)), sizes=np.array([2, 2]), indices=np.arange(5))
    with pytest.raises(ValueError, match=r"sizes \[2, 2\] do not add up to the 5 stored indices"):
        Partition.load(file)
    with pytest.raises(FileNotFoundError):
        Partition.load(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([], ValueError, "one array per worker, got an empty list"),
        ([np.zeros((2, 2), int)], ValueError, r"indices\[0\] must be 1-D, got shape \[2, 2\]"),
        ([np.array([0]), np.array([0.5])], TypeError, r"indices\[1\] must hold integers, got dtype float64"),
        ([np.array([0, -2])], ValueError, r"indices\[0\] must not be negative, got -2"),
    ],
)
def test_partition_checks_its_indices(indices: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Partition(indices)


def test_hold_out_draws_a_seeded_share_and_keeps_the_rest() -> None:
    kept, held = hold_out(1000, 0.15, seed=3)
    assert (len(kept), len(held)) == (850, 150)
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(1000))
    assert (np.diff(kept) > 0).all()
    assert (np.diff(held) > 0).all()
    again, other = hold_out(1000, 0.15, seed=3), hold_out(1000, 0.15, seed=4)
    assert np.array_equal(again[1], held)
    assert not np.array_equal(other[1], held)
    assert 40 < (held < 500).sum() < 110  # from everywhere, not one end
    everything, nothing = hold_out(7, 0, seed=0)
    assert (everything.tolist(), nothing.tolist()) == (list(range(7)), [])


@pytest.mark.parametrize(
    ("num_samples", "fraction", "message"),
    [
        (10, 1.0, r"fraction must be in \[0, 1\), got 1.0"),
        (10, -0.5, r"fraction must be in \[0, 1\), got -0.5"),
        (10, float("nan"), r"fraction must be in \[0, 1\), got nan"),
        (10, "half", "fraction must be a number, got str"),
        (10, 0.01, "fraction=0.01 of 10 samples are 0; both parts need at least one"),
        (10, 0.99, "fraction=0.99 of 10 samples are 10; both parts need at least one"),
        (0, 0.5, "num_samples must be >= 1, got 0"),
    ],
)
def test_hold_out_names_what_is_wrong(num_samples: int, fraction: float, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        hold_out(num_samples, fraction, seed=0)


def test_a_partition_within_a_larger_set() -> None:
    split = iid_partition(np.zeros(6, dtype=int), 2, seed=1)
    positions = np.array([10, 20, 30, 40, 50, 60])
    larger = split.within(positions)
    assert [part.tolist() for part in larger.indices] == [positions[part].tolist() for part in split.indices]
    assert (larger.seed, larger.alpha, larger.method) == (split.seed, split.alpha, split.method)
    with pytest.raises(ValueError, match="refers to sample 5, but there are only 5 samples"):
        split.within(positions[:5])


@pytest.mark.parametrize(("workers", "k"), [(8, 2), (8, 4), (8, 10), (5, 2), (10, 1), (3, 7)])
def test_classes_partition_gives_every_worker_k_classes_and_every_class_a_fair_number_of_workers(
    workers: int, k: int
) -> None:
    labels = np.repeat(np.arange(10), 60)[np.random.RandomState(0).permutation(600)]
    split = classes_partition(labels, workers, k, seed=1)
    own = [set(labels[part].tolist()) for part in split.indices]
    assert [len(classes) for classes in own] == [k] * workers
    holders = [sum(label in classes for classes in own) for label in range(10)]
    assert max(holders) - min(holders) <= 1
    assert len(set(split.sizes)) == 1
    together = np.concatenate(split.indices)
    assert len(np.unique(together)) == len(together)
    again = classes_partition(labels, workers, k, seed=1)
    assert again.digest() == split.digest()
    assert classes_partition(labels, workers, k, seed=2).digest() != split.digest()


@pytest.mark.parametrize(
    ("workers", "k", "message"),
    [
        (4, 2, "at most the 10 classes, and with 4 workers reach all of them; got 2"),
        (4, 11, "classes_per_worker must be at most the 10 classes"),
        (4, 0, "classes_per_worker must be >= 1, got 0"),
        (70, 9, "too few samples: 63 workers share the 60 of class"),
    ],
)
def test_classes_partition_refuses_what_does_not_fit(workers: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classes_partition(np.repeat(np.arange(10), 60), workers, k, seed=0)
