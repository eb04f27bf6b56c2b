"""Processes that tests run functions in, as the workers of a process group.

Importing torch takes seconds: a :class:`ProcessPool` is started once and serves a whole test module; the processes of
:class:`Processes`, which a test may kill, are forked from a server that has done the imports. What does not end in time
is a hang: the processes are killed and the test fails.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GROUP_TIMEOUT = 30.0  # seconds after which a collective gives up


@contextlib.contextmanager
def process_group(rank: int, size: int, store: str, of_rank_0: bool = False) -> Iterator[None]:
    """The default process group over loopback; a file for a store, so that no two tests compete for a port.

    Args:
        of_rank_0: the store is kept by rank 0, on a port that it writes into the file.
    """
    timeout = datetime.timedelta(seconds=GROUP_TIMEOUT)
    made: dist.Store = dist.FileStore(store, size)
    if of_rank_0:
        port = 0
        if rank > 0:
            port = int(made.get("port").decode())
        served = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False, timeout=timeout)
        if rank == 0:
            made.set("port", str(served.port))
        made = served
    dist.init_process_group("gloo", store=made, rank=rank, world_size=size, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, rank, size, store, arguments = connection.recv()
        except EOFError:
            return
        try:
            with process_group(rank, size, store):
                answer = (True, function(rank, *arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)


class ProcessPool:
    """``size`` processes; a context manager."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._members: list[tuple[Any, Connection]] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for _ in range(self.size - len(self._members)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def run(self, function: Callable[..., Any], size: int, *arguments: Any, limit: float = 240.0) -> list[Any]:
        """Run ``function(rank, *arguments)`` in ``size`` processes that are a process group; the results by rank.

        Raises:
            AssertionError: if one raises, dies or has not finished after ``limit`` seconds.
        """
        self._start()
        members = self._members[:size]
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            for rank, (_, connection) in enumerate(members):
                connection.send((function, rank, size, store, arguments))
            results: dict[int, tuple[bool, Any]] = {}
            end = time.monotonic() + limit
            while len(results) < size:
                waiting = {connection: rank for rank, (_, connection) in enumerate(members) if rank not in results}
                ready = wait(list(waiting), max(0.0, end - time.monotonic()))
                if not ready:
                    self.close()
                    raise AssertionError(
                        f"ranks {sorted(waiting.values())} have not finished after {limit:g} s: a hang"
                    )
                for connection in ready:
                    rank = waiting[connection]
                    try:
                        results[rank] = connection.recv()
                    except EOFError:
                        self.close()
                        raise AssertionError(f"rank {rank} died") from None
        failed = [f"rank {rank}:\n{text}" for rank, (good, text) in sorted(results.items()) if not good]
        assert not failed, "\n".join(failed)
        return [results[rank][1] for rank in range(size)]

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._members:
            connection.close()
            process.kill()
            process.join()
        self._members = []

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _run_logged(function: Callable[..., None], rank: int, log: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    sys.stderr = open(log, "w")  # noqa: SIM115 - until the process ends
    function(rank, *arguments)


class Processes:
    """``size`` processes that run ``function(rank, *arguments)`` once, and that a test may kill.

    Args:
        log: how the names of the files begin that hold what each has to say on stderr.
        preload: modules that the server imports, of which all of these processes are forked.
    """

    def __init__(
        self, function: Callable[..., None], size: int, *arguments: Any, log: str, preload: Sequence[str]
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))
        self._logs = [Path(f"{log}-{rank}.log") for rank in range(size)]
        self.members: list[BaseProcess] = []
        for rank, file in enumerate(self._logs):
            process = context.Process(target=_run_logged, args=(function, rank, str(file), arguments))
            process.start()
            self.members.append(process)

    @property
    def logs(self) -> str:
        """What all of them have said."""
        said = [(rank, file.read_text()) for rank, file in enumerate(self._logs) if file.exists()]
        return "\n".join(f"rank {rank}: {text}" for rank, text in said)

    def end(self, limit: float = 240.0) -> list[int | None]:
        """Wait for all of them; their exit codes by rank.

        Raises:
            AssertionError: if one has not ended after ``limit`` seconds. None of them lives on.
        """
        end = time.monotonic() + limit
        for process in self.members:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.members) if process.is_alive()]
        for process in self.members:
            process.kill()
            process.join()
        assert not hanging, f"ranks {hanging} have not ended after {limit:g} s: a hang\n{self.logs}"
        return [process.exitcode for process in self.members]
