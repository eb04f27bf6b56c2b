"""The ways to start ``qgm train`` on several machines, with two of them that are both this one, on loopback."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import FileStore, TCPStore

from qgm_ext import cli_support
from qgm_ext.distributed import PeerLostError
from qgm_ext.experiments.config import TrainConfig
from qgm_ext.experiments.train import run

EXAMPLES = Path(__file__).parent.parent / "examples"
OPTIONS = ["--num-train", "300", "--steps", "4", "--batch", "4", "--alpha", "1", "--threads", "1"]
CONFIG: dict[str, Any] = {"workers": 4, "num_train": 300, "steps": 4, "batch": 4, "alpha": 1.0, "threads": 1}
LIMIT = 240.0  # seconds, after which it hangs

SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames 127.0.0.[1-2]" ] || exit 3
echo 127.0.0.1
sleep 0.2 # long lists come in several pieces
echo 127.0.0.2
"""

# As srun with one task on each of two nodes: the ends of all tasks, and the highest exit code.
SRUN = """#!/bin/bash
[ "$1 $2" = "--cpus-per-task 2" ] || exit 4
shift 2
tasks=()
for node in 0 1; do
  SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 SLURM_NTASKS=2 SLURMD_NODENAME=127.0.0.$((node + 1)) \
    SLURM_STEP_ID=0 "$@" &
  tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do
  wait "$task" || { ended=$?; [ $ended -le $code ] || code=$ended; }
done
exit $code
"""

TORCHRUN = f"""#!/bin/bash
exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"
"""


def write_commands(folder: Path, **texts: str) -> str:
    """Commands of these names and texts in a folder, and the PATH on which they are found first."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def free_port(low: int = 20000, high: int = 30000) -> int:
    for port in range(low + os.getpid() % 1000, high):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError(f"no port from {low} to {high} is free")


def for_machines(processes: int, options: list[str], port: int | None = None) -> list[str]:
    """The documented command for two machines, with so many processes on each."""
    text = (EXAMPLES / "distributed.md").read_text()
    block = re.search(r"```\n(GLOO_SOCKET_IFNAME=eth0 torchrun --nnodes 2 .*?)```", text, re.DOTALL)
    assert block is not None
    command = block[1].strip()
    for old, new in (
        ("=eth0", "=lo"),
        ("--nproc-per-node 4", f"--nproc-per-node {processes}"),
        ("10.0.0.1:29500", f"127.0.0.1:{free_port() if port is None else port}"),
        ("--out DIR", shlex.join(options)),
    ):
        assert command.count(old) == 1
        command = command.replace(old, new)
    return ["bash", "-c", f"exec env {command}"]


def start(commands: list[list[str]], environment: dict[str, str], folder: Path) -> list[tuple[int, str, str]]:
    """Run commands side by side: exit code, output and errors of each. A hang is a failure."""
    started = [
        subprocess.Popen(
            command, env=environment, cwd=folder, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for command in commands
    ]  # fmt: skip
    try:
        said = [one.communicate(timeout=LIMIT) for one in started]
        return [(one.returncode, *texts) for one, texts in zip(started, said, strict=True)]
    finally:
        for one in started:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGTERM)  # torchrun ends its workers, whose sessions are their own
            one.wait()


def figures(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if not key.startswith("seconds")} for record in metrics]


def check_as_one_process(out: Path) -> None:
    """Whether loss, accuracies and distance of the run are, to the last digit, those of one process."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    expected = run(TrainConfig(**CONFIG, topology="one_peer_exponential"))
    assert figures(found) == figures(expected.metrics)
    assert [record["step"] for record in found] == [0, 4]


