"""Run folders: every file is old or new and never half, one run at a time, and damage is named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from qgm_ext.experiments import runfolder
from qgm_ext.experiments.runfolder import RunFolder


def started(path):
    """A folder with a config, as a run leaves it."""
    folder = RunFolder.create(path)
    folder.write_text(runfolder.CONFIG, "{}")
    return folder


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_create_makes_missing_parents(tmp_path):
    with RunFolder.create(tmp_path / "a" / "b") as folder:
        assert folder.path.is_dir()


def test_create_refuses_a_folder_with_foreign_files_and_adds_nothing(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"not empty, it holds thesis\.tex"):
        RunFolder.create(tmp_path)
    assert names(tmp_path) == ["thesis.tex"]


def test_create_refuses_an_earlier_run_and_says_how_to_resume(tmp_path):
    for name, word in (("run", "run"), ("my run", "my run'"), ("$HOME", "$HOME'")):  # as a shell takes it
        path = tmp_path / name
        started(path).close()
        with pytest.raises(ValueError, match=f"not empty.*--resume '?{re.escape(str(tmp_path / word))} continues"):
            RunFolder.create(path)


@pytest.mark.parametrize("below", ["", "deeper"])
def test_create_refuses_a_path_under_a_file(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match=r"out folder .*file"):
        RunFolder.create(file / below)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_create_refuses_a_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="can't be written to"):
        RunFolder.create(tmp_path)


def test_create_takes_what_a_run_left_that_was_killed_before_its_config(tmp_path):
    (tmp_path / ".lock").write_text("1\n")
    (tmp_path / ".config.json.77.tmp").write_text("{")
    with RunFolder.create(tmp_path):
        assert names(tmp_path) == [".lock"]


def test_a_second_run_in_the_folder_is_refused_until_the_first_ends(tmp_path):
    first = started(tmp_path)
    with pytest.raises(ValueError, match=f"in use by another run .process {os.getpid()}"):
        RunFolder.open(tmp_path)
    first.close()
    RunFolder.open(tmp_path).close()


def test_the_lock_holds_across_processes_and_ends_with_the_process(tmp_path):
    code = f"""
import sys
from qgm_ext.experiments.runfolder import RunFolder
folder = RunFolder.create({str(tmp_path)!r})
folder.write_text("config.json", "{{}}")
print("locked", flush=True)
sys.stdin.read()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"in use by another run .process {child.pid}"):
            RunFolder.open(tmp_path)
    finally:
        child.kill()
        child.wait()
    RunFolder.open(tmp_path).close()


def test_open_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"no run to resume in .*config\.json"):
        RunFolder.open(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_metrics_are_cut_back_to_the_given_records(tmp_path):
    path = tmp_path / runfolder.METRICS
    with started(tmp_path) as folder:
        folder.start_metrics([])
        for step in range(3):
            folder.append_metrics({"step": step, "loss": float("nan")})
            assert len(path.read_text().splitlines()) == step + 1  # visible at once
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')  # torn by a kill
    with RunFolder.open(tmp_path) as folder:
        folder.start_metrics([{"step": 0, "loss": None}])
        folder.append_metrics({"step": 1, "loss": 0.5})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "loss": None},
        {"step": 1, "loss": 0.5},
    ]


def test_json_has_no_nan(tmp_path):
    with started(tmp_path) as folder:
        folder.write_json("summary.json", {"a": float("inf"), "b": [float("nan"), 1.5], "c": 3})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": None, "b": [None, 1.5], "c": 3}


def test_checkpoint_comes_back_with_the_same_bits(tmp_path):
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    with started(tmp_path) as folder:
        assert folder.load_checkpoint() is None
        folder.save_checkpoint({"x": x, "metrics": [{"loss": 0.1}], "step": 7})
        content = folder.load_checkpoint()
    assert torch.equal(content["x"], x)
    assert (content["metrics"], content["step"]) == ([{"loss": 0.1}], 7)


def test_a_checkpoint_damaged_anywhere_is_named(tmp_path):
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    path = tmp_path / runfolder.CHECKPOINT
    with started(tmp_path) as folder:
        folder.save_checkpoint({"x": x, "step": 7})
        whole = path.read_bytes()
        half = len(whole) // 2  # inside the numbers, where torch.load alone notices nothing
        flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
        path.write_bytes(flipped)
        assert not torch.equal(torch.load(path, weights_only=True)["x"], x)
        for damaged in (flipped, b"", whole[:half], whole[:-1], b"hello"):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
                folder.load_checkpoint()
        torch.save([1], path)
        with pytest.raises(ValueError, match=r"checkpoint\.pt is no checkpoint"):
            folder.load_checkpoint()
        path.write_bytes(whole)
        assert torch.equal(folder.load_checkpoint()["x"], x)


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    with started(tmp_path) as folder:
        torch.save({"x": Evil()}, folder.file(runfolder.CHECKPOINT))
        with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
            folder.load_checkpoint()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("buffering", [0, 1 << 16])
def test_torchs_error_on_a_full_disk_becomes_the_disks(buffering):
    with pytest.raises(OSError, match="No space left on device"), open("/dev/full", "wb", buffering=buffering) as file:
        runfolder._save({"x": torch.zeros(100_000)}, file)
