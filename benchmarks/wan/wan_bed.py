"""The WAN test bed: n hosts as network namespaces around one switch, with bandwidth and delay on every host's link.

Runs inside :mod:`wan_sandbox`. A host's link is shaped both ways by ``tc tbf``. The delay is netem's where the kernel
has it; elsewhere each link is a pair of TAP devices joined by a delay line in user space (delay_line.cpp), which holds
every packet for its time, so that all methods and libraries are delayed alike. ``Bed.delay_by`` says which.

``delay`` is one way, from host to host: half of it on the sender's link and half on the receiver's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from wan_sandbox import INSIDE

__all__ = ["INTERFACE", "Bed", "Network", "address"]

INTERFACE = "eth0"
_MTU = 9000  # jumbo frames: six times fewer packets for the few cores that play all hosts
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
# What a host on a long fast link is tuned to: windows for 1 Gbit/s x 100 ms, no slow start after each pause between
# two steps, nothing remembered from an earlier case.
_SYSCTL = {
    "tcp_rmem": "4096 131072 67108864",
    "tcp_wmem": "4096 131072 67108864",
    "tcp_slow_start_after_idle": "0",
    "tcp_no_metrics_save": "1",
    "tcp_congestion_control": "reno",  # every kernel has it; the queues are long enough that nothing is lost
}


@dataclass(frozen=True)
class Network:
    """What is between the hosts.

    Args:
        hosts: 2 to 64.
        rate: of each host's link, each way, in bit/s; at least 1e5.
        delay: one way between two hosts, in seconds; 0 to 1.
        slow_host: a host whose link has a tenth of the rate, or None.
    """

    hosts: int
    rate: float
    delay: float
    slow_host: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.hosts <= 64:
            raise ValueError(f"hosts must be 2 to 64, got {self.hosts}")
        if not self.rate >= 1e5:
            raise ValueError(f"rate must be at least 1e5 bit/s, got {self.rate}")
        if not 0.0 <= self.delay <= 1.0:
            raise ValueError(f"delay must be 0 to 1 s, got {self.delay}")
        if self.slow_host is not None and not 0 <= self.slow_host < self.hosts:
            raise ValueError(f"slow_host must be a host (0 to {self.hosts - 1}) or None, got {self.slow_host}")

    def rate_of(self, host: int) -> float:
        """bit/s of a host's link."""
        return self.rate / 10 if host == self.slow_host else self.rate


def address(host: int) -> str:
    """The IP address of a host."""
    return f"10.77.0.{host + 1}"


