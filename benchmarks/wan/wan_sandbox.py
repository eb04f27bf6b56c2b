"""A sandbox for the WAN test bed: network, processes and mounts of its own, which the kernel removes with the last.

The bed's namespaces, devices and queues live inside one ``unshare``; nothing of them is visible outside, no traffic
leaves, and nothing is left behind by ctrl-C, by a failure, or by kill -9 of any process of it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

__all__ = ["INSIDE", "run_inside", "why_not"]

INSIDE = "QGM_WAN_SANDBOX"  # set in the environment of processes in the sandbox
_TOOLS = ("unshare", "setpriv", "ip", "tc", "mount", "c++")
_GRACE = 10.0  # seconds after ctrl-C or SIGTERM before the sandbox is killed

# Everything that the bed will need, tried once; the first command that fails tells why.
_TRIAL = """
set -e
mount -t tmpfs tmpfs /run
ip netns add trial
ip netns exec trial ip link set lo up
ip link add trial-a type veth peer name trial-b
ip link add trial-bridge type bridge
tc qdisc add dev trial-a root tbf rate 100mbit burst 20kb limit 100kb
tc qdisc add dev trial-b root netem delay 1ms 2> /dev/null || ip tuntap add dev trial-c mode tap
"""


def _command(argv: Sequence[str]) -> list[str]:
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    # setpriv: unshare dies with this process; --kill-child: the first process inside dies with unshare; the kernel
    # kills all others with that one.
    return [
        *("setpriv", "--pdeathsig", "KILL", "unshare", *as_root, "--net", "--mount", "--pid"),
        *("--fork", "--kill-child", "--mount-proc", *argv),
    ]


def why_not() -> str | None:
    """Why the bed can't run on this machine, for a person; None if it can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: util-linux, iproute2, mount, g++)"
    try:
        trial = subprocess.run(_command(["sh", "-c", _TRIAL]), capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return "making a network namespace took more than 30 s"
    if trial.returncode:
        reason = (trial.stderr or trial.stdout).strip().splitlines()
        return f"network namespaces are not permitted here: {reason[-1] if reason else 'unshare failed'}"
    return None


def run_inside(argv: Sequence[str], timeout: float | None = None) -> int:
    """Run a command as the first process of a sandbox and return its exit code.

    Ctrl-C and SIGTERM go to the command; what still runs ten seconds later is killed.

    Args:
        argv: the command.
        timeout: seconds after which everything is killed; the exit code is 124 then.
    """
    process = subprocess.Popen(_command(argv), env={**os.environ, INSIDE: "1"}, start_new_session=True)
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        os.killpg(process.pid, signal.SIGINT)
        signal.alarm(int(_GRACE))

    def kill(number: int, frame: FrameType | None) -> None:
        process.kill()

    before = [(n, signal.signal(n, stop)) for n in (signal.SIGINT, signal.SIGTERM)]
    before.append((signal.SIGALRM, signal.signal(signal.SIGALRM, kill)))
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        print(f"wan: stopped after {timeout:g} s", file=sys.stderr)
        code = 124
    finally:
        process.kill()
        process.wait()
        signal.alarm(0)
        for number, handler in before:
            signal.signal(number, handler)
    return 128 + stopped[0] if stopped else code
