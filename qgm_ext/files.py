"""Files written so that a kill -9, a power cut or a full disk leaves the old one or the new one, and errors that name
the file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

__all__ = ["naming", "sync_folder", "told", "write_atomically"]


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file in one go: beside its place, flushed to the disk, renamed, and the rename flushed too.

    Args:
        path: where it shall be; what is there stays until the new file is complete.
        write: gets the open file and writes the content.

    Raises:
        OSError: if it can't be written; names it. What was at ``path`` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # a file system that is read-only refuses even what is not there
                temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError name this file: that of a write, on a full disk, names none, and others a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def told(error: BaseException) -> str:
    """An error for people: of the system's, the file and the words, without the number.

    Example:
        >>> told(FileNotFoundError(2, "No such file or directory", "a.toml")), told(ValueError("lr must be > 0"))
        ('a.toml: No such file or directory', 'lr must be > 0')
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def sync_folder(folder: Path) -> None:
    """Flush to the disk what a folder holds: the names, so that what was renamed there stays renamed."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