class Bed:
    """The hosts and their links, from ``with`` to the end of it.

    Attributes:
        network: what was built.
        delay_by: "netem", "delay line (TAP)" or "nothing", where the delay is 0.
    """

    def __init__(self, network: Network) -> None:
        if INSIDE not in os.environ:
            raise RuntimeError("a bed is built inside a sandbox only: use wan_sandbox.run_inside")
        self.network = network
        self.delay_by = "nothing"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Bed:
        with self._stack:
            if not os.path.ismount("/run"):
                _run("mount", "-t", "tmpfs", "tmpfs", "/run")  # /run/netns holds the names of namespaces
            _run("ip", "link", "add", "switch", "type", "bridge")
            self._stack.callback(_run, "ip", "link", "del", "switch")
            _run("ip", "link", "set", "switch", "mtu", str(_MTU), "up")
            has_netem = self.network.delay > 0 and _has_netem()
            cables: list[int] = []
            for host in range(self.network.hosts):
                _run("ip", "netns", "add", f"h{host}")
                self._stack.callback(_run, "ip", "netns", "del", f"h{host}")
                if self.network.delay == 0 or has_netem:
                    _run("ip", "link", "add", f"p{host}", "mtu", str(_MTU), "type", "veth", "peer", "name", f"e{host}")
                else:
                    cables += [self._tap(f"p{host}"), self._tap(f"e{host}")]
                self._connect(host, has_netem)
            if cables:
                self._start_delay_line(cables)
                self.delay_by = "delay line (TAP)"
            elif has_netem:
                self.delay_by = "netem"
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self, command: Callable[[int], Sequence[str]], timeout: float) -> list[str]:
        """Run a command on every host at once and return what each wrote to stdout.

        Args:
            command: of a host.
            timeout: seconds; after that, or when a host fails, all are killed.

        Raises:
            RuntimeError: names the first host that failed, with the end of its stderr, or those that still ran.
        """
        with tempfile.TemporaryDirectory() as folder:
            # Files, not pipes: nobody reads while we wait for all of them.
            outputs = [(open(f"{folder}/{i}.out", "w+"), open(f"{folder}/{i}.err", "w+")) for i in self._hosts]  # noqa: SIM115
            running = {}
            # Said again for hosts, whose Python may leave out a script's folder (PYTHONSAFEPATH).
            path = os.pathsep.join([str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
            path = path.rstrip(os.pathsep)
            try:
                for host in self._hosts:
                    env = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, "MASTER_ADDR": address(0), "PYTHONPATH": path}
                    argv = ["ip", "netns", "exec", f"h{host}", *command(host)]
                    running[host] = subprocess.Popen(argv, env=env, stdout=outputs[host][0], stderr=outputs[host][1])
                deadline = time.monotonic() + timeout
                while running:
                    for host, process in list(running.items()):
                        if process.poll() is None:
                            continue
                        del running[host]
                        if process.returncode:
                            outputs[host][1].seek(0)
                            said = outputs[host][1].read()[-2000:]
                            raise RuntimeError(f"host {host} failed with exit code {process.returncode}:\n{said}")
                    if running and time.monotonic() > deadline:
                        raise RuntimeError(f"hosts {sorted(running)} still ran after {timeout:g} s")
                    time.sleep(0.01)
                texts = []
                for out, _ in outputs:
                    out.seek(0)
                    texts.append(out.read())
                return texts
            finally:
                for process in running.values():
                    process.kill()
                for process in running.values():
                    process.wait()
                for pair in outputs:
                    for file in pair:
                        file.close()

    @property
    def _hosts(self) -> range:
        return range(self.network.hosts)

    def _tap(self, name: str) -> int:
        """Make a TAP device and return the descriptor that holds its packets."""
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._stack.callback(os.close, fd)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
        _run("ip", "link", "set", name, "mtu", str(_MTU))
        return fd

    def _connect(self, host: int, has_netem: bool) -> None:
        """Put one end of the cable into the host, the other into the switch, and shape both."""
        inside = ("ip", "netns", "exec", f"h{host}")
        _run("ip", "link", "set", f"e{host}", "netns", f"h{host}")
        _run(*inside, "ip", "link", "set", f"e{host}", "name", INTERFACE)
        _run("ip", "link", "set", f"p{host}", "master", "switch")
        for name, value in _SYSCTL.items():
            _run(*inside, "sh", "-c", f"echo {value} > /proc/sys/net/ipv4/{name}")
        _run(*inside, "sh", "-c", f"echo 1 > /proc/sys/net/ipv6/conf/{INTERFACE}/disable_ipv6 || true")
        _run(*inside, "ip", "address", "add", f"{address(host)}/24", "dev", INTERFACE)
        _run(*inside, "ip", "link", "set", "lo", "up")
        rate = self.network.rate_of(host)
        burst = int(max(2 * _MTU, rate / 8 * 0.001))
        limit = int(max(4e6, rate / 8 * 0.2))
        tbf = ("tbf", "rate", f"{int(rate)}bit", "burst", str(burst), "limit", str(limit))
        for where, device in ((inside, INTERFACE), ((), f"p{host}")):
            place: tuple[str, ...] = ("root",)
            if has_netem:
                half = f"{self.network.delay / 2 * 1e6:.0f}us"
                netem = ("netem", "delay", half, "limit", "100000")
                _run(*where, "tc", "qdisc", "add", "dev", device, "root", "handle", "1:", *netem)
                place = ("parent", "1:1")
            _run(*where, "tc", "qdisc", "add", "dev", device, *place, *tbf)
            _run(*where, "ip", "link", "set", device, "up")

    def _start_delay_line(self, cables: Sequence[int]) -> None:
        # Half on the sender's link and half on the receiver's.
        argv = [str(_delay_line()), f"{self.network.delay / 2 * 1e6:.0f}", *map(str, cables)]
        process = subprocess.Popen(argv, pass_fds=cables)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        with contextlib.suppress(PermissionError):  # ahead of the hosts' own work, where that is allowed
            os.sched_setscheduler(process.pid, os.SCHED_FIFO, os.sched_param(1))
        time.sleep(0.05)
        if process.poll() is not None:
            raise RuntimeError(f"the delay line ended with exit code {process.returncode}")


def _delay_line() -> Path:
    """The compiled delay line; compiled on first use in a sandbox."""
    binary = Path("/run/qgm_delay_line")
    if not binary.exists():
        _run("c++", "-O2", "-std=c++17", "-o", str(binary), str(Path(__file__).with_name("delay_line.cpp")))
    return binary


def _has_netem() -> bool:
    """Whether the kernel has netem; tried on the sandbox's own loopback."""
    argv = ["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    if subprocess.run(argv, capture_output=True, check=False).returncode:
        return False
    _run("tc", "qdisc", "del", "dev", "lo", "root")
    return True


def _run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout
