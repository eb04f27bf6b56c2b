"""What the commands share: the console, options, errors as one line, and signals that stop between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console

__all__ = [
    "EXIT_FAILED",
    "EXIT_USAGE",
    "Stop",
    "fail",
    "make_console",
    "option",
    "process_group",
    "stop_on_signal",
    "told",
    "user_errors",
]

EXIT_FAILED, EXIT_USAGE = 1, 2
_PIPE_WIDTH = 110


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
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield 1
        return
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Workers that torchrun has started again meet in the store of those before them, whose addresses are still in it.
    store, rank, size = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group("gloo", store=PrefixStore(f"attempt-{attempt}", store), rank=rank, world_size=size)
    try:
        yield size
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn what the library raises on wrong input into one line on stderr."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(told(error), EXIT_USAGE)
    except KeyboardInterrupt:
        fail("stopped", 128 + signal.SIGINT)


def told(error: Exception) -> str:
    """An error for people: of the system's, the file and the words, without the number.

    Example:
        >>> told(FileNotFoundError(2, "No such file or directory", "a.toml")), told(ValueError("lr must be > 0"))
        ('a.toml: No such file or directory', 'lr must be > 0')
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def fail(message: str, code: int) -> NoReturn:
    typer.echo(f"qgm: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)
