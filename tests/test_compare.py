"""Comparisons that run: in child processes, resumed after a kill to the same result, and every accident is told."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from cli_runs import qgm
from qgm_ext import data, evaluate
from qgm_ext.experiments import compare_check, compare_worker, results, run, runfolder
from qgm_ext.experiments.compare import CompareError, compare
from qgm_ext.experiments.comparison_files import from_dict
from qgm_ext.experiments.config import TrainConfig

TRAIN = {"num_train": 200, "batch": 8, "steps": 12}
PLAIN = {"algorithms": ["dsgd", "qg_dsgdm_n"], "topologies": ["ring:4"], "lrs": [0.05, 0.2], "seeds": 2, "train": TRAIN}
TIMES = {"seconds", "seconds_training"}

# Breaks what the environment says, in a child process only: there, plugins are loaded by compare_worker.
PLUGIN = """
import errno, os, sys
from qgm_ext.experiments import compare_worker, runfolder
from qgm_ext.experiments.train import Training
kind = os.environ.get("QGM_TEST_BREAK")
if kind and "compare_worker.serve" in " ".join(sys.orig_argv):
    if kind == "disk":
        def full(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")
        runfolder.RunFolder.save_checkpoint = full
    if kind == "start":
        def full(handle, size):
            raise OSError(errno.ENOSPC, "No space left on device")
        os.ftruncate = full
    step = Training._step
    def broken(self):
        if self._folder is not None and self.step == 5:
            if kind == "die":
                os.kill(os.getpid(), 9)
            if kind == "bug":
                raise RuntimeError("a bug")
        step(self)
    Training._step = broken
"""


def plan(**changes):
    return from_dict({**PLAIN, **changes})


def table_of(folder):
    """The rows of results.csv without times."""
    with open(folder / results.CSV, newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def metrics_of(folder):
    """All metrics of all runs, without times."""
    return {
        path.parent.name: [
            {key: value for key, value in json.loads(line).items() if key not in TIMES}
            for line in path.read_text().splitlines()
        ]
        for path in sorted(folder.glob("runs/*/metrics.jsonl"))
    }


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/summary.json")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A comparison that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    told = []
    outcome = compare(plan(), folder, processes=2, on_estimate=told.append, on_run=told.append, on_state=told.append)
    return folder, outcome, told


def test_a_comparison_does_all_runs_and_each_is_the_run_it_says(whole):
    folder, outcome, _ = whole
    assert outcome.finished
    rows = table_of(folder)
    assert len(rows) == 2 * 2 * 2
    assert {row["status"] for row in rows} == {"finished"}
    assert sum(int(row["chosen"]) for row in rows) == 2 * 2
    for row in rows:
        run_folder = folder / row["folder"]
        for name in ("config.json", "partition.npz", "summary.json", "metrics.jsonl"):
            assert (run_folder / name).exists()
    made = plan()
    cell = next(made.cells())
    alone = run(made.config(cell, 0.2, 1))
    (row,) = (row for row in rows if (row["method"], row["lr"], row["seed"]) == ("dsgd", "0.2", "1"))
    last = alone.metrics[-1]
    assert float(row["accuracy_local_mean"]) == last["accuracy_local_mean"]
    assert float(row["validation_accuracy_local_mean"]) == last["validation_accuracy_local_mean"]
    # DSGD on a ring of 4: each of 8 links carries one float32 vector in each of 12 steps.
    assert int(row["bytes_sent"]) == 8 * 12 * 4 * alone.summary["num_parameters"]


def test_a_comparison_tells_estimate_runs_and_progress(whole):
    _, _, told = whole
    estimate = told[0]
    assert (estimate.runs, estimate.done, estimate.processes, estimate.measured) == (8, 0, 2, "calibration")
    assert estimate.seconds > 0
    assert sum(isinstance(item, results.Run) for item in told) == 8
    last = told[-1]
    assert (last.done, last.runs, last.running) == (8, 8, ())
    assert last.seconds == pytest.approx(last.total_seconds)


def test_finished_runs_are_not_repeated_and_a_new_method_is_one_more_row(whole):
    folder, _, _ = whole
    before = stamps(folder)
    again = compare(plan(), folder, processes=1)
    assert again.finished
    assert again.estimate is None  # nothing to do
    assert stamps(folder) == before
    done = []
    more = compare(plan(algorithms=["dsgd", "qg_dsgdm_n", "d2"]), folder, processes=2, on_run=done.append)
    assert more.finished
    assert {item.config.algorithm for item in done} == {"d2"}
    assert more.estimate.measured == "finished runs and calibration"
    after = stamps(folder)
    assert {path: after[path] for path in before} == before
    assert [score.cell.method.label for score in more.results.scores()] == ["dsgd", "qg_dsgdm_n", "d2"]


def test_a_diverged_run_is_a_result(tmp_path):
    made = plan(algorithms=["dsgd"], lrs=[0.1, 1e30], seeds=1)
    outcome = compare(made, tmp_path, processes=1)
    assert outcome.finished
    (score,) = outcome.results.scores()
    assert score.lr == 0.1
    by_lr = {row["lr"]: row for row in table_of(tmp_path)}
    assert by_lr["1e+30"]["status"] == "diverged"
    assert by_lr["1e+30"]["accuracy_local_mean"] == ""
    (told,) = tmp_path.glob("runs/*/diverged.json")
    assert "is not finite" in json.loads(told.read_text())["reason"]
    assert compare(made, tmp_path, processes=1).estimate is None


def test_the_first_seed_may_choose_alone(tmp_path):
    made = plan(algorithms=["dsgd"], lr_seeds="first", lrs=[0.01, 0.3], seeds=3)
    outcome = compare(made, tmp_path, processes=2)
    assert outcome.finished
    assert outcome.estimate.runs == 4
    assert sorted((row["lr"], row["seed"]) for row in table_of(tmp_path)) == [
        ("0.01", "0"),
        ("0.3", "0"),
        ("0.3", "1"),
        ("0.3", "2"),
    ]


def test_a_second_comparison_in_the_folder_is_refused(whole, tmp_path):
    lock = runfolder.lock_folder(tmp_path, "comparison")
    try:
        with pytest.raises(ValueError, match=f"in use by another comparison .process {os.getpid()}"):
            compare(plan(), tmp_path)
    finally:
        os.close(lock)


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"not empty, it holds thesis\.tex"):
        compare(plan(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="can't be"):
        compare(plan(), "/dev/null/x")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("processes", 0, "at least 1"),
        ("threads", 0, "at least 1"),
        ("checkpoint_seconds", -1.0, "a finite number of at least 0, got -1"),
        ("checkpoint_seconds", math.nan, "a finite number of at least 0, got nan"),
    ],
)
def test_wrong_numbers_are_named(name, value, expected, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be {expected}"):
        compare(plan(), tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_damaged_files_of_a_run_are_named(whole, tmp_path):
    made = plan(algorithms=["dsgd"], lrs=[0.1], seeds=1)
    compare(made, tmp_path, processes=1)
    (summary,) = tmp_path.glob("runs/*/summary.json")
    metrics = summary.with_name("metrics.jsonl")
    first, *rest = metrics.read_text().splitlines(keepends=True)
    for path, content in (
        (summary, "{"),
        (summary, "{}"),
        (summary, "[]"),
        (metrics, ""),
        (metrics, "3\n"),
        (metrics, "{}\n"),
        (metrics, first),  # cut short
        (metrics, first + '{"step": 1}\n' + "".join(rest)),
        (metrics, first + "".join(rest).replace("accuracy_local_mean", "accuracy")),
        (metrics, first.replace('"epoch": 0.0', '"epoch": "x"') + "".join(rest)),
    ):
        before = path.read_text()
        path.write_text(content)
        with pytest.raises(ValueError, match=f"the files of the run in {summary.parent} are damaged"):
            results.load(tmp_path)
        path.write_text(before)
    results.load(tmp_path)
    (tmp_path / "comparison.json").write_text('{"format": "qgm_ext.compare/1", "comparison": 3}')
    with pytest.raises(ValueError, match=r"comparison\.json can't be read: it holds no comparison"):
        results.load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "message", "disk"),
    [
        ("disk", "No space left on device", True),
        ("start", "seed 0: out folder .* can't be written to: No space left on device", True),
        ("die", "its process was killed by signal 9", False),
        ("bug", "RuntimeError: a bug", False),
    ],
)
def test_an_accident_in_a_child_is_told_and_what_is_done_is_kept(kind, message, disk, whole, tmp_path, monkeypatch):
    plugin = tmp_path / "breaks.py"
    plugin.write_text(PLUGIN)
    made = plan(algorithms=["dsgd"], lrs=[0.05], plugins=[str(plugin)])
    out = tmp_path / "out"
    monkeypatch.setenv("QGM_TEST_BREAK", kind)
    with pytest.raises(CompareError, match=message) as caught:
        compare(made, out, processes=1, checkpoint_seconds=0)
    assert caught.value.disk == disk
    assert "dsgd on ring:4, alpha 0.1, mlp, lr 0.05, seed 0" in str(caught.value)
    if kind != "disk":
        return  # what follows is the same for all
    monkeypatch.delenv("QGM_TEST_BREAK")
    assert compare(made, out, processes=1).finished
    folder, _, _ = whole
    expected = metrics_of(folder)
    assert all(metrics == expected[name] for name, metrics in metrics_of(out).items())


# The command line -----------------------------------------------------------------------------------------------------

FILE = """
title = "A small comparison"
algorithms = ["dsgd", "qg_dsgdm_n"]
topologies = ["ring:4"]
lrs = [0.05, 0.2]
seeds = 2
[train]
num_train = 200
batch = 8
steps = 12
"""


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "qgm_ext", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_the_command_shows_estimate_progress_and_table(whole, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(FILE)
    code, output = qgm("compare", path, "--out", tmp_path / "out", "--processes", 2)
    assert code == 0, output
    assert re.search(r"8 runs to do, 0 done before; about \d+ (s|min) on 2 processes \(from calibration\)", output)
    # Two processes finish in any order; every run is told once, in the order of its number.
    told = re.findall(r"\[(\d)/8\] (.*, lr 0\.\d+, seed \d): validation accuracy \d", output)
    assert [int(number) for number, _ in told] == list(range(1, 9)), output
    assert len({run for _, run in told}) == 8, output
    assert "mlp on digits, ring of 4" in output
    assert "alpha = 0.1" in output
    assert re.search(r"dsgd +\d+\.\d ± \d", output)
    assert "never on the test set" in output
    folder, _, _ = whole
    assert [row for row in table_of(folder) if row["method"] != "d2"] == table_of(tmp_path / "out")
    code, output = qgm("compare", "--resume", tmp_path / "out")
    assert code == 0
    assert "runs to do" not in output


def test_brackets_in_labels_and_titles_are_shown_as_they_are(tmp_path):
    path = tmp_path / "small.toml"
    figure = '[[published]]\nmethod = "[/b] QG"\ntopology = "ring:4"\nvalue = 70\nnote = "[red]"\n'
    path.write_text(
        'title = "[/x] title"\ntopologies = ["ring:4"]\n[train]\ndata = "mnist"\n'
        f'[[method]]\nalgorithm = "dsgd"\nlabel = "[/b] QG"\n{figure}'
    )
    code, output = qgm("compare", path, "--dry-run", "--data-root", tmp_path)  # shows the table, then misses the data
    assert code == 2, output
    for text in ("[/x] title", "[/b] QG", "70 ([red])"):
        assert text in output


def test_a_dry_run_only_estimates(tmp_path):
    words = "--algorithm dsgd --topology ring:4 --num-train 200 --steps 5 --lr 0.1 --seeds 2 --processes 1 --dry-run"
    code, output = qgm("compare", *words.split(), "--out", tmp_path / "out")
    assert code == 0, output
    assert "2 runs to do" in output
    assert not list((tmp_path / "out").glob("runs/*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "say what to compare: a TOML file, --preset NAME or --algorithm NAME"),
        ("/nowhere.toml", "qgm: /nowhere.toml: No such file or directory"),
        ("/usr", "qgm: /usr: Is a directory"),
        ("--preset paper-smal", "did you mean 'paper-small'?"),
        ("--preset paper-small --resume x", "only one of them"),
        ("--resume /nowhere", "there is no comparison in /nowhere"),
        ("--resume /nowhere --alpha 1", "--resume goes on with a comparison as it is"),
        ("--algorithm dsdg", "algorithm 'dsdg' is not known, did you mean 'dsgd'?"),
        ("--algorithm dsgd --topology rnig", "did you mean 'ring'?"),
        ("--algorithm dsgd --data mnist --data-root /nowhere", "To get them:"),
        ("--algorithm dsgd --lr nan", "lrs must be a finite number"),
        ("--algorithm relaysgd --topology exponential:8", "give the method a topology of its own"),
        (
            "--algorithm dsgd --topology ring:4 --topology ring:1000 --out {out}",
            "dsgd on ring:1000, alpha 0.1, mlp, seed 0: too few samples: 1000 workers need at least 2000 labels",
        ),
        ("--algorithm dsgd --topology ring:4 --batch 330 --out {out}", "batch_size=330 is larger than the 323 samples"),
        ("--algorithm dsgd --model text_mlp --out {out}", "text_mlp is no model for digits; there are cnn,"),
        (
            "--algorithm dsgd --processes 0 --num-train 100 --topology ring:4 --out {out}",
            "processes must be at least 1",
        ),
    ],
)
def test_the_command_refuses_wrong_input_in_one_line(words, message, tmp_path):
    code, output = qgm("compare", *words.format(out=tmp_path / "o").split())
    assert code == 2, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("qgm: ")
    assert message in last
    assert not (tmp_path / "o").exists()  # nothing was begun


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_told_before_any_process_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr("qgm_ext.experiments.compare._Child", None)
    code, output = qgm("compare", "--algorithm", "dsgd", "--device", "cuda", "--out", tmp_path / "o")
    assert code == 2, output
    last = output.strip().splitlines()[-1]
    assert last == "qgm: device 'cuda' needs a CUDA device and a torch with CUDA, but torch finds none"
    assert not (tmp_path / "o").exists()


def test_a_split_that_fails_with_the_last_seed_only_is_found_before_the_first_run(tmp_path, monkeypatch):
    monkeypatch.setattr("qgm_ext.experiments.compare._Child", None)
    real = data.dirichlet_partition

    def draw(labels, num_workers, alpha, seed):
        if seed == 1 and alpha == 0.5:
            raise ValueError("no Dirichlet partition found")
        return real(labels, num_workers, alpha, seed)

    monkeypatch.setattr(data, "dirichlet_partition", draw)
    with pytest.raises(ValueError, match=r"dsgd on ring:4, alpha 0\.5, mlp, seed 1: no Dirichlet partition found"):
        compare(plan(alphas=[10, 0.5]), tmp_path / "o")


def test_what_is_finished_needs_neither_data_nor_device(whole, tmp_path, monkeypatch):
    folder, _, _ = whole
    monkeypatch.setattr(compare_check, "check", None)
    assert compare(plan(), folder).finished


def until_done(process, runs):
    """Read its lines until so many runs are done."""
    while True:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        if line.startswith(f"[{runs}/"):
            return


def children_of(pid):
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if parent == pid:
                found.append(int(entry))
    return found


def wait_until_gone(pids, seconds=30.0):
    end = time.monotonic() + seconds
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < end, "children outlive their parent"
        time.sleep(0.05)


def test_kill_leaves_no_process_and_the_same_command_goes_on(whole, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(FILE)
    out = tmp_path / "out"
    words = ("compare", path, "--out", out, "--processes", 2)
    process = start(*words)
    until_done(process, 3)
    children = children_of(process.pid)
    assert len(children) == 2
    process.kill()
    process.communicate(timeout=60)
    wait_until_gone(children)
    before = stamps(out)
    assert len(before) >= 3
    process = start(*words)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"{8 - len(before)} runs to do, {len(before)} done before" in output
    after = stamps(out)
    assert {file: after[file] for file in before} == before  # not repeated
    folder, _, _ = whole
    assert [row for row in table_of(folder) if row["method"] != "d2"] == table_of(out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_to_all_processes_keeps_what_is_done_and_says_how_to_go_on(number, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(FILE.replace("steps = 12", "steps = 4000").replace("lrs = [0.05, 0.2]", "lrs = [0.05]"))
    out = tmp_path / "out"
    process = start("compare", path, "--out", out, "--processes", 2)
    while not list(out.glob("runs/*/metrics.jsonl")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    children = children_of(process.pid)
    for child in children:  # as a terminal and a scheduler do, which signal the whole group, the parent not first
        os.kill(child, number)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1] == (
        f"qgm: stopped by {number.name}, what is done is kept; continue with: qgm compare --resume {out}"
    )
    wait_until_gone(children)
    assert list(out.glob("runs/*/checkpoint.pt"))
    assert (out / results.CSV).exists()


def test_a_folder_whose_first_file_found_no_space_can_be_taken_up(tmp_path, monkeypatch):
    made = plan(algorithms=["dsgd"], lrs=[0.05], seeds=1)
    with monkeypatch.context() as patch:

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*comparison\.json'"):
            compare(made, tmp_path / "out", processes=1)
    assert compare(made, tmp_path / "out", processes=1, dry_run=True).estimate is not None


def test_calibration_measures_evaluations_of_workers_that_differ(monkeypatch):
    # Before the first step all workers are equal, and one of them is evaluated; later ones cost n models.
    asked = []
    accuracy = evaluate.accuracy_and_loss
    monkeypatch.setattr(
        evaluate, "accuracy_and_loss", lambda *args: asked.append(time.perf_counter()) or accuracy(*args)
    )
    config = TrainConfig(data="digits", algorithm="dsgd", workers=4, epochs=1, validation=0.1)
    begin = time.perf_counter()
    found = compare_worker.calibrate(config)
    assert len(asked) == 1 + 1 + 2 * 5  # one of five equal models on either set, then four and their average
    assert 0 < found["evaluation"] < time.perf_counter() - begin
    assert found["evaluations"] == 1
    assert found["steps"] > 4


def test_calibration_takes_a_step_however_long_the_evaluation_took(monkeypatch):
    monkeypatch.setattr(compare_worker, "_CALIBRATION_SECONDS", 0.0)
    found = compare_worker.calibrate(TrainConfig(data="digits", algorithm="dsgd", workers=4, epochs=1))
    assert found["step"] > 0
