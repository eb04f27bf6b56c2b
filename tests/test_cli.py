"""The command line: every command shows what it should, and a user's mistake is one line and exit code 2."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import qgm_ext
from cli_runs import SMALL, fails, qgm
from qgm_ext import cli_train
from qgm_ext.cli import _COMMANDS
from qgm_ext.distributed import PeerLostError
from qgm_ext.experiments import runfolder


def test_no_command_and_help_list_the_commands():
    for arguments in ((), ("--help",), ("-h",)):
        _, output = qgm(*arguments)
        for command in ("train", "topology", "plan", "algorithms", "bench", "doctor"):
            assert re.search(rf"\b{command}\b", output)


@pytest.mark.parametrize("command", ["train", "topology", "plan", "algorithms", "bench", "doctor"])
def test_help_of_every_command(command):
    code, output = qgm(command, "--help")
    assert code == 0
    assert "Usage" in output


def test_help_of_train_tells_the_defaults_that_are_used():
    _, output = qgm("train", "--help")
    text = " ".join(output.replace("│", " ").split())
    for option, default in {
        "--algorithm": "qg_dsgdm_n",
        "--topology": "ring",
        "--workers": "16",
        "--data": "digits",
        "--alpha": "0.1",
        "--model": "mlp",
        "--batch": "16",
        "--epochs": "100",
        "--seed": "0",
    }.items():
        start = text.index(option)
        assert f"[default: {default}]" in text[start : start + 300], option
    from qgm_ext.experiments import TrainConfig

    config = TrainConfig()
    assert (config.algorithm, config.topology, config.workers, config.data) == ("qg_dsgdm_n", "ring", 16, "digits")
    assert (config.alpha, config.model, config.batch, config.epochs, config.seed) == (0.1, "mlp", 16, 100, 0)


def test_help_tells_of_every_command_what_its_docstring_does():
    for name, (place, text) in _COMMANDS.items():
        module, function = place.split(":")
        assert (
            inspect.getdoc(getattr(importlib.import_module(f"qgm_ext.{module}"), function)).splitlines()[0] == text
        ), name


def test_what_needs_no_torch_does_not_wait_for_it():
    code = """
import sys
from qgm_ext.cli import app
for words in ("--help", "--version", "nope", "compare --help", "compare --nope", "report --help", "plan --help",
              "plan --nope", "topology --help", "topology ring:4", "topology rnig"):
    try:
        app(words.split())
    except SystemExit:
        pass
    assert "torch" not in sys.modules, words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ring of 4 workers" in done.stdout


def test_the_package_has_what_it_says():
    assert set(qgm_ext.__all__) <= set(dir(qgm_ext))
    for name in qgm_ext.__all__:
        assert getattr(qgm_ext, name) is not None
    with pytest.raises(AttributeError, match="module 'qgm_ext' has no attribute 'nope'"):
        qgm_ext.nope  # noqa: B018 (to ask for it is the test)


def test_version():
    assert qgm("--version") == (0, f"qgm_ext {qgm_ext.__version__}\n")


# train ----------------------------------------------------------------------------------------------------------------


def test_train_shows_partition_progress_and_result(tmp_path):
    code, output = qgm("train", *SMALL, "--epochs", 2, "--eval-every", 1, "--out", tmp_path / "run")
    assert code == 0
    assert "dirichlet partition, alpha 0.1, seed 0: 4 workers, 50 samples each" in output
    assert "worker  size  class 0" in output
    assert "step 12/12, epoch 2, loss" in output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for label, shown in (
        ("accuracy of the local models: mean", f"{summary['accuracy_local_mean']:.2%}"),
        ("worst worker", f"{summary['accuracy_local_min']:.2%}"),
        ("best worker", f"{summary['accuracy_local_max']:.2%}"),
        ("accuracy of the averaged model", f"{summary['accuracy_average']:.2%}"),
        ("consensus distance", f"{summary['consensus_distance']:.4g}"),
        ("worker-steps per second", f"{summary['worker_steps_per_second']:,.0f}"),
        ("share of time: gradient", f"{summary['share_gradient']:.1%}"),
        ("optimizer", f"{summary['share_optimizer']:.1%}"),
        ("evaluation", f"{summary['share_evaluation']:.1%}"),
    ):
        assert re.search(rf"{label} +{re.escape(shown)}", output), label


