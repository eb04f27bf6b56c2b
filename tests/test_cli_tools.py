"""The commands that look at topologies, algorithms and the machine show what they should, and refuse what is wrong."""

from __future__ import annotations

import json
import re
import sys

import pytest

from cli_runs import SMALL, fails, qgm
from qgm_ext import algorithms
from qgm_ext import topology as topologies
from qgm_ext.experiments import bench as benchmark
from qgm_ext.experiments import doctor as medicine


@pytest.mark.parametrize("name", topologies.names())
def test_topology_shows_every_topology(name):
    code, output = qgm("topology", name)
    assert code == 0
    made = topologies.get(name, 32 if name == "social" else 16)
    assert f"{made.name} of {made.num_workers} workers" in output
    assert re.search(rf"spectral gap +{made.spectral_gap:.6g}\b", output)


def test_topology_shows_figures_matrix_and_picture(tmp_path):
    png = tmp_path / "ring.png"
    code, output = qgm("topology", "ring", "--workers", 4, "--png", png)
    assert code == 0
    for label, value in (
        ("degree", "2"),
        ("lambda_2", "0.333333"),
        ("lambda_n", "-0.333333"),
        ("weight of a neighbour", "0.333333"),
        ("weight of oneself", "0.333333"),
        ("period", "1"),
    ):
        assert re.search(rf"{label} +{value}", output), label
    assert "0.3333 0.3333      . 0.3333" in output
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_topology_shows_each_step_of_a_time_varying_one():
    _, output = qgm("topology", "one-peer-exponential", "-n", 4)
    assert "mixing matrix of step 0:" in output
    assert "mixing matrix of step 1:" in output
    assert re.search(r"period +2", output)
    assert re.search(r"period +never repeats", qgm("topology", "random_matching", "-n", 4)[1])


@pytest.mark.parametrize("words", ["ring -n 4", "ring:4", "Ring:4 -n 4"])
def test_topology_and_train_take_the_number_of_workers_either_way(words, tmp_path):
    assert "ring of 4 workers" in qgm("topology", *words.split())[1]
    small = (*SMALL[2:], "--steps", 1, "--out", tmp_path)
    assert qgm("train", "--topology", *words.split(), *small)[0] == 0
    config = json.loads((tmp_path / "config.json").read_text())["config"]
    assert (config["topology"], config["workers"]) == ("ring", 4)
    assert qgm("train", "--resume", tmp_path, "--topology", "ring:4")[0] == 0
    assert "workers is 4 in the run, 8 was given" in fails("train", "--resume", tmp_path, "--topology", "ring:8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("rnig", "did you mean 'ring'?"),
        ("rnig:4", "did you mean 'ring'?"),
        ("ring:0", "topology must be NAME or NAME:WORKERS, e.g. 'ring:16', got 'ring:0'"),
        ("ring:8 -n 4", "topology 'ring:8' has 8 workers, and workers is 4"),
        ("ring -n 0", "must be at least 1, got 0"),
        ("ring:99999999999", "n (number of workers of ring) must be at most 16,777,216, got 99999999999"),
        ("social -n 5", "n must be 32 for the social network, got 5"),
        ("ring --png /nowhere/ring.png", "/nowhere/ring.png"),
    ],
)
def test_topology_refuses_wrong_input_in_one_line(words, message):
    assert message in fails("topology", *words.split())


def test_algorithms_lists_every_algorithm_with_its_hyper_parameters():
    code, output = qgm("algorithms")
    assert code == 0
    for name in algorithms.names():
        assert re.search(rf"^ *{name} ", output, re.MULTILINE), name
    for word in ("doubly stochastic", "qg_momentum_buffer", "qg_momentum=0.9", "weight_decay=0.0", "2102.04761"):
        assert word in output


def test_bench_shows_times_and_ratios():
    code, output = qgm("bench", "--size", "4x1000", "--size", "8x100", "--seconds", 0.01, "--algorithm", "dsgdm")
    assert code == 0
    assert "dsgdm, ring, float32, threads: 1" in output
    rows = [line.split() for line in output.splitlines() if re.match(r"\s*[48]\s", line)]
    assert [row[:2] for row in rows] == [["4", "1000"], ["8", "100"]]
    assert all(float(word) > 0 for row in rows for word in row)


def test_bench_measures_positive_times_of_the_least_bytes():
    (timing,) = benchmark.measure([(4, 1000)], "qg_dsgdm_n", 0.01)
    assert timing.bytes == 4 * 5 * 4 * 1000  # reads x, g, m_hat and writes x, m_hat in float32
    assert min(timing.fused, timing.reference, timing.copy) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--size 16", "--size must be workers x parameters, e.g. 16x100000, got '16'"),
        ("--size 0x5", "a size must be n >= 1"),
        ("--seconds 0", "seconds must be > 0"),
        ("--threads 0", "threads must be at least 1"),
        ("--algorithm qg_dsgdmn", "did you mean"),
    ],
)
def test_bench_refuses_wrong_input_in_one_line(words, message):
    assert message in fails("bench", *words.split())


def test_doctor_finds_this_installation_well():
    code, output = qgm("doctor")
    assert code == 0, output
    for word in (
        "qgm_ext: ",
        "python: ",
        "torch: ",
        "numpy: ",
        "native CPU core: compiler",
        "SIMD level: ",
        "threads: ",
    ):
        assert f"ok    {word}" in output
    assert re.search(r"ok    self-check: \d+ cases: fused and split steps equal bit by bit", output)


def test_doctor_finds_a_broken_split_step(monkeypatch):
    from qgm_ext import ops

    def wrong(x, *arguments):
        merge(x, *arguments)
        x[0] += 1e-6

    merge = ops.merge_
    monkeypatch.setattr(ops, "merge_", wrong)
    code, output = qgm("doctor")
    assert code == 1
    assert "WRONG self-check: dsgd, torch.float64: the fused step 0 differs from the split one" in output
    assert "qgm: 1 problem found" in output


def test_doctor_finds_a_fused_and_split_step_that_are_wrong_together(monkeypatch):
    monkeypatch.setattr(medicine.reference, "step", lambda a, x, g, state, w, step: (x, state))
    code, output = qgm("doctor")
    assert code == 1
    assert "the result differs from the reference by" in output


def test_doctor_finds_a_missing_native_module(monkeypatch):
    from qgm_ext import ops

    monkeypatch.setitem(sys.modules, "qgm_ext._cpu", None)
    monkeypatch.setattr(ops, "has_native", lambda device: False)
    code, output = qgm("doctor")
    assert code == 1
    assert "WRONG native CPU core: can't be imported" in output


def test_doctor_notes_a_missing_optional_package(monkeypatch):
    real = medicine.version

    def version(name):
        if name == "tensorboard":
            raise medicine.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(medicine, "version", version)
    code, output = qgm("doctor")
    assert code == 0
    assert "note  tensorboard: missing: pip install 'qgm_ext[train]'" in output
