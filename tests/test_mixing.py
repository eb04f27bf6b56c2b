"""The mixing matrix as compressed rows: forms, round trips, tensors, and refusal of what a kernel couldn't read."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgm_ext.mixing import Mixing


def random_matrix(n: int, density: float, seed: int) -> np.ndarray:
    """An [n, n] matrix of random weights with about ``density`` of its entries not zero."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n, n)) < density, rng.random((n, n)) + 0.1, 0.0)


@pytest.mark.parametrize(
    ("matrix", "form"),
    [
        ([[1.0]], "identity"),
        (np.eye(5), "identity"),
        ([[0.5, 0.5], [0.5, 0.5]], "mean"),
        (np.full((7, 7), 1 / 7), "mean"),
        ([[0.75, 0.25], [0.25, 0.75]], "dense"),
        ([[0.5, 0.5, 0.0], [0.5, 0.25, 0.25], [0.0, 0.25, 0.75]], "sparse"),
        ([[0.0, 1.0], [1.0, 0.0]], "sparse"),  # n entries like the identity, but not on the diagonal
    ],
    ids=["one", "identity", "mean-2", "mean-7", "dense", "sparse", "swap"],
)
def test_from_matrix_finds_the_form(matrix: Any, form: str) -> None:
    mixing = Mixing.from_matrix(matrix)
    assert mixing.form == form
    assert np.array_equal(mixing.to_matrix(), matrix)