def test_train_takes_every_option(tmp_path):
    words = (
        "--algorithm qg_dsgdm --topology chain --alpha 1 --data digits --model cnn --steps 6 --lr 0.05 "
        "--schedule cosine --warmup-epochs 0.5 --warmup-from 0.01 --momentum 0.8 --qg-momentum 0.7 "
        "--weight-decay 1e-4 --hyper local_step=2 --clip 1 --seed 3 --dtype float64 --device cpu --engine loop "
        "--eval-every 1 --partition dirichlet --on-nonfinite skip --checkpoint-seconds 0 --validation 0.1 "
        "--augment crop_flip --classes-per-worker 3 --base-batch 32 --milestones 0.2 --milestones 0.9 --message int8"
    )
    code, output = qgm("train", *SMALL, *words.split(), "--out", tmp_path, "--data-root", tmp_path)
    assert code == 0, output
    config = json.loads((tmp_path / "config.json").read_text())["config"]
    assert config == {
        "algorithm": "qg_dsgdm",
        "hyper": {"weight_decay": 1e-4, "momentum": 0.8, "qg_momentum": 0.7, "local_step": 2},
        "topology": "chain",
        "workers": 4,
        "data": "digits",
        "data_root": str(tmp_path),
        "num_train": 200,
        "validation": 0.1,
        "augment": "crop_flip",
        "partition": "dirichlet",
        "alpha": 1.0,
        "classes_per_worker": 3,
        "model": "cnn",
        "pretrained": None,
        "epochs": None,
        "steps": 6,
        "batch": 8,
        "lr": 0.05,
        "base_batch": 32,
        "schedule": "cosine",
        "milestones": [0.2, 0.9],
        "warmup_epochs": 0.5,
        "warmup_from": 0.01,
        "clip": 1.0,
        "seed": 3,
        "dtype": "float64",
        "device": "cpu",
        "engine": "loop",
        "threads": 1,
        "eval_every": 1,
        "on_nonfinite": "skip",
        "message": "int8",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--algorithm qg_dsgdm_m", "did you mean 'qg_dsgdm_n'?"),
        ("--topology rnig", "did you mean 'ring'?"),
        ("--topology hypercube --workers 12", "n must be a power of two"),
        ("--topology hypercube:12", "n must be a power of two"),
        ("--topology ring:many", "topology must be NAME or NAME:WORKERS, e.g. 'ring:16', got 'ring:many'"),
        ("--topology ring:8 --workers 4", "topology 'ring:8' has 8 workers, and workers is 4; say the number once"),
        ("--data digit", "did you mean 'digits'?"),
        ("--model mpl", "did you mean 'mlp'?"),
        ("--model vgg11 --engine threads", "engine 'threads' can't run vgg11, which draws random numbers in training"),
        ("--lr nan", "lr must be a finite number of at least 0, got nan"),
        ("--lr -0.1", "lr must be a finite number of at least 0, got -0.1"),
        ("--momentum nan", "momentum must be in [0, 1), got nan"),
        ("--momentum 1", "momentum must be in [0, 1), got 1.0"),
        ("--weight-decay -1", "weight_decay must be a finite number of at least 0"),
        ("--local-step 0", "local_step must be an integer of at least 1, got 0"),
        ("--alpha 0", "alpha must be a finite number > 0, got 0"),
        ("--alpha -1", "alpha must be a finite number"),
        ("--workers 0", "workers must be at least 1, got 0"),
        ("--workers 1000", "too few samples"),
        ("--batch 90", "batch_size=90 is larger than the 89 samples of worker"),
        ("--batch 0", "batch must be at least 1, got 0"),
        ("--num-train 100000", "num_train=100000 is more than the 1438 training samples"),
        ("--on-peer-loss heal", "on_peer_loss='heal' is for workers in processes of their own, which torchrun starts"),
        ("--on-peer-loss hel", "--on-peer-loss must be one of raise, heal, got 'hel'"),
        ("--overlap", "overlap=True is for workers in processes of their own, which torchrun starts"),
        ("--bucket-mb 1", "bucket_mb=1.0 is for workers in processes of their own, which torchrun starts"),
        ("--bucket-mb 0", "bucket_mb must be a finite number above 0, got 0.0"),
        ("--staleness 2", "staleness=2 needs on_nonfinite='ignore', for the others ask all workers in every step, got"),
        ("--staleness 2 --on-nonfinite ignore", "staleness=2 is for workers in processes of their own, which torchrun"),
        ("--staleness -1", "staleness must be an integer of at least 0, got -1"),
        ("--staleness 1 --overlap", "staleness=1 needs overlap=False and message='float32', got overlap=True and"),
        ("--epochs 0", "epochs must be at least 1, got 0"),
        ("--epochs 1 --steps 1", "give epochs or steps, not both"),
        ("--steps 3 --warmup-epochs 2", "warmup_epochs must fit into the 3 steps"),
        ("--clip 0", "clip must be a finite number > 0, got 0"),
        ("--threads 0", "threads must be at least 1"),
        ("--seed -1", "seed must be in"),
        ("--dtype float8", "dtype must be one of float32, float64, bfloat16, float16, got 'float8'"),
        ("--device gpu", "device must be 'cpu', 'cuda' or 'cuda:i', got 'gpu'"),
        ("--engine lop", "did you mean 'loop'?"),
        ("--on-nonfinite rase", "did you mean 'raise'?"),
        ("--algorithm dsgd --momentum 0.9", "dsgd has no hyper-parameter 'momentum'"),
        ("--algorithm dsgdm --qg-momentum 0.9", "dsgdm has no hyper-parameter 'qg_momentum', did you mean 'momentum'?"),
        ("--hyper nope", "--hyper must be NAME=VALUE, got 'nope'"),
        ("--hyper =3", "--hyper must be NAME=VALUE, got '=3'"),
        ("--pretrained /nowhere", "pretrained is for distilbert; mlp starts from random weights"),
        ("--validation 0.0001", "validation must leave samples on both sides: fraction=0.0001 of 1438 samples are 0"),
        ("--hyper nope=3", "qg_dsgdm_n has no hyper-parameter 'nope'"),
        ("--hyper local_step=two", "local_step must be an integer of at least 1, got 'two'"),
        ("--hyper momentum=nan", "momentum must be in [0, 1), got nan"),
        ("--tensorboard", "tensorboard needs an out folder"),
        ("--trace 2", "start at least two by torchrun with --out, got --trace 2, 1 processes"),
        ("--checkpoint-seconds -1", "checkpoint_seconds must be a finite number of at least 0"),
        ("--data mnist --data-root /nowhere", "To get them:"),
        ("--resume /nowhere", "there is no run to resume in /nowhere"),
        ("--resume /nowhere --hyper momentum=0.1", "config.json"),
        ("--resume a --out b", "give --out for a new run or --resume for an old one, not both"),
        ("--out /proc/nowhere", "out folder /proc/nowhere can't be written to"),
        ("--out /dev/null", "out folder /dev/null can't be used"),
    ],
)
def test_train_refuses_wrong_input_in_one_line(words, message):
    assert message in fails("train", *words.split())


