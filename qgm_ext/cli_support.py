"""What the commands share: the console, options, errors as one line, and signals that stop between two steps."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console
from typer.rich_utils import rich_format_error

from qgm_ext.files import told

__all__ = [
    "EXIT_FAILED",
    "EXIT_USAGE",
    "Stop",
    "fail",
    "make_console",
    "option",
    "parser_errors",
    "process_group",
    "stop_on_signal",
    "user_errors",
]

EXIT_FAILED, EXIT_USAGE = 1, 2
_PIPE_WIDTH = 110
_FOR_ANOTHER = timedelta(seconds=10)
_FOR_ALL = timedelta(seconds=300)
_UsageError: Any = typer.BadParameter.__bases__[0]  # click's, or that of typer's own copy of click
_stores: list[Any] = []  # where this worker has met the others, if there are any


def make_console() -> Console:
    """The terminal as wide as it is; in a pipe, wide enough for our tables."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH)


def option(panel: str | None, text: str, default: str | None = None, *names: str, **more: Any) -> Any:
    """An option whose default is filled in later, by TrainConfig, and so can only be told in words."""
    shown = f"{text} [dim]\\[default: {default}][/dim]" if default else text
    return typer.Option(*names, help=shown, rich_help_panel=panel, show_default=False, **more)


class Stop:
    """Whether the user or the system has asked to stop, and how."""

    def __init__(self) -> None:
        self.signals: list[int] = []

    def __call__(self) -> bool:
        return bool(self.signals)


@contextlib.contextmanager
def stop_on_signal(once: bool = True) -> Iterator[Stop]:
    """Let ctrl-C and SIGTERM end the run between two steps; a second ctrl-C ends it at once.

    A KeyboardInterrupt could come in the middle of a step and leave parameters that no uninterrupted run has.

    Args:
        once: False: a second one changes nothing, for torchrun sends on what its workers have got already.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # where Python allows no signal handlers
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signals and once:
            raise KeyboardInterrupt
        stop.signals.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def process_group() -> Iterator[int]:
    """Join the other processes if torchrun started several; gives their number, 1 without torchrun.

    Where all of them are on this machine they listen on the loopback interface, unless GLOO_SOCKET_IFNAME names one.

    Raises:
        PeerLostError: if one does not come.
    """
    if not _has_others():
        yield 1
        return
    import torch.distributed as dist

    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store, rank, size = _meet()
    _await_all(store, rank, size)
    _join(store, rank, size)
    try:
        yield size
    finally:
        dist.destroy_process_group()


def _has_others() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def _meet(**more: Any) -> tuple[Any, int, int]:
    """The store where this worker meets the others, its rank and their number."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    # Workers that torchrun has started again meet in the store of those before them, whose addresses are still in it.
    store, rank, size = next(rendezvous("env://", **more))
    store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    _stores.append(store)
    return store, rank, size


def _await_all(store: Any, rank: int, size: int) -> None:
    """Wait until all workers are there, and name those that don't come; torch would wait longer, and name none."""
    from qgm_ext.distributed import PeerLostError

    keys = [f"here/{other}" for other in range(size)]
    try:
        store.set(keys[rank], "")
        with contextlib.suppress(RuntimeError):
            store.wait(keys, _FOR_ALL)
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
    except RuntimeError as error:
        raise PeerLostError(f"the store at which the workers meet is gone, with its host ({error})", 0) from error
    if missing:
        who = f"rank {', '.join(map(str, missing))} of {size}"
        raise PeerLostError(f"{who} did not come within {_FOR_ALL.total_seconds():g} s", missing[0])


def _join(store: Any, rank: int, size: int) -> None:
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    except RuntimeError as error:
        transport = os.environ.get("GLOO_DEVICE_TRANSPORT")
        if transport is not None and "unsupported gloo device" in str(error):
            raise ValueError(
                f"GLOO_DEVICE_TRANSPORT must be one with which this torch was built, got {transport!r}: {error}"
            ) from error
        interface = os.environ.get("GLOO_SOCKET_IFNAME")
        if interface is None:
            raise
        known = ", ".join(name for _, name in socket.if_nameindex())
        raise ValueError(
            f"GLOO_SOCKET_IFNAME must name an interface with an address, of {known}, got {interface!r}: {error}"
        ) from error


@contextlib.contextmanager
def parser_errors() -> Iterator[None]:
    """Leave to the parser to tell what it finds wrong; of several workers on a machine, let one tell it."""
    try:
        yield
    except _UsageError as error:
        if not _has_others():
            raise
        with _first_to_say(error.format_message()) as first:
            if first:
                rich_format_error(error)
        raise typer.Exit(error.exit_code) from error


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn what the library raises on wrong input into one line on stderr."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(told(error), EXIT_USAGE)
    except MemoryError as error:
        fail("not enough memory" + (f": {error}" if str(error) else ""), EXIT_FAILED)
    except KeyboardInterrupt:
        fail("stopped", 128 + signal.SIGINT)


def fail(message: str, code: int, about: str = "") -> NoReturn:
    """Say in one line what is wrong, and end.

    Of several workers on a machine that want to say the same, or something about the same, one does.
    """
    line = f"qgm: {' '.join(message.split())}"
    with _first_to_say(about or line) as first:
        if first:
            typer.echo(line, err=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def _first_to_say(line: str) -> Iterator[bool]:
    """Whether no other worker on this machine is about to say it; if one is, until it has: torchrun ends all workers as
    soon as one has ended.
    """
    key = f"said/{os.environ.get('GROUP_RANK', '0')}/{hashlib.sha256(line.encode()).hexdigest()}"
    first = True
    # A store that is gone, with rank 0 or torchrun, or a worker killed in between: better twice than never.
    with contextlib.suppress(RuntimeError):
        # Before they have met: only torchrun's own store is sure to be there, for rank 0 may never come.
        if not _stores and _has_others() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            _meet(timeout=_FOR_ANOTHER)
        for store in _stores:
            if store.add(key, 1) > 1:
                store.wait([f"{key}/done"], _FOR_ANOTHER)
                first = False
    yield first
    with contextlib.suppress(RuntimeError):
        for store in _stores if first else ():
            store.set(f"{key}/done", "")
