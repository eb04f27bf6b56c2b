"""What the links of a bed achieve: bandwidth and delay between two hosts, by plain TCP sockets.

``probe(bed, sender, receiver)`` is for the program in the sandbox; this file as a program is what a host runs.
"""

from __future__ import annotations

import json
import socket
import sys
import time

from wan_bed import Bed, address

__all__ = ["probe"]

_PORT = 29400
_ROUNDS = 10
_PIECE = 1 << 16


def probe(bed: Bed, sender: int, receiver: int, seconds: float = 1.0) -> tuple[float, float]:
    """Measure one way between two hosts.

    Args:
        seconds: how long to send, at the nominal rate.

    Returns:
        bit/s of payload, after TCP has found its pace; and half the shortest round trip of a byte, in seconds.
    """
    rate = min(bed.network.rate_of(sender), bed.network.rate_of(receiver))
    size = int(rate / 8 * seconds)

    def command(host: int) -> list[str]:
        if host == sender:
            return [sys.executable, __file__, "send", address(receiver), str(size)]
        return [sys.executable, __file__, "receive", str(size)] if host == receiver else ["true"]

    outputs = bed.run(command, timeout=30 + 10 * seconds)
    found = json.loads(outputs[receiver]) | json.loads(outputs[sender])
    return found["rate"], found["round_trip"] / 2


def _receive(size: int) -> None:
    with socket.create_server(("", _PORT)) as server:
        server.settimeout(20)
        connection, _ = server.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(20)
        for _ in range(_ROUNDS):
            connection.sendall(connection.recv(1))
        # The first third lets TCP find its pace (slow start); the rest is timed.
        received, begin, counted = 0, 0.0, 0
        while received < size:
            piece = connection.recv(_PIECE)
            if not piece:
                raise ConnectionError(f"sender stopped after {received} of {size} bytes")
            received += len(piece)
            if begin == 0.0 and received >= size // 3:
                begin, counted = time.perf_counter(), received
        end = time.perf_counter()
        connection.sendall(b"!")
    print(json.dumps({"rate": (received - counted) * 8 / (end - begin)}))


def _send(host: str, size: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            connection = socket.create_connection((host, _PORT), timeout=20)
            break
        except ConnectionRefusedError:  # the receiver has not started yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        round_trips = []
        for _ in range(_ROUNDS):
            begin = time.perf_counter()
            connection.sendall(b"?")
            connection.recv(1)
            round_trips.append(time.perf_counter() - begin)
        piece = bytes(_PIECE)
        for sent in range(0, size, _PIECE):
            connection.sendall(piece[: size - sent])
        connection.recv(1)
    print(json.dumps({"round_trip": min(round_trips)}))


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        _receive(int(sys.argv[2]))
    else:
        _send(sys.argv[2], int(sys.argv[3]))