def test_train_refuses_a_missing_cuda_device():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "needs a CUDA device" in fails("train", "--device", "cuda")


def test_train_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    assert "is not empty, it holds thesis.tex" in fails("train", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_train_resumes_and_refuses_other_options(tmp_path):
    assert qgm("train", *SMALL, "--steps", 6, "--out", tmp_path)[0] == 0
    assert qgm("train", "--resume", tmp_path)[0] == 0
    assert (
        qgm("train", "--resume", tmp_path, *SMALL, "--steps", 6, "--momentum", 0.9, "--hyper", "local_step=1")[0] == 0
    )
    message = fails(
        "train", "--resume", tmp_path, "--steps", 7, "--momentum", 0.5, "--workers", 4, "--hyper", "local_step=2"
    )
    assert "steps is 6 in the run, 7 was given; momentum is 0.9 in the run, 0.5 was given; local_step is 1" in message
    assert "workers" not in message
    assert "has no hyper-parameter 'x'" in fails("train", "--resume", tmp_path, "--hyper", "x=1")


def test_train_names_a_damaged_file(tmp_path):
    assert qgm("train", *SMALL, "--steps", 1, "--out", tmp_path)[0] == 0
    for name in ("checkpoint.pt", "partition.npz", "config.json"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:100])
        assert str(path) in fails("train", "--resume", tmp_path)