@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT)
def test_the_slurm_script_trains_on_two_nodes_and_goes_on_when_it_is_requeued(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | {
        "PATH": write_commands(tmp_path / "bin", scontrol=SCONTROL, srun=SRUN, torchrun=TORCHRUN),
        "GLOO_SOCKET_IFNAME": "lo",
        "SLURM_JOB_ID": str(free_port() - 20000 + 4_560_000),
        "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    command = ["bash", str(EXAMPLES / "slurm.sbatch"), *OPTIONS, "--topology", "one_peer_exponential"]
    out = tmp_path / f"run-{environment['SLURM_JOB_ID']}"
    for said in ("step 4/4", "resumed at step 4 of 4"):
        ((code, output, errors),) = start([command], environment, tmp_path)
        assert code == 0, errors[-3000:]
        assert said in output
        assert output.count("Result on the test set") == 1
        check_as_one_process(out)


def test_the_slurm_script_asks_for_what_it_uses() -> None:
    text = (EXAMPLES / "slurm.sbatch").read_text()
    assert text.startswith("#!/bin/bash\n")
    head, body = text.split("set -euo pipefail")
    assert re.findall(r"^#SBATCH --(\S+?)=", head, re.MULTILINE) == [
        "job-name",
        "nodes",
        "ntasks-per-node",
        "cpus-per-task",
    ]
    assert "#SBATCH" not in body, "sbatch reads no options behind the first command"


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT)
def test_the_command_for_two_machines_trains_as_one_process(tmp_path: Path) -> None:
    command = for_machines(2, ["--out", str(tmp_path / "run"), *OPTIONS, "--topology", "one_peer_exponential"])
    environment = os.environ | {"PATH": write_commands(tmp_path / "bin", torchrun=TORCHRUN), "OMP_NUM_THREADS": "1"}
    said = start([command, command], environment, tmp_path)
    assert [code for code, _, _ in said] == [0, 0], "\n".join(errors[-3000:] for _, _, errors in said)
    assert sorted(output.count("Result on the test set") for _, output, _ in said) == [0, 1]
    check_as_one_process(tmp_path / "run")


def test_workers_that_do_not_come_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_support, "_FOR_ALL", timedelta(seconds=0.2))
    store = FileStore(str(tmp_path / "store"), 4)
    store.set("here/1", "")
    with pytest.raises(PeerLostError, match=r"^rank 0, 3 of 4 did not come within 0.2 s$"):
        cli_support._await_all(store, 2, 4)
    for rank in (0, 3):
        store.set(f"here/{rank}", "")
    cli_support._await_all(store, 2, 4)


def test_a_store_that_is_gone_is_told() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=2))
    client = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=2))
    del server
    with pytest.raises(PeerLostError, match=r"^the store at which the workers meet is gone"):
        cli_support._await_all(client, 1, 2)


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT)
def test_messages_are_encrypted_if_torch_can(tmp_path: Path) -> None:
    """Under GLOO_DEVICE_TRANSPORT=TCP_TLS workers train with a certificate of their own, or are told what lacks."""
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_DEVICE_TRANSPORT": "TCP_TLS",
        "GLOO_DEVICE_TRANSPORT_TCP_TLS_PKEY": key,
        "GLOO_DEVICE_TRANSPORT_TCP_TLS_CERT": certificate,
        "GLOO_DEVICE_TRANSPORT_TCP_TLS_CA_FILE": certificate,
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ((code, output, errors),) = start([[*launch, "-m", "qgm_ext", "train", *OPTIONS]], environment, tmp_path)
    if code == 0:
        assert "Result on the test set" in output
        return
    (said,) = [line for line in errors.splitlines() if line.startswith("qgm: ")]
    assert said.startswith("qgm: GLOO_DEVICE_TRANSPORT must be one with which this torch was built, got 'TCP_TLS'")
    pytest.skip("this torch was built without Gloo's TLS")


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT)
def test_machines_with_different_options_are_told(tmp_path: Path) -> None:
    port = free_port()
    commands = [for_machines(1, [*OPTIONS, "--lr", lr], port) for lr in ("0.1", "0.2")]
    environment = os.environ | {"PATH": write_commands(tmp_path / "bin", torchrun=TORCHRUN), "OMP_NUM_THREADS": "1"}
    for code, _, errors in start(commands, environment, tmp_path):
        assert code != 0
        said = [line for line in errors.splitlines() if line.startswith("qgm: ")]
        assert len(said) == 1, errors
        assert re.fullmatch(
            r"qgm: workers must be started alike, but --lr of rank 1 is 0.[12], and of rank 0 0.[12]", said[0]
        )