def test_from_matrix_known_rows() -> None:
    mixing = Mixing.from_matrix([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    assert mixing.row_offsets.tolist() == [0, 2, 3, 5]
    assert mixing.columns.tolist() == [0, 2, 1, 0, 2]
    assert mixing.weights.tolist() == [0.5, 0.5, 1.0, 0.5, 0.5]
    assert mixing.nnz == 5
    assert mixing.diagonal().tolist() == [0.5, 1.0, 0.5]
    assert list(mixing.entries())[1] == (0, 2, 0.5)
    columns, weights = mixing.row(2)
    assert (columns.tolist(), weights.tolist()) == ([0, 2], [0.5, 0.5])


def test_mean_with_rounding_is_stored_as_exactly_one_over_n() -> None:
    rounded = np.full((3, 3), 1 / 3)
    rounded[np.diag_indices(3)] = 1 - 2 / 3  # what Metropolis-Hastings gives: one unit in the last place off
    assert not np.array_equal(rounded, np.full((3, 3), 1 / 3))
    mixing = Mixing.from_matrix(rounded)
    assert mixing.form == "mean"
    assert np.array_equal(mixing.to_matrix(), np.full((3, 3), 1 / 3))


def test_identity_with_rounding_is_stored_as_exactly_one() -> None:
    mixing = Mixing.from_matrix([[1.0 - 2**-52]])
    assert (mixing.form, mixing.to_matrix().tolist()) == ("identity", [[1.0]])


def test_almost_mean_is_dense() -> None:
    matrix = np.full((4, 4), 0.25)
    matrix[:2, :2] += [[1e-9, -1e-9], [-1e-9, 1e-9]]
    assert Mixing.from_matrix(matrix).form == "dense"


@settings(deadline=None, max_examples=60, derandomize=True)
@given(n=st.integers(1, 40), density=st.floats(0.0, 1.0), seed=st.integers(0, 2**16))
def test_rows_describe_the_matrix(n: int, density: float, seed: int) -> None:
    matrix = random_matrix(n, density, seed)
    mixing = Mixing.from_matrix(matrix)
    assert np.array_equal(mixing.to_matrix(), matrix)
    assert mixing.row_offsets.dtype == mixing.columns.dtype == np.int32
    assert mixing.weights.dtype == np.float64
    for array in (mixing.row_offsets, mixing.columns, mixing.weights):
        assert array.flags.c_contiguous
        assert not array.flags.writeable
    for worker in range(n):
        columns, weights = mixing.row(worker)
        assert np.all(np.diff(columns) > 0)
        assert np.array_equal(columns, np.flatnonzero(matrix[worker]))
        assert np.array_equal(weights, matrix[worker, columns])
    assert np.array_equal(mixing.diagonal(), np.diag(matrix))


def test_arrays_are_copies() -> None:
    offsets, columns, weights = np.array([0, 1, 2]), np.array([0, 1]), np.array([1.0, 1.0])
    mixing = Mixing("identity", 2, offsets, columns, weights)
    weights[0] = 7.0
    assert mixing.weights.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="read-only"):
        mixing.weights[0] = 7.0


@pytest.mark.parametrize(
    ("offsets", "columns", "weights", "message"),
    [
        ([0, 1], [0], [1.0], r"row_offsets must have shape \[num_workers \+ 1\] = \[3\], got \[2\]"),
        ([0, 1, 3], [0, 1], [1.0, 1.0], "row_offsets must rise from 0 to the number of entries 2"),
        ([1, 1, 2], [0, 1], [1.0, 1.0], "row_offsets must rise from 0"),
        ([0, 3, 2], [0, 1], [1.0, 1.0], "row_offsets must rise from 0"),
        ([0, 1, 2], [0, 2], [1.0, 1.0], r"columns must be in \[0, 2\), got values from 0 to 2"),
        ([0, 1, 2], [-1, 1], [1.0, 1.0], r"columns must be in \[0, 2\), got values from -1 to 1"),
        ([0, 1, 3], [0, 1, 0], [1.0, 0.5, 0.5], r"columns must ascend within each row, got \[1, 0\] in row 1"),
        ([0, 2, 3], [0, 0, 1], [0.5, 0.5, 1.0], r"columns must ascend within each row, got \[0, 0\] in row 0"),
        ([0, 1, 2], [0, 1], [1.0], r"equally long, got shapes \[2\] and \[1\]"),
        ([0, 1, 2], [0, 1], [1.0, np.nan], r"weights must be finite, got weights\[1\] = nan"),
    ],
)
def test_bad_rows_are_refused(offsets: list[int], columns: list[int], weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixing("sparse", 2, np.array(offsets), np.array(columns), np.array(weights))


def test_unknown_form_and_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"form must be .*, got 'banded'"):
        Mixing("banded", 1, np.array([0, 1]), np.array([0]), np.array([1.0]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_workers must be at least 1, got 0"):
        Mixing("sparse", 0, np.array([0]), np.array([]), np.array([]))


@pytest.mark.parametrize("shape", [(2, 3), (0, 0), (4,), (1, 1, 1)], ids=str)
def test_from_matrix_refuses_what_is_not_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"matrix must be square with at least one row, got shape \["):
        Mixing.from_matrix(np.ones(shape))


@pytest.mark.parametrize("worker", [-1, 2])
def test_row_out_of_range(worker: int) -> None:
    with pytest.raises(IndexError, match=rf"worker must be in \[0, 2\), got {worker}"):
        Mixing.from_matrix(np.eye(2)).row(worker)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tensors_hold_the_rows_and_are_cached(dtype: torch.dtype) -> None:
    mixing = Mixing.from_matrix(random_matrix(9, 0.4, seed=1))
    offsets, columns, weights = mixing.tensors("cpu", dtype)
    assert (offsets.dtype, columns.dtype, weights.dtype) == (torch.int32, torch.int32, dtype)
    assert torch.equal(offsets, torch.tensor(mixing.row_offsets.tolist(), dtype=torch.int32))
    assert torch.equal(columns, torch.tensor(mixing.columns.tolist(), dtype=torch.int32))
    assert torch.equal(weights, torch.tensor(mixing.weights.tolist(), dtype=torch.float64).to(dtype))
    again = mixing.tensors(torch.device("cpu"), dtype)
    assert all(one is other for one, other in zip((offsets, columns, weights), again, strict=True))


def test_tensors_default_is_float32_on_cpu() -> None:
    mixing = Mixing.from_matrix(np.eye(2))
    assert mixing.tensors() is mixing.tensors("cpu", torch.float32)
    assert mixing.tensors("cpu", torch.float64) is not mixing.tensors()


def test_tensors_refuse_other_dtypes() -> None:
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 or torch.float64, got torch.bfloat16"):
        Mixing.from_matrix(np.eye(2)).tensors("cpu", torch.bfloat16)


def test_equality_pickle_and_deepcopy_go_by_content() -> None:
    matrix = random_matrix(6, 0.5, seed=2)
    mixing = Mixing.from_matrix(matrix)
    mixing.tensors()
    for twin in (Mixing.from_matrix(matrix), pickle.loads(pickle.dumps(mixing)), copy.deepcopy(mixing)):
        assert twin == mixing
        assert hash(twin) == hash(mixing)
        assert not twin.weights.flags.writeable
        assert not twin._tensors, "tensors must not travel: the other machine may lack the device"
    assert mixing != Mixing.from_matrix(random_matrix(6, 0.5, seed=3))
    assert mixing != "mixing"


def test_import_needs_no_torch() -> None:
    code = "import sys, qgm_ext.mixing as m; m.Mixing.from_matrix([[1.0]]); sys.exit('torch' in sys.modules)"
    # The package's own __init__ may import torch; the module must not.
    blocked = f"import sys, types; p = types.ModuleType('qgm_ext'); p.__path__ = {package_path()!r}; "
    assert subprocess.run([sys.executable, "-c", blocked + "sys.modules['qgm_ext'] = p; " + code]).returncode == 0


def package_path() -> list[str]:
    """Folder of the package under test."""
    import qgm_ext

    return list(qgm_ext.__path__)