def test_a_diverging_run_is_exit_code_1_and_one_line():
    code, output = qgm("train", *SMALL, "--steps", 20, "--lr", 1e30)
    assert code == 1
    last = output.strip().splitlines()[-1]
    assert last.startswith("qgm: the gradient of worker")
    assert last.endswith("a smaller --lr or --clip may help")


def test_a_full_disk_is_exit_code_1_and_says_how_to_go_on(monkeypatch, tmp_path):
    def full(self, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runfolder.RunFolder, "save_checkpoint", full)
        code, output = qgm("train", *SMALL, "--steps", 6, "--out", tmp_path)
    assert code == 1
    last = output.strip().splitlines()[-1]
    assert last.startswith("qgm: [Errno 28] No space left on device")
    assert last.endswith(f"continue with: qgm train --resume {tmp_path}")
    assert qgm("train", "--resume", tmp_path)[0] == 0


@pytest.mark.parametrize(("alone", "command"), [(True, "qgm"), (False, "torchrun ... -m qgm_ext")])
def test_a_run_that_an_error_ended_goes_on_as_it_was_started(alone, command, capsys):
    with pytest.raises(typer.Exit), cli_train._run_errors(Path("my run"), alone):
        raise PeerLostError("rank 1 of 2 is lost", 1)
    assert capsys.readouterr().err.strip().endswith(f"continue with: {command} train --resume 'my run'")


@pytest.mark.parametrize(
    ("module", "words"),
    [("sklearn", ()), ("matplotlib", ("--out", "x")), ("tensorboard", ("--out", "x", "--tensorboard"))],
)
def test_train_names_the_extra_of_a_missing_package(module, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'qgm_ext[train]'" in fails("train", *SMALL, *words)


# Real processes -------------------------------------------------------------------------------------------------------


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "qgm_ext", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_resume(tmp_path):
    process = start("train", *SMALL, "--steps", 100_000, "--eval-every", 1, "--out", tmp_path)
    seen = [process.stdout.readline()]
    while not seen[-1].startswith("step 6/"):
        seen.append(process.stdout.readline())
        assert seen[-1], process.stderr.read()  # it ended early
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    found = re.search(
        r"^qgm: stopped by SIGINT at step (\d+) of 100000, checkpoint written; continue with: (.*)$", errors
    )
    assert found, errors
    assert found[2] == f"qgm train --resume {tmp_path}"
    assert (tmp_path / "checkpoint.pt").exists()
    assert not (tmp_path / "summary.json").exists()
    # In a pipe: no control characters (colours, cursor movements) but the ends of lines.
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", "".join(seen) + output + errors)


def test_without_typer_the_command_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['typer'] = None; from qgm_ext.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "qgm needs the package typer: pip install 'qgm_ext[train]'\n"


def test_the_entry_point_is_installed():
    from importlib.metadata import entry_points

    (found,) = (entry for entry in entry_points(group="console_scripts") if entry.name == "qgm")
    assert found.value == "qgm_ext.cli:main"
    assert Path(qgm_ext.__file__).with_name("cli.py").exists()
